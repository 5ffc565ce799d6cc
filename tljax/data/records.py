"""TFRecord files and ArrayRecords of ``tf.train.Example``, read without TensorFlow.

Formats: https://www.tensorflow.org/tutorials/load_data/tfrecord (a record is its length, 8 bytes,
the masked CRC-32C of these, the data, and the masked CRC-32C of the data),
https://protobuf.dev/programming-guides/encoding, and ``feature.proto`` of TensorFlow.
"""

import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from tljax.data.buckets import is_bucket
from tljax.data.byte_ranges import BlockReader, ShardFile
from tljax.data.byte_strings import ByteStrings
from tljax.data.shard_index import ShardIndex
from tljax.runtime.errors import RequestError, UnreadableImageError

Read = Callable[[int, int], bytes]
"""Reads a start and a length."""

_Value = list[Any]  # numbers, or the start and length of each string
_USUAL = ("image/encoded", "image", "jpg", "jpeg", "png", "image_bytes", "img")
_MAX_VALUE = 2**16  # bytes of a feature that is kept as a possible label
_MAX_GROUP = 64
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP", b"\x93NUMPY")


def index_tfrecord(file: ShardFile) -> ShardIndex:
    """Find the images and labels of a TFRecord file; images are not read.

    Raises:
        RequestError: the file is damaged, cut short or compressed, or its records are no
            ``tf.train.Example`` with an encoded image.
    """
    reader, digest = BlockReader(file), hashlib.sha256()
    rows = []
    for start, length, checksum in _records(reader):
        rows.append(_read_example(reader, start, start + length, f"{file}, record {len(rows)},"))
        digest.update(checksum)
    return _index(file, rows, reader, digest.hexdigest())


def locate_records(file: ShardFile) -> tuple[np.ndarray, np.ndarray]:
    """Find the records of a TFRecord file.

    Returns:
        Where each begins, and its length in bytes, ``[n]`` int64.

    Raises:
        RequestError: the file is damaged, cut short or compressed.
    """
    places = [place[:2] for place in _records(BlockReader(file))]
    starts, lengths = np.array(places, np.int64).reshape(-1, 2).T
    return starts, lengths


def _records(reader: BlockReader) -> Iterator[tuple[int, int, bytes]]:
    """Yield the start, the length and the checksums of each record."""
    file, position = reader.file, 0
    while position < file.size:
        header = reader(position, 12)
        if position == 0 and header.startswith(b"\x1f\x8b"):
            raise RequestError(
                f"{file} is compressed, which allows no random access: decompress it"
            )
        length, checksum = struct.unpack("<QI", header.ljust(12, b"\0"))
        if len(header) == 12 and checksum != _masked_crc32c(header[:8]):
            what = f"is damaged at byte {position}" if position else "is no TFRecord file"
            raise RequestError(f"{file} {what}: copy it again")
        start = position + 12
        position = start + length + 4
        if position > file.size:
            raise RequestError(f"{file} is cut short at byte {file.size}: copy it again")
        yield start, length, header + reader(start + length, 4)


def _masked_crc32c(data: bytes) -> int:
    """Return the masked CRC-32C (RFC 3720, B.4) that TFRecord files have."""
    crc, table = 0xFFFFFFFF, _crc32c_table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@lru_cache(maxsize=1)
def _crc32c_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table


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


def _read_example(read: Read, start: int, end: int, where: str) -> dict[str, _Value]:
    """Return the features of a ``tf.train.Example`` by name; strings as starts and lengths."""
    features = {}
    try:
        for _, begin, stop in (x for x in _fields(read, start, end) if x[0] == 1):
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


def _index(file: ShardFile, rows: list[dict[str, _Value]], read: Read, identity: str) -> ShardIndex:
    image = _find_image(file, rows, read)
    places = [_place(row.get(image, [])) for row in rows]
    starts, lengths = np.array(places, np.int64).reshape(-1, 2).T
    values = {
        name: ByteStrings.of(_write_value(row.get(name, []), read) for row in rows)
        for name in sorted({name for row in rows for name in row} - {image})
    }
    return ShardIndex(
        _row_numbers(len(rows)), starts, lengths, values, ByteStrings.of(()), identity, image
    )


def _row_numbers(count: int) -> ByteStrings:
    return ByteStrings.of(str(row).encode() for row in range(count))


def _place(value: _Value) -> tuple[int, int]:
    """Return the start and length of an image; a length of -1 if there is none."""
    return value[0] if value and isinstance(value[0], tuple) else (0, -1)


