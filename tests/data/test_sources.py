"""Sources: which files are examples, which split they are in, and which errors are raised."""

import contextlib
import hashlib
import io
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from servers import Server

from tljax.data.examples import (
    Source,
    find_ambiguous_names,
    match_classes,
    select,
)
from tljax.data.folders import open_folder, open_images
from tljax.data.sources import has_validation, open_labeled, open_splits
from tljax.data.splits import split_source
from tljax.runtime.errors import RequestError, UnreadableImageError
from tljax.runtime.files import mark_output
from tljax.runtime.settings import Kind
from tljax.runtime.task import Task


def write(root: Path, *files: str) -> Path:
    """Write files whose content is their name; a name that ends in / is an empty folder."""
    for name in files:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(name.encode())
    return root


def in_memory(files: list[bytes], labels: list[int], classes: str = "ab") -> Source:
    names = [repr(content) for content in files]
    return Source(files, np.array(labels, np.int32), tuple(classes), names)


def fraction(content: bytes) -> float:
    return int(hashlib.sha256(content).hexdigest()[:12], 16) / 16**12


def contents(source: Source) -> list[bytes]:
    return [bytes(source.read(i)) for i in range(len(source))]


def by_name(source: Source) -> list[tuple[str, str]]:
    return [
        (name, source.classes[label])
        for name, label in zip(source.names, source.labels, strict=True)
    ]


def test_class_folders_are_sorted_nested_and_read_whatever_the_extension(tmp_path):
    write(
        tmp_path,
        "wasps/1.jpg",
        "ants/deep/er/x.png",
        "ants/b.JPG",
        "ants/é",
        "ants/a.txt",
        "ants/.hidden",
        "ants/.folder/y.jpg",
        "ants/Thumbs.db",
        "ants/desktop.ini",
        "__MACOSX/ants/._b.jpg",
        ".git/config",
        "README.md",
    )
    source = open_folder(tmp_path)
    assert source.classes == ("ants", "wasps")
    assert [Path(name).relative_to(tmp_path).as_posix() for name in source.names] == [
        "ants/a.txt",
        "ants/b.JPG",
        "ants/deep/er/x.png",
        "ants/é",
        "wasps/1.jpg",
    ]
    assert source.labels.tolist() == [0, 0, 0, 0, 1]
    assert source.labels.dtype == np.int32
    assert len(source) == 5
    assert source.read(2) == b"ants/deep/er/x.png"


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test", "Test"])
def test_train_and_val_folders(tmp_path, val):
    write(tmp_path, "train/b/1", "train/a/2", "train/a/3", f"{val}/b/4", f"{val}/a/5", "notes/x")
    train, held_out, notes = open_splits(str(tmp_path))
    assert by_name(train) == [(str(tmp_path / "train" / f), f[0]) for f in ("a/2", "a/3", "b/1")]
    assert by_name(held_out) == [(str(tmp_path / val / f), f[0]) for f in ("a/5", "b/4")]
    assert notes == ()
    assert has_validation(str(tmp_path))
    assert not has_validation(str(tmp_path / "train"))
    assert not has_validation(str(tmp_path / "missing"))
    assert not has_validation("digits")


def test_val_is_relabeled_by_name_and_may_lack_classes(tmp_path):
    write(tmp_path, "train/a/1", "train/b/2", "train/c/3", "val/c/4", "val/a/")
    _, val, notes = open_splits(str(tmp_path))
    assert val.classes == ("a", "b", "c")
    assert val.labels.tolist() == [2]
    assert notes == ("1 of 3 classes not in the data: b", "1 of 3 classes without an example: a")


def test_content_split_follows_the_hash(tmp_path):
    write(tmp_path, *(f"{c}/{i}" for c in "ab" for i in range(50)))
    train, val, notes = open_splits(str(tmp_path), val_fraction=0.3)
    everything = {f"{c}/{i}".encode() for c in "ab" for i in range(50)}
    assert set(contents(val)) == {content for content in everything if fraction(content) < 0.3}
    assert set(contents(train)) == everything - set(contents(val))
    assert notes == (f"split by content: {len(train)} to train on, {len(val)} to validate on",)


