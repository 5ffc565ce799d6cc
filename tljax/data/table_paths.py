"""The files that a column of a table names."""

import os
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from tljax.data.examples import join_names, normal
from tljax.data.files import printable
from tljax.data.listing import IMAGE_SUFFIXES
from tljax.data.table_files import Table, require_column
from tljax.runtime.errors import RequestError

_SAMPLE = 100  # rows that tell which column has the paths
_SUBFOLDERS = 100  # folders that are searched before --root is suggested


class Files(NamedTuple):
    """The files of a table.

    Attributes:
        column: the column that names them.
        paths: the path of the file of each row; None if it does not exist.
    """

    column: str
    paths: Sequence[str | None]


def find_files(table: Table, root: str, path_column: str | None, taken: Sequence[str]) -> Files:
    r"""Find the column with paths, and the file of each row.

    A path is absolute or relative to ``root``. Where there is no such file, ``\`` is read as ``/``,
    and a name without an extension means the only image ``NAME.jpg``, ``NAME.png`` and so on.

    Args:
        table: the table.
        root: folder of relative paths.
        path_column: the column with paths; None for the one in which most of 100 rows name
            different existing files, the first such column if there are several.
        taken: columns that have another purpose.

    Raises:
        RequestError: there is no such column, or no file exists.
    """
    find = _Finder(root)
    if path_column is None:
        column = _guess_column(table, find, taken)
    else:
        column = require_column(path_column, table.columns, table.where, "--path-column")
    paths = list(map(find, table.columns[column]))
    if not any(paths):
        names = [name for name in table.columns[column][:3] if name]
        raise RequestError(
            f"none of the {len(table)} files of {table.where}, column {column} ({join_names(names)}"
            f"), is in {printable(root)}: set --root{_suggest_root(root, names)}"
        )
    return Files(column, paths)


def _guess_column(table: Table, find: "_Finder", taken: Sequence[str]) -> str:
    rows = range(0, len(table), max(len(table) // _SAMPLE, 1))
    columns = [name for name in table.columns if name not in taken]
    # A column of few values, such as 0 and 1, may also happen to have the names of files.
    found = {
        name: len({path for row in rows if (path := find(table.columns[name][row]))})
        for name in columns
    }
    best = max(columns, key=lambda name: found[name], default="")
    # Without a header, the names of the columns are the first row.
    if images := [
        name for name in table.columns if _is_image(name) or (name == best and find(name))
    ]:
        raise RequestError(
            f"the first line of {table.where} has the image {images[0]} instead of the names of the"
            " columns: put a line such as path,label above it"
        )
    if found.get(best):
        return best
    for name in columns:
        cells = table.columns[name]
        if any(_is_image(cells[row]) for row in rows):
            return name  # for the error that none of its files exists
    if len(table.columns) == 1:
        raise RequestError(
            f"{table.where} has only one column, {columns[0] if columns else taken[0]}: separate"
            " columns by commas, semicolons or tabs"
        )
    raise RequestError(
        f"no column of {table.where} ({join_names([*table.columns])}) has paths of files in"
        f" {printable(find.root)}: choose the column with --path-column, and the folder with --root"
    )


def _is_image(text: str) -> bool:
    return os.path.splitext(text)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 - of many cells


def _suggest_root(root: str, names: Sequence[str]) -> str:
    """Return a folder in the root that has one of the files, as the end of an error."""
    try:
        with os.scandir(root) as entries:
            folders = sorted(entry.path for entry in islice(entries, _SUBFOLDERS) if entry.is_dir())
    except OSError:
        folders = []
    good = (folder for folder in folders if any(map(_Finder(folder), names)))
    return f" {printable(next(good, 'FOLDER'))}"


class _Finder:
    """Find files by listing each folder once: a table may have a million rows."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.folders: dict[str, tuple[str, set[str]]] = {}  # by their text in cells
        self.names: dict[str, set[str]] = {}  # by folder
        self.others: dict[str, Mapping[str, str | None]] = {}  # by folder: see _other_names

    def __call__(self, cell: str) -> str | None:
        if not cell:
            return None
        path = self._find(cell)
        return self._find(cell.replace("\\", "/")) if path is None and "\\" in cell else path

    def _find(self, cell: str) -> str | None:
        start = cell.rfind("/") + 1
        text, name = cell[:start], cell[start:]
        if text not in self.folders:
            # Equal files have equal paths, so that duplicates are found.
            folder = os.path.normpath(os.path.join(self.root, text))  # noqa: PTH118
            if folder not in self.names:
                self.names[folder] = _list(folder)
            self.folders[text] = os.path.join(folder, ""), self.names[folder]  # noqa: PTH118
        folder, names = self.folders[text]
        if name in names:
            return folder + name
        if folder not in self.others:
            self.others[folder] = _other_names(names)
        other = self.others[folder].get(normal(name))
        return other and folder + other


def _list(folder: str) -> set[str]:
    """List the names of files in a folder; none if it does not exist."""
    try:
        with os.scandir(folder) as entries:
            # Links are not followed, which would take long.
            return {entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)}
    except PermissionError as error:
        raise RequestError(f"{printable(folder)} cannot be listed: {error.strerror}") from error
    except (OSError, ValueError):  # ValueError: a cell with a null character
        return set()


def _other_names(names: set[str]) -> dict[str, str | None]:
    """Map further names of files: normalized ones, and those of images without extension."""
    others: dict[str, str | None] = {}
    for name in names:
        stem, suffix = os.path.splitext(normal(name))  # noqa: PTH122
        if suffix.lower() in IMAGE_SUFFIXES:
            others[stem] = None if stem in others else name  # two images: neither
    for name in names:
        others[normal(name)] = name
    return others
