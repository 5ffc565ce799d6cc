"""Tars of images and labels are random access: the bytes that tarfile reads, in every dialect."""

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tljax.commands import train as train_command
from tljax.data import byte_ranges, shard_index, tars
from tljax.data.byte_ranges import ByteRanges, ShardFile
from tljax.data.byte_strings import ByteStrings
from tljax.data.loader import load_batches
from tljax.data.options import LabelOptions
from tljax.data.shards import expand_braces, is_shards
from tljax.data.sources import has_validation, open_labeled, open_splits
from tljax.data.tars import index_tar
from tljax.runtime.errors import RequestError, UnreadableImageError
from tljax.runtime.preprocess import Preprocess
from tljax.train import run_directory

TINY = Preprocess(size=2, resize=2)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path / "cache"))


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 14), (number * 5 % 256, 0, 0)).save(file, "jpeg", comment=b"%d" % number)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def examples(indices: range) -> dict[str, bytes]:
    """Return members: photographs of the classes 0 to 2, scores and tags."""
    members = {}
    for i in indices:
        members[f"{i:04d}.jpg"] = jpeg(i)
        members[f"{i:04d}.cls"] = b"%d\n" % (i % 3)
        members[f"{i:04d}.json"] = json.dumps({"score": i / 4, "tags": ["even"][i % 2 :]}).encode()
    return members


@pytest.fixture(name="shards")
def _shards(tmp_path: Path) -> Path:
    """Write 20 examples to train in two tars, and 6 to validate on."""
    folder = tmp_path / "shards"
    for name, indices in (("train-00", range(12)), ("train-01", range(12, 20))):
        write_tar(folder / f"{name}.tar", examples(indices))
    write_tar(folder / "val-00.tar", examples(range(20, 26)))
    return folder


def index(path: Path) -> shard_index.ShardIndex:
    return index_tar(ShardFile.local(str(path)))


def images(path: Path) -> dict[str, bytes]:
    """Return the images of a tar by key, read as ranges of bytes."""
    found, file = index(path), ShardFile.local(str(path))
    numbers = np.zeros(len(found.keys), np.int32)
    ranges = ByteRanges((file,), numbers, found.starts, found.lengths, "")
    return {found.keys[i].decode("utf-8", "replace"): ranges[i] for i in range(len(found.keys))}


def test_tars_are_opened_as_their_parts(shards):
    train, val, notes = open_splits(str(shards))
    assert [train.read(i) for i in range(len(train))] == [*map(jpeg, range(20))]
    assert [val.read(i) for i in range(len(val))] == [*map(jpeg, range(20, 26))]
    assert train.classes == val.classes == ("0", "1", "2")
    np.testing.assert_array_equal(train.labels, np.arange(20) % 3)
    assert train.names[13] == "train-01.tar/0013"
    assert notes == ()
    assert has_validation(str(shards))
    assert len(open_labeled(str(shards))) == 6


@pytest.mark.parametrize(
    "pattern", ["train-*.tar", "train-{00..01}.tar", "{train-00,train-01}.tar"]
)
def test_a_pattern_chooses_tars(shards, pattern):
    assert is_shards(str(shards / pattern))
    assert not has_validation(str(shards / pattern))
    assert len(open_labeled(str(shards / pattern))) == 20


def test_a_run_keeps_a_pattern_as_an_absolute_path(shards, monkeypatch):
    monkeypatch.chdir(shards)
    data = train_command._absolute("train-{00..01}.tar")
    assert data == str(shards / "train-{00..01}.tar")
    run_directory.refuse_missing(shards, {"data": data}, "data")


def test_parts_may_be_folders(shards, tmp_path):
    for part in ("train", "test"):
        write_tar(tmp_path / "parts" / part / "0.tar", examples(range(len(part))))
    train, val, _ = open_splits(str(tmp_path / "parts"))
    assert (len(train), len(val)) == (5, 4)


def test_tars_with_one_name_in_two_folders_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        write_tar(tmp_path / folder / "0.tar", examples(range(3)))
    names = open_labeled(str(tmp_path / "*" / "0.tar")).names
    assert [*names][::3] == ["a/0.tar/0000", "b/0.tar/0000"]


def test_tars_without_parts_are_split_by_content(tmp_path):
    write_tar(tmp_path / "0.tar", examples(range(30)))
    train, val, notes = open_splits(str(tmp_path / "0.tar"))
    assert notes == (f"split by content: {len(train)} to train on, {len(val)} to validate on",)
    assert len(open_labeled(str(tmp_path / "0.tar"))) == 30


