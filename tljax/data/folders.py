"""Folders of images, files and URLs as sources."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tljax.data.examples import (
    Source,
    Splits,
    join_names,
    match_part,
    normal,
    without_example,
)
from tljax.data.files import MAX_BYTES, Files, Names, printable
from tljax.data.folder_labels import label_folders
from tljax.data.index import Index, index_classes
from tljax.data.listing import exists, list_folders, suggest_path, walk
from tljax.data.options import LabelOptions
from tljax.data.splits import group_parts, refuse_constants, search_groups, split_source
from tljax.runtime.download import download
from tljax.runtime.errors import RequestError
from tljax.runtime.files import cache_dir, sha256

TRAIN = ("train", "training")
VAL = ("val", "valid", "validation", "test")

_TABLE_OPTIONS = "root target path_column split_column weight_column"


class _ClassFolders(NamedTuple):
    folder: Path
    source: Source
    listed: Index

    def label(self, labels: LabelOptions) -> tuple[Source, tuple[str, ...]]:
        return label_folders(self.source, self.listed, labels)


def open_folder_splits(
    path: Path, val_fraction: float, labels: LabelOptions | None = None
) -> Splits:
    """Open the train and validation folders of a folder, or split it if it has none.

    One image in folders of several classes, by links or copies, is noted; for the task
    ``multilabel`` it has several labels. See `tljax.data.folder_labels.label_folders` for what the
    names of the folders are for each task, and `tljax.data.folder_labels.find_same_files` for
    which copies are found.

    Raises:
        RequestError: the folder does not exist or cannot be trained on.
    """
    labels = labels or LabelOptions()
    labels.refuse(_TABLE_OPTIONS, printable(path))
    train_folder, val_folder = train_and_val(path) or (path, None)
    opened = _open_training(train_folder)
    train, notes = opened.label(labels)
    if train.task.kind == "regression":
        refuse_constants(train, printable(train_folder))
    parts = [(train_folder, train)]
    if val_folder is not None:
        val, more = _label_validation(
            _open_classes(val_folder), opened.source.classes, train, labels
        )
        notes += more
        parts.append((val_folder, val))
    elif train_folder != path:
        note = f"{printable(train_folder)} is split, as no folder beside it has its classes"
        notes = (note, *notes)
    sources, group_names, more = _group(parts, labels, printable(path))
    if val_folder is not None:
        return Splits(sources[0], sources[1], notes + more)
    splits = split_source(sources[0], printable(train_folder), val_fraction, group_names)
    return splits._replace(notes=notes + more + splits.notes)


def _label_validation(
    opened: _ClassFolders, classes: Sequence[str], train: Source, labels: LabelOptions
) -> tuple[Source, tuple[str, ...]]:
    folder = printable(opened.folder)
    unknown = [name for name in opened.source.classes if name not in classes]
    if unknown and train.task.kind != "regression":
        raise RequestError(
            f"{folder} has classes without training images, {join_names(unknown)}: add them to the"
            " training folder or remove them"
        )
    # The order of the classes is that of the training folder, which has all of them.
    task = None if train.task.has_classes else labels.task
    val, notes = opened.label(replace(labels, order=None, task=task))
    val, more = match_part(val, train, by_name=True)
    return val, (*(f"{folder}: {note}" for note in notes), *more)


def _group(
    parts: Sequence[tuple[Path, Source]], labels: LabelOptions, where: str
) -> tuple[list[Source], list[str] | None, tuple[str, ...]]:
    """Group images by ``labels.group``, an expression over their paths in their folder."""
    sources = [source for _, source in parts]
    if labels.group is None:
        return sources, None, ()
    paths = [
        name.removeprefix(f"{printable(folder)}/").replace("\\", "/")
        for folder, source in parts
        for name in source.names
    ]
    return group_parts(sources, search_groups(labels.group, paths, where), paths)


def open_folder(path: str | PathLike[str]) -> Source:
    """Open a folder of class folders or, if it has no folders, of images without labels.

    Class folders are sorted by name and may contain folders to any depth. Hidden files, files of
    operating systems and thumbnail caches, and folders written by tljax are ignored. Every other
    file is an example, whatever its extension; decoding decides whether it is an image.

    Raises:
        RequestError: the folder does not exist, has no file, or has ``train/`` and ``val/``.
    """
    path, val = train_and_val(expand_path(path)) or (expand_path(path), None)
    if val is not None:
        raise RequestError(
            f"{printable(path.parent)} has a training and a validation folder:"
            f" choose {printable(path)} or {printable(val)}"
        )
    if list_folders(path):
        return _open_classes(path).source
    return _file_source(Files.from_paths(_files_of(path), str(path)))


def open_labeled_folder(path: Path, labels: LabelOptions | None = None) -> Source:
    """Open the validation folder of a folder or, if it has none, the folder itself.

    Args:
        path: folder of class folders, or with ``train/`` and a validation folder.
        labels: what the class folders are; see `open_folder_splits`.

    Raises:
        RequestError: the folder does not exist, or has no file or no class folders.
    """
    labels = labels or LabelOptions()
    labels.refuse(_TABLE_OPTIONS, printable(path))
    train, val = train_and_val(path) or (path, None)
    source = open_folder(val or path)
    if not source.classes:
        raise RequestError(f"{printable(path)} has no class folders: evaluation needs labels")
    folder = val or train
    if labels.kind is not None:
        source, _ = _open_classes(folder).label(labels)
    return _group([(folder, source)], labels, printable(path))[0][0]


def open_images(items: Sequence[str | PathLike[str]]) -> Source:
    """Open files, folders (every file below them) and URLs as images without labels.

    Args:
        items: paths and URLs. An image from a URL is cached and downloaded again if it changes;
            without a connection, the cached copy is used.

    Raises:
        RequestError: a path does not exist, a folder has no file, or a URL leads to no image.
    """
    paths: list[str | Path] = []
    urls: dict[int, str] = {}
    for item in items:
        if re.match(r"[a-z][a-z0-9+.-]+://", str(item), re.IGNORECASE):
            urls[len(paths)] = str(item)
            paths.append(_fetch(str(item)))
            continue
        path = expand_path(item)
        if not exists(path):
            raise RequestError(f"{printable(path)} does not exist{suggest_path(path)}")
        paths += _files_of(path) if path.is_dir() else [path]
    source = _file_source(Files.from_paths(paths, str(expand_path(items[0])) if items else ""))
    if not urls:
        return source
    return replace(source, names=[urls.get(i, name) for i, name in enumerate(source.names)])


def _fetch(url: str) -> Path:
    """Download an image, or find the copy of an earlier download if there is no connection."""
    from tljax.data.decode import open_image  # noqa: PLC0415 - decode imports this module

    path = cache_dir() / "images" / sha256(url.encode())
    download(
        url, path, lambda file: open_image(file.read_bytes()), limit=MAX_BYTES, revalidate="always"
    )
    return path


def _open_training(path: Path) -> _ClassFolders:
    opened = _open_classes(path)
    source = opened.source
    if len(source.classes) < 2:
        raise RequestError(
            f"{printable(path)} has one class folder, {join_names(source.classes)}: training"
            " needs two or more, or train/ and val/ with class folders inside"
        )
    if empty := without_example(source):
        raise RequestError(
            f"class {empty[0]!r} in {printable(path)} has no file: add images or remove the folder"
        )
    return opened


def _open_classes(path: Path) -> _ClassFolders:
    index = index_classes(path)
    if not index.folders:
        raise RequestError(
            f"{printable(path)} has no class folders: put the images of each class into a folder"
            f" such as {printable(path / 'cats')}"
        )
    if not len(index.files):
        raise _no_file(path)
    names = [normal(printable(name)) for name in index.folders]
    # Folders whose names differ in Unicode form only are one class.
    position = {name: number for number, name in enumerate(dict.fromkeys(names))}
    folder_labels = np.array([position[name] for name in names], np.int32)
    labels = np.repeat(folder_labels, index.counts)
    return _ClassFolders(path, _file_source(index.files, labels, tuple(position)), index)


def _file_source(
    files: Files, labels: np.ndarray | None = None, classes: tuple[str, ...] = ()
) -> Source:
    labels = np.full(len(files), -1, np.int32) if labels is None else labels
    return Source(files, labels, classes, Names(files))


def _files_of(path: Path) -> list[str]:
    if paths := [entry.path.removeprefix("./") for entry in walk(path)]:
        return paths
    raise _no_file(path)


def _no_file(path: Path) -> RequestError:
    return RequestError(f"{printable(path)} has no file: put images into it")


def train_and_val(path: Path) -> tuple[Path, Path | None] | None:
    """Find the training and validation folders within a folder, or return None.

    The validation folder is None if there is only ``train/``, or if the other one is a ``test/``
    that has none of the classes, as in competitions.
    """
    folders = {folder.name.lower(): folder for folder in list_folders(path)}
    train = next((folders[name] for name in TRAIN if name in folders), None)
    val = next((folders[name] for name in VAL if name in folders), None)
    if train is None or (val is None and len(folders) > 1):
        return None
    classes = {normal(folder.name) for folder in list_folders(train)}
    if val is None:
        return (train, None) if classes else None
    common = {normal(folder.name) for folder in list_folders(val)} & classes
    return train, None if val.name.lower() == "test" and not common else val


def expand_path(item: str | PathLike[str]) -> Path:
    """Convert to a path and expand a leading ``~`` if the user has a home folder."""
    return Path(os.path.expanduser(item))  # noqa: PTH111 - Path.expanduser raises if there is none
