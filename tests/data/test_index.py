"""The index of class folders: remembered, used while no folder has changed, and no longer."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tljax.data import index
from tljax.data.folders import open_folder
from tljax.data.index import index_classes
from tljax.runtime.files import mark_output

LONG_AGO = 10**18  # ns


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Write a folder that was last changed long ago; every index is remembered."""
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "FEWEST", 1)
    for name in ("ants/1", "ants/deep/2", "bees/3"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return age(tmp_path / "data")


def age(folder: Path) -> Path:
    """Let all folders have been changed long ago."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return folder


def listed(folder: Path) -> list[str]:
    files = index_classes(folder).files
    return [os.fsdecode(path) for path in files.paths.take(np.arange(len(files)))]


def remembered(folder: Path) -> list[Path]:
    return [*(folder.parent / "cache").rglob("*.npz")]


def forbid_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "list_folders", lambda *_: pytest.fail("it was listed again"))


def test_an_unchanged_folder_is_not_listed_again(data, monkeypatch):
    first = index_classes(data)
    forbid_listing(monkeypatch)
    second = index_classes(data)
    assert (first.folders, first.files.root) == (second.folders, second.files.root)
    for name in ("counts", "inodes", "links"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), strict=True)
    for name in ("data", "ends"):
        one, other = getattr(first.files.paths, name), getattr(second.files.paths, name)
        np.testing.assert_array_equal(one, other, strict=True)


def test_an_index_serves_every_way_to_name_its_folder(data, monkeypatch):
    index_classes(data)
    forbid_listing(monkeypatch)
    monkeypatch.chdir(data)
    assert index_classes(Path()).files.path(1) == "ants/deep/2"
    assert open_folder("../data").names[0] == "../data/ants/1"


def add(data: Path) -> None:
    (data / "ants/deep/4").touch()


def remove(data: Path) -> None:
    (data / "bees/3").unlink()


def rename(data: Path) -> None:
    (data / "ants/1").rename(data / "ants/0")


def add_class(data: Path) -> None:
    (data / "wasps").mkdir()


def mark(data: Path) -> None:
    mark_output(data / "ants")


BEFORE = ["ants/1", "ants/deep/2", "bees/3"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (add, (("ants", "bees"), [*BEFORE[:2], "ants/deep/4", BEFORE[2]])),
        (remove, (("ants", "bees"), BEFORE[:2])),
        (rename, (("ants", "bees"), ["ants/0", *BEFORE[1:]])),
        (add_class, (("ants", "bees", "wasps"), BEFORE)),
        (mark, (("bees",), BEFORE[2:])),
    ],
)
def test_a_changed_folder_is_listed_again(data, change, expected):
    index_classes(data)
    change(data)
    assert (index_classes(data).folders, listed(data)) == expected


def test_a_file_written_in_place_is_read_and_measured_anew(data, monkeypatch):
    index_classes(data)
    (data / "bees/3").write_text("more than before")
    forbid_listing(monkeypatch)
    source = open_folder(data)
    assert (source.read(2), source.file_sizes) == (b"more than before", [6, 11, 16])


def test_a_folder_that_is_no_longer_output_is_listed(data):
    mark_output(data / "out")
    (data / "out" / "5").touch()
    age(data)
    assert "out/5" not in listed(data)
    (data / "out" / ".tljax").unlink()
    age(data)
    assert "out/5" in listed(data)


def test_a_link_that_comes_to_lead_to_a_folder_is_followed(data):
    (data / "ants" / "link").symlink_to(data.parent / "target")
    age(data)
    assert "ants/link" in listed(data)
    (data.parent / "target").mkdir()
    (data.parent / "target" / "6").touch()
    assert remembered(data)
    assert "ants/link/6" in listed(data)


def test_a_linked_folder_is_watched_where_it_lies(data):
    (data.parent / "elsewhere").mkdir()
    (data / "flies").symlink_to(data.parent / "elsewhere")
    age(data)
    age(data.parent / "elsewhere")
    assert "flies/7" not in listed(data)
    (data.parent / "elsewhere" / "7").touch()
    assert "flies/7" in listed(data)


def test_what_may_change_unseen_is_not_remembered(data):
    (data / "link").symlink_to(data.parent / "nowhere")  # there may come to be a class
    index_classes(age(data))
    assert not remembered(data)


def test_a_folder_that_was_just_changed_is_not_remembered(data):
    add(data)
    index_classes(data)
    assert not remembered(data)


def test_a_small_data_set_is_not_remembered(data, monkeypatch):
    monkeypatch.setattr(index, "FEWEST", 4)
    index_classes(data)
    assert not remembered(data)


@pytest.mark.parametrize("damage", ["empty", "cut", "garbled", "of another version"])
def test_a_damaged_index_is_written_anew(data, monkeypatch, damage):
    expected = listed(data)
    (path,) = remembered(data)
    content = path.read_bytes()
    wrong = {"empty": b"", "cut": content[:-100], "garbled": b"x" * 100 + content[100:]}
    path.write_bytes(wrong.get(damage, content))
    if damage == "of another version":
        monkeypatch.setattr(index, "VERSION", 0)
    assert listed(data) == expected
    forbid_listing(monkeypatch)
    assert listed(data) == expected


def test_nothing_fails_if_the_cache_cannot_be_written(data, monkeypatch):
    (data.parent / "file").touch()
    monkeypatch.setenv("TLJAX_CACHE", str(data.parent / "file"))
    assert listed(data) == ["ants/1", "ants/deep/2", "bees/3"]


def test_files_whose_names_are_not_utf8_are_remembered(data, monkeypatch):
    (data / os.fsdecode(b"caf\xe9")).mkdir()
    (data / os.fsdecode(b"caf\xe9/\xff")).write_text("pixels")
    index_classes(age(data))
    forbid_listing(monkeypatch)
    source = open_folder(data)
    assert source.classes == ("ants", "bees", r"caf\xe9")
    assert (source.read(3), source.names[3]) == (b"pixels", rf"{data}/caf\xe9/\xff")


MEASURE = """
import resource, sys
from tljax.data.sources import open_splits
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
train, val, _ = open_splits(sys.argv[1])
assert train.fingerprint != val.fingerprint
assert (len(train), len(val)) == (48_000, 2_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 50_000)
"""


@pytest.mark.slow
def test_a_file_takes_few_bytes_of_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path / "cache"))
    for number in range(50):
        (tmp_path / f"{number}.jpg").write_bytes(bytes([number]))
    for part, count in (("train", 480), ("val", 20)):
        for name in range(100):
            folder = tmp_path / "data" / part / f"n{name:08}"
            folder.mkdir(parents=True)
            for number in range(count):
                original = tmp_path / f"{(number + name) % 50}.jpg"
                os.link(original, folder / f"n{name:08}_{number:05}.JPEG")
    for _ in range(2):  # listed, then remembered
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "data")]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        assert float(result.stdout) < 600
