"""Table files: CSV, parquet and JSON lines as columns of text."""

import csv
import io
import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tljax.data.examples import join_names, normal
from tljax.data.files import printable
from tljax.runtime.errors import RequestError, first_line
from tljax.runtime.packages import install_command

SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
MAX_COLUMNS = 100_000
_CHUNK = 10_000  # rows that exist as lists of cells at a time


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        where: the file, as printable text.
        columns: the cells of each named column, without spaces around them; empty if missing.
        lines: the line of the file, or the number of the row in a parquet file, of each row.
        unit: what ``lines`` counts, ``line`` or ``row``.
        decimal: the character before decimals: a comma where commas do not separate cells.
    """

    where: str
    columns: Mapping[str, list[str]]
    lines: Sequence[int]
    unit: str = "line"
    decimal: str = "."

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        """Name a row in a message, such as ``line 7``."""
        return f"{self.unit} {self.lines[row]}"

    def select(self, rows: np.ndarray) -> "Table":
        """Select rows by their indices."""
        if len(rows) == len(self):
            return self
        indices = rows.tolist()
        columns = {name: [cells[i] for i in indices] for name, cells in self.columns.items()}
        return replace(self, columns=columns, lines=[self.lines[i] for i in indices])


def is_table(path: Path) -> bool:
    """Return True for a .csv, .tsv, .parquet, .jsonl or .ndjson file, also if it is missing."""
    return path.suffix.lower() in SUFFIXES and not os.path.isdir(path)  # noqa: PTH112 - long names


def read_table(path: Path) -> Table:
    """Read a table file as text.

    A .csv or .tsv file is UTF-8, or UTF-16 with a byte order mark; its first line names the
    columns; its cells are separated by commas, semicolons, tabs or ``|``, whichever divides the
    first lines into the same number of cells; a quoted cell may contain any of them. Empty lines
    and columns without a name, such as the index that pandas writes, are left out. A .jsonl or
    .ndjson file has one object per line. Lists become text with ``|`` between the items.

    Raises:
        RequestError: the file cannot be read, a line does not fit the first, two columns have one
            name, there is no row, or a package is missing.
    """
    where = printable(path)
    reader = {".parquet": _read_parquet, ".jsonl": _read_json, ".ndjson": _read_json}
    try:
        table = reader.get(path.suffix.lower(), _read_csv)(path, where)
    except OSError as error:
        raise RequestError(
            f"{where} cannot be read: {error.strerror or first_line(error)}"
        ) from error
    if not len(table):
        raise RequestError(f"{where} has no row below the names of its columns: add images")
    return table


def _read_csv(path: Path, where: str) -> Table:
    text = _decode(path.read_bytes(), where)
    separator = _separator(text)
    reader = _records(text, separator, where)
    names = [_column_name(cell) for cell in next(reader, ([], [[]]))[1][0]]
    if not any(names):
        raise RequestError(f"{where} is empty: its first line must name its columns")
    _check_names(names, where)
    cells: list[list[str]] = [[] for _ in names]
    lines: list[int] = []
    for numbers, rows in reader:
        for number, row in zip(numbers, rows, strict=True):
            if len(row) != len(names):
                _fit(row, names, f"{where}, line {number}", separator)
        lines += numbers
        for column, values in zip(cells, zip(*rows, strict=True), strict=True):
            column.extend(map(str.strip, values))
    columns = {name: column for name, column in zip(names, cells, strict=True) if name}
    return Table(where, columns, lines, decimal="." if separator == "," else ",")


def _decode(data: bytes, where: str) -> str:
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{where}, line {line} is not UTF-8 text: save it as UTF-8") from error
    if "\0" in text:
        raise RequestError(f"{where} is not a text file: save it as UTF-8 text")
    return text


def _separator(text: str) -> str:
    """Find the separator that divides the first lines into the same number of cells."""
    sample = text[: 2**16]

    def score(separator: str) -> tuple[bool, float, int]:
        reader = csv.reader(io.StringIO(sample, ""), delimiter=separator, skipinitialspace=True)
        try:
            rows = [row for row in islice(reader, 20) if any(row)]
        except csv.Error:
            rows = []
        if len(rows) > 1 and len(sample) < len(text):
            del rows[-1]  # may be cut off
        width = len(rows[0]) if rows else 0
        return width > 1, sum(len(row) == width for row in rows) / max(len(rows), 1), width

    return max(",;\t|", key=score)


def _records(text: str, separator: str, where: str) -> Iterator[tuple[list[int], list[list[str]]]]:
    """Yield the first line that is not empty, then the others in chunks, each with its number."""
    # Without an argument newline, StringIO would change line ends within quotes.
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    numbers: list[int] = []
    rows: list[list[str]] = []
    size = 1
    try:
        for row in reader:
            if any(row):
                numbers.append(reader.line_num)
                rows.append(row)
                if len(rows) == size:
                    yield numbers, rows
                    numbers, rows, size = [], [], _CHUNK
    except csv.Error as error:
        advice = "check the quotation marks"
        raise RequestError(f"{where}, line {reader.line_num}: {error}: {advice}") from error
    if rows:
        yield numbers, rows


def _column_name(cell: str) -> str:
    """Normalize a column's name; the index of pandas, read and written again, has none."""
    name = normal(cell.strip())
    return "" if name.startswith(("Unnamed: ", "__index_level_")) else name


