"""Where files go, and how they get there whole."""

import errno
import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tljax.errors import RequestError


def cache_dir() -> Path:
    """The user's cache folder for weights and features: ``$TLJAX_CACHE`` or ``~/.cache/tljax``."""
    if chosen := os.environ.get("TLJAX_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tljax"


def keep_compiled() -> None:
    """Lets JAX keep what it compiles in the cache folder, for this machine's processor and JAX.

    The second run of a script then starts in seconds. To be called before JAX is imported; a
    ``JAX_COMPILATION_CACHE_DIR`` that is set already wins, and an empty one turns it off.
    """
    features, cpu = "", Path("/proc/cpuinfo")
    if cpu.exists():  # it is long where there are many processors, and says the same of each
        with cpu.open(encoding="utf-8", errors="replace") as lines:
            features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    # Code compiled for another processor may hold instructions that this one lacks.
    machine = hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:16]
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "compiled" / machine))


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without error.

    So a reader sees the old file or the new one, never half of one. Missing folders are made.

    Raises:
        RequestError: the file cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise  # of the network, say, that the block reads from
        raise RequestError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


_OF_THE_DISK = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)
