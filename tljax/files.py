"""Where files go, and how they get there whole."""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from tljax.errors import RequestError


def cache_dir() -> Path:
    """The user's cache folder for weights and features: ``$TLJAX_CACHE`` or ``~/.cache/tljax``."""
    if chosen := os.environ.get("TLJAX_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tljax"


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
        return dict(json.loads(path.read_text("utf-8")))
    except (TypeError, ValueError) as error:
        raise RequestError(f"{path} is damaged ({error}): restore it or start anew") from error


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

    So a reader sees the old file or the new one, never half of one. Missing folders are made.

    Args:
        path: the file.
        exclusive: never replace a file: of several writers at once the first one wins.

    Raises:
        FileExistsError: with ``exclusive``: there is such a file by now.
        RequestError: the file cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        yield temporary
        if exclusive:
            os.link(temporary, path)
        else:
            temporary.replace(path)
    except OSError as error:
        if exclusive and error.errno == errno.EEXIST:
            raise
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
