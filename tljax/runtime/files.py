"""Cache folder, output folders, atomic writes, digests and JSON."""

import codecs
import errno
import glob
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from tljax.runtime.errors import RequestError, WriteError, first_line
from tljax.runtime.packages import BUCKETS, install_command


def cache_dir() -> Path:
    """Return the folder of cached downloads, features and compiled programs.

    Returns:
        ``$TLJAX_CACHE`` if it is set, otherwise ``tljax`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        WriteError: neither variable is set and the user has no home folder.
    """
    if folder := os.environ.get("TLJAX_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tljax"
    except RuntimeError as error:  # for example a container whose user has no passwd entry
        raise WriteError("there is no home folder: set TLJAX_CACHE to a cache folder") from error


def open_path(path: str | os.PathLike[str]) -> Path:
    """Return a path as given on the command line, which may be in a bucket.

    Args:
        path: ``gs://bucket/name``, which pathlib shortens to ``gs:/bucket/name``, or local.

    Returns:
        The path; of a bucket an `epath.Path`, which has the methods of a `Path`.

    Raises:
        RequestError: buckets of this kind are not supported, or their package is not installed.
    """
    scheme, sign, rest = os.fspath(path).partition(":/")
    if os.fspath(path).rstrip("/") in ("gs:", "s3:"):
        kind = scheme.rstrip(":")
        raise RequestError(f"{kind}:// names no bucket: write {kind}://BUCKET/RUN")
    if not sign or not scheme.isalnum():
        return Path(path)
    if scheme not in BUCKETS:
        raise RequestError(
            f"{scheme}://: choose a local folder, or one in a bucket: gs:// or s3://"
        )
    from etils import epath  # noqa: PLC0415 - for buckets only
    from fsspec.config import conf  # noqa: PLC0415

    # Other processes and Orbax write to the bucket, too, so that a list is old at once.
    for protocol in ("gs", "gcs", "s3"):
        conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs errors that it raises
    opened = epath.Path(f"{scheme}://{rest.lstrip('/')}")
    try:
        opened.exists()
    except ImportError as error:
        package = BUCKETS[scheme]
        raise RequestError(f"{opened} needs {package}: {install_command(package)}") from error
    except Exception as error:  # each package has errors of its own
        raise RequestError(f"{opened} cannot be opened: {first_line(error)}") from error
    return cast("Path", opened)


def in_bucket(path: Path) -> bool:
    """Return whether a path from `open_path`, or below one, is in a bucket."""
    return "://" in os.fspath(path)


def object_version(info: Mapping[str, Any]) -> str:
    """Return text that changes with the content of an object in a bucket.

    Args:
        info: what fsspec says about the object.
    """
    keys = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "updated", "created")
    return next((str(info[key]) for key in keys if info.get(key)), "")


MARKER = ".tljax"
"""Name of a file that marks folders of results, which are never read as data."""


def mark_output(folder: Path) -> None:
    """Mark a folder as output of tljax; create it if it is missing.

    Raises:
        RequestError: the folder cannot be written.
    """
    if not (folder / MARKER).exists():
        with suppress(FileExistsError), atomic_write(folder / MARKER, exclusive=True) as temporary:
            temporary.write_text("written by tljax: not read as data\n", "utf-8")


@contextmanager
def locked(path: Path, message: str, *, wait: bool = False) -> Iterator[None]:
    """Lock a file against other processes that lock it, until the end of the block.

    The operating system releases the lock when the process ends, however it ends. On a file system
    without locks, and in a bucket, there is none.

    Args:
        path: the file; it is created if it is missing.
        message: the error if another process has locked it.
        wait: wait for the other process instead.

    Raises:
        RequestError: another process has locked the file.
    """
    if in_bucket(path):
        yield
        return
    with path.open("a") as file:
        try:
            import fcntl  # noqa: PLC0415 - not on Windows

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise RequestError(message) from error
        except (ImportError, OSError):
            pass
        yield


