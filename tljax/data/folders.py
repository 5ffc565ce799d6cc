"""Folders of images, files and URLs as sources."""

import difflib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
    printable,
    without_example,
)
from tljax.data.folder_labels import label_folders
from tljax.data.options import LabelOptions
from tljax.data.splits import group_parts, refuse_constants, search_groups, split_source
from tljax.runtime.download import download
from tljax.runtime.errors import RequestError, UnreadableImageError
from tljax.runtime.files import MARKER, cache_dir, sha256

TRAIN = ("train", "training")
VAL = ("val", "valid", "validation", "test")
MAX_BYTES = 2**29
"""Size in bytes of the largest file that is read as an image: 134 million RGB pixels fit."""

# Hidden files, and names that only operating systems and thumbnail caches use.
_IGNORED = re.compile(
    r"\..*|(eh)?thumbs\.db|desktop\.ini|\$recycle\.bin|system volume information|found\.000"
    r"|lost\+found|cvs|__macosx|icon\r|network trash folder|temporary items|@eadir|#recycle"
    r"|#snapshot|@recycle|@recently-snapshot|@__thumb",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Files:
    """Files as examples. Paths may be text, which a million rows make faster than `Path`."""

    paths: Sequence[Path | str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> bytes:
        path = Path(self.paths[index])
        try:
            info = path.stat()
            if not stat.S_ISREG(info.st_mode):
                raise UnreadableImageError("not a file but a folder, pipe or device")
            if info.st_size > MAX_BYTES:
                raise UnreadableImageError(f"larger than {MAX_BYTES >> 20} MiB")
            return path.read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"cannot be read: {error.strerror}") from error


IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".npy")
}

_TABLE_OPTIONS = "root target path_column split_column weight_column"


class _ClassFolders(NamedTuple):
    folder: Path
    source: Source
    entries: list[os.DirEntry[str]]

    def label(self, labels: LabelOptions) -> tuple[Source, tuple[str, ...]]:
        return label_folders(self.source, self.entries, labels)


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
    return _open_classes(path).source if _folders(path) else _file_source(_files_of(path))


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
    paths: list[Path] = []
    names: list[str] = []
    for item in items:
        if re.match(r"[a-z][a-z0-9+.-]+://", str(item), re.IGNORECASE):
            paths.append(_fetch(str(item)))
            names.append(str(item))
            continue
        path = expand_path(item)
        if not exists(path):
            raise RequestError(f"{printable(path)} does not exist{suggest_path(path)}")
        files = _files_of(path) if path.is_dir() else [path]
        paths += files
        names += map(printable, files)
    return replace(_file_source(paths), names=tuple(names))


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
    folders = _folders(path)
    if not folders:
        raise RequestError(
            f"{printable(path)} has no class folders: put the images of each class into a folder"
            f" such as {printable(path / 'cats')}"
        )
    # A link to the data set or a folder above it would bring in the images of other classes.
    ancestors = {path.resolve(), *path.resolve().parents}
    files = [list(_walk(folder, set(ancestors))) for folder in folders]
    names = [normal(printable(folder.name)) for folder in folders]
    # Folders whose names differ in Unicode form only are one class.
    position = {name: index for index, name in enumerate(dict.fromkeys(names))}
    folder_labels = np.array([position[name] for name in names], np.int32)
    labels = np.repeat(folder_labels, [*map(len, files)])
    entries = [entry for class_files in files for entry in class_files]
    source = _file_source(_nonempty(path, entries), labels, tuple(position))
    return _ClassFolders(path, source, entries)


def _file_source(
    paths: Sequence[Path], labels: np.ndarray | None = None, classes: tuple[str, ...] = ()
) -> Source:
    labels = np.full(len(paths), -1, np.int32) if labels is None else labels
    return Source(Files(tuple(paths)), labels, classes, tuple(map(printable, paths)))


def _files_of(path: Path) -> list[Path]:
    return _nonempty(path, _walk(path, set()))


def _nonempty(path: Path, entries: Iterable[os.DirEntry[str]]) -> list[Path]:
    if paths := [Path(entry.path) for entry in entries]:
        return paths
    raise RequestError(f"{printable(path)} has no file: put images into it")


