"""Labels from columns of values: what they are, inferred from their values."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tljax.data.examples import Source, join_names, normal
from tljax.data.options import LabelOptions
from tljax.data.table_files import Table, factorize
from tljax.runtime.errors import RequestError
from tljax.runtime.settings import Kind
from tljax.runtime.task import Task

MANY = 20
"""Whole numbers with more different values are quantities, unless they number classes."""

MAX_VALUES = 2**31
"""Largest product of labels and rows: 8 GB."""

_BLANK = {"", "nan", "null", "<na>"}  # in every column; compared in lower case
_UNKNOWN = _BLANK | {"na", "n/a", "none", "?", "-"}  # in columns of numbers, or of yes and no
_FLAGS = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0, "no": 0.0, "yes": 1.0}
_LARGEST = float(np.finfo(np.float32).max)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)


class Labels(NamedTuple):
    """The labels of a data set.

    Attributes:
        values: labels as those of `Source`; class -1, or a row of NaN, if nothing is known.
        names: the names of the classes, labels or numbers.
        task: what the labels are.
        note: what the columns were found to be, one line.
        by_name: whether labels are names, so that one that no row names applies to none, and all
            names that rows of one image give apply to it.
    """

    values: np.ndarray
    names: tuple[str, ...]
    task: Task
    note: str
    by_name: bool = False


@dataclass(frozen=True)
class Column:
    """One column, by its different cells.

    Attributes:
        table: says where the column and its rows are; its own columns are not used.
        name: the name of the column.
        codes: ``[n]`` index of the cell of each row.
        cells: text; empty if missing.
        classes: the names that ``cells`` are, in their order and then an empty cell; None if names
            are found in the cells.
        lists: the names in each cell if it is a list, None for a missing one.
        label: the name of the label or number that the column is, if not that of the column.
    """

    table: Table
    name: str
    codes: np.ndarray
    cells: Sequence[str]
    classes: tuple[str, ...] | None = None
    lists: Sequence[Sequence[str] | None] | None = None
    label: str = ""

    def rows(self, values: np.ndarray) -> np.ndarray:
        """Return a value per row from a value per different cell."""
        return values[self.codes]

    def place(self, wrong: np.ndarray) -> str:
        """Name the first of some cells and its first row, such as ``'x' in line 7``."""
        cell = int(np.argmax(wrong))
        row = int(np.argmax(self.codes == cell))
        return f"{self.cells[cell]!r} in {self.table.place(row)}"

    def require(self, good: np.ndarray, need: str) -> None:
        """Refuse a column with a cell that is not good.

        Raises:
            RequestError: there is one.
        """
        if not good.all():
            place = self.place(~good)
            raise RequestError(f"column {self.name} of {self.table.where} has {place}: {need}")

    @cached_property
    def is_blank(self) -> np.ndarray:
        """Whether each different cell is missing in a column of any kind."""
        blank = {""} if self.classes is not None else _BLANK
        return np.array([cell.lower() in blank for cell in self.cells], bool)

    @cached_property
    def is_unknown(self) -> np.ndarray:
        """Whether each different cell is missing in a column of numbers."""
        return np.array([cell.lower() in _UNKNOWN for cell in self.cells], bool)

    @cached_property
    def numbers(self) -> np.ndarray:
        """Float64 value of each different cell; NaN if it is unknown or no number."""
        return np.array([parse_number(cell, self.table.decimal) for cell in self.cells])

    @cached_property
    def flags(self) -> np.ndarray:
        """0 or 1 of each different cell; NaN if it is unknown or neither."""
        flags = [_FLAGS.get(cell.lower(), np.nan) for cell in self.cells]
        return np.where(np.isin(self.numbers, (0, 1)), self.numbers, flags)

    @cached_property
    def is_numeric(self) -> np.ndarray:
        """Whether each different cell is a number or unknown."""
        return self.is_unknown | ~np.isnan(self.numbers)

    @cached_property
    def is_flag(self) -> np.ndarray:
        """Whether each different cell is 0, 1, true, false, yes, no or unknown."""
        return self.is_unknown | ~np.isnan(self.flags)

    @cached_property
    def is_missing(self) -> np.ndarray:
        """Whether each cell has no name: NA and None are names, except among numbers."""
        is_quantity = self.is_numeric.all() and not np.isnan(self.numbers).all()
        return self.is_unknown if is_quantity and self.classes is None else self.is_blank

    @property
    def is_whole(self) -> bool:
        """Whether all cells are whole numbers or unknown."""
        known = self.numbers[~np.isnan(self.numbers)]
        # From 2**53 on every floating-point number is whole.
        is_whole = (known == np.rint(known)) & (np.abs(known) < 2**53)
        return bool(self.is_numeric.all() and is_whole.all())

    @property
    def separators(self) -> str:
        """The separators of names that are in cells."""
        cells = self.cells if self.classes is None else ()
        return "".join(sign for sign in "|;" if any(sign in cell for cell in cells))

    def find_classes(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the names of the classes, and the index of the class of each row or -1."""
        if self.classes is not None:
            return self.classes, self.rows(np.append(np.arange(len(self.classes)), -1))
        names = [normal(cell) for cell in self.cells]
        if self.is_whole and any("." in cell for cell in self.cells):  # pandas, if some are blank
            texts = zip(names, self.numbers.tolist(), strict=True)
            names = [cell if math.isnan(number) else f"{number:.0f}" for cell, number in texts]
        pairs = list(zip(names, self.is_missing.tolist(), strict=True))
        found = sorted({name for name, missing in pairs if not missing})
        if not any(math.isnan(number) for number in map(parse_number, found)):
            found.sort(key=parse_number)
        position = {name: index for index, name in enumerate(found)}
        return tuple(found), self.rows(
            np.array([-1 if missing else position[name] for name, missing in pairs], np.int32)
        )

    def find_names(self) -> list[Sequence[str] | None]:
        """Return the names in each different cell, separated by ``|`` or ``;``; None if unknown."""
        if self.lists is not None:
            return list(self.lists)
        if self.classes is not None:
            return [*([name] for name in self.classes), None]
        pairs = zip(self.cells, self.is_missing.tolist(), strict=True)
        return [[] if missing else re.split(r"[|;]", cell) for cell, missing in pairs]