def test_without_validation_the_training_images_are_validated_on_with_a_note(tmp_path):
    write(tmp_path, "a/1", "b/2")
    train, val, notes = open_splits(str(tmp_path), val_fraction=0)
    assert sorted(contents(train)) == sorted(contents(val)) == [b"a/1", b"b/2"]
    assert notes == ("no validation images: metrics are computed on the 2 training images",)
    with pytest.raises(RequestError, match="--val-fraction 0"):
        open_splits(str(tmp_path), val_fraction=1e-9)


CONTENTS = st.lists(st.binary(max_size=3), max_size=30)


@settings(max_examples=30, deadline=None)
@given(first=CONTENTS, more=CONTENTS, share=st.floats(0.1, 0.9))
def test_adding_files_moves_no_example_to_the_other_split(tmp_path_factory, first, more, share):
    root = tmp_path_factory.mktemp("split")
    write(root, *(f"{c}/seed{i}" for c in "ab" for i in range(40)))

    def sides(files: list[bytes]) -> dict[bytes, set[str]]:
        for i, content in enumerate(files):
            (root / "ab"[i % 2] / f"{i}").write_bytes(content)
        where: dict[bytes, set[str]] = {}
        for side in ("train", "val"):
            for content in contents(getattr(open_splits(str(root), val_fraction=share), side)):
                where.setdefault(content, set()).add(side)
        return where

    before = sides(first)
    after = sides(first + more)
    assert all(len(side) == 1 for side in after.values())  # copies are in one split
    assert {content: after[content] for content in before} == before


def test_digits_equal_scikit_learns():
    from sklearn.datasets import load_digits

    train, val, _ = open_splits("digits")
    images, targets = load_digits(return_X_y=True)
    seen = []
    for source in (train, val):
        assert source.classes == tuple("0123456789")
        for i, name in enumerate(source.names):
            index = int(name.removeprefix("digit "))
            seen.append(index)
            pixels = source.read(i)
            assert isinstance(pixels, np.ndarray)
            assert pixels.shape == (8, 8, 3)
            assert pixels.dtype == np.uint8
            assert source.labels[i] == targets[index]
            expected = images[index].reshape(8, 8, 1) * 255 / 16
            assert (abs(pixels - expected) <= 0.5).all()
    assert sorted(seen) == list(range(1797))
    assert 0.17 < len(val) / 1797 < 0.23
    assert train.names[0] == "digit 0000"


def test_digits_name_scikit_learn_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(RequestError, match=r'pip install "tljax\[demo\]"$'):
        open_splits("digits")


def test_a_folder_of_files_has_no_labels(tmp_path):
    source = open_folder(write(tmp_path, "b.jpg", "a.jpg", ".hidden"))
    assert source.classes == ()
    assert source.labels.tolist() == [-1, -1]
    assert [Path(name).name for name in source.names] == ["a.jpg", "b.jpg"]


def test_a_folder_among_images_is_expanded_to_its_files(tmp_path):
    write(tmp_path, "b.jpg", "more/c.jpg", "more/deep/a.jpg", "more/.hidden")
    source = open_images([tmp_path / "more", tmp_path / "b.jpg"])
    assert contents(source) == [b"more/c.jpg", b"more/deep/a.jpg", b"b.jpg"]


