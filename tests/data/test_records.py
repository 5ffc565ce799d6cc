"""TFRecord files and ArrayRecords of tf.train.Example are read without TensorFlow.

Examples are written with the protocol buffers that TensorFlow Datasets has, ArrayRecords with their
own package, and TFRecord files by their definition.
"""

import gzip
import json
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tars import TINY, jpeg

from tljax.data import tfrecords
from tljax.data.byte_ranges import ShardFile
from tljax.data.loader import load_batches
from tljax.data.options import LabelOptions
from tljax.data.sources import open_splits
from tljax.data.tfrecords import index_tfrecord
from tljax.runtime.errors import RequestError, UnreadableImageError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path / "cache"))


def encode(features: dict[str, Any]) -> bytes:
    """Serialize a tf.train.Example."""
    from tensorflow_datasets.proto import tf_example_generated_pb2

    example = tf_example_generated_pb2.Example()
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        feature = example.features.feature[name]
        if values and isinstance(values[0], bytes):
            feature.bytes_list.value.extend(values)
        elif values and isinstance(values[0], float):
            feature.float_list.value.extend(values)
        else:
            feature.int64_list.value.extend(values)
    return example.SerializeToString()


def crc32c(data: bytes) -> int:
    """Divide by the polynomial bit by bit, as its definition says."""
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = (remainder >> 1) ^ (0x82F63B78 * (remainder & 1))
    return remainder ^ 0xFFFFFFFF


def mask(crc: int) -> bytes:
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)


def write_tfrecord(path: Path, examples: Iterable[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for data in examples:
            length = struct.pack("<Q", len(data))
            file.write(length + mask(crc32c(length)) + data + mask(crc32c(data)))
    return path


def write_array_record(
    path: Path, examples: Iterable[bytes], options: str = "group_size:1"
) -> Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), options)
    for data in examples:
        writer.write(data)
    writer.close()
    return path


def photograph(number: int) -> dict[str, Any]:
    return {
        "image": jpeg(number),
        "label": number % 3,
        "name": f"p{number}".encode(),
        "score": number / 4,
        "tags": [b"even", b"all"][number % 2 :],
        "flags": [number % 2, 1, 0],
    }


def examples(indices: range) -> list[bytes]:
    return [encode(photograph(i)) for i in indices]


