"""Tables of images: a column with paths, and columns with labels, groups, weights and the split."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tljax.data.examples import (
    Source,
    Splits,
    is_labeled,
    join_names,
    normal,
    select,
    without_example,
)
from tljax.data.files import Files, Names, printable
from tljax.data.folders import TRAIN, VAL, expand_path
from tljax.data.labels import (
    Column,
    Labels,
    describe_columns,
    read_column,
    read_labels,
    read_weights,
    split_names,
)
from tljax.data.options import LabelOptions
from tljax.data.splits import (
    check_training,
    number_groups,
    refuse_divided_groups,
    search_groups,
    split_source,
)
from tljax.data.table_files import Table, factorize, read_table, require_column
from tljax.data.table_paths import find_files
from tljax.runtime.errors import RequestError

_USUAL = ("label", "labels", "class", "target")  # names of columns that are the target if present


class _Opened(NamedTuple):
    """A table as a source; ``parts`` is 0 for training, 1 for validation, None without a split."""

    source: Source
    parts: np.ndarray | None
    group_names: list[str] | None
    notes: tuple[str, ...]


def open_table_splits(path: Path, val_fraction: float, options: LabelOptions) -> Splits:
    """Open the training and validation rows of a table.

    Without a column for the split, or without validation rows in it, the training rows are split by
    group if there are groups, otherwise by content.

    Args:
        path: a .csv, .tsv, .parquet, .jsonl or .ndjson file; see `read_table`.
        val_fraction: fraction of the groups or images to validate on, in [0, 1).
        options: columns, and the kind of labels; see `read_labels`.

    Raises:
        RequestError: the table cannot be read or cannot be trained on.
    """
    source, parts, group_names, notes = _open(path, options)
    where = printable(path)
    train = source if parts is None else select(source, np.flatnonzero(parts == 0))
    if not len(train):
        raise RequestError(f"{where} has no training row: correct the column with the split")
    notes += check_training(train, where)
    if parts is None or not parts.any():
        splits = split_source(train, where, val_fraction, group_names)
        return splits._replace(notes=notes + splits.notes)
    if train.task.kind == "classification" and (lost := without_example(train)):
        raise RequestError(
            f"{where}: the validation rows have classes without training rows, {join_names(lost)}:"
            " correct the split or remove them"
        )
    val = select(source, np.flatnonzero(parts == 1))
    unseen = tuple(name for name in without_example(val) if name not in without_example(source))
    notes += (f"no validation image of {join_names(unseen)}",) if unseen else ()
    return Splits(train, val, notes)


def open_labeled_table(path: Path, options: LabelOptions) -> Source:
    """Open the validation rows of a table or, if no column says which these are, all rows.

    Raises:
        RequestError: the table cannot be read.
    """
    source, parts, _, _ = _open(path, options)
    if parts is None or not parts.any():
        return source
    return select(source, np.flatnonzero(parts == 1))


def table_has_validation(path: Path, options: LabelOptions) -> bool:
    """Return True if a column of a table says which rows to validate on.

    Raises:
        RequestError: the table cannot be read.
    """
    parts = _read_parts(read_table(path), options)
    return parts is not None and bool(_validation(parts[1]))


def _open(path: Path, options: LabelOptions) -> _Opened:
    table = read_table(path)
    root = os.path.abspath(path.parent if options.root is None else expand_path(options.root))  # noqa: PTH100
    if not os.path.isdir(root):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        raise RequestError(f"--root {printable(root)} is not a folder")
    split = _read_parts(table, options)
    taken = _columns_taken(table, options) + ([] if split is None else [split[0]])
    targets = split_names(options.target or "", [*table.columns])
    column, files = find_files(table, root, options.path_column, [*taken, *targets])
    rows, notes = _choose_rows(table, table.columns[column], files, split)
    table, paths = table.select(rows), [str(files[i]) for i in rows.tolist()]
    parts = None if split is None else (~np.isin(split[1][rows], TRAIN)).astype(np.int8)
    labels = read_labels(choose_targets(table, options, [*taken, column]), options)
    return _build(table, root, paths, labels, parts, options, (labels.note, *notes))


def _columns_taken(table: Table, options: LabelOptions) -> list[str]:
    """Return the columns with weights and groups, which are neither paths nor labels."""
    taken = []
    if options.weight_column is not None:
        name = options.weight_column
        taken.append(require_column(name, table.columns, table.where, "--weight-column"))
    if options.group is not None and normal(options.group) in table.columns:
        taken.append(normal(options.group))
    return taken


def _choose_rows(
    table: Table,
    cells: list[str],
    files: Sequence[str | None],
    split: tuple[str, np.ndarray] | None,
) -> tuple[np.ndarray, list[str]]:
    """Return the rows with a file, to train or to validate on, and notes about the others."""
    keep, notes = np.array([file is not None for file in files]), list[str]()
    if not keep.all():
        missing = [cells[i] or f"none in {table.place(i)}" for i in np.flatnonzero(~keep)[:3]]
        notes.append(f"left out {(~keep).sum()} rows whose files are missing: {', '.join(missing)}")
    if split is not None:
        parts = split[1]
        unused = keep & ~np.isin(parts, (*TRAIN, _validation(parts)))
        if unused.any():
            names = join_names(sorted(set(parts[unused].tolist())))
            notes.append(f"left out {unused.sum()} rows of the part {names}")
        keep &= ~unused
    if not keep.any():
        raise RequestError(f"{table.where} has no row to train or validate on")
    return np.flatnonzero(keep), notes


def _build(
    table: Table,
    root: str,
    paths: list[str],
    labels: Labels,
    parts: np.ndarray | None,
    options: LabelOptions,
    notes: tuple[str, ...],
) -> _Opened:
    weights = None
    if options.weight_column is not None:
        weights = read_weights(read_column(table, normal(options.weight_column)))
    groups, group_names, ungrouped = _read_groups(table, root, paths, options.group)
    known = is_labeled(labels.values)
    if not known.any():
        raise RequestError(f"{table.where}: no row has a known label: choose another --target")
    if not known.all():
        ungrouped += (f"left out {(~known).sum()} rows without a known label",)
    others = {"part of the split": parts, "group": groups, "weight": weights}
    rows, values, repeats = _merge_repeated(table, paths, np.flatnonzero(known), labels, others)
    parts, groups, weights = (x if x is None else x[rows] for x in (parts, groups, weights))
    if parts is not None and groups is not None:
        refuse_divided_groups(groups, parts, group_names or [])
    files = Files.from_paths([paths[i] for i in rows.tolist()], root)
    source = Source(
        examples=files,
        labels=values,
        classes=labels.names,
        names=Names(files),
        extra={} if weights is None else {"weight": weights},
        task=labels.task,
        groups=groups,
    )
    return _Opened(source, parts, group_names, notes + ungrouped + repeats)


def _read_groups(
    table: Table, root: str, paths: list[str], group: str | None
) -> tuple[np.ndarray | None, list[str] | None, tuple[str, ...]]:
    """Return the group of each row, the names of the groups, and notes; None without groups."""
    if group is None:
        return None, None, ()
    prefix = os.path.join(root, "")  # noqa: PTH118
    relative = [path.removeprefix(prefix) for path in paths]
    column = table.columns.get(normal(group))
    cells = search_groups(group, relative, table.where) if column is None else column
    return number_groups(cells, relative)


def _merge_repeated(
    table: Table,
    paths: list[str],
    rows: np.ndarray,
    labels: Labels,
    others: Mapping[str, np.ndarray | None],
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Find the first row of each image, and check that further rows of it say the same.

    Several rows with names of labels are joined: all of them apply.

    Returns:
        The first row of each image, its labels, and notes.

    Raises:
        RequestError: rows of one image differ.
    """
    codes, different = factorize([paths[i] for i in rows.tolist()])
    if len(different) == len(rows):
        return rows, labels.values[rows], ()
    first = rows[np.unique(codes, return_index=True)[1]]
    values, merged = labels.values, labels.values[first]
    firsts = first[codes]
    for name, array in others.items():
        if array is not None:
            what = f"more than one {name}"
            _refuse_differing(table, paths, rows, firsts, array[:, None], what)
    if labels.by_name:
        np.maximum.at(merged, codes, values[rows])
        return first, merged, (f"joined {len(rows)} rows of {len(first)} images",)
    is_class = labels.task.kind == "classification"
    hint = ", or learn several labels with --task multilabel" if is_class else ""
    columns = values[:, None] if values.ndim == 1 else values
    _refuse_differing(table, paths, rows, firsts, columns, "different labels", hint)
    return first, merged, (f"left out {len(rows) - len(first)} rows that repeat an image",)