def test_files_keep_their_order(tmp_path):
    write(tmp_path, "b.jpg", "a.jpg")
    source = open_images([tmp_path / "b.jpg", str(tmp_path / "a.jpg")])
    assert contents(source) == [b"b.jpg", b"a.jpg"]
    assert source.labels.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("files", "spec", "message"),
    [
        ([], "digts", "digts is neither a folder, a table, shards nor digits, tfds:NAME"),
        ([], "./tfds:mnist", "./tfds:mnist is neither a folder, a table, shards nor"),
        (["hymenoptera/x"], "hymenopterra/train", "packed:FOLDER; did you mean .*hymenoptera\\?"),
        (["file"], "file", "file is a file: choose a folder"),
        (["x/1.jpg"], "x", "x has no class folders: put the images of each class into a folder"),
        (["x/a/1", "x/a/2"], "x", "x has one class folder, a: training needs two or more"),
        (["x/ants/1", "x/wasps/"], "x", "class 'wasps' in .*x has no file: add images or rem"),
        (["x/train/a/1", "x/train/b/", "x/val/a/1"], "x", "class 'b' in .*train has no file"),
        (["x/train/a/1", "x/val/a/1"], "x", "train has one class folder, a"),
        (["x/a/", "x/b/"], "x", "x has no file"),
        (
            ["x/train/a/1", "x/train/b/1", "x/val/b/1", "x/val/c/1", "x/val/d/1"],
            "x",
            "val has classes without training images, c, d: add them",
        ),
        (["x/train/a/1", "x/train/b/1", "x/val/"], "x", "val has no class folders"),
    ],
)
def test_data_sets_that_cannot_be_trained_on_are_refused_in_one_line(
    tmp_path, monkeypatch, files, spec, message
):
    monkeypatch.chdir(write(tmp_path, *files))
    with pytest.raises(RequestError, match=message) as error:
        open_splits(spec)
    assert "\n" not in str(error.value)


def test_a_split_by_content_that_leaves_a_part_without_examples_is_refused(tmp_path):
    names = [f"{c}/{i}" for c in "ab" for i in range(30)]
    in_val = [name for name in names if fraction(name.encode()) < 0.2]
    write(tmp_path / "no_val", *(name for name in names if name not in in_val))
    with pytest.raises(RequestError, match=r"no_val: none of the .* images falls into the val"):
        open_splits(str(tmp_path / "no_val"))
    write(tmp_path / "lost", *(name for name in names if name in in_val or name[0] == "b"))
    with pytest.raises(RequestError, match=r"lost: all images of a fall into the validation"):
        open_splits(str(tmp_path / "lost"))
    write(tmp_path / "unseen", *(name for name in names if name not in in_val or name[0] == "b"))
    notes = open_splits(str(tmp_path / "unseen")).notes
    assert notes[1:] == ("no validation image of a",)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_the_range_of_val_fraction_is_checked(share):
    with pytest.raises(RequestError, match="--val-fraction"):
        open_splits("digits", val_fraction=share)


@pytest.mark.parametrize(
    ("open_", "name", "message"),
    [
        (open_folder, "missing", "missing does not exist"),
        (open_folder, "ant", r"ant does not exist; did you mean .*ants\?"),
        (open_folder, "ants/1", "1 is a file: choose a folder"),
        (open_folder, "empty", "empty has no file"),
        (open_folder, "split", "has a training and a validation folder: choose .*train or .*val"),
        (lambda path: open_images([path]), "ants/11", r"11 does not exist; did you mean .*1\?"),
    ],
)
def test_folders_that_cannot_be_opened_are_refused(tmp_path, open_, name, message):
    write(tmp_path, "ants/1", "empty/", "split/train/a/1", "split/val/a/1")
    with pytest.raises(RequestError, match=message):
        open_(tmp_path / name)


def test_links_are_followed_but_not_in_cycles(tmp_path):
    write(tmp_path, "elsewhere/1", "x/ants/2", "x/wasps/deep/3")
    (tmp_path / "x/bees").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "x/ants/4").symlink_to(tmp_path / "elsewhere/1")
    (tmp_path / "x/ants/up").symlink_to(tmp_path / "x")
    (tmp_path / "x/ants/far_up").symlink_to(tmp_path)
    (tmp_path / "x/ants/self").symlink_to(tmp_path / "x/ants/self")
    (tmp_path / "x/wasps/deep/back").symlink_to(tmp_path / "x/wasps")
    source = open_folder(tmp_path / "x")
    assert [Path(name).relative_to(tmp_path / "x").as_posix() for name in source.names] == [
        "ants/2",
        "ants/4",
        "ants/self",
        "bees/1",
        "wasps/deep/3",
    ]
    with pytest.raises(UnreadableImageError, match="cannot be read: Too many levels"):
        source.read(2)


def test_a_broken_link_is_an_example_that_cannot_be_read(tmp_path):
    write(tmp_path, "a/1", *(f"b/{i}" for i in range(20)))
    (tmp_path / "a/gone").symlink_to(tmp_path / "nowhere")
    source = open_folder(tmp_path)
    assert len(source) == 22
    with pytest.raises(UnreadableImageError, match="cannot be read: No such file"):
        source.read(1)
    assert open_splits(str(tmp_path)).train.digest  # it can still be split and hashed