def _find_image(file: ShardFile, rows: list[dict[str, _Value]], read: Read) -> str:
    """Find the feature with encoded images: by its usual name, or by its content."""
    strings = Counter[str]()
    found = Counter[str]()
    for row in rows[:100]:
        for name, value in row.items():
            if value and isinstance(value[0], tuple):
                strings[name] += 1
                found[name] += _is_image(read(value[0][0], min(12, value[0][1])))
    names = [name for name in _USUAL if name in strings] or [name for name in found if found[name]]
    if len(names) == 1 or (names and names[0] in _USUAL):
        return names[0]
    several = f"several features with images, {', '.join(sorted(names))}: name one image/encoded"
    existing = ", ".join(sorted({name for row in rows[:100] for name in row})) or "none"
    none = f"no feature with encoded images, such as image/encoded, but {existing}"
    raise RequestError(f"the records of {file} have {several if names else none}")


def _is_image(head: bytes) -> bool:
    """Return True for the first 12 bytes of an image file."""
    return head.startswith(_MAGIC) or head[8:] == b"WEBP" or head[4:8] == b"ftyp"


def _write_value(value: _Value, read: Read) -> bytes:
    """Write a feature as JSON: a string or number, or a list of several."""
    items = []
    for item in value:
        if isinstance(item, tuple):
            if item[1] > _MAX_VALUE:
                return b""
            items.append(read(*item).decode("utf-8", "backslashreplace"))
        else:
            items.append(item)
    return json.dumps(items[0] if len(items) == 1 else items).encode() if items else b""


def index_array_record(file: ShardFile) -> ShardIndex:
    """Read the labels of an ArrayRecord.

    Raises:
        RequestError: the file is damaged, or its records are no ``tf.train.Example`` with an
            encoded image.
    """
    digest, image = hashlib.sha256(), ""
    lengths, rows = list[int](), list[dict[str, bytes]]()
    for record in _iterate(file):
        digest.update(record)
        read = _reader_of(record)
        example = _read_example(read, 0, len(record), f"{file}, record {len(rows)},")
        image = image or _find_image(file, [example], read)
        lengths.append(_place(example.pop(image, []))[1])
        rows.append({name: _write_value(value, read) for name, value in example.items()})
    return ShardIndex(
        keys=_row_numbers(len(rows)),
        starts=np.arange(len(rows)),
        lengths=np.array(lengths, np.int64),
        values={
            name: ByteStrings.of(row.get(name, b"") for row in rows)
            for name in sorted({name for row in rows for name in row})
        },
        skipped=ByteStrings.of(()),
        identity=digest.hexdigest(),
        image=image,
    )


def _reader_of(data: bytes) -> Read:
    return lambda start, length: data[start : start + length]


def _iterate(file: ShardFile) -> Iterator[bytes]:
    reader = _open(file)
    count = reader.num_records()
    for start in range(0, count, 64):
        yield from reader.read(start, min(start + 64, count))


@lru_cache(maxsize=128)
def _open(file: ShardFile) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader  # noqa: PLC0415 - slow

    if is_bucket(file.path):
        raise RequestError(f"{file}: ArrayRecords are read from disks only: copy it to one")
    reader = ArrayRecordReader(file.path, options="readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok() or not reader.num_records():
        raise RequestError(f"{file} is no ArrayRecord, damaged or empty: copy it again")
    group = re.search(r"group_size:(\d+)", reader.writer_options_string() or "")
    if group and int(group[1]) > _MAX_GROUP:
        raise RequestError(
            f"{file} was written in groups of {group[1]} records, which are decoded together to"
            " read one: write it with the option group_size:1"
        )
    return reader


@dataclass(frozen=True, eq=False)
class ArrayRecords:
    """Images in records of ArrayRecords, as examples.

    Attributes:
        files: the files.
        images: the name of the feature with the images in each file.
        file: ``[n]`` index into ``files`` of each image.
        rows: ``[n]`` the number of its record.
        fingerprint: see `tljax.data.examples.Examples`.
    """

    files: tuple[ShardFile, ...]
    images: tuple[str, ...]
    file: np.ndarray
    rows: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> bytes:
        number = int(self.file[index])
        file = self.files[number]
        (record,) = _open(file).read([int(self.rows[index])])
        read = _reader_of(record)
        example: Mapping[str, _Value] = _read_example(read, 0, len(record), str(file))
        start, length = _place(example.get(self.images[number], []))
        if length < 0:
            raise UnreadableImageError("the record has no image")
        return read(start, length)