def train_and_val(path: Path) -> tuple[Path, Path | None] | None:
    """Find the training and validation folders within a folder, or return None.

    The validation folder is None if there is only ``train/``, or if the other one is a ``test/``
    that has none of the classes, as in competitions.
    """
    folders = {folder.name.lower(): folder for folder in _folders(path)}
    train = next((folders[name] for name in TRAIN if name in folders), None)
    val = next((folders[name] for name in VAL if name in folders), None)
    if train is None or (val is None and len(folders) > 1):
        return None
    classes = {normal(folder.name) for folder in _folders(train)}
    if val is None:
        return (train, None) if classes else None
    common = {normal(folder.name) for folder in _folders(val)} & classes
    return train, None if val.name.lower() == "test" and not common else val


def expand_path(item: str | PathLike[str]) -> Path:
    """Convert to a path and expand a leading ``~`` if the user has a home folder."""
    return Path(os.path.expanduser(item))  # noqa: PTH111 - Path.expanduser raises if there is none


def exists(path: Path) -> bool:
    """Return True if a file or folder exists and is accessible."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises for a name that is too long


def _walk(folder: Path, seen: set[Path]) -> Iterator[os.DirEntry[str]]:
    """Yield the files below a folder in the byte order of their names; no real folder twice."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    for entry in _entries(folder):
        if _is_folder(entry):
            yield from _walk(Path(entry.path), seen)
        elif _is_example(entry):
            yield entry


def _folders(path: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(path) if _is_folder(entry)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # Path.is_dir raises for a link to a name that is too long.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # noqa: PTH112


def _is_example(entry: os.DirEntry[str]) -> bool:
    """Return True for a file and for a broken link, which is reported when it is read."""
    if not entry.is_symlink():
        return entry.is_file()
    path = Path(entry.path)
    return path.is_file() or not exists(path)


_RUN_FILES = ("config.json", "split.csv", "metrics.jsonl")


def _is_output(folder: str) -> bool:
    """Return True if tljax wrote into a folder, or into every folder in it and nothing else."""
    # Runs of earlier versions have no marker.
    if exists(Path(folder, MARKER)) or all(exists(Path(folder, name)) for name in _RUN_FILES):
        return True
    with os.scandir(folder) as entries:
        outputs = (
            entry.is_dir(follow_symlinks=False) and _is_output(entry.path)
            for entry in filter(_is_visible, entries)
        )
        return next(outputs, False) and all(outputs)


def first_image(folder: Path) -> str | None:
    """Find a file with the extension of an image that is not in an output folder of tljax."""
    if not folder.is_dir() or _is_output(str(folder)):
        return None
    paths = (Path(entry.path) for entry in _walk(folder, set()))
    paths = (path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
    return next(map(printable, paths), None)


def _is_visible(entry: os.DirEntry[str]) -> bool:
    return not _IGNORED.fullmatch(entry.name)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """List the visible entries of a folder in the byte order of their names."""
    try:
        with os.scandir(folder) as entries:
            visible = [
                entry
                for entry in filter(_is_visible, entries)
                if not (_is_folder(entry) and _is_output(entry.path))
            ]
    except FileNotFoundError as error:
        raise RequestError(f"{printable(folder)} does not exist{suggest_path(folder)}") from error
    except NotADirectoryError as error:
        raise RequestError(f"{printable(folder)} is a file: choose a folder") from error
    except OSError as error:
        where = printable(error.filename or folder)
        raise RequestError(f"{where} cannot be listed: {error.strerror}") from error
    return sorted(visible, key=lambda entry: os.fsencode(normal(entry.name)))


def suggest_path(path: Path) -> str:
    """Suggest an existing path with a similar name, as the end of an error; empty if none is."""
    missing = next(part for part in (*reversed(path.parents), path) if not exists(part))
    try:
        names = [sibling.name for sibling in missing.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(missing.name, names, n=1)
    return f"; did you mean {printable(missing.parent / close[0])}?" if close else ""