def test_braces_expand_as_in_shells():
    assert expand_braces("{08..10}-{a,b}") == ["08-a", "08-b", "09-a", "09-b", "10-a", "10-b"]
    assert expand_braces("x") == ["x"]


def test_a_folder_with_class_folders_is_no_folder_of_shards(shards):
    (shards / "cats").mkdir()
    assert not is_shards(str(shards))


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({"target": "score"}, "regression", [[0.0], [0.25], [0.5]]),
        ({"target": "tags"}, "multilabel", [[1], [0], [1]]),
        ({"task": "regression", "target": "cls"}, "regression", [[0], [1], [2]]),
        ({"order": "2,1,0"}, "ordinal", [2, 1, 0]),
    ],
)
def test_labels_are_read_as_those_of_other_data(shards, options, kind, expected):
    train = open_splits(str(shards), labels=LabelOptions(**options)).train
    assert train.task.kind == ("classification" if kind == "ordinal" else kind) or kind == "ordinal"
    np.testing.assert_array_equal(train.labels[:3], expected)


def test_groups_are_searched_in_the_keys(shards):
    options = LabelOptions(group=r"/000?(\d)")
    train, val, _ = open_splits(str(shards / "train-*.tar"), val_fraction=0.4, labels=options)
    assert len(np.unique(train.groups)) + len(np.unique(val.groups)) == 10


def test_names_of_numbered_classes_are_read_beside_the_tars(shards):
    (shards / "classnames.txt").write_text("cat\ndog\nfox\n")
    assert open_splits(str(shards)).train.classes == ("cat", "dog", "fox")
    (shards / "classnames.txt").write_text("cat\ndog\n")
    with pytest.raises(
        RequestError, match=r"cls has numbers up to 2, but .* names has 2, of 0 to 1"
    ):
        open_splits(str(shards))


def test_folders_in_a_tar_are_classes_if_there_are_no_labels(tmp_path):
    members = {f"x/{'cat' if i % 2 else 'dog'}/{i}.JPEG": jpeg(i) for i in range(8)}
    train, _, _ = open_splits(str(write_tar(tmp_path / "a.tar", members)), val_fraction=0)
    assert [train.classes[i] for i in train.labels] == ["dog", "cat"] * 4


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_sizes_are_read_in_every_dialect(tmp_path, form):
    long = "d" * 90 + "/" + "k" * 60
    names = {f"{long}.jpg", "./rel/1.png", "/abs/2.webp", "up/../3.jpeg", "plain/4.v2.jpg"}
    if form != tarfile.USTAR_FORMAT:
        names |= {"e" * 120 + "/ö" + "f" * 130 + ".jpg"}
    members = {name: jpeg(i) for i, name in enumerate(sorted(names))}
    read = images(write_tar(tmp_path / "a.tar", members, form))
    expected = {name.removeprefix("./").lstrip("/"): data for name, data in members.items()}
    expected = {name[: name.index(".", name.rfind("/"))]: x for name, x in expected.items()}
    assert read == expected


def test_names_that_are_not_utf8_are_read(tmp_path):
    with tarfile.open(
        tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape"
    ) as t:
        info = tarfile.TarInfo(os.fsdecode(b"\xff\xfe.jpg"))
        info.size = 3
        t.addfile(info, io.BytesIO(b"abc"))
    assert index(tmp_path / "a.tar").keys.tolist() == [b"\xff\xfe"]
    source = open_labeled(str(write_tar(tmp_path / "b.tar", examples(range(3)))))
    assert source.names[0] == "b.tar/0000"


def test_large_sizes_are_read_in_binary():
    assert tars._number(b"\x80" + bytes(3) + (2**33).to_bytes(8)) == 2**33
    assert tars._number(b"00000000144\0") == 100
    assert tars._number(b"zz") == -1


