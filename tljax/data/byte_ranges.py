"""Images as ranges of bytes in files that hold many of them.

Processes that decode import this: it imports no JAX.
"""

import os
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tljax.data.buckets import is_bucket, read_bucket
from tljax.data.byte_strings import ByteStrings
from tljax.data.files import check_size
from tljax.runtime.errors import RequestError, UnreadableImageError

_LOCAL_BLOCK, _BUCKET_BLOCK = 2**12, 2**23


@dataclass(frozen=True)
class ShardFile:
    """A file that holds many examples.

    Attributes:
        path: an absolute path, or the URL of a file in a bucket.
        size: its size in bytes.
        version: text that changes with its content: the modification time in ns of a local file.
    """

    path: str
    size: int
    version: str

    @classmethod
    def local(cls, path: str) -> "ShardFile":
        """Look up a local file.

        Raises:
            OSError: the file does not exist.
        """
        info = os.stat(path)  # noqa: PTH116 - of many files
        return cls(os.path.realpath(path), info.st_size, str(info.st_mtime_ns))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    def __str__(self) -> str:
        return os.fsencode(self.path).decode("utf-8", "backslashreplace")

    def read(self, start: int, length: int) -> bytes:
        """Read a range of bytes; fewer at the end of the file.

        Raises:
            UnreadableImageError: the file cannot be read.
            RequestError: the file is not the one that was looked up.
        """
        if is_bucket(self.path):
            return read_bucket(self.path, start, min(start + length, self.size))
        try:
            return os.pread(_open(self).number, length, start)
        except OSError as error:
            raise UnreadableImageError(f"cannot be read: {error.strerror}") from error


class _Descriptor:
    """An open file, closed when the last reader lets go of it: threads share them."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=128)  # processes may open 1,024 files at a time, or fewer
def _open(file: ShardFile) -> _Descriptor:
    descriptor = _Descriptor(file.path)
    info = os.fstat(descriptor.number)
    if (info.st_size, str(info.st_mtime_ns)) != (file.size, file.version):
        raise RequestError(f"{file} has changed since it was opened: start again")
    return descriptor


class BlockReader:
    """Read short ranges of a file in ascending order, through one block of its bytes."""

    def __init__(self, file: ShardFile) -> None:
        self.file = file
        self._size = _BUCKET_BLOCK if is_bucket(file.path) else _LOCAL_BLOCK
        self._start, self._block = 0, b""

    def __call__(self, start: int, length: int) -> bytes:
        """Return a range of bytes; fewer at the end of the file.

        Raises:
            RequestError: the file cannot be read.
        """
        offset = start - self._start
        if offset < 0 or offset + length > len(self._block):
            try:
                self._block = self.file.read(start, max(length, self._size))
            except UnreadableImageError as error:
                raise RequestError(f"{self.file} {error}") from error
            self._start, offset = start, 0
        return self._block[offset : offset + length]


@dataclass(frozen=True, eq=False)
class ByteRanges:
    """Images that are ranges of bytes in files, as examples.

    Attributes:
        files: the files.
        file: ``[n]`` index into ``files`` of each image.
        starts: ``[n]`` where it begins.
        lengths: ``[n]`` its length in bytes, -1 if there is none.
        fingerprint: see `tljax.data.examples.Examples`.
    """

    files: tuple[ShardFile, ...]
    file: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> bytes:
        file, length = self.files[int(self.file[index])], int(self.lengths[index])
        if length < 0:
            raise UnreadableImageError("the record has no image")
        check_size(length)
        data = file.read(int(self.starts[index]), length)
        if len(data) < length:
            raise UnreadableImageError(f"{file.name} has become shorter")
        return data


@dataclass(frozen=True, eq=False)
class BucketFiles:
    """Files below a folder of a bucket, as examples.

    Attributes:
        folder: the URL of the folder, with a slash at the end.
        paths: ``[n]`` the path of each file below the folder.
        sizes: ``[n]`` its size in bytes.
        fingerprint: see `tljax.data.examples.Examples`.
    """

    folder: str
    paths: ByteStrings
    sizes: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> bytes:
        check_size(size := int(self.sizes[index]))
        return read_bucket(self.folder + os.fsdecode(self.paths[int(index)]), 0, size)