IGNORED = (
    "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "lost+found",
    ".ipynb_checkpoints", ".git", ".Trash-1000", "@Recycle", ".@__thumb", "@__thumb", ".thumbnails",
    ".picasaoriginals", ".dtrash", "CVS", "#snapshot", "Icon\r",
)  # fmt: skip
IGNORED_FILES = ("Thumbs.db", ".DS_Store", "._1.jpg", "desktop.ini", "ehthumbs.db")


@pytest.mark.parametrize("change_case", [str, str.lower, str.upper])
def test_files_and_folders_of_operating_systems_are_ignored(tmp_path, change_case):
    write(tmp_path, "ants/1.jpg", "wasps/2.jpg")
    for folder in ("", "ants/", "ants/deep/"):
        write(tmp_path, *(f"{folder}{change_case(name)}/a/3.jpg" for name in IGNORED))
        write(tmp_path, *(f"{folder}{change_case(name)}" for name in IGNORED_FILES))
    source = open_folder(tmp_path)
    assert source.classes == ("ants", "wasps")
    assert contents(source) == [b"ants/1.jpg", b"wasps/2.jpg"]
    assert contents(open_images([tmp_path])) == [b"ants/1.jpg", b"wasps/2.jpg"]
    write(tmp_path / "split", "train/@eaDir/a/1", "train/a/1", "train/b/2", "VAL/#recycle/1")
    write(tmp_path / "split", "VAL/a/1")
    assert open_splits(str(tmp_path / "split")).val.classes == ("a", "b")


def test_ordinary_names_similar_to_ignored_ones_are_classes(tmp_path):
    names = ("@user", "#1", "recycled", "recycle bin", "thumbs", "trash", "lost", "snapshot")
    write(tmp_path, *(f"{name}/1.jpg" for name in names))
    assert sorted(open_folder(tmp_path).classes) == sorted(names)


def test_output_folders_are_ignored_unless_named(tmp_path):
    write(tmp_path, "ants/1.jpg", "wasps/2.jpg", "empty/", "runs/1/best/3.png", "runs/2/eval/4.png")
    write(tmp_path, "old/runs/1/5.png", "ants/out/6.png", "out/7.png")
    for folder in ("runs/1", "runs/2", "old/runs/1", "ants/out", "out"):
        mark_output(tmp_path / folder)
    source = open_folder(tmp_path)
    assert source.classes == ("ants", "empty", "wasps")
    assert contents(source) == contents(open_images([tmp_path])) == [b"ants/1.jpg", b"wasps/2.jpg"]
    assert contents(open_images([tmp_path / "out"])) == [b"out/7.png"]
    assert contents(open_folder(tmp_path / "runs" / "1")) == [b"runs/1/best/3.png"]
    write(tmp_path, "runs/mine.jpg")  # not written by tljax
    assert open_folder(tmp_path).classes == ("ants", "empty", "runs", "wasps")


def test_a_run_of_an_earlier_version_is_detected_by_its_files(tmp_path):
    run = [f"runs/1/{name}" for name in ("config.json", "split.csv", "metrics.jsonl", "best/1")]
    write(tmp_path, "ants/config.json", "wasps/split.csv", *run)
    assert open_folder(tmp_path).classes == ("ants", "wasps")


def test_an_output_folder_beside_train_is_ignored(tmp_path):
    write(tmp_path, "train/a/1", "train/b/2", "runs/1/best/3")
    mark_output(tmp_path / "runs" / "1")
    assert open_splits(str(tmp_path), val_fraction=0).train.classes == ("a", "b")


