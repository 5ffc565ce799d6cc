"""Lists of folders: every file is an example, except hidden ones and what tljax has written."""

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tljax.data.examples import normal
from tljax.data.files import printable
from tljax.runtime.errors import RequestError
from tljax.runtime.files import MARKER

# Hidden files, and names that only operating systems and thumbnail caches use.
_IGNORED = re.compile(
    r"\..*|(eh)?thumbs\.db|desktop\.ini|\$recycle\.bin|system volume information|found\.000"
    r"|lost\+found|cvs|__macosx|icon\r|network trash folder|temporary items|@eadir|#recycle"
    r"|#snapshot|@recycle|@recently-snapshot|@__thumb",
    re.IGNORECASE | re.DOTALL,
)

IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".npy")
}

Signature = tuple[int, int, int, int]
"""Device, inode, mode and time of modification in ns: another list of a folder changes it."""


@dataclass
class Visits:
    """What the lists of folders depend on.

    Attributes:
        folders: the signature of each listed folder, from before it was listed.
        outputs: folders that were left out as written by tljax.
        repeatable: False if the same signatures may come with another list.
    """

    folders: dict[str, Signature] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    repeatable: bool = True

    def add(self, other: "Visits") -> None:
        """Add what further lists depend on."""
        self.folders |= other.folders
        self.outputs += other.outputs
        self.repeatable &= other.repeatable


def walk(
    folder: Path, seen: set[Path] | None = None, visits: Visits | None = None
) -> Iterator[os.DirEntry[str]]:
    """Yield the examples below a folder in the byte order of their names; no real folder twice.

    Args:
        folder: the folder.
        seen: resolved folders to leave out, to which those that were listed are added.
        visits: what the result depends on is added to it.

    Raises:
        RequestError: a folder cannot be listed.
    """
    seen, visits = set() if seen is None else seen, visits or Visits()
    real = folder.resolve()
    if real in seen:
        visits.folders[str(folder)] = signature(folder)  # a link may come to lead elsewhere
        return
    seen.add(real)
    for entry in list_entries(folder, visits):
        if is_folder(entry):
            yield from walk(Path(entry.path), seen, visits)
        elif _is_example(entry):
            yield entry
        elif entry.is_symlink():  # to a pipe or device, which may be replaced by a file
            visits.repeatable = False


def list_folders(path: Path, visits: Visits | None = None) -> list[Path]:
    """List the folders in a folder, in the byte order of their names.

    Raises:
        RequestError: the folder cannot be listed.
    """
    visits = visits or Visits()
    entries = list_entries(path, visits)
    folders = [Path(entry.path) for entry in entries if is_folder(entry)]
    if any(entry.is_symlink() and not is_folder(entry) for entry in entries):
        visits.repeatable = False  # where the link leads to, there may come to be a folder
    return folders


def list_entries(folder: Path, visits: Visits) -> list[os.DirEntry[str]]:
    """List the visible entries of a folder in the byte order of their names.

    Raises:
        RequestError: the folder cannot be listed.
    """
    visible: list[os.DirEntry[str]] = []
    try:
        visits.folders[str(folder)] = signature(folder)
        with os.scandir(folder) as entries:
            for entry in filter(_is_visible, entries):
                if is_folder(entry) and is_output(entry.path):
                    visits.outputs.append(entry.path)
                else:
                    visible.append(entry)
    except FileNotFoundError as error:
        raise RequestError(f"{printable(folder)} does not exist{suggest_path(folder)}") from error
    except NotADirectoryError as error:
        raise RequestError(f"{printable(folder)} is a file: choose a folder") from error
    except OSError as error:
        where = printable(error.filename or folder)
        raise RequestError(f"{where} cannot be listed: {error.strerror}") from error
    return sorted(visible, key=lambda entry: os.fsencode(normal(entry.name)))


def signature(folder: str | Path) -> Signature:
    """Return the signature of a folder.

    Raises:
        OSError: it cannot be looked up.
    """
    info = os.stat(folder)  # noqa: PTH116 - also of text
    return info.st_dev, info.st_ino, info.st_mode, info.st_mtime_ns


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder and for a link to one."""
    # Path.is_dir raises for a link to a name that is too long.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # noqa: PTH112


def _is_example(entry: os.DirEntry[str]) -> bool:
    """Return True for a file and for a broken link, which is reported when it is read."""
    if not entry.is_symlink():
        return entry.is_file()
    path = Path(entry.path)
    return path.is_file() or not exists(path)


_RUN_FILES = ("config.json", "split.csv", "metrics.jsonl")


def is_output(folder: str) -> bool:
    """Return True if tljax wrote into a folder, or into every folder in it and nothing else.

    Raises:
        OSError: it cannot be listed.
    """
    # Runs of earlier versions have no marker.
    if exists(Path(folder, MARKER)) or all(exists(Path(folder, name)) for name in _RUN_FILES):
        return True
    with os.scandir(folder) as entries:
        outputs = (
            entry.is_dir(follow_symlinks=False) and is_output(entry.path)
            for entry in filter(_is_visible, entries)
        )
        return next(outputs, False) and all(outputs)


def first_image(folder: Path) -> str | None:
    """Find a file with the extension of an image that is not in an output folder of tljax."""
    if not folder.is_dir() or is_output(str(folder)):
        return None
    paths = (Path(entry.path) for entry in walk(folder))
    paths = (path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
    return next(map(printable, paths), None)


def _is_visible(entry: os.DirEntry[str]) -> bool:
    return not _IGNORED.fullmatch(entry.name)


def exists(path: Path) -> bool:
    """Return True if a file or folder exists and is accessible."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises for a name that is too long


def suggest_path(path: Path) -> str:
    """Suggest an existing path with a similar name, as the end of an error; empty if none is."""
    missing = next(part for part in (*reversed(path.parents), path) if not exists(part))
    try:
        names = [sibling.name for sibling in missing.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(missing.name, names, n=1)
    return f"; did you mean {printable(missing.parent / close[0])}?" if close else ""
