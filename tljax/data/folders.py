"""Folders of images, files and URLs as sources: what counts as an example, in which order."""

import difflib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import numpy as np

from tljax.data.examples import (
    Source,
    Splits,
    match_classes,
    normal,
    printable,
    shortened,
    split_by_content,
    without_example,
)
from tljax.runtime.download import download
from tljax.runtime.errors import RequestError, UnreadableImageError
from tljax.runtime.files import MARKER, cache_dir, sha256

TRAIN = ("train", "training")
VAL = ("val", "valid", "validation", "test")
MAX_BYTES = 2**29
"""The largest file that is read as an image: 134 million pixels of RGB are not larger."""

# What is hidden, and what only systems and their thumbnails are called.
_LITTER = re.compile(
    r"\..*|(eh)?thumbs\.db|desktop\.ini|\$recycle\.bin|system volume information|found\.000"
    r"|lost\+found|cvs|__macosx|icon\r|network trash folder|temporary items|@eadir|#recycle"
    r"|#snapshot|@recycle|@recently-snapshot|@__thumb",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class _Files:
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> bytes:
        path = self.paths[index]
        try:
            info = path.stat()
            if not stat.S_ISREG(info.st_mode):
                raise UnreadableImageError("a folder, pipe or device, not a file")
            if info.st_size > MAX_BYTES:
                raise UnreadableImageError(f"larger than {MAX_BYTES >> 20} MiB: no image")
            return path.read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"cannot be read: {error.strerror}") from error


def open_folder_splits(path: Path, val_fraction: float) -> Splits:
    """The two parts of a folder or, if it has no parts, a split by content.

    Raises:
        RequestError: the folder is missing or cannot be trained on.
    """
    folder, beside = train_and_val(path) or (path, None)
    train = _open_training(folder)
    if beside is None:
        splits = split_by_content(train, printable(folder), val_fraction)
        note = f"no folder beside {printable(folder)} holds its classes: it is split itself"
        return splits._replace(notes=(note,) * (folder != path) + splits.notes)
    val = _open_classes(beside)
    unknown = [name for name in val.classes if name not in train.classes]
    if unknown:
        raise RequestError(
            f"{printable(beside)} holds classes that {printable(folder)} lacks:"
            f" {shortened(unknown)}; add them to the latter or remove them from the former"
        )
    return Splits(train, *match_classes(val, train.classes))


def open_folder(path: str | PathLike[str]) -> Source:
    """Opens a folder of class folders or, if it holds files only, of images without labels.

    Class folders are sorted by name, and may be nested to any depth. Hidden files, the litter of
    desktops and disks, and what tljax itself wrote are left out; any other file is an example,
    whatever its extension: whether it holds an image is decided when it is decoded.

    Raises:
        RequestError: the folder is missing or holds no file, or holds ``train/`` and ``val/``.
    """
    path, val = train_and_val(as_path(path)) or (as_path(path), None)
    if val is not None:
        raise RequestError(
            f"{printable(path.parent)} is a training and a validation set:"
            f" name {printable(path)} or {printable(val)}"
        )
    if _folders(path):
        return _open_classes(path)
    return _unlabelled(_checked(path, list(_files(path, set()))))


def open_labelled_folder(path: Path) -> Source:
    """The validation part of a folder or, if it has none, all of it.

    Raises:
        RequestError: the folder is missing, holds no file or no class folders.
    """
    _, val = train_and_val(path) or (path, None)
    source = open_folder(val or path)
    if not source.classes:
        raise RequestError(
            f"{printable(path)} has no class folders, so there is nothing to evaluate against"
        )
    return source


def open_images(items: Sequence[str | PathLike[str]]) -> Source:
    """Images without labels: files, every file of a folder, and what URLs lead to.

    Raises:
        RequestError: a path is missing, a folder is empty, or a URL leads to no image.
    """
    paths: list[Path] = []
    names: list[str] = []
    for item in items:
        if re.match(r"[a-z][a-z0-9+.-]+://", str(item), re.IGNORECASE):
            found = [_fetch(str(item))]
            names.append(str(item))
        else:
            path = as_path(item)
            if not exists(path):
                raise RequestError(f"{printable(path)} does not exist{suggestion(path)}")
            found = _checked(path, list(_files(path, set()))) if path.is_dir() else [path]
            names += map(printable, found)
        paths += found
    return replace(_unlabelled(paths), names=tuple(names))


def _fetch(url: str) -> Path:
    """The local copy of what a URL leads to now, or did when it could be reached."""
    from tljax.data.decode import open_image  # noqa: PLC0415 - which needs this module

    path = cache_dir() / "images" / sha256(url.encode())
    download(url, path, lambda file: open_image(file.read_bytes()), limit=MAX_BYTES, ask="always")
    return path


def _open_training(path: Path) -> Source:
    source = _open_classes(path)
    if len(source.classes) < 2:
        raise RequestError(
            f"{printable(path)} holds one class folder, {shortened(source.classes)}: training"
            " needs two or more, or train/ and val/ with the class folders inside"
        )
    empty = without_example(source)
    if empty:
        raise RequestError(
            f"class {empty[0]!r} in {printable(path)} holds no file;"
            " add images or remove the folder"
        )
    return source