def read_column(table: Table, name: str) -> Column:
    """Return a column of a table."""
    return Column(table, name, *factorize(table.columns[name]))


def read_labels(
    columns: Sequence[Column], options: LabelOptions, kind: Kind | None = None
) -> Labels:
    """Read labels from columns, inferring their kind unless ``options`` says it.

    Several columns are labels (``multilabel``) if they have only 0 and 1, true and false, or yes
    and no, and numbers (``regression``) if they have numbers. One column is, by the first rule
    that holds,

    1. ``multilabel`` if ``|`` or ``;`` is in a cell: they separate names;
    2. ``regression`` if all cells are numbers, some of them with decimals;
    3. ``regression`` if all cells are whole numbers, more than 20 of them different, unless they
       number classes: they are all numbers from 0 or 1 to the highest one, with five rows each on
       average;
    4. ``classification``.

    A cell that is empty, NaN or null is blank, and in columns of numbers or of yes and no also NA,
    N/A, None, ``?`` and ``-``. Blank is unknown, except for names with separators: no label.

    Args:
        columns: the columns to learn.
        options: the kind of task, the order and the units.
        kind: the kind if the type of the column says it; None to infer it from the values.

    Raises:
        RequestError: the values do not fit the task.
    """
    where = columns[0].table.where
    for column in columns:
        if column.lists is None and column.is_blank.all():
            raise RequestError(f"column {column.name} of {where} is empty: choose another")
    kind, inferred = options.kind or kind or _infer(columns), options.task is None
    task = make_task(options, kind, len(columns), f"{describe_columns(columns)} of {where}")
    if kind == "regression":
        labels = _numbers(columns)
    elif kind == "multilabel" and (len(columns) > 1 or _is_flag(columns[0])):
        labels = _flags(columns, inferred=inferred)
    elif kind == "multilabel":
        labels = _names(columns[0])
    elif len(columns) > 1:
        labels = _one_hot(columns, kind)
    elif kind == "ordinal":
        found, indices = columns[0].find_classes()
        names, ranks, phrase = order_classes(found, options, where)
        labels = Labels(ranks[indices], names, task, phrase)
    else:
        labels = _classes(columns[0], inferred=inferred)
    return labels._replace(task=task, note=f"{describe_columns(columns)}: {labels.note}")


