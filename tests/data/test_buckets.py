"""Shards and folders in buckets are read as local ones; fsspec's memory stands for a bucket."""

import pickle

import fsspec
import numpy as np
import pytest
from test_records import encode, photograph, write_tfrecord
from test_tars import TINY, jpeg, write_tar
from test_tars import examples as tar_examples

from tljax.data import buckets
from tljax.data.loader import load_batches
from tljax.data.sources import has_validation, open_labeled, open_splits
from tljax.runtime.errors import RequestError, UnreadableImageError


@pytest.fixture(name="bucket", autouse=True)
def _bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture(name="tree")
def _tree(bucket) -> str:
    """Put 12 images to train and 6 to validate into class folders of a bucket."""
    for i in range(18):
        part, label = ("val", "train")[i < 12], ("cat", "dog")[i % 2]
        bucket.pipe(f"/b/pets/{part}/{label}/{i:02d}.jpg", jpeg(i))
    bucket.pipe("/b/pets/.hidden/x.jpg", b"x")
    bucket.pipe("/b/pets/train/cat/.DS_Store", b"x")
    bucket.pipe("/b/pets/README.md", b"x")
    return "memory://b/pets"


def put(bucket, local, name: str) -> None:
    bucket.pipe(f"/b/{name}", local.read_bytes())


def test_class_folders_in_a_bucket_are_read(tree):
    train, val, notes = open_splits(tree)
    assert {train.read(i) for i in range(12)} == {*map(jpeg, range(12))}
    assert {val.read(i) for i in range(6)} == {*map(jpeg, range(12, 18))}
    assert train.classes == ("cat", "dog")
    assert [name.split("/")[-2] for name in train.names] == [train.classes[x] for x in train.labels]
    assert train.names[0] == "memory://b/pets/train/cat/00.jpg"
    assert notes == ()
    assert has_validation(tree)


def test_a_part_of_a_bucket_is_split_by_content(tree):
    train, val, _ = open_splits(f"{tree}/train/", val_fraction=0.4)
    assert len(train) + len(val) == 12
    assert len(open_labeled(f"{tree}/train")) == 12


def test_a_bucket_with_training_images_only_is_split(bucket):
    for i in range(12):
        bucket.pipe(f"/b/one/train/{('cat', 'dog')[i % 2]}/{i:02d}.jpg", jpeg(i))
    train, val, _ = open_splits("memory://b/one", val_fraction=0.4)
    assert train.classes == ("cat", "dog")
    assert len(train) + len(val) == 12


@pytest.mark.parametrize("spec", ["memory://b/wds", "memory://b/wds/{train,val}-*.tar"])
def test_tars_in_a_bucket_are_read_by_ranges(bucket, tmp_path, spec, monkeypatch):
    put(bucket, write_tar(tmp_path / "a.tar", tar_examples(range(20))), "wds/train-0.tar")
    put(bucket, write_tar(tmp_path / "a.tar", tar_examples(range(20, 26))), "wds/val-0.tar")
    bucket.pipe("/b/wds/classnames.txt", b"cat\ndog\nfox\n")
    train, val, _ = open_splits(spec)
    assert train.classes == ("cat", "dog", "fox")
    assert [val.read(i) for i in range(6)] == [*map(jpeg, range(20, 26))]
    ranges, read = [], buckets.read_bucket
    monkeypatch.setattr(
        "tljax.data.byte_ranges.read_bucket", lambda *x: ranges.append(x[2] - x[1]) or read(*x)
    )
    copy = pickle.loads(pickle.dumps(train.examples, protocol=5))
    assert copy[3] == jpeg(3)
    assert ranges == [len(jpeg(3))]


def test_tfrecord_files_in_a_bucket_are_read(bucket, tmp_path):
    local = write_tfrecord(tmp_path / "a", [encode(photograph(i)) for i in range(20)])
    put(bucket, local, "records/train-00000-of-00001")
    train = open_splits("memory://b/records", val_fraction=0).train
    assert [train.read(i) for i in range(20)] == [*map(jpeg, range(20))]


def test_batches_from_a_bucket_are_those_of_the_local_tar(bucket, tmp_path):
    local = write_tar(tmp_path / "a.tar", tar_examples(range(10)))
    put(bucket, local, "a.tar")
    one, other = (
        list(load_batches(open_labeled(spec), TINY, batch_size=4, seed=3))
        for spec in (str(local), "memory://b/a.tar")
    )
    for batch, reference in zip(one, other, strict=True):
        np.testing.assert_array_equal(batch.inputs, reference.inputs)


def test_a_changed_object_is_indexed_again(bucket, tmp_path):
    for start in (0, 30):
        put(bucket, write_tar(tmp_path / "a.tar", tar_examples(range(start, start + 9))), "a.tar")
        assert open_labeled("memory://b/a.tar").read(0) == jpeg(start)


def test_an_object_that_is_gone_is_said_when_it_is_read(bucket, tree):
    train = open_splits(tree).train
    bucket.rm("/b/pets/train/cat/00.jpg")
    with pytest.raises(UnreadableImageError, match="cannot be read"):
        train.read(0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("memory://b/nothing", "memory://b/nothing has no file: check the address"),
        ("memory://b/x/*.tar", r"memory://b/x/\*.tar has no file: check the address"),
        ("memory://b/flat", "has neither shards nor class folders with images"),
        ("nowhere://b/x", "cannot be opened: Protocol not known: nowhere"),
    ],
)
def test_a_missing_bucket_is_one_line(bucket, spec, message):
    bucket.pipe("/b/flat/x.jpg", b"x")
    with pytest.raises(RequestError, match=message):
        open_splits(spec)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ImportError("Please install gcsfs to access Google Storage"),
            r"needs gcsfs: pip install \"tljax\[gcs\]\"$",
        ),
        (PermissionError("Anonymous caller\nmore"), "Anonymous caller; check .* credentials"),
    ],
)
def test_a_missing_package_or_credentials_are_one_line(monkeypatch, error, message):
    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr(buckets, "_locate", fail)
    with pytest.raises(RequestError, match=message) as caught:
        open_splits("gs://private/data")
    assert "\n" not in str(caught.value)