def read_config(workdir: Path) -> dict[str, Any]:
    """Read and check the ``config.json`` of a run directory.

    Raises:
        RequestError: the folder is not a run directory, or the file is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise RequestError(f"{workdir} is not a run directory: it has no config.json")
    try:
        config = dict(json.loads(path.read_text("utf-8")))
        invalid = [k for k in config.keys() & _TYPES if not isinstance(config[k], _TYPES[k])]
        invalid = invalid or sorted(_DIGESTS.difference(config.get("fingerprint", _DIGESTS)))
    except (OSError, TypeError, ValueError) as error:
        raise RequestError(f"{path} is damaged ({error}): restore it or start anew") from error
    if invalid:
        raise RequestError(f"{path} is damaged (its {invalid[0]}): restore it or start anew")
    return config


CONFIG_VERSION = 6
"""Version of a run's config.json. Version 1 has no number and calls ``ema_decay`` ``average``."""

_TYPES = {"data": str, "weights": str, "val_fraction": int | float, "fingerprint": dict}
_DIGESTS = {"images", "weights", "split.csv"}  # keys of "fingerprint", which old files may lack


def to_json(value: Any, **options: Any) -> str:
    """Serialize a value to JSON, with null for NaN and infinities, which JSON does not have.

    Args:
        value: nested mappings, lists and tuples of plain values.
        **options: passed to `json.dumps`.
    """

    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(value), allow_nan=False, **options)


def sha256(content: Path | bytes) -> str:
    """Compute the SHA-256 of a file (given by its path) or of bytes, as 64 hexadecimal digits.

    A file is read in chunks, so its size does not matter.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path that replaces ``path`` after the block.

    Readers see the old file or the new one, never a partial one. After an error in the block the
    old file remains. Missing folders are created, and temporary files that killed processes left
    for this path are removed after a day.

    Args:
        path: file to write; the target of a symbolic link is written, not the link. A device or
            pipe, such as /dev/stdout, is written after the block, not replaced. A file in a bucket
            is uploaded after the block, which replaces it at once.
        exclusive: never replace an existing file; of several concurrent writers the first wins,
            but in a bucket the last.

    Raises:
        FileExistsError: ``exclusive`` is set and the file exists.
        WriteError: the file cannot be written, for example because the disk is full.
    """
    if in_bucket(path):
        with _uploaded(path, exclusive=exclusive) as temporary:
            yield temporary
        return
    if os.path.exists(path) and not (path.is_file() or path.is_dir()):  # noqa: PTH110
        with TemporaryDirectory() as folder:
            temporary = Path(folder, path.name)
            temporary.touch()
            yield temporary
            with path.open("wb") as device:
                device.write(temporary.read_bytes())
        return
    if os.path.islink(path):  # noqa: PTH114 - Path.is_symlink raises if a name is too long
        path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.part")
    try:
        _create(temporary)
        remove_stale_files(path.parent.glob(f".{glob.escape(path.name)}.*.part"))
        yield temporary
        if exclusive:
            _rename_exclusively(temporary, path)
        else:
            temporary.replace(path)
    except OSError as error:
        if exclusive and error.errno == errno.EEXIST and temporary.exists():
            raise
        if error.errno not in _DISK_ERRORS:
            raise  # for example an error of the network that the block reads from
        raise WriteError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def _uploaded(path: Path, *, exclusive: bool) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        temporary = Path(folder, path.name)
        temporary.touch()
        yield temporary
        if exclusive and path.exists():
            raise FileExistsError(errno.EEXIST, "exists", str(path))
        try:
            path.write_bytes(temporary.read_bytes())
        except Exception as error:  # each package has errors of its own
            raise WriteError(f"{path}: cannot be written ({first_line(error)})") from error


def remove_stale_files(paths: Iterable[Path]) -> None:
    """Remove the files that were last modified more than a day ago; ignore errors."""
    for path in paths:
        with suppress(OSError):  # another process may have removed it
            if time.time() - path.stat().st_mtime > 24 * 3600:
                path.unlink()


def _create(path: Path) -> None:
    for _ in range(10):  # another process may remove the folder as long as it is empty
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.touch(exist_ok=False)
            return
    path.touch()


def _rename_exclusively(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        path.touch(exist_ok=False)  # without hard links the file is empty for a moment
        source.replace(path)


_DISK_ERRORS = (
    *(errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS),
)


def is_html(data: bytes) -> bool:
    """Return whether a file that begins with these bytes is a web page, for example a login page.

    Args:
        data: the file, or its first kilobyte.
    """
    head = data[:1024].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return head.startswith((b"<!doctype html", b"<html"))
