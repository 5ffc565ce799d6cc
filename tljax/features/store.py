"""A cache of stage outputs on disk, keyed by a hash of everything that determines them.

It is the folder ``features`` of the cache folder (``TLJAX_CACHE``), limited to
``TLJAX_FEATURE_CACHE_GIB`` GiB, by default 50. The least recently used entries are removed first.

Any number of processes can use the cache at once. Values are written to a file with a unique name.
Then ``about.json``, which only one process can create, names the file of the entry and its hash.
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
from tljax.runtime.files import atomic_write, cache_dir, remove_stale_files, sha256
from tljax.runtime.trees import array_bytes, tree_digest
from tljax.runtime.types import Variables

Stored = tuple[np.ndarray, np.ndarray, dict[int, str]]
"""Memory-mapped values; positions in the source; and the reason by position of skipped images."""


def entry_folder(
    model: Model, variables: Variables, stop: str | int | None, others: tuple[Any, ...]
) -> Path:
    """Return the folder of a cache entry; it is the same in every process.

    Its name is a hash of the stages before ``stop`` with their settings and weights, the
    preprocessing, the code of networks, decoding and augmentation, the versions of the packages
    they depend on, the backend, the matmul precision, and ``others``.

    Args:
        model: the network.
        variables: its variables.
        stop: stage to stop before, by name or position; None for all stages.
        others: settings that also determine the values.
    """
    prefix = model.stages[: None if stop is None else model.position(stop)]
    names = {stage.name for stage in prefix}
    prefix_variables = {
        kind: {name: tree for name, tree in stages.items() if name in names}
        for kind, stages in variables.items()
    }
    platform = jax.default_backend(), jax.config.values["jax_default_matmul_precision"]
    settings = _describe((prefix, model.preprocess, model.dtype, platform, others))
    key = sha256("\n".join((settings, _code(), tree_digest(prefix_variables))).encode())
    return cache_dir() / "features" / key


def limit() -> int:
    """Read the limit of the cache size from the environment, in bytes.

    Raises:
        RequestError: ``TLJAX_FEATURE_CACHE_GIB`` is not a number.
    """
    value = os.environ.get("TLJAX_FEATURE_CACHE_GIB") or "50"
    try:
        return int(float(value) * 2**30)
    except (ValueError, OverflowError) as error:
        raise RequestError(f"TLJAX_FEATURE_CACHE_GIB={value}: choose a number of GiB") from error


_CODE = ("models/**/*.py", "data/**/*.py", "runtime/preprocess.py", "features/extract.py")


@cache
def _code() -> str:
    """Identify the code that turns an image file into features: hashes and package versions."""
    root = Path(tljax.__file__).parent
    files = sorted(path for pattern in _CODE for path in root.glob(pattern))
    packages = [
        f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "pillow", "simplejpeg")
    ]
    return "\n".join((*map(_file_digest, files), *packages))


@cache
def _file_digest(path: str | Path) -> str:
    return sha256(Path(path))


def _describe(value: Any) -> str:
    """Describe settings so that equal ones have equal descriptions in every process.

    A class or function is described by its qualified name and the hash of its file, because its
    address differs between processes. Values that cannot be described get a unique description.
    """
    if is_dataclass(value) and not isinstance(value, type):
        settings = [(f.name, _describe(getattr(value, f.name))) for f in fields(value) if f.repr]
        return f"{_describe(type(value))}{settings}"
    if isinstance(value, partial):
        value = "partial", value.func, value.args, value.keywords
    elif isinstance(value, Mapping):
        value = "mapping", *value.items()
    if isinstance(value, list | tuple):
        return f"{[_describe(item) for item in value]}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
    with suppress(KeyError, AttributeError, TypeError, OSError):
        if attrgetter(name)(sys.modules[module]) is value:
            covered = module.split(".")[0] in ("tljax", "jax", "flax", "builtins")  # by `_code`
            return f"{module}.{name} {covered or _file_digest(sys.modules[module].__file__ or '')}"
    return uuid4().hex


def write(
    folder: Path,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    size: int,
    skipped: dict[int, str],
) -> Stored:
    """Write an entry, or read the one that another process has written in the meantime.

    Args:
        folder: folder of the entry, from `entry_folder`.
        batches: values and positions in the source.
        size: upper bound of the size of all values, in bytes.
        skipped: the reason by position of skipped images, complete at the end of ``batches``.

    Raises:
        WriteError: there is not enough space, or the entry cannot be written.
    """
    _make_room(folder.parent, size)
    values = folder / f"values-{uuid4().hex}.bin"
    try:
        about = _write_values(values, batches, skipped)
        stored = _open(folder, about)
        return _publish(folder, about) or stored
    except WriteError as error:
        raise WriteError(f"{error}: {_ADVICE}") from error
    finally:
        if values.name not in _entry_files(folder):
            _remove(folder, [values.name])


_ADVICE = "set TLJAX_CACHE to another disk"


def _write_values(
    path: Path, batches: Iterator[tuple[np.ndarray, np.ndarray]], skipped: dict[int, str]
) -> list[Any]:
    digest, indices, values = hashlib.sha256(), [], np.empty(0)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
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
    """Publish an entry, or return the one that another process published first."""
    path, text = folder / "about.json", json.dumps(about)
    try:
        with atomic_write(path, exclusive=True) as temporary:
            temporary.write_text(text, "utf-8")
    except FileExistsError:
        if (existing := read(folder)) is not None:
            return existing
        damaged = _entry_files(folder)
        with atomic_write(path) as temporary:
            temporary.write_text(text, "utf-8")
        _remove(folder, damaged[1:])
    return None


def read(folder: Path) -> Stored | None:
    """Map an entry into memory and mark it as used; None if it is missing or damaged."""
    try:
        stored = _open(folder, json.loads((folder / "about.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    with suppress(OSError):  # the cache may be read-only
        os.utime(folder / "about.json")
    return stored


def _open(folder: Path, about: list[Any]) -> Stored:
    name, shape, dtype, indices, skipped, expected = about
    with (folder / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        digest.update(json.dumps(about[:-1]).encode())
        if digest.hexdigest() != expected:
            raise WriteError(f"{folder / name}: the bytes read differ from those written")
        if math.prod(shape):
            values = np.memmap(file, jnp.dtype(dtype), "r", shape=tuple(shape))
        else:
            values = np.empty(shape, jnp.dtype(dtype))  # an empty file cannot be memory-mapped
    return values, np.asarray(indices, np.int32), dict(skipped)


def available_bytes() -> int:
    """Return the number of bytes that can be cached: the limit, or free disk space if less."""
    with suppress(OSError, WriteError):
        path = cache_dir()
        existing = next(part for part in (path, *path.parents) if part.exists())
        return min(limit(), shutil.disk_usage(existing).free)
    return 0


def _make_room(parent: Path, size: int) -> None:
    """Remove the least recently used entries. Runs that have mapped one can still read it."""
    allowed, needed = limit(), f"the features take {size / 2**30:.1f} GiB"
    if size > allowed:
        raise WriteError(
            f"{needed}, over the limit of {allowed / 2**30:.1f}: raise TLJAX_FEATURE_CACHE_GIB"
        )
    entries, total = [], size
    for folder in parent.glob("*"):
        names = _entry_files(folder)
        remove_stale_files(path for path in folder.glob("*") if path.name not in names)
        with suppress(OSError):  # another process may remove the files
            entry_size = sum(file.stat().st_size for file in folder.iterdir())
            total += entry_size
            entries.append(((folder / "about.json").stat().st_mtime, entry_size, folder))
        _remove(folder, [])
    for _, entry_size, folder in sorted(entries):
        if total > allowed:
            _remove(folder, _entry_files(folder))
            total -= entry_size
    if size > (free := available_bytes()):
        raise WriteError(f"{needed} and {parent} has {free / 2**30:.1f} free: {_ADVICE}")


def _entry_files(folder: Path) -> list[str]:
    """List the names of an entry's files; others are being written or were abandoned."""
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
