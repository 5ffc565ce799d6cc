"""Labels of class folders: several of one image, numbers, and classes in an order."""

import operator
import os
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tljax.data.examples import Source, printable, select
from tljax.data.labels import describe_values, make_task, order_source, parse_number
from tljax.data.options import LabelOptions
from tljax.runtime.errors import RequestError
from tljax.runtime.files import sha256

MAX_COMPARED_FILES = 10_000
"""Copies are searched for among as many files; links among any number."""
MAX_COMPARED_BYTES = 2**28
"""Copies are searched for if the files that have the size of another have as many bytes."""


def label_folders(
    source: Source, entries: Sequence[os.DirEntry[str]], labels: LabelOptions
) -> tuple[Source, tuple[str, ...]]:
    """Label the images of class folders for a task.

    For ``multilabel``, an image has the labels of all folders that it is in and no others, and is
    one example, named by its first path. For ``ordinal``, the classes are put in their order. For
    ``regression``, the name of each folder is the number of its images.

    Args:
        source: the images with the class of their folder.
        entries: the file of each image.
        labels: the options.

    Returns:
        The labeled source, and notes to print: what the folders were taken for, and images in
        folders of several classes.

    Raises:
        RequestError: the names of the folders do not fit the task.
    """
    where = "the folder"
    kind = labels.kind or "classification"
    task = make_task(labels, kind, 1, where)
    first, compared = find_same_files(entries, source.labels)
    if kind == "multilabel":
        numbers = np.unique(first, return_inverse=True)[1]
        applies = np.zeros((numbers.max() + 1, len(source.classes)), np.float32)
        applies[numbers, source.labels] = 1
        phrase = f"class folders: {describe_values(applies, kind)}"
        phrase += "" if compared else ", where copies of an image count as different images"
        source = select(source, np.unique(first))
        several = np.count_nonzero(applies.sum(1) > 1)
        phrase += f"; {several} of {len(source)} images are in several folders"
        return replace(source, labels=applies, task=task), (phrase,)
    notes = _note_contradictions(source, entries, first)
    if kind == "ordinal":
        source, phrase = order_source(source, labels, where)
        return source, (f"class folders: {phrase}", *notes)
    if kind == "regression":
        numbers = np.array([*map(parse_number, source.classes)])
        if not np.isfinite(numbers).all():
            raise RequestError(
                "--task regression needs class folders whose names are numbers, such as 1.5; write"
                " the numbers of other images into a table"
            )
        values = numbers[source.labels][:, None]
        source = replace(source, labels=values, classes=("value",))
        notes = (f"class folders: {describe_values(values, kind)}", *notes)
    return replace(source, task=task), notes


def _note_contradictions(
    source: Source, entries: Sequence[os.DirEntry[str]], first: np.ndarray
) -> tuple[str, ...]:
    """Return a note on files in folders of several classes."""
    is_other = source.labels != source.labels[first]
    if not is_other.any():
        return ()
    count, index = len(np.unique(first[is_other])), int(np.flatnonzero(is_other)[0])
    pair = entries[first[index]].path, entries[index].path
    folder = os.path.commonpath(pair)
    one, other = (printable(Path(path).relative_to(folder)) for path in pair)
    images = "1 image is" if count == 1 else f"{count} images are"
    note = (
        f"{images} in several class folders ({one} and {other}): training sees contradictory"
        " labels; keep each image in one folder, or learn several labels with --task multilabel"
    )
    return (note,)


def find_same_files(
    entries: Sequence[os.DirEntry[str]], labels: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Find the files that are links to one file, or copies of it in another class.

    Copies are searched for among up to 10,000 files, and only by reading those that have the size
    of a file of another class, if these have up to 256 MB.

    Args:
        entries: files.
        labels: ``[n]`` their classes.

    Returns:
        ``[n]`` index of the first file that is the same, and whether copies were searched for.
    """
    # Files are looked up only if they have the inode of another: that takes long for many.
    # Some file systems list other inodes than they report for a file, or the same for all.
    inodes = [_status(x, "st_ino") if x.is_symlink() else x.inode() for x in entries]
    first = np.arange(len(entries))
    for group in _groups_of_equals(inodes):
        keys = [_status(entries[i], "st_dev", "st_ino") for i in group]
        for same in _groups_of_equals(keys):
            first[np.array(group)[same]] = group[same[0]]
    if len(entries) > MAX_COMPARED_FILES:
        return first, False
    sizes = [_status(entry, "st_size") or None for entry in entries]
    groups = [group for group in _groups_of_equals(sizes) if len({*labels[group]}) > 1]
    groups = [group for group in groups if len({*first[group]}) > 1]
    if sum(sizes[index] or 0 for group in groups for index in group) > MAX_COMPARED_BYTES:
        return first, False
    for group in groups:
        for same in _groups_of_equals([_hash(entries[index].path) for index in group]):
            members = np.asarray(group)[same]
            first[np.isin(first, first[members])] = first[members].min()
    return first, True


def _groups_of_equals(keys: Sequence[Hashable]) -> list[list[int]]:
    """Return the indices of keys that occur more than once, except None."""
    if len({*keys}) == len(keys):  # the usual case, in a tenth of the time
        return []
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    groups.pop(None, None)
    return [group for group in groups.values() if len(group) > 1]


def _status(entry: os.DirEntry[str], *names: str) -> Any:
    """Return fields of the status of a file, None if it does not exist.

    ``entry.stat`` is not used, as it remembers, and has no inode on Windows.
    """
    try:
        return operator.attrgetter(*names)(Path(entry.path).stat())
    except OSError:
        return None


def _hash(path: str) -> str | None:
    try:
        return sha256(Path(path))
    except OSError:
        return None
