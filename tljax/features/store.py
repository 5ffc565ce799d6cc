"""Outputs of stages on disk: named by everything that decides them, kept whole, within a limit.

They lie in ``features`` of the cache folder (``TLJAX_CACHE``), up to ``TLJAX_FEATURE_CACHE_GIB``
GiB together, by default 50: what was not used for longest makes room.

Any number of processes may use them at once. Values go into a file of a name of their own; then
``about.json``, which only one process can create, says which file counts, and its hash.
"""

import hashlib
import json
import math
import os
import shutil
import sys
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
from tljax.models import Model
from tljax.runtime.errors import RequestError, WriteError
from tljax.runtime.files import cache_dir, remove_abandoned, sha256, written_whole
from tljax.runtime.trees import array_bytes, tree_digest
from tljax.runtime.types import Variables

Stored = tuple[np.ndarray, np.ndarray, dict[int, str]]
"""Values, mapped into memory; positions in the source; reason by position for what was skipped."""


def folder(
    model: Model, variables: Variables, stop: str | int | None, others: tuple[Any, ...]
) -> Path:
    """Where the output of the stages before ``stop`` lies: the same in every process.

    Named by a hash of the stages and their settings, their weights, the preprocessing, the code of
    networks, decoding and augmentation, the versions of what that stands on, and ``others``.
    """
    prefix = model.stages[: None if stop is None else model.position(stop)]
    names = {stage.name for stage in prefix}
    of_prefix = {
        kind: {name: tree for name, tree in stages.items() if name in names}
        for kind, stages in variables.items()
    }
    how = jax.default_backend(), jax.config.values["jax_default_matmul_precision"]
    what = _described((prefix, model.preprocess, model.dtype, how, others))
    key = sha256("\n".join((what, _code(), tree_digest(of_prefix))).encode())
    return cache_dir() / "features" / key


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


_CODE = ("models/**/*.py", "data/**/*.py", "runtime/types.py", "features/extract.py")


@cache
def _code() -> str:
    """Of everything between a file and its features: source files, and versions of packages."""
    root = Path(tljax.__file__).parent
    files = sorted(path for pattern in _CODE for path in root.glob(pattern))
    packages = [f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "pillow")]
    return "\n".join((*map(_file_digest, files), *packages))


@cache
def _file_digest(path: str | Path) -> str:
    return sha256(Path(path))


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
) -> Stored:
    """Make room and write, or take what another process has written by then.

    Args:
        folder: see `folder`.
        batches: values and positions in the source.
        size: bytes of all values, or more.
        skipped: reason by position, complete when the batches are at an end.

    Raises:
        WriteError: there is no room, or it cannot be written.
    """
    _make_room(folder.parent, size)
    values, kept = folder / f"values-{uuid4().hex}.bin", False
    try:
        about = _write_values(values, batches, skipped)
        stored = _open(folder, about)
        theirs = _publish(folder, about)
        kept = theirs is None
    except WriteError as error:
        raise WriteError(f"{error}: {_ELSEWHERE}") from error
    finally:
        if not kept:
            _remove(folder, [values.name])
    return theirs or stored


_ELSEWHERE = "set TLJAX_CACHE to another disk"


def _write_values(
    path: Path, batches: Iterator[tuple[np.ndarray, np.ndarray]], skipped: dict[int, str]
) -> list[Any]:
    digest, indices, values = hashlib.sha256(), [], np.empty(0)
    with written_whole(path) as temporary, temporary.open("wb") as file:
        for values, rows in batches:
            data = array_bytes(values)
            digest.update(data)
            file.write(data)
            indices += rows.tolist()
    shape = [len(indices), *values.shape[1:]]
    about = [path.name, shape, values.dtype.name, indices, list(skipped.items())]
    digest.update(json.dumps(about).encode())
    return [*about, digest.hexdigest()]


def _publish(folder: Path, about: list[Any]) -> Stored | None:
    """Make it what counts, unless something whole does: that is returned instead."""
    path, text = folder / "about.json", json.dumps(about)
    try:
        with written_whole(path, exclusive=True) as temporary:
            temporary.write_text(text, "utf-8")
    except FileExistsError:
        if (theirs := read(folder)) is not None:
            return theirs
        damaged = _counting(folder)
        with written_whole(path) as temporary:
            temporary.write_text(text, "utf-8")
        _remove(folder, damaged[1:])
    return None


def read(folder: Path) -> Stored | None:
    """Map what `write` wrote, if every byte of it is as it was; it counts as used now."""
    try:
        stored = _open(folder, json.loads((folder / "about.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    with suppress(OSError):  # a cache that cannot be written may still be read
        os.utime(folder / "about.json")
    return stored


def _open(folder: Path, about: list[Any]) -> Stored:
    name, shape, dtype, indices, skipped, expected = about
    with (folder / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        digest.update(json.dumps(about[:-1]).encode())
        if digest.hexdigest() != expected:
            raise WriteError(f"{folder / name}: reads back otherwise than it was written")
        if math.prod(shape):
            values = np.memmap(file, jnp.dtype(dtype), "r", shape=tuple(shape))
        else:
            values = np.empty(shape, jnp.dtype(dtype))  # an empty file cannot be mapped
    return values, np.asarray(indices, np.int32), dict(skipped)


def room() -> int:
    """Measure how many bytes of features the cache could take at most."""
    with suppress(OSError, WriteError):
        path = cache_dir()
        there = next(part for part in (path, *path.parents) if part.exists())
        return min(limit(), shutil.disk_usage(there).free)
    return 0


def _make_room(parent: Path, size: int) -> None:
    """Drop what was used least recently. What a run has mapped into memory stays there."""
    most, needed = limit(), f"the features take {size / 2**30:.1f} GiB"
    if size > most:
        raise WriteError(
            f"{needed}, over the limit of {most / 2**30:.1f}: raise TLJAX_FEATURE_CACHE_GIB"
        )
    found, taken = [], 0
    for folder in parent.glob("*"):
        names = _counting(folder)
        remove_abandoned(path for path in folder.glob("*") if path.name not in names)
        with suppress(OSError):  # another process was quicker
            bytes_ = sum(file.stat().st_size for file in folder.iterdir())
            taken += bytes_
            found.append(((folder / "about.json").stat().st_mtime, bytes_, folder))
        _remove(folder, [])
    for _, bytes_, folder in sorted(found):
        if taken + size > most:
            _remove(folder, _counting(folder))
            taken -= bytes_
    if size > (free := room()):
        raise WriteError(f"{needed} and {parent} has {free / 2**30:.1f} free: {_ELSEWHERE}")


def _counting(folder: Path) -> list[str]:
    """Name the files that count; others are being written, or were when a process was killed."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return ["about.json", Path(json.loads((folder / "about.json").read_bytes())[0]).name]
    return ["about.json"]


def _remove(folder: Path, names: list[str]) -> None:
    """Remove files from a folder, and the folder if nothing else is in it."""
    for name in names:
        with suppress(OSError):
            (folder / name).unlink()
    with suppress(OSError):
        folder.rmdir()