@pytest.mark.parametrize(
    "beside",
    [
        (),
        ("labels.csv", "sample_submission.csv"),
        ("test/1.jpg", "test/2.jpg", "labels.csv"),
        ("test/unknown/1.jpg",),
        ("Test/",),
        ("test/1.jpg", "notes/1.txt"),
    ],
)
def test_a_training_folder_without_a_validation_folder_is_split(tmp_path, beside):
    inside = [f"train/{c}/{i}" for c in "ab" for i in range(30)]
    write(tmp_path, *inside, *beside)
    train, val, notes = open_splits(str(tmp_path))
    alone = open_splits(str(tmp_path / "train"))
    assert train.classes == ("a", "b")
    assert (train.names, val.names) == (alone.train.names, alone.val.names)
    note = f"{tmp_path / 'train'} is split, as no folder beside it has its classes"
    assert notes == (note, *alone.notes)
    assert not has_validation(str(tmp_path))
    assert open_folder(tmp_path).names == open_folder(tmp_path / "train").names
    assert len(open_labeled(str(tmp_path))) == 60


def test_val_is_preferred_to_a_test_without_classes(tmp_path):
    write(tmp_path, "train/a/1", "train/b/2", "val/a/3", "test/4")
    train, val, _ = open_splits(str(tmp_path))
    assert (contents(train), contents(val)) == ([b"train/a/1", b"train/b/2"], [b"val/a/3"])
    assert has_validation(str(tmp_path))


def test_train_can_be_the_name_of_a_class(tmp_path):
    write(tmp_path, "train/1.jpg", "car/2.jpg")
    assert open_folder(tmp_path).classes == ("car", "train")


COMPOSED, DECOMPOSED = "h\u00e9ron", "he\u0301ron"  # as on Linux and on macOS


def test_names_are_compared_in_a_normal_form_of_unicode(tmp_path):
    write(tmp_path, f"{DECOMPOSED}/1", "zebra/2", "hf/3")
    source = open_folder(tmp_path)
    assert source.classes == ("hf", COMPOSED, "zebra")  # as the composed names are sorted
    assert contents(source) == [b"hf/3", f"{DECOMPOSED}/1".encode(), b"zebra/2"]
    for form in (COMPOSED, DECOMPOSED):
        matched, notes = match_classes(source, ["zebra", form, "hf"])
        assert (matched.labels.tolist(), notes) == ([2, 1, 0], ())
        assert matched.classes == ("zebra", form, "hf")
        hub = replace(source, classes=("hf", DECOMPOSED, "zebra"))
        assert match_classes(hub, ["zebra", form, "hf"])[0].labels.tolist() == [2, 1, 0]
    assert match_classes(hub, ["hf"])[1] == (
        f"left out 2 examples of unknown classes: {COMPOSED}, zebra",
    )
    network = ["zebra", COMPOSED, "hf", DECOMPOSED]
    assert find_ambiguous_names(source.classes, network) == {COMPOSED: [1, 3]}
    write(tmp_path / "split", f"train/{COMPOSED}/1", "train/b/2", f"val/{DECOMPOSED}/3")
    assert open_splits(str(tmp_path / "split")).val.labels.tolist() == [1]


def test_two_folders_of_one_name_are_one_class(tmp_path):
    write(tmp_path, "z/4", f"{DECOMPOSED}/1", f"{COMPOSED}/2", "b/3")
    source = open_folder(tmp_path)
    assert source.classes == ("b", COMPOSED, "z")
    assert source.labels.tolist() == [0, 1, 1, 2]
    assert source.labels.dtype == np.int32