def describe_columns(columns: Sequence[Column]) -> str:
    """Name columns in a message; those of one list have one name."""
    names = list(dict.fromkeys(column.name for column in columns))
    return f"column{'s' * (len(names) > 1)} {join_names(names)}"


def make_task(options: LabelOptions, kind: Kind, numbers: int, where: str) -> Task:
    """Make a task of a kind, with the units of its numbers.

    Raises:
        RequestError: there are units of something else than numbers, or not one for each.
    """
    if options.units is None:
        return Task(kind)
    units = tuple(unit.strip() for unit in options.units.split(","))
    if kind != "regression":
        raise RequestError(
            f"--units {options.units} has no effect on {where}, which is read with --task {kind}"
        )
    if len(units) != numbers:
        raise RequestError(
            f"--units {options.units}: give {numbers}, one for each number of {where}"
        )
    return Task(kind, units=units)


def order_classes(
    found: Sequence[str], options: LabelOptions, where: str
) -> tuple[tuple[str, ...], np.ndarray, str]:
    """Put classes in the order of ``--order`` or, without it, of the numbers that they are.

    Without ``--order``, classes whose names are not all numbers keep their order. A class of
    ``--order`` may have no example, such as a step of a scale.

    Args:
        found: the names of the classes of the data.
        options: the options.
        where: the name of the data in errors.

    Returns:
        The names from the lowest to the highest, the rank of each found class and at last -1 for
        an unknown one, and a phrase that says the order.

    Raises:
        RequestError: ``--order`` names a class twice, or not all classes of the data.
    """
    found, more = [*map(normal, found)], ""
    numbers = [*map(parse_number, found)]
    if options.order is not None:
        ordered = [normal(name) for name in split_names(options.order, found)]
        if len({*ordered}) < len(ordered):
            raise RequestError(f"--order {options.order}: name every class once")
        if missing := [name for name in found if name not in ordered]:
            lacks = f"lacks {join_names(missing)}: name all classes of {where}"
            raise RequestError(f"--order {options.order} {lacks}")
        if never := [name for name in ordered if name not in found]:
            more = f", no image is of {join_names(never)}"
    elif not np.isnan(numbers).any():
        ordered = [found[index] for index in np.argsort(numbers, kind="stable")]
    else:
        ordered, more = found, "; --order changes it"
    phrase = f"{len(ordered)} ordered classes from {ordered[0]} to {ordered[-1]}{more}"
    return tuple(ordered), np.array([*map(ordered.index, found), -1], np.int32), phrase


def order_source(source: Source, options: LabelOptions, where: str) -> tuple[Source, str]:
    """Put the classes of a source in order; see `order_classes`.

    Returns:
        The source as an ordinal one, and a phrase that says the order.
    """
    names, ranks, phrase = order_classes(source.classes, options, where)
    task = make_task(options, "ordinal", 0, where)
    return replace(source, labels=ranks[source.labels], classes=names, task=task), phrase


def split_names(text: str, known: Sequence[str]) -> list[str]:
    """Split names at commas, except those of a known name that contains commas itself."""
    parts, names = normal(text).split(","), list[str]()
    while parts:
        ends = range(len(parts), 0, -1)
        end = next((end for end in ends if ",".join(parts[:end]).strip() in known), 1)
        names.append(",".join(parts[:end]).strip())
        parts = parts[end:]
    return [name for name in names if name]


