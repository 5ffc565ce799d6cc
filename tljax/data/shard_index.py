"""What a shard holds and where: found by reading its headers once, kept in the cache folder."""

import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tljax.data.byte_ranges import ShardFile
from tljax.data.byte_strings import ByteStrings
from tljax.runtime.errors import WriteError
from tljax.runtime.files import atomic_write, cache_dir, sha256

_VERSION = 2


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The examples of a shard.

    Attributes:
        keys: ``[n]`` the name of each example in the shard.
        starts: ``[n]`` int64, where the image of each begins, in bytes; its number in an
            ArrayRecord.
        lengths: ``[n]`` int64 length of each image in bytes.
        values: ``[n]`` the JSON of each further field by name; empty if missing.
        skipped: what was left out, such as ``link``, once for each.
        image: the name of the field with the images, in records.
        identity: text that changes whenever the content of any example does.
    """

    keys: ByteStrings
    starts: np.ndarray
    lengths: np.ndarray
    values: Mapping[str, ByteStrings]
    skipped: ByteStrings
    identity: str
    image: str = ""


def open_index(file: ShardFile, build: Callable[[ShardFile], ShardIndex]) -> ShardIndex:
    """Return the index of a shard from the cache folder; build and keep it if it is not there.

    Args:
        file: the shard.
        build: reads the shard.

    Raises:
        RequestError: the shard is damaged.
    """
    key = sha256(json.dumps([_VERSION, os.fsdecode(file.path), file.size, file.version]).encode())
    try:
        path = cache_dir() / "indexes" / f"{key}.npz"
    except WriteError:  # there is no home folder
        return build(file)
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return _load(path)
    index = build(file)
    with suppress(WriteError), atomic_write(path) as temporary:
        _save(index, temporary)
    return index


def open_column(key: str, read: Callable[[], Sequence[Any]]) -> Sequence[Any]:
    """Return values that are slow to read from the cache folder; read and keep them the first time.

    Args:
        key: says what the values are, and of what.
        read: returns the values: what JSON has.
    """

    def build(_: ShardFile) -> ShardIndex:
        cells = ByteStrings.of(json.dumps(value).encode() for value in read())
        none = np.empty(0, np.int64)
        return ShardIndex(cells, none, none, {}, ByteStrings.of(()), "")

    return [json.loads(cell) for cell in open_index(ShardFile(key, 0, ""), build).keys.tolist()]


def _save(index: ShardIndex, path: Path) -> None:
    columns = {"keys": index.keys, "skipped": index.skipped}
    columns |= {f"value{number}": column for number, column in enumerate(index.values.values())}
    names = [name.encode() for name in (index.identity, index.image, *index.values)]
    columns["names"] = ByteStrings.of(names)
    arrays = {f"{name}.data": column.data for name, column in columns.items()}
    arrays |= {f"{name}.ends": column.ends for name, column in columns.items()}
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, starts=index.starts, lengths=index.lengths, **arrays)


def _load(path: Path) -> ShardIndex:
    # np.load leaves a damaged file open that it has opened itself.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:

        def column(name: str) -> ByteStrings:
            return ByteStrings(arrays[f"{name}.data"], arrays[f"{name}.ends"])

        identity, image, *fields = (name.decode() for name in column("names"))
        return ShardIndex(
            column("keys"),
            arrays["starts"],
            arrays["lengths"],
            {field: column(f"value{number}") for number, field in enumerate(fields)},
            column("skipped"),
            identity,
            image,
        )