def test_pipes_and_devices_are_never_read(tmp_path):
    write(tmp_path, "a/1")
    os.mkfifo(tmp_path / "a/pipe")
    (tmp_path / "a/link_to_pipe").symlink_to(tmp_path / "a/pipe")
    (tmp_path / "a/link_to_device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as unix, contextlib.chdir(tmp_path / "a"):
        unix.bind("socket")
    assert contents(open_folder(tmp_path)) == contents(open_images([tmp_path])) == [b"a/1"]
    named = open_images([tmp_path / "a/pipe", "/dev/zero"])
    for index in range(2):
        with pytest.raises(UnreadableImageError, match="not a file but a folder, pipe or device"):
            named.read(index)


def test_a_very_large_file_is_not_read(tmp_path):
    write(tmp_path, "a/1")
    with (tmp_path / "a/film.mp4").open("wb") as file:
        file.truncate(2**40)
    source = open_folder(tmp_path)
    with pytest.raises(UnreadableImageError, match=r"larger than 512 MiB$"):
        source.read(1)
    assert source.digest


def test_a_path_may_begin_with_a_tilde_and_end_with_a_slash(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(write(tmp_path, "data/a/1", "data/b/2")))
    for spec in ("~/data", "~/data/"):
        assert open_splits(spec, val_fraction=0).train.classes == ("a", "b")
        assert open_folder(spec).classes == open_labeled(spec).classes == ("a", "b")
        assert len(open_images([spec])) == 2
    for spec in ("~nobody/data", "x" * 300):
        with pytest.raises(RequestError, match="is neither a folder, a table, shards nor digits"):
            open_splits(spec)
        with pytest.raises(RequestError, match="does not exist"):
            open_images([spec])
        with pytest.raises(RequestError, match=r"does not exist|too long"):
            open_labeled(spec)
        assert not has_validation(spec)


@pytest.mark.parametrize(
    "address", ["ftp://127.0.0.1/x.jpg", "HTTP://[::1", "file:///x.jpg", "http://127.0.0.1:9/x.jpg"]
)
def test_a_url_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, address):
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path))
    with pytest.raises(RequestError, match=r"could not fetch .*; fetch it on another machine"):
        open_images([address])


def test_only_images_from_a_url_are_cached(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path / "cache"))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        photograph = io.BytesIO()
        Image.new("RGB", (9, 9)).save(photograph, "JPEG")
        server.body = photograph.getvalue()
        source = open_images([server.url])
        assert contents(source) == [server.body]
        assert source.names == [server.url]
        server.body = b"<html>moved"
        with pytest.raises(RequestError, match="an HTML page, not an image"):
            open_images([server.url])
        assert contents(source) == [photograph.getvalue()]
        server.shutdown()
        thread.join()
    assert contents(open_images([server.url])) == [photograph.getvalue()]
    assert "the copy of 20" in capsys.readouterr().err