def append(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "a") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_links_folders_and_others_are_left_out_with_a_note(tmp_path):
    path = write_tar(tmp_path / "a.tar", examples(range(6)))
    kinds = {"l.jpg": tarfile.SYMTYPE, "h.jpg": tarfile.LNKTYPE, "folder": tarfile.DIRTYPE}
    with tarfile.open(path, "a") as tar:
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0000.jpg"
            tar.addfile(info)
    append(path, {"0007.jpg": jpeg(7), "0007.cls": b"1", "notes.md": b"x"})
    train, _, notes = open_splits(str(path), val_fraction=0)
    assert len(train) == 7
    assert notes[:2] == ("left out 1 examples without an image", "left out 2 links")


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_files_are_left_out(tmp_path, form):
    with (tmp_path / "s.jpg").open("wb") as file:
        for hole in range(1, 30):  # GNU's first header has four
            file.seek(hole * 2**20)
            file.write(b"data")
    command = ["tar", "--create", "--sparse", f"--format={form}", "--file=a.tar", "s.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    append(tmp_path / "a.tar", {"1.jpg": jpeg(1)})
    assert images(tmp_path / "a.tar") == {"1": jpeg(1)}
    assert index(tmp_path / "a.tar").skipped.tolist() == [b"sparse files"]


def test_files_that_systems_add_are_ignored(tmp_path):
    members = {"a/1.jpg": jpeg(1), "a/._1.jpg": b"x", "__MACOSX/a/1.jpg": b"x", "./.DS_Store": b"x"}
    found = index(write_tar(tmp_path / "a.tar", members))
    assert found.keys.tolist() == [b"a/1"]
    assert not len(found.skipped)


def test_of_two_members_with_one_name_the_second_counts(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(1), "1.cls": b"0"})
    append(path, {"1.jpg": jpeg(2)})
    assert images(path) == {"1": jpeg(2)}


def test_a_photograph_is_preferred_to_its_mask(tmp_path):
    members = {"1.seg.png": b"mask", "1.png": b"mask", "1.jpg": jpeg(1), "2.rgb.jpg": jpeg(2)}
    assert images(write_tar(tmp_path / "a.tar", members)) == {"1": jpeg(1), "2": jpeg(2)}


def test_examples_without_a_label_are_left_out(tmp_path):
    members = examples(range(6)) | {"9.jpg": jpeg(9)}
    train, _, notes = open_splits(str(write_tar(tmp_path / "a.tar", members)), val_fraction=0)
    assert len(train) == 6
    assert notes[0] == "left out 1 examples without a label"


def test_a_member_that_is_no_image_is_skipped_when_it_is_read(tmp_path):
    members = examples(range(6)) | {"0002.jpg": b"<html>"}
    train = open_splits(str(write_tar(tmp_path / "a.tar", members)), val_fraction=0).train
    skipped: dict[int, str] = {}
    list(load_batches(train, TINY, batch_size=4, skipped=skipped))
    assert [*skipped] == [2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: b"junk" * 1000, "is no tar: copy it again"),
        (lambda data: data[:-5000], "is cut short"),
        (lambda data: data[:700], "is cut short"),
        (lambda data: data[:1024] + b"\1" + data[1025:], "is damaged at byte 1024"),
        (gzip.compress, "is compressed, which allows no random access: decompress it"),
    ],
)
def test_a_damaged_tar_is_refused_in_one_line(tmp_path, damage, message):
    path = write_tar(tmp_path / "a.tar", {"1.jpg": bytes(400), "2.jpg": os.urandom(20000)})
    data = path.read_bytes()
    data = data[: data.rindex(b"2.jpg") + 512 + 20480]  # without the end mark and its padding
    path.write_bytes(damage(data))
    with pytest.raises(RequestError, match=message) as error:
        open_splits(str(path))
    assert "\n" not in str(error.value)
    assert not [*(tmp_path / "cache").rglob("*.npz")]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("train-{00..02}.tar", "train-02.tar does not exist; did you mean .*train-0"),
        ("nothing-*.tar", r"nothing-\*.tar does not exist"),
        ("missing.tar", "missing.tar does not exist"),
        ("*.txt", r"\*.txt does not exist"),
    ],
)
def test_missing_shards_are_named(shards, spec, message):
    with pytest.raises(RequestError, match=message):
        open_splits(str(shards / spec))


def test_options_of_tables_are_refused(shards):
    with pytest.raises(RequestError, match="--split-column x has no effect on"):
        open_splits(str(shards), labels=LabelOptions(split_column="x"))
    with pytest.raises(RequestError, match=r"--target no: .* has no such column"):
        open_splits(str(shards), labels=LabelOptions(target="no"))


def test_a_label_that_is_no_json_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(1), "1.json": b"{label: 3}"})
    with pytest.raises(RequestError, match="label: 3}' is no JSON: correct the field json"):
        open_splits(str(path))


def test_a_tar_is_indexed_once(shards, monkeypatch):
    digest = open_splits(str(shards)).train.digest
    monkeypatch.setattr(tars, "_members", lambda *_: pytest.fail("read the headers"))
    assert open_splits(str(shards)).train.digest == digest


