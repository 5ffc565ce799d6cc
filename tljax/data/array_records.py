"""ArrayRecords of ``tf.train.Example``, read by their own package."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from tljax.data.buckets import is_bucket
from tljax.data.byte_ranges import ShardFile
from tljax.data.shard_index import ShardIndex
from tljax.data.tf_examples import make_index, read_example, reader_of
from tljax.runtime.errors import RequestError
from tljax.runtime.packages import install_command

_MAX_GROUP = 64  # records that are decoded together
_MANY = 64  # records that are read together


@dataclass(frozen=True, eq=False)
class ArrayRecords:
    """The records of ArrayRecord files.

    Attributes:
        files: the files.
        file: ``[n]`` index into ``files`` of each record.
        rows: ``[n]`` its number in the file.
    """

    files: tuple[ShardFile, ...]
    file: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> bytes:
        (record,) = _open(self.files[int(self.file[index])]).read([int(self.rows[index])])
        return record


def open_array_records(files: Sequence[ShardFile]) -> ArrayRecords:
    """Open the records of ArrayRecord files.

    Raises:
        RequestError: a file is damaged or empty.
    """
    counts = [_open(file).num_records() for file in files]
    rows = np.concatenate([np.arange(count) for count in counts])
    return ArrayRecords(tuple(files), np.repeat(np.arange(len(files)), counts), rows)


def index_array_record(file: ShardFile) -> ShardIndex:
    """Read the labels of an ArrayRecord.

    Raises:
        RequestError: the file is damaged, or its records are no ``tf.train.Example`` with an
            encoded image.
    """
    digest, examples = hashlib.sha256(), []
    for record in _iterate(file):
        digest.update(record)
        where = f"{file}, record {len(examples)},"
        examples.append(read_example(reader_of(record), 0, len(record), where))
    return make_index(file, examples, np.arange(len(examples)), digest.hexdigest())


def _iterate(file: ShardFile) -> Iterator[bytes]:
    reader = _open(file)
    count = reader.num_records()
    for start in range(0, count, _MANY):
        yield from reader.read(start, min(start + _MANY, count))


@lru_cache(maxsize=128)
def _open(file: ShardFile) -> Any:
    try:
        from array_record.python.array_record_module import ArrayRecordReader  # noqa: PLC0415
    except ImportError as error:  # on Windows, grain does without it
        advice = install_command("array_record")
        raise RequestError(f"{file} needs array_record: {advice}") from error
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