def _refuse_differing(
    table: Table,
    paths: list[str],
    rows: np.ndarray,
    firsts: np.ndarray,
    values: np.ndarray,
    what: str,
    hint: str = "",
) -> None:
    a, b = values[rows], values[firsts]
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    differ = np.flatnonzero(~same.all(1))
    if differ.size:
        images = len({paths[i] for i in rows[differ].tolist()})
        row, first = int(rows[differ[0]]), int(firsts[differ[0]])
        raise RequestError(
            f"{table.where} gives {images} images {what}, such as {printable(paths[row])} in"
            f" {table.place(first)} and {table.place(row)}: correct them{hint}"
        )


def _read_parts(table: Table, options: LabelOptions) -> tuple[str, np.ndarray] | None:
    """Find the column with the split and the part of each row, in lower case."""
    name = options.split_column
    if name is None and "split" not in table.columns:
        return None
    column = require_column(name or "split", table.columns, table.where, "--split-column")
    codes, different = factorize(table.columns[column])
    parts = np.array([cell.lower() for cell in different])
    wrong = ~np.isin(parts, TRAIN + VAL)
    if wrong.any() and name is None:
        return None
    if wrong.any():
        cell = int(np.argmax(wrong))
        place = table.place(int(np.argmax(codes == cell)))
        raise RequestError(
            f"--split-column {name}: {table.where}, {place} has {different[cell]!r}: write train,"
            " or val, valid, validation or test"
        )
    return column, parts[codes]


