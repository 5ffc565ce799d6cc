"""Where examples come from: folders of images, lists of files, scikit-learn's digits.

A source gives random access to encoded files or pixels, with labels; nothing is decoded here.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.request import urlopen

import numpy as np

from tljax.errors import RequestError, UnreadableImageError
from tljax.files import cache_dir, written_whole

_TRAIN = ("train", "training")
_VAL = ("val", "valid", "validation", "test")
_IGNORED = ("thumbs.db", "desktop.ini", "__macosx")


class Examples(Protocol):
    """Random access to images: encoded files, or RGB pixels, ``[height, width, 3]`` uint8.

    An array of images, ``[n, height, width, 3]``, is one already. Asking for an example that cannot
    be read raises ``UnreadableImageError``.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> bytes | np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Source:
    """Labelled examples in an order.

    Attributes:
        examples: the images; nothing is read before it is asked for.
        labels: ``[n]`` int32 indices into ``classes``; -1 where there is no label.
        classes: the names of the classes; empty where nothing is labelled.
        names: what a report calls each example: printable text.
    """

    examples: Examples
    labels: np.ndarray
    classes: tuple[str, ...]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes | np.ndarray:
        """One example: an encoded image file, or RGB pixels, ``[height, width, 3]`` uint8.

        Raises:
            UnreadableImageError: the file cannot be read.
        """
        return self.examples[index]

    @cached_property
    def digest(self) -> str:
        """Hex; changes if and only if a content, a label, the order or the classes change."""
        header = json.dumps([self.classes, self.labels.tolist()]).encode()
        return hashlib.sha256(header + b"".join(_hashes(self))).hexdigest()


class Splits(NamedTuple):
    """A data set to train on.

    Attributes:
        train: examples to learn from; every class has at least one.
        val: examples to measure on, with the same classes; may lack some.
        notes: remarks for a person, one line each.
    """

    train: Source
    val: Source
    notes: tuple[str, ...]


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


@dataclass(frozen=True, eq=False)
class _Subset:
    examples: Examples
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        return self.examples[self.indices[index]]


def select(source: Source, indices: Sequence[int] | np.ndarray) -> Source:
    """The examples at ``indices``, in that order, with the same classes."""
    indices = np.asarray(indices, np.int64)
    return Source(
        _Subset(source.examples, indices),
        source.labels[indices],
        source.classes,
        [source.names[int(index)] for index in indices],
    )


