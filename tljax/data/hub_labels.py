"""Columns of labels from the features of a data set of a hub.

A feature is described in the same way for every hub; its values are Python objects, one per row.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan, nan
from typing import Any, Literal, NamedTuple

import numpy as np

from tljax.data.examples import join_names, normal
from tljax.data.labels import Column, parse_number, split_names
from tljax.data.options import LabelOptions
from tljax.data.table_files import Table, factorize, require_column
from tljax.runtime.errors import RequestError
from tljax.runtime.settings import Kind

Values = Literal["class", "text", "bool", "int", "float"]


class Feature(NamedTuple):
    """A feature that can be a label.

    Attributes:
        values: what a value is: the index of a class (``class``), a string (``text``), or a bool or
            number.
        names: for ``class``, the names of the classes.
        many: True if a row has a list of such values.
    """

    values: Values
    names: tuple[str, ...] = ()
    many: bool = False

    def can_be(self, task: str | None) -> bool:
        """Return True if the values can be labels of a task, or, without a task, of any."""
        if task in (None, "multilabel"):
            return True
        if task == "regression":
            if self.values == "class":
                return not self.many and not any(isnan(parse_number(name)) for name in self.names)
            return self.values in ("int", "float")
        return not self.many or self.values not in ("class", "text")

    def __str__(self) -> str:
        nouns = {"text": "string", "int": "whole number", "float": "number"}
        noun = nouns.get(self.values, self.values)
        return f"lists of {noun}{'es' if noun == 'class' else 's'}" if self.many else noun


def choose_features(
    where: str,
    features: Mapping[str, Feature | str],
    labels: LabelOptions,
    preferred: object,
    advice: str,
) -> list[str]:
    """Choose the features to learn: those of ``--target``, or the only one that can be a label.

    Features with a class per row are chosen before those with a list of classes, and these before
    all others; not for --task regression.

    Args:
        where: the name of the data set in errors.
        features: its features by name; of one that cannot be a label the name of its type.
        labels: the options.
        preferred: the name of the feature to choose among several.
        advice: the end of the error if no feature can be a label.

    Raises:
        RequestError: a feature does not exist or cannot be a label, or several can.
    """
    task = labels.kind
    if labels.target is not None:
        chosen = list(dict.fromkeys(split_names(labels.target, [*features])))
        for name in chosen or [labels.target]:
            feature = features[require_column(name, features, where, "--target")]
            if isinstance(feature, str):
                raise RequestError(f"{where}: the {feature} feature {name} cannot be a label")
            if not feature.can_be(task):
                raise RequestError(
                    f"{where}: the feature {name} ({feature}) cannot be learned with --task {task}"
                )
        return chosen
    taken = (labels.group, labels.weight_column)
    usable = {
        name: feature
        for name, feature in features.items()
        if isinstance(feature, Feature) and feature.can_be(task) and name not in taken
    }
    ranks = {name: int(x.many) if x.values == "class" else 2 for name, x in usable.items()}
    if task == "regression":
        ranks = dict.fromkeys(usable, 0)
    best = [name for name, rank in ranks.items() if rank == min(ranks.values())]
    chosen = [name for name in best if name == preferred] or best
    if len(chosen) > 1:
        raise RequestError(
            f"{where} has {len(chosen)} features that can be labels ({join_names(chosen)}): choose"
            " one with --target"
        )
    if task is None and chosen and usable[chosen[0]] == Feature("int"):
        raise RequestError(
            f"{where}: {chosen[0]} has whole numbers without names: say --target {chosen[0]} to"
            f" learn them, or {advice}"
        )
    if not chosen:
        kinds = join_names([f"{name}: {feature}" for name, feature in features.items()])
        aim = f" for --task {task}" if task else ""
        raise RequestError(f"{where} has no feature that can be a label{aim} ({kinds}); {advice}")
    return chosen


def read_features(
    table: Table,
    features: Mapping[str, Feature],
    rows: Mapping[str, Sequence[Any]],
    kind: Kind | None,
) -> tuple[list[Column], Kind | None]:
    """Convert the features to learn to columns.

    Lists of classes or strings are one column of lists. Lists of numbers have one length; each
    position is a column, ``label 0``, ``label 1``, ... if they are whole numbers, which must then
    be 0 and 1, or ``NAME 0``, ``NAME 1``, ... A missing value is unknown, and so is a missing list,
    or an empty one of numbers.

    Args:
        table: says where the rows are.
        features: the chosen features by name.
        rows: the values of each feature; None is missing.
        kind: the kind of labels that is asked for.

    Returns:
        The columns, and the kind of labels that a single feature is by its type: classes, strings
        and bools are ``classification``, lists of the former two and of whole numbers
        ``multilabel``, other numbers ``regression``; None to infer it from the values.

    Raises:
        RequestError: several features cannot be learned together, or the values are no labels.
    """
    names, first = [*features], next(iter(features.values()))
    if len(names) > 1 and any(x.many or x.values in ("class", "text") for x in features.values()):
        raise RequestError(
            f"{table.where}: columns {join_names(names)} are learned together only if each has one"
            " number, or 0 and 1, per row: choose one with --target"
        )
    if len(names) > 1:
        return [read_feature(table, name, features[name], rows[name]) for name in names], None
    name, values = names[0], rows[names[0]]
    if first.many and first.values in ("class", "text"):
        return [_column_of_lists(table, name, first, values)], "multilabel"
    if first.many:
        return _columns_of_numbers(table, name, first, values, kind)
    kinds: dict[Values, Kind | None] = {"int": None, "float": "regression"}
    column = read_feature(table, name, first, values)
    return [column], kinds.get(first.values, "classification")


def read_feature(table: Table, name: str, feature: Feature | str, rows: Sequence[Any]) -> Column:
    """Convert a feature with one value per row to a column.

    Args:
        table: says where the rows are.
        name: the name of the feature.
        feature: the feature.
        rows: its values; None is missing.

    Raises:
        RequestError: the feature has lists or other values, or an index that is no class.
    """
    if isinstance(feature, str) or feature.many:
        raise RequestError(
            f"{table.where}: the feature {name} ({feature}) does not have one value a row"
        )
    if feature.values == "class":
        indices = _class_indices(table.where, name, feature, rows)
        return Column(table, name, indices, [*feature.names, ""], feature.names)
    return Column(table, name, *factorize([*map(_cell, rows)]))


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and isnan(value)):
        return ""
    return f"{value:.15g}" if isinstance(value, float) else str(value).strip()


def _class_indices(
    where: str, name: str, feature: Feature, values: Iterable[int | None]
) -> np.ndarray:
    """Return int32 indices of classes; a missing one, or -1, is the number of classes."""
    indices = np.array([-1 if value is None else value for value in values], np.int64)
    count = len(feature.names)
    if wrong := np.unique(indices[(indices < -1) | (indices >= count)]).tolist():
        raise RequestError(
            f"{where}: column {name} has class indices {join_names([*map(str, wrong)])}, but only"
            f" {count} names: correct the names or the values"
        )
    return np.where(indices < 0, count, indices).astype(np.int32)


def _column_of_lists(table: Table, name: str, feature: Feature, rows: Sequence[Any]) -> Column:
    classes = feature.names if feature.values == "class" else None
    if classes is None:
        lists = [None if row is None else [x for x in row if x] for row in rows]
    else:
        named = [*map(normal, classes), ""]
        items = [item for row in rows if row is not None for item in row]
        _class_indices(table.where, name, feature, items)
        lists = [
            None if row is None else [named[x] for x in row if x is not None and x >= 0]
            for row in rows
        ]
    return Column(table, name, np.arange(len(rows)), [""] * len(rows), classes, lists)


def _columns_of_numbers(
    table: Table, name: str, feature: Feature, rows: Sequence[Any], kind: Kind | None
) -> tuple[list[Column], Kind | None]:
    lists = [() if row is None else np.ravel(np.array(row, np.float64)) for row in rows]
    lengths = sorted({len(row) for row in lists} - {0})
    where = f"{table.where}: column {name}"
    if len(lengths) > 1:
        raise RequestError(
            f"{where} has lists of {lengths[0]} to {lengths[-1]} numbers: all must have one length"
        )
    if not lengths:
        raise RequestError(f"{where} has no value: choose another with --target")
    unknown = np.full(lengths[0], nan)
    matrix = np.array([row if len(row) else unknown for row in lists], np.float64)
    known = matrix[~np.isnan(matrix)]
    several, exact = lengths[0] > 1, feature.values in ("bool", "int")
    is_binary, is_signed = (bool(np.isin(known, x).all()) for x in ((0, 1), (-1, 0, 1)))
    if kind is None and is_binary:
        kind = "multilabel" if several or exact else "regression"
    elif kind is None and exact and not (several and is_signed):
        raise RequestError(
            f"{where} has lists of whole numbers other than 0 and 1: give them names with a"
            " ClassLabel feature, or say --task regression"
        )
    elif kind is None and not (several and is_signed):
        kind = "regression"
    prefix = name if kind in (None, "regression") else "label"
    columns: list[Column] = []
    for index, values in enumerate(matrix.T):
        label = f"{prefix} {index}" if several or prefix == "label" else name
        different, codes = np.unique(values, return_inverse=True)
        cells = [*map(_cell, different.tolist())]
        columns.append(Column(table, name, codes.reshape(-1), cells, label=label))
    return columns, kind