def test_names_that_are_not_utf8_are_printable(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    Path(os.fsdecode(folder)).mkdir()
    path = Path(os.fsdecode(folder + b"/\xff.jpg"))
    try:
        path.write_bytes(b"pixels")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    source = open_folder(tmp_path)
    assert source.classes == (r"caf\xe9",)
    assert source.names[0].endswith(r"caf\xe9/\xff.jpg")
    source.names[0].encode()
    assert source.read(0) == b"pixels"


def test_digest_changes_with_contents_labels_order_and_classes_only(tmp_path):
    source = in_memory([b"1", b"2", b"3"], [0, 1, 1])
    renamed = replace(source, names=["x", "y", "z"])
    assert renamed.digest == source.digest
    assert in_memory([b"1", b"2", b"3"], [0, 1, 1]).digest == source.digest
    others = [
        in_memory([b"1", b"2", b"4"], [0, 1, 1]),
        in_memory([b"1", b"2", b"3"], [0, 1, 0]),
        in_memory([b"1", b"2", b"3"], [0, 1, -1]),
        in_memory([b"1", b"2", b"3"], [0, 1, 1], "ac"),
        in_memory([b"1", b"2", b"3"], [0, 1, 1], "abc"),
        in_memory([b"1", b"3", b"2"], [0, 1, 1]),
        in_memory([b"1", b"2"], [0, 1]),
        select(source, [1, 0, 2]),
        select(source, []),
    ]
    assert len({source.digest, *(other.digest for other in others)}) == 1 + len(others)

    write(tmp_path, "a/1", "b/2")
    before = open_folder(tmp_path).digest
    (tmp_path / "a/1").rename(tmp_path / "a/0")
    assert open_folder(tmp_path).digest == before
    (tmp_path / "a/0").write_bytes(b"new")
    assert open_folder(tmp_path).digest != before


def test_digest_depends_on_the_shape_of_images():
    pixels = np.arange(24, dtype=np.uint8)
    tall = Source(pixels.reshape(1, 4, 2, 3), np.zeros(1, np.int32), ("a",), ["x"])
    wide = Source(pixels.reshape(1, 2, 4, 3), np.zeros(1, np.int32), ("a",), ["x"])
    assert tall.digest != wide.digest


def test_hashing_covers_more_than_one_chunk():
    files = [str(i).encode() for i in range(600)]
    source = in_memory(files, [0] * 600)
    changed = in_memory([*files[:-1], b"new"], [0] * 600)
    assert source.digest != changed.digest
    assert select(changed, range(599)).digest == select(source, range(599)).digest


def test_select_composes():
    source = select(in_memory([b"0", b"1", b"2", b"3"], [0, 1, 0, 1]), [3, 2, 0])
    subset = select(source, np.array([2, 0]))
    assert contents(subset) == [b"0", b"3"]
    assert subset.labels.tolist() == [0, 1]
    assert list(subset.names) == ["b'0'", "b'3'"]
    assert subset.classes == ("a", "b")


def test_classes_are_matched_by_name():
    source = in_memory([b"0", b"1", b"2", b"3", b"4"], [0, 1, 2, 3, 1], "abcx")
    matched, notes = match_classes(source, ["d", "c", "b", "a"])
    assert matched.classes == ("d", "c", "b", "a")
    assert contents(matched) == [b"0", b"1", b"2", b"4"]
    assert matched.labels.tolist() == [3, 2, 1, 2]
    assert matched.labels.dtype == np.int32
    assert notes == (
        "1 of 4 classes not in the data: d",
        "left out 1 examples of unknown classes: x",
    )


def test_classes_with_the_same_name_are_matched_in_order():
    source = in_memory([b"0", b"1"], [0, 1], ["crane", "heron"])
    matched, notes = match_classes(source, ["heron", "crane", "stork", "crane"])
    assert matched.labels.tolist() == [1, 0]
    note = "2 classes are called crane (1 and 3): each of its images is labeled with the most"
    assert notes == (f"{note} probable one", "1 of 4 classes not in the data: stork")
    source = in_memory([b"0", b"1", b"2"], [0, 1, 2], ["crane", "heron", "crane"])
    matched, notes = match_classes(source, ["heron", "crane", "stork", "crane"])
    assert (matched.labels.tolist(), notes[1:]) == ([1, 0, 3], ())
    matched, _ = match_classes(source, ["heron", "crane"])
    assert matched.labels.tolist() == [1, 0, 1]


def test_classes_without_an_example_are_named():
    source = in_memory([b"0"], [1], "abx")
    _, notes = match_classes(source, "ab")
    assert notes == (
        "1 of 2 classes without an example: a",
        "left out 0 examples of unknown classes: x",
    )


@given(
    data=st.permutations("abcdef"),
    network=st.permutations("abcdef"),
    known=st.integers(1, 6),
    labels=st.lists(st.integers(-1, 5), min_size=1),
)
def test_matching_keeps_the_class_name_of_every_example(data, network, known, labels):
    source = in_memory([str(i).encode() for i in range(len(labels))], labels, "".join(data))
    expected = [
        (str(i).encode(), data[label])
        for i, label in enumerate(labels)
        if label >= 0 and data[label] in network[:known]
    ]
    if not expected:
        with pytest.raises(RequestError):
            match_classes(source, network[:known])
        return
    matched, _ = match_classes(source, network[:known])
    assert [
        (matched.read(i), matched.classes[label]) for i, label in enumerate(matched.labels)
    ] == expected


def with_columns(labels: list[list[float]], names: str, kind: Kind = "multilabel") -> Source:
    files = [str(index).encode() for index in range(len(labels))]
    values = np.array(labels, np.float32)
    return Source(files, values, tuple(names), [*map(repr, files)], task=Task(kind))


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_labels_and_numbers_are_matched_by_name(kind):
    source = with_columns([[1, 0, np.nan], [0, 1, 1]], "abc", kind)
    matched, notes = match_classes(source, ["c", "x", "a"])
    assert matched.classes == ("c", "x", "a")
    expected = np.float32([[np.nan, np.nan, 1], [1, np.nan, 0]])
    np.testing.assert_array_equal(matched.labels, expected)
    assert matched.labels.dtype == np.float32
    assert len(matched) == 2
    word = "numbers" if kind == "regression" else "labels"
    assert notes == (
        f"1 of 3 {word} not in the data: x",
        f"left out {word} that the network does not have: b",
    )
    assert match_classes(source, "abc")[1] == ()
    np.testing.assert_array_equal(match_classes(source, "abc")[0].labels, source.labels)
    with pytest.raises(RequestError, match=f"none of the {word} in common: the data has a, b, c;"):
        match_classes(source, "xyz")


@given(data=st.permutations("abcdef"), network=st.permutations("abcdef"), known=st.integers(1, 6))
def test_matching_keeps_the_column_of_every_label(data, network, known):
    source = with_columns([[ord(name) for name in data]], "".join(data))
    matched, notes = match_classes(source, network[:known])
    assert matched.labels[0].tolist() == [ord(name) for name in network[:known]]
    assert len(notes) == (known < 6)


def test_ordered_classes_are_matched_as_classes_and_stay_ordered():
    source = replace(in_memory([b"0", b"1", b"2"], [0, 1, 2], "abx"), task=Task("ordinal"))
    matched, _ = match_classes(source, "ba")
    assert (matched.labels.tolist(), matched.task.kind) == ([1, 0], "ordinal")


def test_a_split_by_content_notes_labels_without_an_example_and_says_nothing_of_numbers():
    names = [str(index) for index in range(60)]
    files = [name.encode() for name in names]
    in_val = np.array([fraction(file) < 0.3 for file in files])
    labels = np.stack([in_val, ~in_val, np.zeros(60)], 1).astype(np.float32)
    source = Source(files, labels, tuple("abc"), names, task=Task("multilabel"))
    train, val, notes = split_source(source, "x", 0.3)
    assert notes[1:] == ("no training image of a", "no validation image of b")
    assert (len(train), len(val)) == ((~in_val).sum(), in_val.sum())
    numbers = replace(source, task=Task("regression"))
    assert len(split_source(numbers, "x", 0.3).notes) == 1
    with pytest.raises(RequestError, match="x: none of the"):
        split_source(select(numbers, np.flatnonzero(~in_val)), "x", 0.3)
    with pytest.raises(RequestError, match=r"x: all \d+ images fall into the validation fraction"):
        split_source(select(numbers, np.flatnonzero(in_val)), "x", 0.3)


def test_a_step_of_a_scale_that_no_example_has_is_not_missed():
    source = in_memory([str(i).encode() for i in range(60)], [0, 2] * 30, "abc")
    assert len(split_source(replace(source, task=Task("ordinal")), "x", 0.3).notes) == 1


def test_digests_of_other_tasks_and_unknown_labels_differ():
    sources = [
        with_columns([[1, 0], [0, 1]], "ab"),
        with_columns([[1, 0], [0, 1]], "ab", "regression"),
        with_columns([[1, np.nan], [0, 1]], "ab"),
        with_columns([[np.nan, 0], [0, 1]], "ab"),
        with_columns([[1, 0], [0, 0]], "ab"),
    ]
    ordered = in_memory([b"0"], [0])
    sources += [ordered, replace(ordered, task=Task("ordinal"))]
    weighted = replace(ordered, extra={"weight": np.ones(1, np.float32)})
    sources += [weighted, replace(ordered, extra={"weight": np.zeros(1, np.float32)})]
    assert len({source.digest for source in sources}) == len(sources)


def test_an_error_about_no_common_class_lists_both_lists():
    source = in_memory([b"0"], [0], "abcdefgh")
    with pytest.raises(RequestError) as error:
        match_classes(source, ["ants", "bees"])
    assert str(error.value) == (
        "the data and the network have no class in common: the data has a, b, c, d, e and 3 more;"
        " the network has ants, bees"
    )
    with pytest.raises(RequestError, match="the data has none"):
        match_classes(in_memory([b"0"], [-1], ""), ["ants"])


def test_real_folders_are_opened(shared_data):
    train, val, notes = open_splits(str(shared_data / "hymenoptera"))
    assert train.classes == val.classes == ("ants", "bees")
    # torchvision counts 244: it goes by extension and leaves out imageNotFound.gif.
    assert (len(train), len(val), notes) == (245, 153, ())


def test_sources_and_decode_do_not_import_grain():
    code = "import sys, tljax.data.sources, tljax.data.decode; sys.exit('grain' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