def _check_names(names: Sequence[str], where: str) -> None:
    if len(names) > MAX_COLUMNS:
        raise RequestError(f"{where} has {len(names)} columns: at most {MAX_COLUMNS} can be read")
    name, count = Counter(filter(None, names)).most_common(1)[0] if any(names) else ("", 0)
    if count > 1:
        raise RequestError(f"{where} has two columns named {name}: rename one")


def _fit(row: list[str], names: Sequence[str], place: str, separator: str) -> None:
    """Remove empty cells behind the last column; refuse any other number of cells."""
    found = len(row)
    while len(row) > len(names) and not row[-1]:
        del row[-1]
    if len(row) != len(names):
        sign = "tab" if separator == "\t" else repr(separator)
        raise RequestError(
            f"{place} has {found} cells but the first line names {len(names)} columns: correct it,"
            f" or put quotation marks around cells that contain {sign}"
        )


def _read_json(path: Path, where: str) -> Table:
    text = _decode(path.read_bytes(), where)
    columns: dict[str, list[str]] = {}
    lines: list[int] = []
    # str.splitlines would also divide lines at separators that JSON allows in strings.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"{where}, line {number} is not JSON: {first_line(error)}"
            ) from error
        if not isinstance(row, dict):
            raise RequestError(f"{where}, line {number} is not an object: write {{NAME: VALUE}}")
        for key in row:
            if key not in columns:
                columns[key] = [""] * len(lines)
        for key, column in columns.items():
            column.append(_text(row.get(key)))
        lines.append(number)
    names = [_column_name(_text(key)) for key in columns]
    _check_names(names, where)
    named = zip(names, columns.values(), strict=True)
    return Table(where, {name: cells for name, cells in named if name}, lines)


def _read_parquet(path: Path, where: str) -> Table:
    try:
        from pyarrow import ArrowException, parquet, types  # noqa: PLC0415 - optional
    except ImportError as error:
        raise RequestError(f"{where} needs pyarrow: {install_command('pyarrow')}") from error

    def is_readable(kind: Any) -> bool:  # images in bytes are not
        if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
            kind = kind.value_type
        return not (types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind))

    try:
        schema = parquet.read_schema(path)
        _check_names(schema.names, where)
        readable = [field.name for field in schema if is_readable(field.type)]
        arrays = parquet.read_table(path, columns=readable)
    except ArrowException as error:
        raise RequestError(f"{where} is not a parquet file: {first_line(error)}") from error
    columns = {
        name: list(map(_text, arrays.column(key).to_pylist()))
        for key in readable
        if (name := _column_name(key))
    }
    return Table(where, columns, range(1, arrays.num_rows + 1), unit="row")


def _text(value: Any) -> str:
    """Write a value as CSV has it: nothing for None and NaN, ``|`` between the items of a list."""
    if isinstance(value, str):  # JSON may have halves of characters, which cannot be printed
        return value.encode("utf-8", "backslashreplace").decode().strip()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return json.dumps(value)
    return "|".join(map(_text, value)) if isinstance(value, Iterable) else str(value)


def require_column(name: str, columns: Iterable[str], where: str, flag: str) -> str:
    """Return the name of a column that an option names, in Unicode form C.

    Raises:
        RequestError: there is no such column; similar ones are suggested.
    """
    name, names = normal(name), list(columns)
    if name not in names:
        near = get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose {join_names(names)}"
        raise RequestError(f"{flag} {name}: {where} has no such column; {hint}")
    return name


def factorize(cells: Collection[str]) -> tuple[np.ndarray, list[str]]:
    """Assign numbers to different cells in the order of their first rows.

    Returns:
        The number of each cell, ``[n]`` int32, and the different cells in the order of numbers.
    """
    numbers = {cell: number for number, cell in enumerate(dict.fromkeys(cells))}
    return np.fromiter(map(numbers.__getitem__, cells), np.int32, len(cells)), list(numbers)