def open_splits(spec: str, *, val_fraction: float = 0.2) -> Splits:
    """Opens a data set for training.

    A folder either holds ``train/`` and ``val/`` (or ``valid``, ``validation``, ``test``) with a
    folder for each class inside, or the class folders themselves. The latter, and ``digits``, are
    split by content: an example is for validation if and only if a hash of its content, as a
    fraction of the hash's range, is below ``val_fraction``. So no example changes sides when others
    are added, and copies of one image never end up on both.

    Args:
        spec: ``digits`` (1,797 handwritten digits of 8 x 8 pixels, from scikit-learn), or a folder
            (``./digits`` for one of that name).
        val_fraction: the share of validation in a split by content, in [0, 1).

    Raises:
        RequestError: there is no such data set, or it cannot be trained on.
    """
    if not 0 <= val_fraction < 1:
        raise RequestError(f"a validation share of {val_fraction} makes no sense: 0 <= share < 1")
    if spec == "digits":
        return _split_by_content(_digits(), spec, val_fraction)
    path = Path(spec)
    # "tfds:name" and "hf:name" will be told apart here.
    if not path.exists():
        raise RequestError(
            f"{_printable(spec)} is neither a data set that tljax knows (digits) nor a folder"
            + _suggestion(path)
        )
    parts = _train_and_val(path)
    if parts is None:
        return _split_by_content(_open_training(path), spec, val_fraction)
    train, val = _open_training(parts[0]), _open_classes(parts[1])
    unknown = [name for name in val.classes if name not in train.classes]
    if unknown:
        raise RequestError(
            f"{_printable(parts[1])} holds classes that {_printable(parts[0])} lacks:"
            f" {_shortened(unknown)}; add them to the latter or remove them from the former"
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
    parts = _train_and_val(path)
    if parts is not None:
        train, val = map(_printable, parts)
        raise RequestError(
            f"{_printable(path)} is a training and a validation set: name {train} or {val}"
        )
    if _folders(path):
        return _open_classes(path)
    return _unlabelled(_checked(path, list(_files(path, set()))))


def open_labelled(spec: str) -> Source:
    """Opens what an evaluation measures on.

    Args:
        spec: as for `open_splits`, of which the validation part is taken; or a folder of class
            folders, all of which is taken.

    Raises:
        RequestError: there is no such data, or it has no labels.
    """
    if spec == "digits":
        return open_splits(spec).val
    parts = _train_and_val(Path(spec)) if Path(spec).is_dir() else None
    source = open_folder(parts[1] if parts else spec)
    if not source.classes:
        raise RequestError(f"{spec} has no class folders, so there is nothing to evaluate against")
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
                raise RequestError(f"{_printable(path)} does not exist{_suggestion(path)}")
            found = _checked(path, list(_files(path, set()))) if path.is_dir() else [path]
            names += map(_printable, found)
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


def match_classes(source: Source, classes: Sequence[str]) -> tuple[Source, tuple[str, ...]]:
    """Gives a labelled source the class indices of a network, by the names of the classes.

    Args:
        source: examples under their own list of classes.
        classes: the network's classes, in the order of its logits.

    Returns:
        The examples whose class the network knows, labelled with indices into ``classes``; and
        notes for a person, one line each, on what the two lists do not share.

    Raises:
        RequestError: no example is of a class that the network knows.
    """
    position = {name: index for index, name in enumerate(classes)}
    # The last entry is what an example without a label (-1) gets.
    relabel = np.array([*(position.get(name, -1) for name in source.classes), -1], np.int32)
    labels = relabel[source.labels]
    kept = np.flatnonzero(labels >= 0)
    if not kept.size:
        raise RequestError(
            f"no example is of a known class: the data has {_shortened(source.classes)};"
            f" the network knows {_shortened(classes)}"
        )
    missing = [name for name in classes if name not in source.classes]
    extra = [name for name in source.classes if name not in position]
    empty = [name for name in _without_example(source) if name in position]
    notes = []
    if missing:
        notes.append(
            f"{len(missing)} of {len(classes)} classes not in the data: {_shortened(missing)}"
        )
    if empty:
        notes.append(
            f"{len(empty)} of {len(classes)} classes without an example: {_shortened(empty)}"
        )
    if extra:
        left_out = len(source) - kept.size
        notes.append(f"left out {left_out} examples of unknown classes: {_shortened(extra)}")
    known = replace(select(source, kept), labels=labels[kept], classes=tuple(classes))
    return known, tuple(notes)


def _digits() -> Source:
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - optional and slow to import
    except ImportError as error:
        raise RequestError("digits come with scikit-learn: pip install scikit-learn") from error
    images, labels = load_digits(return_X_y=True)
    grey = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return Source(
        examples=np.repeat(grey, 3, axis=3),
        labels=labels.astype(np.int32),
        classes=tuple("0123456789"),
        names=tuple(f"digit {index:04d}" for index in range(len(grey))),
    )


def _hashes(source: Source) -> list[bytes]:
    """The SHA-256 of each example's content; one that cannot be read counts as empty."""

    def hash_one(index: int) -> bytes:
        try:
            data = source.read(index)
        except UnreadableImageError:
            data = b""
        if isinstance(data, np.ndarray):
            data = repr(data.shape).encode() + data.tobytes()
        return hashlib.sha256(data).digest()

    def hash_chunk(indices: range) -> list[bytes]:
        return [hash_one(index) for index in indices]

    everything = range(len(source))
    chunks = (everything[start : start + 256] for start in everything[::256])
    with ThreadPoolExecutor() as pool:
        return [digest for chunk in pool.map(hash_chunk, chunks) for digest in chunk]


def _split_by_content(source: Source, spec: str, val_fraction: float) -> Splits:
    in_val = np.array([int.from_bytes(h[:6]) / 2**48 < val_fraction for h in _hashes(source)], bool)
    train, val = select(source, np.flatnonzero(~in_val)), select(source, np.flatnonzero(in_val))
    advice = "add images, change the share, or lay the folder out as train/ and val/"
    lost = _without_example(train)
    if lost:
        raise RequestError(
            f"all images of {_shortened(lost)} in {_printable(spec)} fall into the"
            f" validation share of {val_fraction}: {advice}"
        )
    if val_fraction and not len(val):
        raise RequestError(
            f"none of the {len(source)} images in {_printable(spec)} falls into the validation"
            f" share of {val_fraction}: {advice}"
        )
    notes = [f"split by content: {len(train)} to train on, {len(val)} to validate on"]
    unseen = _without_example(val)
    if unseen and val_fraction:
        notes.append(f"no validation image of {_shortened(unseen)}")
    return Splits(train, val, tuple(notes))


def _open_training(path: Path) -> Source:
    source = _open_classes(path)
    if len(source.classes) < 2:
        raise RequestError(
            f"{_printable(path)} holds one class folder, {_shortened(source.classes)}: training"
            " needs two or more, or train/ and val/ with the class folders inside"
        )
    empty = _without_example(source)
    if empty:
        raise RequestError(
            f"class {empty[0]!r} in {_printable(path)} holds no file;"
            " add images or remove the folder"
        )
    return source


def _open_classes(path: Path) -> Source:
    folders = _folders(path)
    if not folders:
        raise RequestError(
            f"{_printable(path)} holds no class folders: put the images of each class into a folder"
            f" of their own, such as {_printable(path / 'cats')}"
        )
    # A link back to the data set or above it would bring in the other classes.
    above = {path.resolve(), *path.resolve().parents}
    files = [list(_files(folder, set(above))) for folder in folders]
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), [len(f) for f in files])
    paths = _checked(path, [file for of_class in files for file in of_class])
    return _file_source(paths, labels, tuple(_printable(folder.name) for folder in folders))


