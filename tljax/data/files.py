"""Files as examples: the paths of a million take some dozen bytes each, and no object.

Processes that decode are given these classes, so that this module does not import JAX.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Self, TypeVar, overload

import numpy as np
from jaxtyping import Int, UInt8, UInt64

from tljax.data.byte_strings import ByteStrings
from tljax.runtime.errors import UnreadableImageError

MAX_BYTES = 2**29
"""Size in bytes of the largest file that is read as an image: 134 million RGB pixels fit."""

MISSING = np.uint64(2**64 - 1)
"""What `Files.look_up` returns for a file that does not exist."""


def check_size(size: int) -> None:
    """Refuse a file that is too large for an image, before it is read.

    Raises:
        UnreadableImageError: it has more than `MAX_BYTES`.
    """
    if size > MAX_BYTES:
        raise UnreadableImageError(f"larger than {MAX_BYTES >> 20} MiB")


T = TypeVar("T")

_CHUNK = 4096  # files that a thread handles at once
_THREADS = 16  # more than cores, as they wait for the file system


@dataclass(frozen=True, eq=False)
class Files:
    """Files as examples.

    Attributes:
        root: folder of relative paths; empty for the working directory.
        paths: the paths, as the file system encodes them.
    """

    root: str
    paths: ByteStrings

    @classmethod
    def from_paths(cls, paths: Iterable[str | PathLike[str]], root: str = "") -> Self:
        """Store paths, relative to ``root`` if all are below it, otherwise as they are."""
        encoded = [os.fsencode(path) for path in paths]
        root = "" if root == "." else root
        prefix = os.fsencode(os.path.join(root, ""))  # noqa: PTH118
        if all(path.startswith(prefix) for path in encoded):
            encoded = [path[len(prefix) :] for path in encoded]
        else:
            root = ""
        return cls(root, ByteStrings.of(encoded))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> bytes:
        path = Path(self.path(index))
        try:
            info = path.stat()
            if not stat.S_ISREG(info.st_mode):
                raise UnreadableImageError("not a file but a folder, pipe or device")
            check_size(info.st_size)
            return path.read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"cannot be read: {error.strerror}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return Files, (self.root, self.paths)  # without what is cached

    def path(self, index: int) -> str:
        """Return the path of a file, with ``root``."""
        return os.path.join(self.root, os.fsdecode(self.paths[index]))  # noqa: PTH118

    def look_up(self, indices: np.ndarray, *fields: str) -> UInt64[np.ndarray, "n fields"]:
        """Return fields of `os.stat_result` of some files; negative numbers modulo 2^64.

        Links are followed. All fields of a file that does not exist are `MISSING`.
        """
        prefix = os.fsencode(os.path.join(self.root, ""))  # noqa: PTH118

        def status(path: bytes) -> os.stat_result | None:
            try:
                return os.stat(prefix + path)  # noqa: PTH116 - Path takes three times as long
            except (OSError, ValueError):  # ValueError: a null character
                return None

        def look_up_chunk(chunk: np.ndarray) -> np.ndarray:
            found = [*map(status, self.paths.take(chunk))]
            columns = [
                [int(MISSING) if info is None else getattr(info, name) % 2**64 for info in found]
                for name in fields
            ]
            return np.array(columns, np.uint64).T

        parts = in_chunks(look_up_chunk, np.asarray(indices))
        return np.concatenate([np.zeros((0, len(fields)), np.uint64), *parts])

    @cached_property
    def status(self) -> UInt64[np.ndarray, "n 3"]:
        """The size of each file in bytes, and when its content and its status were changed, in ns.

        They are looked up once.
        """
        return self.look_up(np.arange(len(self)), "st_size", "st_mtime_ns", "st_ctime_ns")

    def describe(self, indices: np.ndarray, *, times: bool) -> Iterator[bytes]:
        """Yield bytes that identify files without reading them: relative paths and sizes.

        Args:
            indices: positions of the files.
            times: whether to add when each file was changed, which a copy does not keep.
        """
        for start in range(0, len(indices), _CHUNK):
            yield b"\0".join([*self.paths.take(indices[start : start + _CHUNK]), b""])
        yield self.status[indices, : 3 if times else 1].tobytes()


@dataclass(frozen=True, eq=False)
class Subset:
    """Some examples of others.

    Attributes:
        examples: the others; no subset.
        indices: ``[n]`` positions of the examples in them.
        hashes: ``[n, 32]`` SHA-256 of the content of each example, if it is known.
    """

    examples: Any
    indices: Int[np.ndarray, " n"]
    hashes: UInt8[np.ndarray, "n 32"] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        return self.examples[self.indices[index]]

    def __reduce__(self) -> tuple[Any, ...]:
        return Subset, (self.examples, self.indices)  # processes that decode need no hashes


class Names(Sequence[str]):
    """The paths of files as printable text, which is made when it is accessed."""

    def __init__(self, files: Files, indices: np.ndarray | None = None) -> None:
        """Name the files at ``indices``, or all."""
        self._files = files
        self._indices = np.arange(len(files)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> "Names": ...
    def __getitem__(self, index: int | slice | np.ndarray) -> "str | Names":
        """Return one name or, at a slice or an array of positions, several."""
        if isinstance(index, slice | np.ndarray):
            return Names(self._files, self._indices[index])
        return printable(self._files.path(int(self._indices[index])))

    def __iter__(self) -> Iterator[str]:
        prefix = printable(os.path.join(self._files.root, ""))  # noqa: PTH118
        for start in range(0, len(self), _CHUNK):
            for path in self._files.paths.take(self._indices[start : start + _CHUNK]):
                yield prefix + _decode(path)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType] - as of a list

    def __repr__(self) -> str:
        return repr([*self])


def in_chunks(run: Callable[[np.ndarray], T], indices: np.ndarray, size: int = _CHUNK) -> list[T]:
    """Run a function on chunks of an array in threads, and return its results in order."""
    chunks = [indices[start : start + size] for start in range(0, len(indices), size)]
    if len(chunks) < 2:
        return [*map(run, chunks)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [*pool.map(run, chunks)]


def printable(path: str | PathLike[str]) -> str:
    """Return a path as printable text, with bytes that are not UTF-8 as escapes."""
    return _decode(os.fsencode(path))


def _decode(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
