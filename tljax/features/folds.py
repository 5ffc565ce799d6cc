"""Choose which examples are held out to score the L2 values of a probe."""

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from tljax.runtime.errors import RequestError

_FOLDS = 5
_CROSS_VALIDATION_LIMIT = 1_000  # with more examples, one fold is enough to choose the L2 value


def held_out_by_class(
    labels: Integer[np.ndarray, " n"], groups: Integer[np.ndarray, " n"] | None, seed: int
) -> Bool[np.ndarray, "folds n"]:
    """Choose the examples that each fold holds out, stratified by class.

    With up to 1,000 examples there are 5 folds; with more, one that holds out 20%. A fold never
    divides a group, and never holds out the only group of a class, unless there are no others.

    Raises:
        RequestError: no class has two examples, or examples in two groups.
    """
    single = _in_one_group(labels, groups)
    if single.all() and groups is None:
        raise RequestError("no class has two examples, so none can be held out: add images")
    if single.all():
        raise RequestError("no class is in two groups, so none can be held out: add groups")
    return _held_out(labels, single, groups, seed)


def held_out_by_label(
    targets: Float[np.ndarray, "n m"], groups: Integer[np.ndarray, " n"] | None, seed: int
) -> Bool[np.ndarray, "folds n"]:
    """Choose the examples that each fold holds out, stratified by their rarest label value.

    As `held_out_by_class`: the only example or group with a 1, or with a 0, of a label is not held
    out, unless there are no others.

    Args:
        targets: ``[n, m]`` 0, 1, or NaN if unknown; each row has a known target.
        groups: ``[n]`` group of each example, or None.
        seed: seed of the assignment.

    Raises:
        RequestError: no value of a label has two examples, or examples in two groups.
    """
    n = len(targets)
    single, repeated = np.zeros(n, bool), False
    rarest, strata = np.full(n, n + 1), np.zeros(n, int)
    for label, target in enumerate(targets.T):
        value = np.where(np.isnan(target), 2, target).astype(int)
        alone = _in_one_group(value, groups)
        single |= alone & (value < 2)
        repeated |= bool(np.any(~alone & (value < 2)))
        count = np.where(value < 2, np.bincount(value)[value], n + 1)
        strata = np.where(count < rarest, 2 * label + value, strata)
        rarest = np.minimum(count, rarest)
    if not repeated:
        what = "two examples" if groups is None else "examples in two groups"
        raise RequestError(f"no label value has {what}, so none can be held out: add examples")
    return _held_out(np.unique(strata, return_inverse=True)[1], single, groups, seed)


def held_out_at_random(
    num_examples: int, groups: Integer[np.ndarray, " n"] | None, seed: int
) -> Bool[np.ndarray, "folds n"]:
    """Choose the examples that each fold holds out at random.

    Raises:
        RequestError: there are not two examples, or groups.
    """
    if num_examples < 2 or (groups is not None and np.ptp(groups) == 0):
        what = "one example" if groups is None else "one group"
        raise RequestError(f"there is only {what}, so none can be held out: add examples")
    none = np.zeros(num_examples, int)
    return _held_out(none, none > 0, groups, seed)


def _in_one_group(values, groups):
    """Return which examples have a value that only their own group has."""
    groups = np.arange(len(values)) if groups is None else groups
    first = np.full(values.max() + 1, groups.max())
    last = np.full(values.max() + 1, groups.min())
    np.minimum.at(first, values, groups)
    np.maximum.at(last, values, groups)
    return (first == last)[values]


def _held_out(strata, stays, groups, seed):
    """Hold out each fold's examples, but not the groups of those that stay, unless all do."""
    fold = _assign_folds(strata, groups, seed)
    num_folds = _FOLDS if len(strata) <= _CROSS_VALIDATION_LIMIT else 1
    if num_folds == 1:
        # Groups can make folds of any size. Differences below one example do not count.
        sizes = np.bincount(fold, minlength=_FOLDS)
        fold = fold - np.abs(sizes - len(strata) / _FOLDS).astype(int).argmin()
    if groups is not None:
        stays = np.isin(groups, groups[stays])
    if not stays.all():
        fold = np.where(stays, -1, fold)
    return fold == np.arange(num_folds)[:, None]


def _assign_folds(strata, groups, seed) -> Int[np.ndarray, " n"]:
    """Assign examples to folds so that strata and folds are balanced."""
    n = len(strata)
    order = np.random.default_rng(seed).permutation(n)
    fold = np.empty(n, int)
    if groups is None:
        order = order[np.argsort(strata[order], kind="stable")]
        fold[order] = np.arange(n) % _FOLDS  # round-robin, stratum after stratum
        return fold

    # The largest groups first, each to the fold that has the least of its strata, and among equals
    # to the smallest fold. With groups of one example, this is the round-robin above.
    position = np.argsort(order)
    members = np.split(
        np.lexsort((position, groups)), np.cumsum(np.unique(groups, return_counts=True)[1])[:-1]
    )
    members.sort(key=lambda rows: (-len(rows), strata[rows].min(), position[rows[0]]))
    totals = np.bincount(strata)
    load = np.zeros((_FOLDS, len(totals)))
    for rows in members:
        present, counts = np.unique(strata[rows], return_counts=True)
        cost = load[:, present] @ (counts / totals[present] ** 2)
        chosen = np.lexsort((load.sum(1), cost))[0]
        load[chosen, present] += counts
        fold[rows] = chosen
    return fold
