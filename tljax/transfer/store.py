"""Features on disk: named by everything that decides them, kept whole, within a limit.

They lie in ``features`` of the cache folder (``TLJAX_CACHE``), up to ``TLJAX_FEATURE_CACHE_GIB``
GiB together, by default 50: what was not used for longest makes room.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache, partial
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any
from uuid import uuid4

import jax
import jax.numpy as jnp
import numpy as np

import tljax
from tljax.errors import RequestError
from tljax.files import cache_dir
from tljax.models import Model
from tljax.trees import array_bytes, tree_digest
from tljax.types import Variables

Stored = tuple[np.ndarray, np.ndarray, dict[int, str]]
"""Values, mapped into memory; positions in the source; reason by position for what was skipped."""


def folder(model: Model, variables: Variables, stop: str | None, others: tuple[Any, ...]) -> Path:
    """Where the output of the stages before ``stop`` lies: the same in every process.

    Named by a hash of the stages and their settings, their weights, the preprocessing, the code of
    networks, decoding and augmentation, the versions of what that stands on, and ``others``.
    """
    prefix = model.stages[: model.position(stop) if stop else None]
    names = {stage.name for stage in prefix}
    of_prefix = {
        kind: {name: tree for name, tree in stages.items() if name in names}
        for kind, stages in variables.items()
    }
    how = jax.default_backend(), jax.config.values["jax_default_matmul_precision"]
    what = _described((prefix, model.preprocess, model.dtype, how, others))
    key = hashlib.sha256("\n".join((what, _code(), tree_digest(of_prefix))).encode())
    return cache_dir() / "features" / key.hexdigest()


def limit() -> int:
    """Bytes that all features together may take.

    Raises:
        RequestError: ``TLJAX_FEATURE_CACHE_GIB`` is no number.
    """
    asked = os.environ.get("TLJAX_FEATURE_CACHE_GIB") or "50"
    try:
        return int(float(asked) * 2**30)
    except (ValueError, OverflowError) as error:
        raise RequestError(f"TLJAX_FEATURE_CACHE_GIB={asked}: choose a number of GiB") from error


_CODE = ("models/**/*.py", "data/**/*.py", "types.py", "transfer/features.py")


@cache
def _code() -> str:
    """Of everything between a file and its features: source files, and versions of packages."""
    root = Path(tljax.__file__).parent
    files = sorted(path for pattern in _CODE for path in root.glob(pattern))
    packages = [f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "pillow")]
    return "\n".join((*map(_file_digest, files), *packages))


@cache
def _file_digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _described(value: Any) -> str:
    """Equal for equal settings in every process; unique for what has no such description.

    A class or function is where it is found, and the file that defines it: an address would be
    another one in the next process, or belong to something else.
    """
    if is_dataclass(value) and not isinstance(value, type):
        settings = [(f.name, _described(getattr(value, f.name))) for f in fields(value) if f.repr]
        return f"{_described(type(value))}{settings}"
    if isinstance(value, partial):
        value = "partial", value.func, value.args, value.keywords
    elif isinstance(value, Mapping):
        value = "mapping", *value.items()
    if isinstance(value, list | tuple):
        return f"{[_described(item) for item in value]}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
    with suppress(KeyError, AttributeError, TypeError, OSError):
        if attrgetter(name)(sys.modules[module]) is value:
            known = module.split(".")[0] in ("tljax", "jax", "flax", "builtins")  # see `_code`
            return f"{module}.{name} {known or _file_digest(sys.modules[module].__file__ or '')}"
    return uuid4().hex


def write(
    folder: Path,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    size: int,
    skipped: dict[int, str],
) -> None:
    """Makes room and writes; the folder appears when everything in it is whole.

    Args:
        folder: see `folder`.
        batches: values and positions in the source.
        size: bytes of all values, or more.
        skipped: reason by position, complete when the batches are at an end.

    Raises:
        RequestError: there is no room, or it cannot be written.
    """
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        _make_room(parent, size)
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=".part-"))
        try:
            _fill(temporary, batches, skipped)
            shutil.rmtree(folder, ignore_errors=True)  # damaged, or this run would have used it
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise RequestError(
            f"{parent}: cannot be written ({error.strerror}): set TLJAX_CACHE to another disk, "
            "or --cache none"
        ) from error


def _fill(
    temporary: Path, batches: Iterator[tuple[np.ndarray, np.ndarray]], skipped: dict[int, str]
) -> None:
    digest, indices, values = hashlib.sha256(), [], np.empty(0)
    with (temporary / "values.bin").open("wb") as file:
        for values, rows in batches:
            data = array_bytes(values)
            digest.update(data)
            file.write(data)
            indices += rows.tolist()
    shape = [len(indices), *values.shape[1:]]
    about = json.dumps([shape, values.dtype.name, indices, list(skipped.items())])
    digest.update(about.encode())
    (temporary / "about.json").write_text(about, "utf-8")
    (temporary / "sha256").write_text(digest.hexdigest(), "utf-8")


def _make_room(parent: Path, size: int) -> None:
    """Drops what was used least recently. What a run has mapped into memory stays there."""
    most, needed = limit(), f"the features take {size / 2**30:.1f} GiB"
    if size > most:
        raise RequestError(
            f"{needed}, over the limit of {most / 2**30:.1f}: raise TLJAX_FEATURE_CACHE_GIB, "
            "or --cache none"
        )
    kept: list[tuple[float, int, Path]] = []
    for path in parent.glob("[!.]*"):
        with suppress(OSError):  # another process was quicker
            bytes_ = sum(file.stat().st_size for file in path.iterdir())
            kept.append((path.stat().st_mtime, bytes_, path))
    taken = sum(bytes_ for _, bytes_, _ in kept)
    for _, bytes_, path in sorted(kept):
        if taken + size > most:
            shutil.rmtree(path, ignore_errors=True)
            taken -= bytes_
    free = shutil.disk_usage(parent).free
    if size > free:
        raise RequestError(
            f"{needed} and {parent} has {free / 2**30:.1f} free: set TLJAX_CACHE to another disk, "
            "or --cache none"
        )


def _sweep(parent: Path) -> None:
    """Removes what processes that were killed had begun: nothing was written to it for a day."""
    for temporary in parent.glob(".part-*"):
        written = max(path.stat().st_mtime for path in (temporary, *temporary.iterdir()))
        if time.time() - written > 24 * 3600:
            shutil.rmtree(temporary, ignore_errors=True)


def read(folder: Path) -> Stored | None:
    """What `write` wrote, if every byte of it is as it was; it counts as used now."""
    try:
        about = (folder / "about.json").read_bytes()
        with (folder / "values.bin").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(about)
        if digest.hexdigest() != (folder / "sha256").read_text("utf-8"):
            return None
        shape, dtype, indices, skipped = json.loads(about)
        if math.prod(shape):
            values = np.memmap(folder / "values.bin", jnp.dtype(dtype), "r", shape=tuple(shape))
        else:
            values = np.zeros(shape, jnp.dtype(dtype))  # an empty file cannot be mapped
    except (OSError, UnicodeDecodeError):
        return None
    with suppress(OSError):  # a cache that cannot be written may still be read
        os.utime(folder)
    return values, np.asarray(indices, np.int32), dict(skipped)
