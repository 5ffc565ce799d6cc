"""Data sets that come in named parts with features, such as those of hubs and shards.

A part is described before its labels are read, so that errors name the features to choose from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tljax.data.examples import (
    Examples,
    Source,
    Splits,
    is_labeled,
    join_names,
    match_classes,
    match_part,
    select,
    without_example,
)
from tljax.data.files import printable
from tljax.data.folders import TRAIN, VAL
from tljax.data.hub_labels import Feature, choose_features, read_feature, read_features
from tljax.data.labels import label_source, read_labels, read_weights
from tljax.data.options import LabelOptions
from tljax.data.splits import check_training, group_parts, search_groups, split_source
from tljax.data.table_files import Table, require_column
from tljax.runtime.errors import RequestError


class Unlabeled(NamedTuple):
    """A part whose labels have not been read.

    Attributes:
        where: its name in errors, and in the names of examples that have none.
        examples: its images.
        features: its features by name; of one that cannot be a label the name of its type.
        read: returns the values of features, as Python objects.
        preferred: the name of the feature to choose among several that can be labels.
        advice: the end of the error if no feature can be a label.
        names: the names of the examples, paths that ``--group`` may search; None numbers them.
        notes: remarks to print.
    """

    where: str
    examples: Examples
    features: Mapping[str, Feature | str]
    read: Callable[[Sequence[str]], Mapping[str, Sequence[Any]]]
    preferred: object
    advice: str
    names: Sequence[str] | None = None
    notes: tuple[str, ...] = ()


Parts = Mapping[str, Callable[[], Unlabeled]]
"""The parts of a data set by their names in lower case; each is opened when it is needed."""


WHOLE = "all"
"""The name of the only part of a data set that is not divided."""


def name_part(spec: str, part: str) -> str:
    """Name a part in errors."""
    return printable(spec) if part == WHOLE else f"{printable(spec)} {part}"


class _Part(NamedTuple):
    """A part whose labels have been read.

    Attributes:
        source: its examples with their labels.
        columns: the features that were read as labels.
        notes: remarks to print.
        by_name: see `Labels`.
        groups: the name of the group of each example, empty if it has none; None without groups.
    """

    source: Source
    columns: tuple[str, ...]
    notes: tuple[str, ...]
    by_name: bool
    groups: tuple[str | None, ...] | None

    def select(self, rows: np.ndarray) -> "_Part":
        """Select examples by their indices."""
        groups = None if self.groups is None else tuple(self.groups[i] for i in rows.tolist())
        return self._replace(source=select(self.source, rows), groups=groups)


def open_parts(spec: str, parts: Parts, val_fraction: float, labels: LabelOptions) -> Splits:
    """Open the training and validation parts of a data set, or split its only part by content.

    The labels are those of the features that ``labels.target`` names or, without it, of the only
    feature that can be a label. `tljax.data.hub_labels.read_features` says what is read from each
    type of feature. Examples without a label, classes without a training example and labels that
    apply to none are left out. A part with ``labels.group`` keeps groups together.

    Raises:
        RequestError: a feature is missing, or the data set cannot be trained on.
    """
    names = [name for name in TRAIN if name in parts] or list(parts)
    if names[0] not in TRAIN and len(names) > 1:
        raise RequestError(f"{spec} has no split named train, only {join_names(names)}: rename one")
    part = _trainable(_read(names[0], parts, labels), f"{spec} {names[0]}")
    others = {name: other for name, other in parts.items() if name != names[0]}
    # The validation part is read as the training part was.
    same = replace(labels, task=part.source.task.kind, target=",".join(part.columns))
    val_part = _validation(others, same)
    both = [part] if val_part is None else [part, val_part]
    sources, group_names, notes = [one.source for one in both], None, part.notes
    if labels.group is not None:
        groups = [name for one in both for name in one.groups or ()]
        rows = [name for source in sources for name in source.names]
        sources, group_names, ungrouped = group_parts(sources, groups, rows)
        notes += ungrouped
    if val_part is None:
        train, val, more = split_source(sources[0], spec, val_fraction, group_names)
    else:
        train = sources[0]
        val, more = match_part(sources[1], train, by_name=part.by_name)
    return Splits(train, val, notes + more)


def has_validation_part(parts: Parts, labels: LabelOptions) -> bool:
    """Return True if a data set has a validation part with labels besides another part.

    Raises:
        RequestError: a feature is missing.
    """
    return len(parts) > 1 and _validation(parts, labels) is not None


def open_validation_part(parts: Parts, labels: LabelOptions) -> Source | None:
    """Open the validation part of a data set; return None if it has none with labels.

    Raises:
        RequestError: a feature is missing.
    """
    part = _validation(parts, labels)
    return None if part is None else _group(part)


def open_part(name: str, parts: Parts, labels: LabelOptions) -> Source:
    """Open a part of a data set with its labels.

    Raises:
        RequestError: a feature is missing.
    """
    return _group(_read(name, parts, labels))


def _group(part: _Part) -> Source:
    if part.groups is None:
        return part.source
    return group_parts([part.source], part.groups, part.source.names)[0][0]


def _validation(parts: Parts, labels: LabelOptions) -> _Part | None:
    """Open the first validation part with labels; test parts of competitions have none."""
    opened = (_read(name, parts, labels) for name in VAL if name in parts)
    return next((part for part in opened if is_labeled(part.source.labels).any()), None)


def _trainable(part: _Part, where: str) -> _Part:
    """Leave out what cannot be learned: examples, classes and labels without the others."""
    labeled, notes = is_labeled(part.source.labels), part.notes
    if not labeled.all():
        notes += (f"left out {np.count_nonzero(~labeled)} examples without a label",)
        part = part.select(np.flatnonzero(labeled))
    source = part.source
    never = without_example(source)
    used = [name for name in source.classes if name not in never]
    if not used or not len(source):
        raise RequestError(f"{where} has no example with a label: training needs some")
    if source.task.kind == "classification" and never:
        notes += (f"left out classes without training examples: {join_names(never)}",)
        source, _ = match_classes(source, used)
    elif source.task.kind == "multilabel" and never:
        notes += (f"left out labels that apply to no training example: {join_names(never)}",)
        columns = [source.classes.index(name) for name in used]
        source = replace(source, labels=source.labels[:, columns], classes=tuple(used))
    return part._replace(source=source, notes=notes + check_training(source, where))


def _read(part: str, parts: Parts, labels: LabelOptions) -> _Part:
    """Read the labels of a part."""
    opened = parts[part]()
    where, group = opened.where, labels.group
    searched = opened.names is not None and group is not None and group not in opened.features
    known = replace(labels, group=None) if searched else labels
    chosen = choose_features(where, opened.features, known, opened.preferred, opened.advice)
    options = (("--group", known.group), ("--weight-column", labels.weight_column))
    others = [require_column(name, opened.features, where, flag) for flag, name in options if name]
    rows = opened.read([*dict.fromkeys([*chosen, *others])])
    table = Table(where, {}, range(1, 1 + len(opened.examples)), unit="row")
    features = {name: x for name in chosen if isinstance(x := opened.features[name], Feature)}
    columns, kind = read_features(table, features, rows, labels.kind)
    read = read_labels(columns, labels, kind)
    names = opened.names or tuple(f"{where}[{index}]" for index in range(len(opened.examples)))
    source = label_source(Source(opened.examples, np.zeros(len(names)), (), names), read)
    plain = all(feature.values == "class" and not feature.many for feature in features.values())
    # Nothing is to be said if there was no choice: the feature says itself what it is.
    said = not plain or labels.target is not None or labels.kind is not None
    notes = opened.notes + (read.note,) * said
    column = partial(_column, table, opened.features, rows)
    if labels.weight_column is not None:
        source = replace(source, extra={"weight": read_weights(column(labels.weight_column))})
    groups = None
    if searched and group is not None:
        groups = tuple(search_groups(group, names, where))
    elif group is not None:
        groups = tuple((cells := column(group)).rows(np.array(cells.cells, object)).tolist())
    return _Part(source, tuple(chosen), notes, read.by_name, groups)


def _column(
    table: Table,
    features: Mapping[str, Feature | str],
    rows: Mapping[str, Sequence[Any]],
    name: str,
) -> Any:
    return read_feature(table, name, features[name], rows[name])
