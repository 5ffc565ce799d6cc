"""Packed photographs: decoded and resized once, read from memory-mapped files ever after.

The format is described in docs/packed.md. Imports no JAX: processes that decode need none.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from tljax.data.boxes import Crops, in_central_part, pixel_boxes
from tljax.data.decode import Crop, decode_whole
from tljax.runtime.errors import RequestError, UnreadableImageError
from tljax.runtime.files import sha256
from tljax.runtime.preprocess import Preprocess

FORMAT = "tljax packed images"
VERSION = 1
HEADER = "header.json"
INDEX = "index.npz"

Encoding = Literal["raw", "jpeg"]
Interpolation = Literal["bilinear", "bicubic"]

_SIZES = ("height", "width", "original_height", "original_width")


class Shard(NamedTuple):
    """A file of photographs, one after the other: its name, its size in bytes, its SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Header:
    """What ``header.json`` says of a folder of packed photographs.

    Attributes:
        size: short side of the photographs, in pixels.
        interpolation: the Pillow filter that they were resized with.
        encoding: ``raw`` pixels, or ``jpeg`` files.
        examples: number of photographs, with those that could not be read.
        classes: the names of the classes, labels or numbers.
        task: the fields of `tljax.runtime.task.Task`.
        notes: remarks on the data, to print when they are opened.
        shards: the files of photographs.
        index: SHA-256 of ``index.npz``.
        unreadable: why a photograph could not be read, by its number.
        source: the data that was packed: its name, and a digest of each of its parts.
        versions: the versions of tljax and Pillow that packed the photographs.
    """

    size: int
    interpolation: Interpolation
    encoding: Encoding
    examples: int
    classes: tuple[str, ...]
    task: Mapping[str, Any]
    notes: tuple[str, ...]
    shards: tuple[Shard, ...]
    index: str
    unreadable: Mapping[int, str]
    source: Mapping[str, Any]
    versions: Mapping[str, str]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the header that a JSON object describes.

        Raises:
            KeyError, TypeError, ValueError: it describes none.
        """
        if values["format"] != FORMAT or values["version"] != VERSION:
            raise ValueError(f"format {values['format']!r:.40}, version {values['version']!r:.9}")
        choices = {"interpolation": Interpolation, "encoding": Encoding}
        for name, allowed in choices.items():
            if values[name] not in allowed.__args__:
                raise ValueError(f"{name} {values[name]!r:.40}")
        shards = tuple(
            Shard(str(name), int(n), str(digest)) for name, n, digest in values["shards"]
        )
        if any(Path(shard.name).name != shard.name for shard in shards):
            raise ValueError("a shard in another folder")
        return cls(
            size=int(values["size"]),
            interpolation=values["interpolation"],
            encoding=values["encoding"],
            examples=int(values["examples"]),
            classes=tuple(map(str, values["classes"])),
            task=dict(values["task"]),
            notes=tuple(map(str, values["notes"])),
            shards=shards,
            index=str(values["index"]),
            unreadable={int(i): str(reason) for i, reason in values["unreadable"].items()},
            source=dict(values["source"]),
            versions=dict(values["versions"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the header as a JSON object."""
        return {"format": FORMAT, "version": VERSION, **vars(self)}


