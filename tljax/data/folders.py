"""Folders of images, files and URLs as sources: what counts as an example, in which order."""

import difflib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from urllib.request import urlopen

import numpy as np

from tljax.data.examples import (
    Source,
    Splits,
    match_classes,
    printable,
    shortened,
    split_by_content,
    without_example,
)
from tljax.errors import RequestError, UnreadableImageError
from tljax.files import cache_dir, written_whole

TRAIN = ("train", "training")
VAL = ("val", "valid", "validation", "test")
_IGNORED = ("thumbs.db", "desktop.ini", "__macosx")


@dataclass(frozen=True)
class _Files:
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> bytes:
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"cannot be read: {error.strerror}") from error


def open_folder_splits(path: Path, val_fraction: float) -> Splits:
    """The two parts of a folder or, if it has no parts, a split by content.

    Raises:
        RequestError: the folder is missing or cannot be trained on.
    """
    parts = train_and_val(path)
    if parts is None:
        return split_by_content(_open_training(path), printable(path), val_fraction)
    train, val = _open_training(parts[0]), _open_classes(parts[1])
    unknown = [name for name in val.classes if name not in train.classes]
    if unknown:
        raise RequestError(
            f"{printable(parts[1])} holds classes that {printable(parts[0])} lacks:"
            f" {shortened(unknown)}; add them to the latter or remove them from the former"
        )
    return Splits(train, *match_classes(val, train.classes))


def open_folder(path: str | PathLike[str]) -> Source:
    """Opens a folder of class folders or, if it holds files only, of images without labels.

    Class folders are sorted by name, and may be nested to any depth. Hidden files and the litter of
    desktops are left out; any other file is an example, whatever its extension: whether it holds an
    image is decided when it is decoded.

    Raises:
        RequestError: the folder is missing or holds no file, or holds ``train/`` and ``val/``.
    """
    path = Path(path)
    parts = train_and_val(path)
    if parts is not None:
        train, val = map(printable, parts)
        raise RequestError(
            f"{printable(path)} is a training and a validation set: name {train} or {val}"
        )
    if _folders(path):
        return _open_classes(path)
    return _unlabelled(_checked(path, list(_files(path, set()))))


def open_labelled_folder(path: Path) -> Source:
    """The validation part of a folder, or a folder of class folders, all of it.

    Raises:
        RequestError: the folder is missing, holds no file or no class folders.
    """
    parts = train_and_val(path) if path.is_dir() else None
    source = open_folder(parts[1] if parts else path)
    if not source.classes:
        raise RequestError(
            f"{printable(path)} has no class folders, so there is nothing to evaluate against"
        )
    return source


def open_images(items: Sequence[str | PathLike[str]]) -> Source:
    """Images without labels: files, every file of a folder, and what URLs lead to.

    Raises:
        RequestError: a path is missing, a folder is empty, or a URL cannot be fetched.
    """
    paths: list[Path] = []
    names: list[str] = []
    for item in items:
        if str(item).startswith(("http://", "https://")):
            found = [_fetch(str(item))]
            names.append(str(item))
        else:
            path = Path(item)
            if not path.exists():
                raise RequestError(f"{printable(path)} does not exist{suggestion(path)}")
            found = _checked(path, list(_files(path, set()))) if path.is_dir() else [path]
            names += map(printable, found)
        paths += found
    return replace(_unlabelled(paths), names=tuple(names))


def _fetch(url: str) -> Path:
    """The local copy of what a URL leads to; fetched once."""
    path = cache_dir() / "images" / hashlib.sha256(url.encode()).hexdigest()
    if not path.exists():
        try:
            with urlopen(url, timeout=30) as response, written_whole(path) as temporary:  # noqa: S310 - http(s) only, see open_images
                temporary.write_bytes(response.read())
        except (OSError, ValueError) as error:
            raise RequestError(f"could not fetch {url} ({error})") from error
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
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), [len(f) for f in files])
    paths = _checked(path, [file for of_class in files for file in of_class])
    return _file_source(paths, labels, tuple(printable(folder.name) for folder in folders))


def _unlabelled(paths: Sequence[Path]) -> Source:
    return _file_source(paths, np.full(len(paths), -1, np.int32), ())


def _file_source(paths: Sequence[Path], labels: np.ndarray, classes: tuple[str, ...]) -> Source:
    return Source(_Files(tuple(paths)), labels, classes, tuple(map(printable, paths)))


def _checked(path: Path, files: list[Path]) -> list[Path]:
    if not files:
        raise RequestError(f"{printable(path)} holds no file: put images into it")
    return files


def train_and_val(path: Path) -> tuple[Path, Path] | None:
    """Finds the two parts of a folder that is laid out as training and validation."""
    folders = {folder.name.lower(): folder for folder in _folders(path)}
    train = [folders[name] for name in TRAIN if name in folders]
    val = [folders[name] for name in VAL if name in folders]
    return (train[0], val[0]) if train and val else None


def _files(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """The files below a folder, in the order of their names' bytes; each real folder once."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    for entry in _entries(folder):
        if _is_folder(entry):
            yield from _files(Path(entry.path), seen)
        elif entry.is_symlink() or entry.is_file():  # a broken link is reported when it is read
            yield Path(entry.path)


def _folders(path: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(path) if _is_folder(entry)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder shows, in the order of the names' bytes."""
    try:
        with os.scandir(folder) as entries:
            shown = [e for e in entries if e.name[0] != "." and e.name.lower() not in _IGNORED]
    except FileNotFoundError as error:
        raise RequestError(f"{printable(folder)} does not exist{suggestion(folder)}") from error
    except NotADirectoryError as error:
        raise RequestError(f"{printable(folder)} is a file: name a folder") from error
    except OSError as error:
        raise RequestError(f"{printable(folder)} cannot be listed: {error.strerror}") from error
    return sorted(shown, key=lambda entry: os.fsencode(entry.name))


def suggestion(path: Path) -> str:
    """What a path that does not exist may have meant, to end an error with; or nothing."""
    missing = next(part for part in (*reversed(path.parents), path) if not part.exists())
    if not missing.parent.is_dir():
        return ""
    names = [sibling.name for sibling in missing.parent.iterdir()]
    close = difflib.get_close_matches(missing.name, names, n=1)
    return f"; did you mean {printable(missing.parent / close[0])}?" if close else ""
