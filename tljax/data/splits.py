"""Division of a data set into training and validation parts, by content or by group."""

import hashlib
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool

from tljax.data.examples import (
    Source,
    Splits,
    hash_examples,
    join_names,
    select,
    with_hashes,
    without_example,
)
from tljax.data.table_files import factorize
from tljax.runtime.errors import RequestError


def split_source(
    source: Source, where: str, val_fraction: float, group_names: Sequence[str] | None = None
) -> Splits:
    """Split a source by group if it has groups, otherwise by content.

    By content, an example is for validation if and only if the hash of its content, as a fraction
    of the hash's range, is below ``val_fraction``. By group, see `choose_validation_groups`.

    Args:
        source: labeled examples; without groups all are read.
        where: the name of the source in errors.
        val_fraction: fraction of the examples, or of the groups, to validate on, in [0, 1). With 0,
            the training images are also the validation images.
        group_names: the name of each group number; by default the numbers.

    Raises:
        RequestError: a class has no training example, or a part has no example.
    """
    if not val_fraction:
        note = f"no validation images: metrics are computed on the {len(source)} training images"
        return Splits(source, source, (note,))
    if source.groups is None:
        source = with_hashes(source)  # which `Source.digest` needs, too
        # The first 48 bits are an integer that a float holds exactly.
        first = hash_examples(source)[:, :6] @ 256.0 ** np.arange(5, -1, -1)
        in_val = first / 2**48 < val_fraction
        advice = "add images, change --val-fraction, or divide the data into train and val"
    else:
        in_val = _rows_of_validation_groups(source, source.groups, val_fraction, group_names)
        advice = "add groups, change --val-fraction, or give a column with the split"
    train, val = select(source, np.flatnonzero(~in_val)), select(source, np.flatnonzero(in_val))
    notes = _check_parts(source, train, val, where, val_fraction, advice)
    if source.groups is None or train.groups is None or val.groups is None:
        note = f"split by content: {len(train)} to train on, {len(val)} to validate on"
    else:
        total, some = (len(np.unique(groups)) for groups in (source.groups, val.groups))
        note = (
            f"split by group: {total - some} groups with {len(train)} images to train on,"
            f" {some} groups ({some / total:.0%}) with {len(val)} images"
            f" ({len(val) / len(source):.0%}) to validate on"
        )
    return Splits(train, val, (note, *notes))


def _rows_of_validation_groups(
    source: Source, groups: np.ndarray, val_fraction: float, names: Sequence[str] | None
) -> Bool[np.ndarray, " n"]:
    numbers, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    order = np.argsort(first)  # groups by their first rows
    ordered_names = [str(n) if names is None else names[int(n)] for n in numbers[order]]
    strata = None if source.task.kind == "regression" else _strata(source, first[order])
    chosen = np.zeros(len(numbers), bool)
    chosen[order] = choose_validation_groups(
        ordered_names, val_fraction, strata, first_trains=source.task.has_classes
    )
    return chosen[inverse.reshape(-1)]


def _check_parts(
    source: Source, train: Source, val: Source, where: str, val_fraction: float, advice: str
) -> tuple[str, ...]:
    """Check that both parts have examples, and the training part some of every class.

    Returns:
        Notes on classes without a validation example, and on labels without one in either part.

    Raises:
        RequestError: a class has no training example, or a part has no example.
    """
    never = without_example(source)  # such as a step of a scale that no row has
    lost = [name for name in without_example(train) if name not in never]
    unseen = [name for name in without_example(val) if name not in never]
    fraction, count = f"the validation fraction of {val_fraction}", len(source)
    fault = None
    if lost and source.task.has_classes:
        fault = f"all images of {join_names(lost)} fall into {fraction}: {advice}"
    elif not len(train):
        fault = f"all {count} images fall into {fraction}: {advice}"
    elif not len(val):
        advice += ", or validate on the training images with --val-fraction 0"
        fault = f"none of the {count} images falls into {fraction}: {advice}"
    if fault:
        raise RequestError(f"{where}: {fault}")
    named = (("training", lost), ("validation", unseen))
    return tuple(f"no {part} image of {join_names(names)}" for part, names in named if names)


def check_training(train: Source, where: str) -> tuple[str, ...]:
    """Check that there is something to learn.

    Returns:
        Notes on labels that never or always apply, and on classes with one image.

    Raises:
        RequestError: all images are of one class, or a number is the same in all of them.
    """
    labels = train.labels
    if train.task.kind == "regression":
        refuse_constants(train, where)
        return ()
    if train.task.kind == "multilabel":
        applies, fails = (labels == 1).any(0), (labels == 0).any(0)
        kinds = {"labels that never apply": ~applies, "labels that always apply": applies & ~fails}
    else:
        counts = np.bincount(labels[labels >= 0], minlength=len(train.classes))
        if np.count_nonzero(counts) < 2:
            used = train.classes[int(counts.argmax())]
            raise RequestError(
                f"{where} has training images of one class, {used}: training needs two or more"
            )
        kinds = {f"{np.count_nonzero(counts == 1)} classes with one image": counts == 1}
    chosen = {
        what: [name for name, yes in zip(train.classes, which, strict=True) if yes]
        for what, which in kinds.items()
    }
    return tuple(f"{what}: {join_names(names)}" for what, names in chosen.items() if names)


def refuse_constants(source: Source, where: str) -> None:
    """Refuse a source with a number that is the same in every example.

    Raises:
        RequestError: a number is constant or unknown everywhere.
    """
    for name, column in zip(source.classes, source.labels.T, strict=True):
        different = np.unique(column[~np.isnan(column)])
        if len(different) < 2:
            value = f"{different[0]:g}" if len(different) else "unknown"
            raise RequestError(f"{where}: {name} is {value} in every example: nothing to learn")