@dataclass(frozen=True, eq=False)
class Packed:
    """The photographs of a folder, as examples: pixels that no one needs to decode.

    Attributes:
        folder: the folder.
        header: what its ``header.json`` says.
        index: arrays ``[n]`` by name, where each photograph is and how large: ``shard``,
            ``offset``, ``length``, ``height``, ``width``, ``transposed``, ``original_height`` and
            ``original_width``; see docs/packed.md.
        fingerprint: SHA-256 of the header, which names the checksums of all other files.
    """

    folder: Path
    header: Header
    index: Mapping[str, np.ndarray]
    fingerprint: str

    def __len__(self) -> int:
        return self.header.examples

    def __getitem__(self, index: int) -> np.ndarray | bytes:
        """Return a read-only view of pixels ``[height, width, 3]`` uint8, or a JPEG file.

        Raises:
            UnreadableImageError: the photograph could not be read when it was packed.
        """
        i = int(index)
        if (reason := self.header.unreadable.get(i)) is not None:
            raise UnreadableImageError(reason)
        column = self.index
        start = int(column["offset"][i])
        data = self._shards[column["shard"][i]][start : start + int(column["length"][i])]
        if self.header.encoding == "jpeg":
            return data.tobytes()
        height, width = int(column["height"][i]), int(column["width"][i])
        if column["transposed"][i]:
            return data.reshape(width, height, 3).transpose(1, 0, 2)
        return data.reshape(height, width, 3)

    @property
    def canvas(self) -> tuple[int, int, int] | None:
        """Return the shape of a canvas that holds any photograph as stored; None for JPEG files."""
        widths = self.index["length"] // (3 * self.header.size)
        return (self.header.size, int(widths.max(initial=1)), 3) if self._is_raw else None

    @property
    def _is_raw(self) -> bool:
        return self.header.encoding == "raw"

    def copy_whole(self, index: int, out: UInt8[np.ndarray, "height width 3"]) -> None:
        """Copy a photograph as stored to the upper left of a canvas, and clear the rest.

        Raises:
            UnreadableImageError: the photograph could not be read when it was packed.
        """
        pixels = np.asarray(self[index])
        stored = pixels.swapaxes(0, 1) if self.index["transposed"][index] else pixels
        out[:, : stored.shape[1]] = stored
        out[:, stored.shape[1] :] = 0

    def copy_square(
        self, index: int, preprocess: Preprocess, out: UInt8[np.ndarray, "size size 3"]
    ) -> bool:
        """Copy the central square that `decode` returns, if no pixel is to be computed.

        Returns:
            Whether it was copied; otherwise decode the photograph.

        Raises:
            UnreadableImageError: the photograph could not be read when it was packed.
        """
        if not self._is_raw or self.header.size != preprocess.resize or out.shape[2] != 3:
            return False
        pixels, size = np.asarray(self[index]), preprocess.size
        top, left = (round((side - size) / 2) for side in pixels.shape[:2])
        square = pixels[top : top + size, left : left + size]
        if not self.index["transposed"][index]:
            out[:] = square
            return True
        for k in range(3):  # twice as fast for an array whose axes are exchanged
            out[..., k] = square[..., k]
        return True

    def crop(self, crop: Crop, index: int) -> Crop:
        """Return the same crop of the packed part of a photograph as of the whole, for `decode`."""
        sides = np.array([self.index[f"original_{side}"][index] for side in ("height", "width")])
        return lambda *_: in_central_part(np.asarray(crop(*sides.tolist())), sides)

    def canvas_boxes(
        self, crops: Crops, indices: np.ndarray, positions: np.ndarray, preprocess: Preprocess
    ) -> Float[np.ndarray, "n 7"]:
        """Draw boxes of random crops, and convert them for ``Batch.boxes``.

        Args:
            crops: the crops of an epoch.
            indices: ``[n]`` position of each example in its source, which its box depends on.
            positions: ``[n]`` position of each in this object; -1 for padding.
            preprocess: the size of the crops.
        """
        original, stored = (
            np.stack([self.index[name + side][positions] for side in ("height", "width")], axis=-1)
            for name in ("original_", "")
        )
        shapes = np.maximum(original, 1)  # 0 for an unreadable photograph
        boxes = in_central_part(crops.boxes(indices, shapes, preprocess), shapes)
        return pixel_boxes(boxes, stored, self.index["transposed"][positions])

    @cached_property
    def _shards(self) -> list[np.ndarray]:
        """Map the shards into memory, in the process that reads them.

        Raises:
            RequestError: one is missing or has another size.
        """
        for shard in self.header.shards:
            _check_size(self.folder / shard.name, shard.bytes)
        paths = [self.folder / shard.name for shard in self.header.shards]
        return [
            # The slices of a plain array are made in a tenth of the time of those of a memmap.
            np.asarray(np.memmap(path, np.uint8, "r")) if shard.bytes else np.empty(0, np.uint8)
            for path, shard in zip(paths, self.header.shards, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_shards"}


def describe_resize(examples: object, preprocess: Preprocess) -> str | None:
    """Say how a network resizes packed photographs again; None if it takes them as they are."""
    packed = getattr(examples, "examples", examples)  # of a subset
    if not isinstance(packed, Packed):
        return None
    header = packed.header
    if header.size != preprocess.resize:
        what = f"at {header.size} pixels, the network resizes to {preprocess.resize}"
        option = f"--size {preprocess.resize}"
    elif header.interpolation != preprocess.interpolation:
        what = f"with the {header.interpolation} filter, the network expects another"
        option = f"--interpolation {preprocess.interpolation}"
    else:
        return None
    return f"packed {what}: tljax pack {option} gives it the pixels of the files"


# --- reading --------------------------------------------------------------------------------------


def read_header(folder: Path) -> tuple[Header, str]:
    """Read and check ``header.json``; return it and its SHA-256.

    Raises:
        RequestError: the folder holds no packed photographs, or the header is damaged.
    """
    path = folder / HEADER
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RequestError(f"{folder} holds no packed images: make them with tljax pack") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return Header.from_json(json.loads(content)), sha256(content)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RequestError(
            f"{path} is damaged or of another version ({reason:.100}): pack the images again"
        ) from error


def open_packed(folder: Path) -> tuple[Packed, dict[str, np.ndarray]]:
    """Open a folder of packed photographs.

    The checksum of the index and the sizes of all files are checked, but no photograph is read; see
    `find_damage`.

    Returns:
        The photographs, and all arrays of ``index.npz``.

    Raises:
        RequestError: the folder holds no packed photographs, or a file is missing or damaged.
    """
    header, fingerprint = read_header(folder)
    path = folder / INDEX
    try:
        if sha256(path) != header.index:
            raise ValueError("checksum mismatch")  # noqa: TRY301
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        index = _check_index(arrays, header)
    except (OSError, LookupError, TypeError, ValueError, BadZipFile) as error:
        raise RequestError(f"{path} is damaged ({error!s:.100}): pack the images again") from error
    for shard in header.shards:
        _check_size(folder / shard.name, shard.bytes)
    return Packed(folder, header, index, fingerprint), arrays


def find_damage(folder: Path, shard: Shard) -> str | None:
    """Read a shard and compare its checksum; return what is wrong with it, or None.

    Raises:
        RequestError: it is missing or has another size.
    """
    path = folder / shard.name
    _check_size(path, shard.bytes)
    try:
        return None if sha256(path) == shard.sha256 else f"{path}: its checksum differs"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}): restore it") from error
    if size != expected:
        raise RequestError(f"{path} has {size} bytes instead of {expected}: restore it")


