"""Class folders as several labels, numbers and ordered classes."""

import os
from pathlib import Path

import numpy as np
import pytest

from tljax.data import folder_labels
from tljax.data.folders import open_folder_splits, open_labeled_folder
from tljax.data.index import index_classes
from tljax.data.options import LabelOptions
from tljax.runtime.errors import RequestError

MULTILABEL = LabelOptions(task="multilabel")


def write(folder: Path, *paths: str) -> Path:
    """Write files, each with its path as content."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)
    return folder


def symlink(old: Path, new: Path) -> None:
    new.symlink_to(os.path.relpath(old, new.parent))


def copy(old: Path, new: Path) -> None:
    new.write_bytes(old.read_bytes())


LINKS = pytest.mark.parametrize("link", [symlink, os.link, copy])


@pytest.fixture(name="pets")
def _pets(tmp_path: Path) -> Path:
    return write(tmp_path, "cat/1.jpg", "cat/22.jpg", "dog/333.jpg", "outdoor/4444.jpg")


def labels_of(folder: Path, options: LabelOptions) -> dict[str, list[float]]:
    source = open_folder_splits(folder, 0, options).train
    names = [str(Path(name).relative_to(folder)) for name in source.names]
    contents = [bytes(source.examples[index]).decode() for index in range(len(source))]
    assert len({*contents}) == len(contents)
    return dict(zip(names, source.labels.tolist(), strict=True))


@LINKS
def test_an_image_in_several_class_folders_is_noted(pets, link):
    link(pets / "cat" / "1.jpg", pets / "outdoor" / "0.jpg")
    link(pets / "dog" / "333.jpg", pets / "outdoor" / "again.jpg")
    notes = open_folder_splits(pets, 0).notes
    assert notes[0] == (
        "2 images are in several class folders (cat/1.jpg and outdoor/0.jpg): training sees"
        " contradictory labels; keep each image in one folder, or learn several labels with --task"
        " multilabel"
    )


@LINKS
def test_as_labels_such_an_image_is_one_example_with_the_labels_of_all_its_folders(pets, link):
    link(pets / "cat" / "1.jpg", pets / "outdoor" / "0.jpg")
    assert labels_of(pets, MULTILABEL) == {
        "cat/1.jpg": [1, 0, 1],
        "cat/22.jpg": [1, 0, 0],
        "dog/333.jpg": [0, 1, 0],
        "outdoor/4444.jpg": [0, 0, 1],
    }
    splits = open_folder_splits(pets, 0, MULTILABEL)
    assert splits.train.task.kind == "multilabel"
    assert splits.train.labels.dtype == np.float32
    assert splits.notes[0] == "class folders: 3 labels; 1 of 4 images are in several folders"


def test_a_link_to_a_link_and_a_copy_of_it_are_one_image(pets):
    symlink(pets / "cat" / "1.jpg", pets / "dog" / "link.jpg")
    symlink(pets / "dog" / "link.jpg", pets / "outdoor" / "link.jpg")
    copy(pets / "cat" / "1.jpg", pets / "outdoor" / "copy.jpg")
    assert labels_of(pets, MULTILABEL)["cat/1.jpg"] == [1, 1, 1]
    assert len(labels_of(pets, MULTILABEL)) == 4


@LINKS
def test_the_same_image_twice_in_one_class_is_no_contradiction(pets, link):
    link(pets / "cat" / "1.jpg", pets / "cat" / "0.jpg")
    assert len(open_folder_splits(pets, 0).notes) == 1


def test_a_linked_class_folder_shares_all_its_images(pets):
    (pets / "feline").symlink_to("cat")
    assert (
        open_folder_splits(pets, 0)
        .notes[0]
        .startswith("2 images are in several class folders (cat/1.jpg and feline/1.jpg)")
    )


def test_different_images_of_one_size_empty_files_and_broken_links_are_not_the_same(pets):
    for name in ("cat", "dog"):
        (pets / name / "empty.jpg").write_bytes(b"")
        (pets / name / "same size.jpg").write_text(f"content of {name}")
        (pets / name / "broken.jpg").symlink_to("nowhere")
    assert len(open_folder_splits(pets, 0).notes) == 1


@pytest.mark.parametrize("limit", ["MAX_COMPARED_FILES", "MAX_COMPARED_BYTES"])
def test_only_links_are_searched_for_among_many_images(pets, monkeypatch, limit):
    monkeypatch.setattr(folder_labels, limit, 1)
    copy(pets / "cat" / "1.jpg", pets / "outdoor" / "copy.jpg")
    assert len(open_folder_splits(pets, 0).notes) == 1
    os.link(pets / "cat" / "22.jpg", pets / "outdoor" / "link.jpg")
    assert "(cat/22.jpg and outdoor/link.jpg)" in open_folder_splits(pets, 0).notes[0]
    note = open_folder_splits(pets, 0, MULTILABEL).notes[0]
    assert "copies of an image count as different images" in note


def test_inodes_that_a_file_system_only_pretends_are_looked_up(pets):
    index = index_classes(pets)._replace(inodes=np.zeros(4, np.uint64))
    first, _ = folder_labels.find_same_files(index, np.arange(4))
    assert first.tolist() == [0, 1, 2, 3]


def test_a_validation_folder_has_the_labels_of_the_training_folder(tmp_path):
    write(tmp_path, "train/cat/1", "train/dog/2", "train/outdoor/3", "val/outdoor/4", "val/dog/5")
    os.link(tmp_path / "val/dog/5", tmp_path / "val/outdoor/5")
    train, val, notes = open_folder_splits(tmp_path, 0, MULTILABEL)
    assert train.classes == val.classes == ("cat", "dog", "outdoor")
    assert val.labels.tolist() == [[0, 1, 1], [0, 0, 1]]
    assert notes[1].endswith("val: class folders: 2 labels; 1 of 2 images are in several folders")
    assert open_labeled_folder(tmp_path, MULTILABEL).labels.tolist() == [[1, 1], [0, 1]]


def test_ordered_classes_are_sorted_as_numbers_or_in_the_order_given(tmp_path):
    write(tmp_path, "10/a", "9/b", "1/c")
    train, _, notes = open_folder_splits(tmp_path, 0, LabelOptions(task="ordinal"))
    assert train.classes == ("1", "9", "10")
    assert train.labels.tolist() == [0, 2, 1]  # of 1/c, 10/a and 9/b
    assert train.task.kind == "ordinal"
    assert notes[0] == "class folders: 3 ordered classes from 1 to 10"

    train, _, notes = open_folder_splits(tmp_path, 0, LabelOptions(order="9, 10,11,1"))
    assert train.classes == ("9", "10", "11", "1")
    assert train.labels.tolist() == [3, 1, 0]
    assert notes[0].endswith("4 ordered classes from 9 to 1, no image is of 11")


def test_ordered_classes_of_other_names_keep_their_order_and_it_is_said(tmp_path):
    write(tmp_path, "train/high/1", "train/low/2", "train/mid, really/3", "val/low/4")
    _, _, notes = open_folder_splits(tmp_path, 0, LabelOptions(task="ordinal"))
    assert notes[0].endswith("3 ordered classes from high to mid, really; --order changes it")
    order = LabelOptions(order="low,mid, really,high")
    train, val, _ = open_folder_splits(tmp_path, 0, order)
    assert train.classes == val.classes == ("low", "mid, really", "high")
    assert train.task == val.task
    assert val.labels.tolist() == [0]


def test_folders_whose_names_are_numbers_are_numbers(tmp_path):
    write(tmp_path, "train/1.5/a", "train/-2/b", "val/3e1/c")
    options = LabelOptions(task="regression", units="mm")
    train, val, notes = open_folder_splits(tmp_path, 0, options)
    assert train.labels.tolist() == [[-2], [1.5]]
    assert val.labels.tolist() == [[30]]
    assert train.labels.dtype == np.float64
    assert train.classes == val.classes == ("value",)
    assert train.task.kind == val.task.kind == "regression"
    assert train.task.units == ("mm",)
    assert notes[0] == "class folders: numbers from -2 to 1.5"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "regression"}, "needs class folders whose names are numbers, such as 1.5; write"),
        ({"order": "cat,dog"}, "--order cat,dog lacks outdoor: name all classes of the folder"),
        ({"order": "cat,cat,dog,outdoor"}, "--order cat,cat,dog,outdoor: name every class once"),
        ({"order": "cat,dog,outdoor", "task": "multilabel"}, "no effect with --task multilabel"),
        (
            {"units": "mm"},
            "--units mm has no effect on the folder, which is read with --task classif",
        ),
        ({"target": "cat"}, "--target cat has no effect on .*: leave it out"),
        ({"weight_column": "w"}, "--weight-column w has no effect on .*: leave it out"),
        ({"root": "x"}, "--root x has no effect on .*: leave it out"),
    ],
)
def test_options_that_do_not_fit_class_folders_are_refused(pets, options, message):
    with pytest.raises(RequestError, match=message) as error:
        open_folder_splits(pets, 0, LabelOptions(**options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", [("1", "1.0"), ("nan", "1"), ("inf", "1"), ("1_0", "2")])
def test_numbers_that_are_equal_or_not_finite_are_refused(tmp_path, names):
    write(tmp_path, *(f"{name}/{name}.jpg" for name in names))
    with pytest.raises(RequestError, match=r"nothing to learn|whose names are numbers"):
        open_folder_splits(tmp_path, 0, LabelOptions(task="regression"))