def parse_number(text: str, decimal: str = ".") -> float:
    """Return the number that a text is, infinite beyond float32, and NaN for any other text."""
    text = text.strip().replace(decimal, ".", 1)
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    return math.copysign(math.inf, number) if abs(number) > _LARGEST else number


def describe_values(values: Float[np.ndarray, "n columns"], kind: Kind, detail: str = "") -> str:
    """Say how many labels, or which numbers, columns hold, and how much is unknown."""
    unknown = np.isnan(values)
    count = f"{values.shape[1]} label{'s' * (values.shape[1] > 1)}"
    if kind == "regression":
        ranges = [
            f"{column[~np.isnan(column)].min():.10g} to {np.nanmax(column):.10g}"
            for column in values.T
            if not np.isnan(column).all()
        ]
        count = f"numbers from {join_names(ranges)}" if ranges else "no numbers"
    share = unknown.mean() if unknown.size else 0
    percent = f"{share:.0%}" if share >= 0.01 else "less than 1%"
    return count + detail + (f", {percent} of the values unknown" if share else "")


def label_source(source: Source, labels: Labels) -> Source:
    """Return a source with other labels."""
    return replace(source, labels=labels.values, classes=labels.names, task=labels.task)


def read_weights(column: Column) -> np.ndarray:
    """Return ``[n]`` float32, the weight of each row in the loss.

    Raises:
        RequestError: a weight is no number from 0, or all are 0.
    """
    weights, where = column.numbers, column.table.where
    wrong = ~((weights >= 0) & (weights < np.inf))
    if wrong.any():
        place = column.place(wrong)
        raise RequestError(
            f"--weight-column {column.name}: {where} has {place}: weights are numbers from 0"
        )
    if not weights.any():
        raise RequestError(f"--weight-column {column.name}: every weight in {where} is 0")
    return column.rows(weights).astype(np.float32)


def _infer(columns: Sequence[Column]) -> Kind:
    """Infer the kind of one or several columns; see `read_labels`."""
    if len(columns) > 1:
        return _infer_several(columns)
    column = columns[0]
    if column.separators:
        return "multilabel"
    if not column.is_numeric.all():
        _refuse_mixed(column)
        return "classification"
    numbers = column.rows(column.numbers)
    known = numbers[~np.isnan(numbers)]
    different = np.unique(known)
    if not len(known) or not column.is_whole:
        return "regression" if len(known) else "classification"
    low, high = different[0], different[-1]
    is_numbering = low in (0, 1) and len(different) == high - low + 1
    is_quantity = len(different) > MANY and not (is_numbering and len(known) >= 5 * len(different))
    return "regression" if is_quantity else "classification"


def _infer_several(columns: Sequence[Column]) -> Kind:
    if all(map(_is_flag, columns)):
        return "multilabel"
    for column in columns:
        if not column.is_numeric.all():
            raise RequestError(
                f"{describe_columns(columns)}: {column.name} has {column.place(~column.is_numeric)}"
                "; several columns need 0 and 1 for labels, or numbers: choose one with --target"
            )
    known = np.concatenate([column.numbers[~column.is_unknown] for column in columns])
    if (known == -1).any() and np.isin(known, (-1, 0, 1)).all():
        raise RequestError(
            f"{describe_columns(columns)}: -1 stands beside 0 or 1: write 0 if a label does not"
            " apply, nothing if it is unknown, or say --task regression"
        )
    return "regression"


def _is_flag(column: Column) -> bool:
    return column.lists is None and bool(column.is_flag.all())


def _refuse_mixed(column: Column) -> None:
    """Refuse numbers among which a few cells are text: they are hardly names of classes."""
    counts = np.bincount(column.codes, minlength=len(column.cells))
    wrong = ~column.is_numeric
    known = ~np.isnan(column.numbers)
    is_quantity = known.sum() > MANY or (column.numbers[known] % 1 != 0).any()
    if is_quantity and counts[wrong].sum() <= 0.1 * counts.sum():
        raise RequestError(
            f"column {column.name} of {column.table.where} has {counts[known].sum()} numbers but"
            f" {column.place(wrong)}: correct it, or say --task classification"
        )