def _open_classes(path: Path) -> Source:
    folders = _folders(path)
    if not folders:
        raise RequestError(
            f"{printable(path)} holds no class folders: put the images of each class into a folder"
            f" of their own, such as {printable(path / 'cats')}"
        )
    # A link back to the data set or above it would bring in the other classes.
    above = {path.resolve(), *path.resolve().parents}
    files = [list(_files(folder, set(above))) for folder in folders]
    names = [normal(printable(folder.name)) for folder in folders]
    # Folders of one name, in two forms of Unicode, are one class.
    position = {name: index for index, name in enumerate(dict.fromkeys(names))}
    of_folder = np.array([position[name] for name in names], np.int32)
    labels = np.repeat(of_folder, [len(f) for f in files])
    paths = _checked(path, [file for of_class in files for file in of_class])
    return _file_source(paths, labels, tuple(position))


def _unlabelled(paths: Sequence[Path]) -> Source:
    return _file_source(paths, np.full(len(paths), -1, np.int32), ())


def _file_source(paths: Sequence[Path], labels: np.ndarray, classes: tuple[str, ...]) -> Source:
    return Source(_Files(tuple(paths)), labels, classes, tuple(map(printable, paths)))


def _checked(path: Path, files: list[Path]) -> list[Path]:
    if not files:
        raise RequestError(f"{printable(path)} holds no file: put images into it")
    return files


def train_and_val(path: Path) -> tuple[Path, Path | None] | None:
    """Finds the parts of a folder that is laid out as training and validation.

    There is no validation part if ``train/`` is alone, or beside a ``test/`` with no class of its
    own, as those of competitions are.
    """
    folders = {folder.name.lower(): folder for folder in _folders(path)}
    train = next((folders[name] for name in TRAIN if name in folders), None)
    val = next((folders[name] for name in VAL if name in folders), None)
    if train is None or (val is None and len(folders) > 1):
        return None
    classes = {normal(folder.name) for folder in _folders(train)}
    if val is None:
        return (train, None) if classes else None
    known = {normal(folder.name) for folder in _folders(val)} & classes
    return train, None if val.name.lower() == "test" and not known else val


def as_path(item: str | PathLike[str]) -> Path:
    """A path as a shell would have it: ``~`` is the home, if there is one."""
    return Path(os.path.expanduser(item))  # noqa: PTH111 - Path.expanduser raises if there is none


def exists(path: Path) -> bool:
    """Whether there is such a file or folder that may be looked at."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises for a name that is too long


def _files(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """The files below a folder, in the order of their names' bytes; each real folder once."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    for entry in _entries(folder):
        if _is_folder(entry):
            yield from _files(Path(entry.path), seen)
        elif _is_example(entry):
            yield Path(entry.path)


def _folders(path: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(path) if _is_folder(entry)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # noqa: PTH112 - as above


def _is_example(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a broken link, which is said when it is read; no pipe or device."""
    path = Path(entry.path)
    return (path.is_file() or not exists(path)) if entry.is_symlink() else entry.is_file()


_OF_A_RUN = ("config.json", "split.csv", "metrics.jsonl")


def _is_output(folder: str) -> bool:
    """Whether tljax wrote into a folder, or into every one that it holds."""
    # Runs of earlier versions have no marker.
    if exists(Path(folder, MARKER)) or all(exists(Path(folder, x)) for x in _OF_A_RUN):
        return True
    with os.scandir(folder) as entries:
        found = (
            e.is_dir(follow_symlinks=False) and _is_output(e.path)
            for e in filter(_is_shown, entries)
        )
        return next(found, False) and all(found)


def first_image(folder: Path) -> str | None:
    """Find a file that looks like an image by its name and that tljax did not write."""
    if not folder.is_dir() or _is_output(str(folder)):
        return None
    paths = (path for path in _files(folder, set()) if path.suffix.lower() in _IMAGES)
    return next(map(printable, paths), None)


_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif"}


def _is_shown(entry: os.DirEntry[str]) -> bool:
    return not _LITTER.fullmatch(entry.name)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder shows, in the order of the names' bytes."""
    try:
        with os.scandir(folder) as entries:
            shown = [
                entry
                for entry in filter(_is_shown, entries)
                if not (_is_folder(entry) and _is_output(entry.path))
            ]
    except FileNotFoundError as error:
        raise RequestError(f"{printable(folder)} does not exist{suggestion(folder)}") from error
    except NotADirectoryError as error:
        raise RequestError(f"{printable(folder)} is a file: name a folder") from error
    except OSError as error:
        where = printable(error.filename or folder)
        raise RequestError(f"{where} cannot be listed: {error.strerror}") from error
    return sorted(shown, key=lambda entry: os.fsencode(normal(entry.name)))


def suggestion(path: Path) -> str:
    """What a path that does not exist may have meant, to end an error with; or nothing."""
    missing = next(part for part in (*reversed(path.parents), path) if not exists(part))
    try:
        names = [sibling.name for sibling in missing.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(missing.name, names, n=1)
    return f"; did you mean {printable(missing.parent / close[0])}?" if close else ""