def _check_index(arrays: Mapping[str, np.ndarray], header: Header) -> dict[str, np.ndarray]:
    """Return the arrays that say where photographs are; check that they are within their shards.

    Raises:
        LookupError, ValueError: an array is missing, or a photograph is outside of its shard.
    """
    places = {name: arrays[name] for name in ("shard", "offset", "length", "transposed", *_SIZES)}
    count = header.examples
    if any(len(array) != count for name, array in arrays.items() if name != "name_bytes"):
        raise ValueError("arrays of different lengths")
    if any(array.shape != (count,) or array.dtype.kind not in "iub" for array in places.values()):
        raise ValueError("an array of another type")
    read = np.ones(count, bool)
    read[[*header.unreadable]] = False
    shard, offset, length, height, width = (
        places[name][read].astype(np.int64)
        for name in ("shard", "offset", "length", "height", "width")
    )
    if not ((shard >= 0) & (shard < len(header.shards))).all():
        raise ValueError("a photograph in an unknown shard")
    ends = np.array([one.bytes for one in header.shards], np.int64)[shard]
    if not ((offset >= 0) & (length > 0) & (offset + length <= ends)).all():
        raise ValueError("a photograph outside of its shard")
    if header.encoding == "raw" and not (length == 3 * height * width).all():
        raise ValueError("a photograph of another size")
    return places


# --- writing --------------------------------------------------------------------------------------


class Record(NamedTuple):
    """A photograph as it is stored.

    Attributes:
        data: its bytes; empty if it could not be read.
        place: its height, width, whether it is transposed, and its height and width before it was
            resized.
        digest: the first 16 bytes of the SHA-256 of its file; of nothing if there is none.
        reason: why it could not be read; None if it could.
        remarks: remarks to print.
    """

    data: bytes
    place: tuple[int, int, bool, int, int]
    digest: bytes
    reason: str | None
    remarks: tuple[str, ...]


class _Readable(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> bytes | np.ndarray: ...


@dataclass(frozen=True)
class Job:
    """Packing of the examples of one or more parts, one after the other.

    Attributes:
        parts: the examples.
        size: short side of the packed photographs.
        interpolation: the Pillow filter to resize with.
        encoding: how they are stored.
    """

    parts: tuple[_Readable, ...]
    size: int
    interpolation: Interpolation
    encoding: Encoding

    def __call__(self, indices: Iterable[int]) -> list[Record]:
        """Read, decode, resize and encode examples."""
        return [self._pack(index) for index in indices]

    def _pack(self, index: int) -> Record:
        digest, remarks = hashlib.sha256(), list[str]()
        try:
            data = self._read(index)
            if isinstance(data, np.ndarray):
                digest.update(repr(data.shape).encode() + data.tobytes())
            else:
                digest.update(data)
            whole = decode_whole(data, self.size, self.interpolation, remarks)
        except UnreadableImageError as error:
            return Record(b"", (0, 0, False, 0, 0), digest.digest()[:16], str(error), ())
        height, width, _ = whole.pixels.shape
        # All records are `size` rows high, so that they are copied to a canvas row by row.
        transposed = height > width and self.encoding == "raw"
        stored = whole.pixels.transpose(1, 0, 2) if transposed else whole.pixels
        place = (height, width, transposed, whole.height, whole.width)
        encoded = stored.tobytes() if self.encoding == "raw" else _encode(stored)
        return Record(encoded, place, digest.digest()[:16], None, tuple(remarks))

    def _read(self, index: int) -> bytes | np.ndarray:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def _encode(pixels: np.ndarray) -> bytes:
    """Encode pixels as a JPEG, with colors in half the resolution, as those of cameras are."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling="4:2:0")
    return file.getvalue()