def _stack(columns: Sequence[Column], values: Sequence[np.ndarray]) -> np.ndarray:
    rows = [column.rows(x) for column, x in zip(columns, values, strict=True)]
    return np.stack(rows, 1)


def _names_of(columns: Sequence[Column]) -> tuple[str, ...]:
    return tuple(column.label or column.name for column in columns)


def _numbers(columns: Sequence[Column]) -> Labels:
    for column in columns:
        column.require(column.is_numeric, "--task regression needs numbers")
        is_finite = ~np.isinf(column.numbers)
        column.require(is_finite, f"--task regression needs numbers up to {_LARGEST:.1g}")
    values = _stack(columns, [column.numbers for column in columns])
    if np.isnan(values).all():
        raise RequestError(f"{describe_columns(columns)}: no value is known: choose another")
    return Labels(values, _names_of(columns), Task(), describe_values(values, "regression"))


def _flags(columns: Sequence[Column], *, inferred: bool) -> Labels:
    for column in columns:
        column.require(column.is_flag, "labels need 0 or 1, or blank if unknown")
    values = _stack(columns, [column.flags for column in columns]).astype(np.float32)
    note = describe_values(values, "multilabel")
    if inferred and (values.sum(1) == 1).all():
        note += "; exactly one applies in every row: --task classification makes them classes"
    return Labels(values, _names_of(columns), Task(), note)


def _one_hot(columns: Sequence[Column], kind: Kind) -> Labels:
    """Read columns of 0 and 1 as exclusive classes; a row without any value is unknown."""
    if kind == "ordinal":
        raise RequestError(
            f"{describe_columns(columns)}: --task ordinal needs one column: choose it"
        )
    values = _flags(columns, inferred=False).values
    unknown, ones = np.isnan(values).all(1), np.nansum(values, 1)
    wrong = (ones != 1) & ~unknown
    if wrong.any():
        row = int(np.argmax(wrong))
        raise RequestError(
            f"{describe_columns(columns)}: --task classification needs one 1 in every row, but"
            f" {columns[0].table.place(row)} has {ones[row]:.0f}"
        )
    classes = np.where(unknown, -1, np.nan_to_num(values).argmax(1)).astype(np.int32)
    return Labels(classes, _names_of(columns), Task(), f"one of {len(columns)} classes")


def _names(column: Column) -> Labels:
    """Read names in cells."""
    cells = [
        None if cell is None else [normal(name.strip()) for name in cell]
        for cell in column.find_names()
    ]
    names = column.classes or tuple(sorted({name for cell in cells for name in cell or () if name}))
    if not names:
        raise RequestError(f"column {column.name} of {column.table.where} names no label")
    if len(names) * max(len(cells), len(column.codes)) > MAX_VALUES:
        raise RequestError(
            f"column {column.name} of {column.table.where} has {len(names)} labels for"
            f" {len(column.codes)} rows, more than fit into memory: keep the frequent ones"
        )
    position = {normal(name): index for index, name in enumerate(names)}
    applies = np.zeros((len(cells), len(names)), np.float32)
    for row, cell in enumerate(cells):
        applies[row, [position[name] for name in cell or () if name]] = 1
        applies[row] += np.nan if cell is None else 0
    values = column.rows(applies)
    detail = f" separated by {column.separators[0]}" if column.separators else ""
    if empty := int((values == 0).all(1).sum()):
        detail += f", none of which applies to {empty} rows"
    note = describe_values(values, "multilabel", detail)
    return Labels(values, names, Task(), note, by_name=True)


def _classes(column: Column, *, inferred: bool) -> Labels:
    names, indices = column.find_classes()
    note = f"one of {len(names)} classes"
    if inferred and column.classes is None and column.is_whole and len(names) > 2:
        note += ", whole numbers: choose --task regression or ordinal if they are quantities"
    return Labels(indices.astype(np.int32), names, Task(), note)
