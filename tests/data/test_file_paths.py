"""Files as examples: their paths, names, sizes and what identifies them."""

import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tljax.data.examples import Source, select, with_hashes
from tljax.data.files import MISSING, Files, Names, Subset
from tljax.data.folders import open_folder, open_images
from tljax.runtime.errors import UnreadableImageError


def write(root: Path, *files: str) -> Path:
    """Write files whose content is their name."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


@pytest.fixture
def folder(tmp_path):
    """Write four images of two classes."""
    return write(tmp_path / "data", "a/1", "a/2", "b/3", "b/4")


def test_files_are_read_in_their_order(folder):
    files = Files.from_paths([folder / "b/3", str(folder / "a/1")])
    assert [files[0], files[1], len(files)] == [b"b/3", b"a/1", 2]
    with pytest.raises(IndexError):
        files[2]


def test_paths_below_the_root_are_stored_without_it(folder):
    files = Files.from_paths([folder / "a/1", folder / "b/3"], str(folder))
    assert files.paths.take(np.array([1, 0])) == [b"b/3", b"a/1"]
    assert files.paths.data.nbytes == 6
    elsewhere = Files.from_paths([folder / "a/1", "elsewhere"], str(folder))
    assert (elsewhere.root, elsewhere.path(1)) == ("", "elsewhere")


def test_a_path_that_is_not_utf8_is_read_and_named(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    Path(os.fsdecode(path)).write_bytes(b"pixels")
    files = pickle.loads(pickle.dumps(Files.from_paths([os.fsdecode(path)], str(tmp_path))))
    assert files[0] == b"pixels"
    assert Names(files)[0] == f"{tmp_path}/caf\\xe9.jpg"
    assert files.look_up(np.arange(1), "st_size").item() == 6


def test_names_behave_as_a_tuple_of_text(folder):
    names = open_folder(folder).names
    expected = tuple(f"{folder}/{name}" for name in ("a/1", "a/2", "b/3", "b/4"))
    assert (*names,) == expected
    assert names == expected
    assert expected == names
    assert names != expected[:3]
    assert names != expected[0]
    assert (names[-1], names[1:3], len(names)) == (expected[-1], expected[1:3], 4)
    assert (names.index(expected[2]), expected[3] in names) == (2, True)
    assert repr(names) == repr([*expected])
    with pytest.raises(IndexError):
        names[4]


def test_a_selection_of_a_selection_names_its_files(folder):
    source = select(select(open_folder(folder), [3, 2, 0]), np.array([2, 0]))
    assert isinstance(source.names, Names)
    assert [Path(name).name for name in source.names] == ["1", "4"]
    assert [source.read(0), source.read(1)] == [b"a/1", b"b/4"]


def test_files_in_the_working_directory_are_named_without_it(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert open_folder(".").names == open_images(["."]).names == ["a/1", "a/2", "b/3", "b/4"]
    assert open_folder(".").read(3) == b"b/4"


def test_the_sizes_of_missing_files_are_unknown(folder):
    source = open_folder(folder)
    (folder / "a/2").unlink()
    assert source.file_sizes == [3, None, 3, 3]
    files = Files.from_paths([folder / "a/2"])
    assert files.look_up(np.array([0]), "st_ino", "st_dev").tolist() == [[MISSING] * 2]
    assert Source([b"x"], np.zeros(1, np.int32), ("a",), ["x"]).file_sizes is None


def identities(path: Path) -> tuple[str, str]:
    source = open_folder(path)
    return source.fingerprint, source.cache_key


def rename(folder: Path) -> None:
    (folder / "a/2").rename(folder / "a/0")


def grow(folder: Path) -> None:
    (folder / "a/2").write_text("a/2 and more")


def relabel(folder: Path) -> None:
    (folder / "a/2").rename(folder / "b/2")


def rename_class(folder: Path) -> None:
    (folder / "a").rename(folder / "aa")


@pytest.mark.parametrize("change", [rename, grow, relabel, rename_class])
def test_another_path_size_or_label_changes_both_identities(folder, change):
    before = identities(folder)
    change(folder)
    assert not {*before} & {*identities(folder)}


def test_other_labels_classes_and_weights_change_both_identities(folder):
    source = open_folder(folder)
    others = [
        replace(source, labels=source.labels[::-1].copy()),
        replace(source, classes=("a", "c")),
        replace(source, extra={"weight": np.ones(4, np.float32)}),
        replace(source, groups=np.arange(4)),
        replace(source, targets={"x": np.zeros(4)}),
        select(source, [1, 0, 2, 3]),
        select(source, [0, 1, 2]),
    ]
    assert len({x for one in (source, *others) for x in (one.fingerprint, one.cache_key)}) == 16


def test_the_fingerprint_of_a_copied_or_moved_folder_is_the_same(folder, tmp_path):
    fingerprint, cache_key = identities(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert identities(tmp_path / "copy")[0] == fingerprint
    assert identities(tmp_path / "copy")[1] != cache_key
    folder.rename(tmp_path / "moved")
    assert identities(tmp_path / "moved") == (fingerprint, cache_key)


def touch(folder: Path) -> None:
    os.utime(folder / "a/2", (1, 1))


def rewrite(folder: Path) -> None:
    (folder / "a/2").write_text("2/a")


def rewrite_and_hide_it(folder: Path) -> None:
    info = (folder / "a/2").stat()
    rewrite(folder)
    os.utime(folder / "a/2", ns=(info.st_atime_ns, info.st_mtime_ns))


@pytest.mark.parametrize("change", [touch, rewrite, rewrite_and_hide_it])
def test_a_file_written_in_place_changes_the_cache_key_only(folder, change):
    fingerprint, cache_key = identities(folder)
    change(folder)
    assert identities(folder)[0] == fingerprint
    assert identities(folder)[1] != cache_key


def test_identities_read_no_file(folder, monkeypatch):
    source = open_folder(folder)
    monkeypatch.setattr(Files, "__getitem__", lambda *_: pytest.fail("a file was read"))
    assert source.fingerprint != source.cache_key


def test_images_in_memory_are_identified_by_their_content():
    source = Source(np.zeros((2, 3, 3, 3), np.uint8), np.zeros(2, np.int32), ("a",), ["x", "y"])
    assert source.fingerprint == source.cache_key == source.digest


def test_hashes_are_computed_once_and_follow_a_selection(folder, monkeypatch):
    source = open_folder(folder)
    digests = select(source, [2, 0]).digest, select(select(source, [3, 1]), [1]).digest
    hashed = with_hashes(source)
    monkeypatch.setattr(Files, "__getitem__", lambda *_: pytest.fail("a file was read again"))
    assert select(hashed, [2, 0]).digest == digests[0]
    assert select(select(hashed, [3, 1]), [1]).digest == digests[1]


def test_other_examples_in_place_of_hashed_ones_are_hashed(folder):
    hashed = with_hashes(open_folder(folder))
    others = [b"1", b"2", b"3", b"4"]
    assert replace(hashed, examples=others).digest != hashed.digest


def test_a_process_that_decodes_gets_tables_only(folder):
    source = with_hashes(open_folder(folder))
    assert source.fingerprint
    sent = pickle.loads(pickle.dumps(source.examples))
    assert isinstance(sent, Subset)
    assert (sent.hashes, vars(sent.examples).keys()) == (None, {"root", "paths"})
    assert sent[3] == b"b/4"


def test_files_need_no_jax():
    code = "import sys, tljax.data.files; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pipe_and_a_missing_file_are_unreadable(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    files = Files.from_paths([tmp_path / "pipe", tmp_path / "gone"])
    for index, reason in enumerate(("not a file but a folder", "cannot be read: No such file")):
        with pytest.raises(UnreadableImageError, match=reason):
            files[index]