def _unlabelled(paths: Sequence[Path]) -> Source:
    return _file_source(paths, np.full(len(paths), -1, np.int32), ())


def _file_source(paths: Sequence[Path], labels: np.ndarray, classes: tuple[str, ...]) -> Source:
    return Source(_Files(tuple(paths)), labels, classes, tuple(map(_printable, paths)))


def _checked(path: Path, files: list[Path]) -> list[Path]:
    if not files:
        raise RequestError(f"{_printable(path)} holds no file: put images into it")
    return files


def _without_example(source: Source) -> list[str]:
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
    return [name for name, count in zip(source.classes, counts, strict=True) if not count]


def _train_and_val(path: Path) -> tuple[Path, Path] | None:
    folders = {folder.name.lower(): folder for folder in _folders(path)}
    train = [folders[name] for name in _TRAIN if name in folders]
    val = [folders[name] for name in _VAL if name in folders]
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
        raise RequestError(f"{_printable(folder)} does not exist{_suggestion(folder)}") from error
    except NotADirectoryError as error:
        raise RequestError(f"{_printable(folder)} is a file: name a folder") from error
    except OSError as error:
        raise RequestError(f"{_printable(folder)} cannot be listed: {error.strerror}") from error
    return sorted(shown, key=lambda entry: os.fsencode(entry.name))


def _suggestion(path: Path) -> str:
    """What a path that does not exist may have meant, to end an error with; or nothing."""
    missing = next(part for part in (*reversed(path.parents), path) if not part.exists())
    if not missing.parent.is_dir():
        return ""
    names = [sibling.name for sibling in missing.parent.iterdir()]
    close = difflib.get_close_matches(missing.name, names, n=1)
    return f"; did you mean {_printable(missing.parent / close[0])}?" if close else ""


def _printable(path: str | PathLike[str]) -> str:
    """A path that any report can hold: bytes that are not UTF-8 show as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more