def _strata(source: Source, rows: np.ndarray) -> list[Hashable]:
    """Return the class, or the set of labels, of each row."""
    if source.task.has_classes:
        return source.labels[rows].tolist()
    return [tuple(np.flatnonzero(row == 1).tolist()) for row in source.labels[rows]]


def choose_validation_groups(
    names: Sequence[str],
    fraction: float,
    strata: Sequence[Hashable] | None = None,
    *,
    first_trains: bool = False,
) -> Bool[np.ndarray, " groups"]:
    """Choose the groups to validate on so that further groups change no earlier choice.

    A rule that gives each group a side by its name alone does not bound the number of validation
    groups: some data set consists of groups of one side. This rule uses the order of the groups,
    at whose end new ones come, and keeps the number of validation groups among the first n within
    one of fraction x n, for every n. Let the deficit be fraction x n less the validation groups so
    far, where n includes the next group. That one is for validation if the deficit is 1 or more,
    for training if it is 0 or less, and in between if and only if the SHA-256 of its name, as a
    fraction of its range, is below the deficit. With strata, the deficit of the group's stratum
    replaces it in this last comparison.

    So another order of the same groups changes part of the choices, not all.

    Args:
        names: the name of each group, in the order of their first rows.
        fraction: fraction of the groups to choose, in (0, 1).
        strata: the stratum of each group, such as a class; None if there are none.
        first_trains: whether the first group of each stratum is for training if the total allows
            it, so that most classes with a single group can be trained.

    Returns:
        ``[groups]`` bool: True for the groups to validate on.
    """
    chosen = np.zeros(len(names), bool)
    seen, validating = Counter[Hashable](), Counter[Hashable]()
    total = 0
    for index, name in enumerate(names):
        stratum = None if strata is None else strata[index]
        seen[stratum] += 1
        deficit = fraction * (index + 1) - total
        if 0 < deficit < 1 and first_trains and seen[stratum] == 1:
            deficit = 0
        elif 0 < deficit < 1:
            deficit = fraction * seen[stratum] - validating[stratum]
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        chosen[index] = int.from_bytes(digest[:6]) / 2**48 < deficit
        validating[stratum] += int(chosen[index])
        total += int(chosen[index])
    return chosen


def number_groups(
    groups: Sequence[str | None], rows: Sequence[str]
) -> tuple[np.ndarray, list[str], tuple[str, ...]]:
    """Assign numbers to groups in the order of their first rows.

    Args:
        groups: the name of the group of each row; None or empty if it is a group of its own.
        rows: the name of each row, which names a group of its own.

    Returns:
        The number of the group of each row, ``[n]`` int32, the name of each group, and a note if
        there are rows without a group.
    """
    # Prefixes keep a group and a row of the same name apart.
    keys = [f"g{group}" if group else f"r{row}" for group, row in zip(groups, rows, strict=True)]
    numbers, names = factorize(keys)
    alone = sum(not group for group in groups)
    note = f"{alone} images have no group: each is a group of its own"
    return numbers, [name[1:] for name in names], (note,) * bool(alone)


def search_groups(expression: str, paths: Sequence[str], where: str) -> list[str | None]:
    """Search the first group of a regular expression in every path.

    Args:
        expression: regular expression with a group in parentheses.
        paths: paths relative to the data, with ``/`` between folders.
        where: the name of the data in errors.

    Returns:
        The text of the group in each path; None where it is not found.

    Raises:
        RequestError: the expression is invalid, has no group, or is found in no path.
    """
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise RequestError(f"--group {expression!r} is no regular expression: {error}") from error
    if not pattern.groups:
        raise RequestError(
            f"--group {expression!r} is no column of {where}; a regular expression for paths needs"
            " parentheses around the name of the group, such as '(.*)_[0-9]+'"
        )
    matches = (pattern.search(path) for path in paths)
    found = [match[1] if match else None for match in matches]
    if not any(found):
        raise RequestError(
            f"--group {expression!r} is found in none of {len(paths)} paths of {where}, such as"
            f" {paths[0]}: correct the expression"
        )
    return found


def refuse_divided_groups(groups: np.ndarray, parts: np.ndarray, names: Sequence[str]) -> None:
    """Check that no group is in several parts of a given split.

    Args:
        groups: ``[n]`` numbers of groups.
        parts: ``[n]`` numbers of parts.
        names: the name of each group number.

    Raises:
        RequestError: a group is in several parts.
    """
    pairs = np.unique(np.stack([groups, parts]), axis=1)[0]
    divided = [names[int(number)] for number in np.unique(pairs[1:][pairs[1:] == pairs[:-1]])]
    if divided:
        raise RequestError(
            f"{len(divided)} groups are both in the training and in the validation part:"
            f" {', '.join(divided[:3])}: correct the split or leave out --group"
        )


def group_parts(
    parts: Sequence[Source], groups: Sequence[str | None], rows: Sequence[str]
) -> tuple[list[Source], list[str], tuple[str, ...]]:
    """Group the examples of a source, or of the training and validation parts of one.

    Args:
        parts: the sources.
        groups: the name of the group of each row, of one part after the other; see `number_groups`.
        rows: the name of each row.

    Returns:
        The sources with groups, the names of the groups by number, and notes.

    Raises:
        RequestError: a group is in several parts.
    """
    numbers, names, notes = number_groups(groups, rows)
    lengths = [len(part) for part in parts]
    refuse_divided_groups(numbers, np.repeat(np.arange(len(parts)), lengths), names)
    divided = np.split(numbers, np.cumsum(lengths)[:-1])
    grouped = [replace(part, groups=x) for part, x in zip(parts, divided, strict=True)]
    return grouped, names, notes
