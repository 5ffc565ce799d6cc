"""TFRecord files as random access: the lengths of their records say where each begins.

Format: https://www.tensorflow.org/tutorials/load_data/tfrecord. A record is its length in 8 bytes,
the masked CRC-32C of these, the data, and the masked CRC-32C of the data.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from tljax.data.byte_ranges import BlockReader, ByteRanges, ShardFile
from tljax.data.shard_index import ShardIndex
from tljax.data.tf_examples import make_index, read_example
from tljax.runtime.errors import RequestError


def index_tfrecord(file: ShardFile) -> ShardIndex:
    """Find the images and labels of a TFRecord file; images are not read.

    Raises:
        RequestError: the file is damaged, cut short or compressed, or its records are no
            ``tf.train.Example`` with an encoded image.
    """
    reader, digest, examples = BlockReader(file), hashlib.sha256(), []
    for start, length, checksums in _records(reader):
        digest.update(checksums)
        where = f"{file}, record {len(examples)},"
        examples.append(read_example(reader, start, length, where))
    return make_index(file, examples, None, digest.hexdigest())


def open_tfrecords(files: Sequence[ShardFile]) -> ByteRanges:
    """Find the records of TFRecord files, which are not read.

    Raises:
        RequestError: a file is damaged, cut short or compressed.
    """
    places = [
        (number, start, length)
        for number, file in enumerate(files)
        for start, length, _ in _records(BlockReader(file))
    ]
    numbers, starts, lengths = np.array(places, np.int64).reshape(-1, 3).T
    return ByteRanges(tuple(files), numbers, starts, lengths, "")


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