def test_a_changed_tar_is_indexed_again(shards):
    first = open_splits(str(shards)).train
    write_tar(shards / "train-00.tar", examples(range(30, 42)))
    again = open_splits(str(shards)).train
    assert again.read(0) == jpeg(30)
    assert again.digest != first.digest


def test_a_tar_that_changes_while_it_is_used_is_refused(shards):
    train = open_splits(str(shards)).train
    byte_ranges._open.cache_clear()  # as in another process
    append(shards / "train-00.tar", {"x.jpg": b""})
    with pytest.raises(RequestError, match=r"train-00.tar has changed since it was opened"):
        train.read(0)


def test_a_tar_that_is_gone_is_said_when_it_is_read(shards):
    train = open_splits(str(shards)).train
    byte_ranges._open.cache_clear()
    (shards / "train-00.tar").unlink()
    with pytest.raises(UnreadableImageError, match="No such file"):
        train.read(0)


def test_photographs_in_a_tar_are_those_of_the_folder(shared_data, tmp_path):
    folder = open_labeled(str(shared_data / "hymenoptera"))
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(shared_data / "hymenoptera" / "val", "val")
    source = open_labeled(str(tmp_path / "val.tar"))
    assert source.classes == folder.classes
    images = {source.read(i): source.labels[i] for i in range(len(source))}
    assert images == {folder.read(i): folder.labels[i] for i in range(len(folder))}


@pytest.mark.slow
def test_workers_read_the_same_batches(shards):
    train = open_splits(str(shards)).train
    here, there = (list(load_batches(train, TINY, batch_size=4, workers=n)) for n in (0, 2))
    for batch, reference in zip(there, here, strict=True):
        np.testing.assert_array_equal(batch.inputs, reference.inputs)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04junk", b"\x80\x04N."])
def test_a_damaged_index_is_made_again(shards, tmp_path, data):
    digest = open_splits(str(shards)).train.digest
    for path in (tmp_path / "cache" / "indexes").iterdir():
        path.write_bytes(data)
    assert open_splits(str(shards)).train.digest == digest


def test_no_cache_folder_is_needed(shards, monkeypatch):
    monkeypatch.setenv("TLJAX_CACHE", "/proc/none")
    assert len(open_splits(str(shards)).train) == 20


def test_resuming_in_the_middle_of_an_epoch_is_exact(shards):
    train = open_splits(str(shards)).train
    whole = list(load_batches(train, TINY, batch_size=4, seed=1, epoch=2))
    rest = list(load_batches(train, TINY, batch_size=4, seed=1, epoch=2, start=3))
    for batch, reference in zip(rest, whole[3:], strict=True):
        np.testing.assert_array_equal(batch.inputs, reference.inputs)
        np.testing.assert_array_equal(batch.targets, reference.targets)


def test_processes_read_their_own_rows(shards):
    train = open_splits(str(shards)).train
    whole = next(load_batches(train, TINY, batch_size=4))
    parts = [next(load_batches(train, TINY, batch_size=4, shard=(i, 2))) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate([part.inputs for part in parts]), whole.inputs)


def test_examples_are_pickled_without_opening_files(shards):
    train = open_splits(str(shards)).train
    train.read(0)
    copy = pickle.loads(pickle.dumps(train.examples, protocol=5))
    assert [copy[i] for i in (0, 19)] == [jpeg(0), jpeg(19)]


def test_reading_imports_no_jax():
    names = ("byte_ranges", "array_records", "tf_examples", "hf_images")
    modules = ", ".join(f"tljax.data.{name}" for name in names)
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_byte_strings_are_a_sequence():
    strings = ByteStrings.of([b"a", b"", b"bcd"])
    assert [*strings] == strings.tolist() == [b"a", b"", b"bcd"]
    assert strings[-1] == b"bcd"
    assert strings[1:].tolist() == [b"", b"bcd"]
    assert strings[::-1].tolist() == [b"bcd", b"", b"a"]
    assert strings[3:].tolist() == []
    assert ByteStrings.concatenate([strings, strings[1:]]).tolist()[3:] == [b"", b"bcd"]
    with pytest.raises(IndexError):
        strings[3]


def test_heic_photos_are_examples_that_cannot_be_read_as_in_a_folder(tmp_path):
    heic = b"\0\0\0\x18ftypheic" + bytes(99)
    tar = write_tar(tmp_path / "a.tar", {**examples(range(3)), "7.HEIC": heic, "7.cls": b"1"})
    source, skipped = open_labeled(str(tar)), {}
    list(load_batches(source, TINY, batch_size=4, skipped=skipped))
    assert skipped == {3: "a HEIC photo, which Pillow cannot read: convert it to JPEG"}
