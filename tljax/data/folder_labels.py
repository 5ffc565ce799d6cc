"""Labels of class folders: several of one image, numbers, and classes in an order."""

import os
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tljax.data.examples import Source, select
from tljax.data.files import MISSING, Files, printable
from tljax.data.index import Index
from tljax.data.labels import describe_values, make_task, order_source, parse_number
from tljax.data.options import LabelOptions
from tljax.runtime.errors import RequestError
from tljax.runtime.files import sha256

MAX_COMPARED_FILES = 10_000
"""Copies are searched for among as many files; links among any number."""
MAX_COMPARED_BYTES = 2**28
"""Copies are searched for if the files that have the size of another have as many bytes."""


def label_folders(
    source: Source, index: Index, labels: LabelOptions
) -> tuple[Source, tuple[str, ...]]:
    """Label the images of class folders for a task.

    For ``multilabel``, an image has the labels of all folders that it is in and no others, and is
    one example, named by its first path. For ``ordinal``, the classes are put in their order. For
    ``regression``, the name of each folder is the number of its images.

    Args:
        source: the images with the class of their folder.
        index: the file of each image.
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
    first, compared = find_same_files(index, source.labels)
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
    notes = _note_contradictions(source, index.files, first)
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


def _note_contradictions(source: Source, files: Files, first: np.ndarray) -> tuple[str, ...]:
    """Return a note on files in folders of several classes."""
    is_other = source.labels != source.labels[first]
    if not is_other.any():
        return ()
    count, index = len(np.unique(first[is_other])), int(np.flatnonzero(is_other)[0])
    pair = files.path(int(first[index])), files.path(index)
    folder = os.path.commonpath(pair)
    one, other = (printable(Path(path).relative_to(folder)) for path in pair)
    images = "1 image is" if count == 1 else f"{count} images are"
    note = (
        f"{images} in several class folders ({one} and {other}): training sees contradictory"
        " labels; keep each image in one folder, or learn several labels with --task multilabel"
    )
    return (note,)


def find_same_files(index: Index, labels: np.ndarray) -> tuple[np.ndarray, bool]:
    """Find the files that are links to one file, or copies of it in another class.

    Copies are searched for among up to 10,000 files, and only by reading those that have the size
    of a file of another class, if these have up to 256 MB.

    Args:
        index: files.
        labels: ``[n]`` their classes.

    Returns:
        ``[n]`` index of the first file that is the same, and whether copies were searched for.
    """
    files, first = index.files, np.arange(len(index.files))
    candidates = _candidates(index)
    devices, inodes = files.look_up(candidates, "st_dev", "st_ino").T
    present = inodes != MISSING
    candidates, keys = candidates[present], [devices[present], inodes[present]]
    firsts, groups = np.unique(_number_rows(keys), return_index=True, return_inverse=True)[1:]
    first[candidates] = candidates[firsts[groups]]
    if len(files) > MAX_COMPARED_FILES:
        return first, False
    sizes = files.status[:, 0]
    known = np.flatnonzero((sizes > 0) & (sizes != MISSING))
    same_size = [known[group] for group in _groups_of_equals(sizes[known].tolist())]
    same_size = [x for x in same_size if len({*labels[x]}) > 1 and len({*first[x]}) > 1]
    if sum(int(sizes[group].sum()) for group in same_size) > MAX_COMPARED_BYTES:
        return first, False
    for group in same_size:
        for same in _groups_of_equals([_hash(files.path(i)) for i in group.tolist()]):
            first[np.isin(first, first[group[same]])] = first[group[same]].min()
    return first, True


def _candidates(index: Index) -> np.ndarray:
    """Return the files that may be links to the same file as another.

    Only these are looked up, which takes long for many. Some file systems list other inodes than
    they report for a file, or the same for all.
    """
    inodes, links = index.inodes.copy(), np.flatnonzero(index.links)
    inodes[links] = index.files.look_up(links, "st_ino")[:, 0]
    _, numbers, counts = np.unique(inodes, return_inverse=True, return_counts=True)
    return np.flatnonzero((counts[numbers] > 1) & (inodes != MISSING))


def _number_rows(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Return a number for each row of a table, the same for equal rows."""
    numbers = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        values, codes = np.unique(column, return_inverse=True)
        numbers = numbers * len(values) + codes
    return numbers


def _groups_of_equals(keys: Sequence[Hashable]) -> list[list[int]]:
    """Return the indices of keys that occur more than once, except None."""
    if len({*keys}) == len(keys):  # the usual case, in a tenth of the time
        return []
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    groups.pop(None, None)
    return [group for group in groups.values() if len(group) > 1]


def _hash(path: str) -> str | None:
    try:
        return sha256(Path(path))
    except OSError:
        return None