def _validation(parts: np.ndarray) -> str:
    """Return the part to validate on, or an empty text."""
    present = set(np.unique(parts).tolist())
    return next((name for name in VAL if name in present), "")


def choose_targets(table: Table, options: LabelOptions, taken: Collection[str]) -> list[Column]:
    """Return the columns to learn: those of ``--target``, or those that can only be labels.

    Args:
        table: the table, without rows that are no examples.
        options: the options.
        taken: columns that have another purpose.

    Raises:
        RequestError: a column does not exist or has another purpose, or there is a choice.
    """
    if options.target is None:
        return _guess_targets(table, taken)
    names = split_names(options.target, [*table.columns]) or [options.target]
    for name in names:
        require_column(name, table.columns, table.where, "--target")
        if name in taken:
            raise RequestError(f"--target {name}: the column already has another purpose")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise RequestError(f"--target names {repeated[0]} twice")
    return [read_column(table, name) for name in names]


def _guess_targets(table: Table, taken: Collection[str]) -> list[Column]:
    """Find the only column that can be a label, or all columns of 0 and 1."""
    names = [name for name in table.columns if name not in taken]
    usual = [name for name in names if name.lower() in _USUAL]
    columns = [read_column(table, name) for name in (usual if len(usual) == 1 else names)]
    found = [column for column in columns if _can_be_label(column)] or columns
    if len(found) > 1 and all(column.is_flag.all() for column in found):
        return [column for column in columns if column.is_flag.all()]
    if not found:
        raise RequestError(f"{table.where} has no column with labels beside the paths: add one")
    if len(found) > 1:
        raise RequestError(
            f"{table.where} has several columns that can be labels: choose among"
            f" {describe_columns(found)} with --target"
        )
    return found


def _can_be_label(column: Column) -> bool:
    """Return False for a column with one value, and for one that identifies rows."""
    different = int((~column.is_missing).sum())
    has_text = not column.is_numeric.all() and not column.separators
    is_identifier = different == len(column.codes) > 2 and (column.is_whole or has_text)
    return different > 1 and not is_identifier