@pytest.fixture(name="folder", params=["tfrecord", "array_record"])
def _folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Write 20 examples to train in two files, and 6 to validate on."""
    write = {"tfrecord": write_tfrecord, "array_record": write_array_record}[request.param]
    folder, suffix = tmp_path / "x", request.param
    write(folder / f"x-train.{suffix}-00000-of-00002", examples(range(12)))
    write(folder / f"x-train.{suffix}-00001-of-00002", examples(range(12, 20)))
    write(folder / f"x-validation.{suffix}", examples(range(20, 26)))
    return folder


def test_records_are_opened_as_their_parts(folder):
    train, val, notes = open_splits(str(folder))
    assert [train.read(i) for i in range(20)] == [*map(jpeg, range(20))]
    assert [val.read(i) for i in range(6)] == [*map(jpeg, range(20, 26))]
    assert train.classes == ("0", "1", "2")
    np.testing.assert_array_equal(train.labels, np.arange(20) % 3)
    assert train.names[13].endswith("-00001-of-00002/1")
    assert notes == ()


@pytest.mark.parametrize(
    ("target", "kind", "expected"),
    [
        ("score", "regression", [[0], [0.25], [0.5]]),
        ("flags", "multilabel", [[0, 1], [1, 1], [0, 1]]),
        ("tags", "multilabel", [[1, 1], [1, 0], [1, 1]]),
    ],
)
def test_features_are_labels_of_their_kind(folder, target, kind, expected):
    train = open_splits(str(folder), labels=LabelOptions(target=target)).train
    assert train.task.kind == kind
    np.testing.assert_array_equal(train.labels[:3], expected)


def test_names_of_classes_are_read_from_the_file_of_tfds(folder):
    (folder / "label.labels.txt").write_text("cat\ndog\nfox\n")
    assert open_splits(str(folder)).train.classes == ("cat", "dog", "fox")


def test_examples_are_pickled_for_processes(folder):
    train = open_splits(str(folder)).train
    train.read(0)
    copy = pickle.loads(pickle.dumps(train.examples, protocol=5))
    assert [copy[i] for i in (0, 19)] == [jpeg(0), jpeg(19)]


def test_resuming_in_the_middle_of_an_epoch_is_exact(folder):
    train = open_splits(str(folder)).train
    whole = list(load_batches(train, TINY, batch_size=4, seed=1))
    rest = list(load_batches(train, TINY, batch_size=4, seed=1, start=3))
    for batch, reference in zip(rest, whole[3:], strict=True):
        np.testing.assert_array_equal(batch.inputs, reference.inputs)


def test_the_digest_changes_with_the_content_only(folder):
    digest = open_splits(str(folder)).train.digest
    assert open_splits(str(folder)).train.digest == digest
    path = min(folder.iterdir())
    write = write_tfrecord if "tfrecord" in path.name else write_array_record
    write(path, examples(range(12)))  # a second time
    assert open_splits(str(folder)).train.digest == digest
    write(path, examples(range(6, 18)))
    assert open_splits(str(folder)).train.digest != digest


def test_numbers_of_every_size_are_read(tmp_path):
    numbers = [0, 1, 127, 128, 300, 2**40, -1, -(2**63), 2**63 - 1]
    floats = [0.0, -1.5, 3e38]
    record = encode({"image": jpeg(0), "n": numbers, "f": floats, "empty": []})
    values = index_tfrecord(
        ShardFile.local(str(write_tfrecord(tmp_path / "a.tfrecord", [record])))
    ).values
    assert json.loads(values["n"][0]) == numbers
    np.testing.assert_array_equal(json.loads(values["f"][0]), np.float32(floats))
    assert "empty" not in values


def test_lengths_are_checked_by_crc32c():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, B.4
    assert struct.pack("<I", tfrecords._masked_crc32c(b"123456789")) == mask(0xE3069283)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"junk" * 99, "is no TFRecord file: copy it again"),
        (lambda data: data[:-3], "is cut short at byte"),
        (lambda data: data + b"\1" * 5, "is cut short at byte"),
        (lambda data: data + b"\1" * 50, r"is damaged at byte \d+: copy it again"),
        (gzip.compress, "is compressed, which allows no random access: decompress it"),
    ],
)
def test_a_damaged_tfrecord_file_is_refused_in_one_line(tmp_path, damage, message):
    path = write_tfrecord(tmp_path / "a.tfrecord", examples(range(3)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RequestError, match=message) as error:
        open_splits(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"", b"junk" * 1000])
def test_a_damaged_array_record_is_refused(tmp_path, data):
    (tmp_path / "a.array_record").write_bytes(data)
    with pytest.raises(RequestError, match="is no ArrayRecord, damaged or empty: copy it again"):
        open_splits(str(tmp_path / "a.array_record"))


def test_an_array_record_of_large_groups_is_refused(tmp_path):
    path = write_array_record(tmp_path / "a.array_record", examples(range(2)), "group_size:65536")
    with pytest.raises(RequestError, match=r"in groups of 65536 records, .* group_size:1"):
        open_splits(str(path))


@pytest.mark.parametrize("write", [write_tfrecord, write_array_record])
@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"\xff" * 20, "record 0, is no tf.train.Example: convert it to one"),
        (b"\x0a\x7fjunk", "record 0, is no tf.train.Example: convert it to one"),
        ({"x": 3}, "no feature with encoded images, such as image/encoded, but x"),
        (
            {"left": jpeg(0), "right": jpeg(1)},
            "several features with images, left, right: name one image/encoded",
        ),
    ],
)
def test_records_that_are_no_photographs_are_refused(tmp_path, write, record, message):
    suffix = write.__name__.removeprefix("write_")
    record = encode(record) if isinstance(record, dict) else record
    with pytest.raises(RequestError, match=message):
        open_splits(str(write(tmp_path / f"a.{suffix}", [record])))


def test_an_image_is_found_by_its_usual_name_or_its_content(tmp_path):
    usual = {"image/encoded": jpeg(1), "mask": jpeg(2), "image/class/label": 1}
    other = {"photo": jpeg(1), "comment": b"a text that is long enough", "image/class/label": 1}
    for number, features in enumerate((usual, other)):
        path = write_tfrecord(tmp_path / f"{number}.tfrecord", [encode(features)] * 2)
        found = index_tfrecord(ShardFile.local(str(path)))
        assert path.read_bytes()[found.starts[1] :][: found.lengths[1]] == jpeg(1)


@pytest.mark.parametrize("write", [write_tfrecord, write_array_record])
def test_a_record_without_an_image_is_said_when_it_is_read(tmp_path, write):
    suffix = write.__name__.removeprefix("write_")
    rows = [*examples(range(6)), encode({"label": 1})]
    train = open_splits(str(write(tmp_path / f"a.{suffix}", rows)), val_fraction=0).train
    with pytest.raises(UnreadableImageError, match="the record has no image"):
        train.read(6)


def test_tars_and_records_are_not_mixed(tmp_path):
    for suffix in ("tfrecord", "array_record"):
        (tmp_path / f"train.{suffix}").touch()
    with pytest.raises(RequestError, match="has ArrayRecords and TFRecord files: choose with a pa"):
        open_splits(str(tmp_path))
