"""Where files go, and how they get there whole."""

import errno
import glob
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from tljax.runtime.errors import RequestError, WriteError


def cache_dir() -> Path:
    """Find the user's cache of weights and features: ``$TLJAX_CACHE`` or ``~/.cache/tljax``.

    Raises:
        WriteError: the user has no home folder.
    """
    if chosen := os.environ.get("TLJAX_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tljax"
    except RuntimeError as error:  # a container, say, that runs as a user without a name
        raise WriteError("there is no home folder: set TLJAX_CACHE to one for files") from error


MARKER = ".tljax"
"""A file in every folder that tljax writes results into; such a folder is never read as data."""


def mark_output(folder: Path) -> None:
    """Mark a folder as written by tljax; made if it is missing.

    Raises:
        RequestError: it cannot be written.
    """
    if not (folder / MARKER).exists():
        with suppress(FileExistsError), written_whole(folder / MARKER, exclusive=True) as temporary:
            temporary.write_text("written by tljax: not read as data\n", "utf-8")


def read_config(workdir: Path) -> dict[str, Any]:
    """Reads what a run was asked to do.

    Raises:
        RequestError: there is no run, or the file is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise RequestError(f"{workdir} is not a run directory: it has no config.json")
    try:
        config = dict(json.loads(path.read_text("utf-8")))
        wrong = [k for k in config.keys() & _KINDS if not isinstance(config[k], _KINDS[k])]
        wrong = wrong or sorted(_KEPT.difference(config.get("fingerprint", _KEPT)))
    except (OSError, TypeError, ValueError) as error:
        raise RequestError(f"{path} is damaged ({error}): restore it or start anew") from error
    if wrong:
        raise RequestError(f"{path} is damaged (its {wrong[0]}): restore it or start anew")
    return config


CONFIG_VERSION = 2
"""Of a run's config.json. Version 1 bore no number, and said ``average`` for ``ema_decay``."""

_KINDS = {"data": str, "weights": str, "val_fraction": int | float, "fingerprint": dict}
_KEPT = {"images", "weights", "split.csv"}  # in the fingerprint; earlier versions kept none


def to_json(value: Any, **options: Any) -> str:
    """JSON by `json.dumps`, with null for nan and the infinities, which JSON does not have."""

    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(value), allow_nan=False, **options)


@contextmanager
def written_whole(path: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its place when the block ends without error.

    So a reader sees the old file or the new one, never half of one. Missing folders are made, and
    what processes that were killed had begun of this file is removed.

    Args:
        path: the file.
        exclusive: never replace a file: of several writers at once the first one wins.

    Raises:
        FileExistsError: with ``exclusive``: there is such a file by now.
        WriteError: the file cannot be written, or the disk is full.
    """
    if os.path.islink(path):  # noqa: PTH114 - Path.is_symlink raises where a name is too long
        path = path.resolve()  # what it leads to is written, not the link
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        _create(temporary)
        remove_abandoned(path.parent.glob(f".{glob.escape(path.name)}.*.part"))
        yield temporary
        if exclusive:
            _rename_exclusively(temporary, path)
        else:
            temporary.replace(path)
    except OSError as error:
        if exclusive and error.errno == errno.EEXIST and temporary.exists():
            raise
        if error.errno not in _OF_THE_DISK:
            raise  # of the network, say, that the block reads from
        raise WriteError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def remove_abandoned(paths: Iterable[Path]) -> None:
    """Remove files that nothing was written to for a day: whoever had begun them is gone."""
    for path in paths:
        with suppress(OSError):  # another process was quicker
            if time.time() - path.stat().st_mtime > 24 * 3600:
                path.unlink()


def _create(path: Path) -> None:
    for _ in range(10):  # another process may remove the folder while it is empty
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
        path.touch(exist_ok=False)  # the disk has no hard links; for a moment, the file is empty
        source.replace(path)


_OF_THE_DISK = (
    *(errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS),
)
