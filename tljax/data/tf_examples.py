"""Images and labels in ``tf.train.Example``, read without TensorFlow.

Formats: https://protobuf.dev/programming-guides/encoding, and ``example.proto`` and
``feature.proto`` of TensorFlow.
"""

import json
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from tljax.data.byte_ranges import ShardFile
from tljax.data.byte_strings import ByteStrings
from tljax.data.shard_index import ShardIndex
from tljax.runtime.errors import RequestError, UnreadableImageError

Read = Callable[[int, int], bytes]
"""Returns the bytes from a start, of a length."""

_Value = list[Any]  # numbers, or the start and length of each string
_Place = tuple[int, int]

_USUAL = ("image/encoded", "image", "jpg", "jpeg", "png", "image_bytes", "img")
_MAX_VALUE = 2**16  # bytes of a feature that is kept as a possible label
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP", b"\x93NUMPY")


class Example(NamedTuple):
    """An example without its images.

    Attributes:
        values: the JSON of each feature: a string or number, or a list of several.
        places: the start and length of the first string of each feature that has strings.
        images: the features whose first string begins as an image does.
    """

    values: dict[str, bytes]
    places: dict[str, _Place]
    images: frozenset[str]


def read_example(read: Read, start: int, length: int, where: str) -> Example:
    """Read an example; images, and what is too long for a label, are passed over.

    Args:
        read: reads the file or record.
        start: where the example begins.
        length: its length in bytes.
        where: names the example in errors.

    Raises:
        RequestError: it is no ``tf.train.Example``.
    """
    features = _read_features(read, start, length, where)
    places = {x: value[0] for x, value in features.items() if value and isinstance(value[0], tuple)}
    heads = {name: read(begin, min(12, size)) for name, (begin, size) in places.items()}
    images = frozenset(name for name, head in heads.items() if _is_image(head))
    values = {
        name: cell
        for name, value in features.items()
        if name not in images and (cell := _write_value(value, read))
    }
    return Example(values, places, images)


def make_index(
    file: ShardFile, examples: Sequence[Example], starts: np.ndarray | None, identity: str
) -> ShardIndex:
    """Make the index of a shard from its examples.

    Args:
        file: the shard.
        examples: its examples.
        starts: where the images begin; None for the places of the examples.
        identity: see `ShardIndex`.

    Raises:
        RequestError: no feature has encoded images, or several have.
    """
    image = _find_image(file, examples)
    places = [example.places.get(image, (0, -1)) for example in examples]
    begins, lengths = np.array(places, np.int64).reshape(-1, 2).T
    names = sorted({name for example in examples for name in example.values} - {image})
    return ShardIndex(
        keys=ByteStrings.of(str(row).encode() for row in range(len(examples))),
        starts=begins if starts is None else starts,
        lengths=lengths,
        values={
            name: ByteStrings.of(example.values.get(name, b"") for example in examples)
            for name in names
        },
        skipped=ByteStrings.of(()),
        identity=identity,
        image=image,
    )


def _find_image(file: ShardFile, examples: Sequence[Example]) -> str:
    """Find the feature with encoded images: by its usual name, or by their first bytes."""
    strings = {name for example in examples for name in example.places}
    found = Counter(name for example in examples for name in example.images)
    names = [name for name in _USUAL if name in strings] or sorted(found)
    if len(names) == 1 or (names and names[0] in _USUAL):
        return names[0]
    several = f"several features with images, {', '.join(names)}: name one image/encoded"
    existing = sorted({name for example in examples for name in (*example.values, *example.places)})
    none = f"no feature with encoded images, such as image/encoded, but {', '.join(existing)}"
    raise RequestError(f"the records of {file} have {several if names else none}")


def _is_image(head: bytes) -> bool:
    """Return True for the first 12 bytes of an image file."""
    return head.startswith(_MAGIC) or head[8:] == b"WEBP" or head[4:8] == b"ftyp"


def _write_value(value: _Value, read: Read) -> bytes:
    """Write a feature as JSON; nothing if it is empty or too long for a label."""
    if not value or sum(item[1] for item in value if isinstance(item, tuple)) > _MAX_VALUE:
        return b""
    items = [
        read(*item).decode("utf-8", "backslashreplace") if isinstance(item, tuple) else item
        for item in value
    ]
    return json.dumps(items[0] if len(items) == 1 else items).encode()


def _fields(read: Read, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the number, the start and the end of each field of a message; a varint is not read."""
    while start < end:
        tag, start = _varint(read, start)
        kind = tag & 7
        if kind == 2:
            length, start = _varint(read, start)
        elif kind == 0:
            length = _varint(read, start)[1] - start
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError
        if start + length > end:
            raise ValueError
        yield tag >> 3, start, start + length
        start += length


def _varint(read: Read, start: int) -> tuple[int, int]:
    """Read a number of 7 bits a byte; return it and where it ends."""
    value = 0
    for position, byte in enumerate(read(start, 10)):
        value |= (byte & 127) << 7 * position
        if byte < 128:
            return value, start + position + 1
    raise ValueError


def _read_features(read: Read, start: int, length: int, where: str) -> dict[str, _Value]:
    """Return the features of a ``tf.train.Example`` by name; strings as starts and lengths."""
    features = {}
    try:
        for _, begin, stop in (x for x in _fields(read, start, start + length) if x[0] == 1):
            for number, first, last in _fields(read, begin, stop):
                if number == 1:
                    entry = {n: (a, b - a) for n, a, b in _fields(read, first, last)}
                    features[read(*entry[1]).decode()] = _read_feature(read, *entry.get(2, (0, 0)))
    except (ValueError, KeyError) as error:
        raise RequestError(f"{where} is no tf.train.Example: convert it to one") from error
    return features


def _read_feature(read: Read, start: int, length: int) -> _Value:
    values = []
    for kind, begin, end in _fields(read, start, start + length):
        for _, first, last in _fields(read, begin, end):
            if kind == 1:
                values.append((first, last - first))
            elif last - first > _MAX_VALUE:
                return []
            elif kind == 2:
                values += struct.unpack(f"<{(last - first) // 4}f", read(first, last - first))
            elif kind == 3:
                values += _read_numbers(read, first, last)
    return values


def _read_numbers(read: Read, start: int, end: int) -> Iterator[int]:
    while start < end:
        value, start = _varint(read, start)
        yield value - (1 << 64) if value >> 63 else value  # two's complement


class _Records(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> bytes: ...


@dataclass(frozen=True, eq=False)
class RecordImages:
    """Images in records, which are ``tf.train.Example``, as examples.

    Attributes:
        records: the records, in bytes.
        image: the name of the feature with the encoded image.
        fingerprint: see `tljax.data.examples.Examples`.
    """

    records: _Records
    image: str
    fingerprint: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> bytes:
        record = self.records[index]
        features = _read_features(reader_of(record), 0, len(record), f"record {index}")
        if not features.get(self.image):
            raise UnreadableImageError("the record has no image")
        start, length = features[self.image][0]
        return record[start : start + length]


def reader_of(data: bytes) -> Read:
    """Return a function that reads bytes in memory."""
    return lambda start, length: data[start : start + length]
