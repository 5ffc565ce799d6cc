import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold

from tljax.features import folds
from tljax.features.folds import held_out_at_random, held_out_by_class, held_out_by_label
from tljax.runtime.errors import RequestError


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.integers(0, 6), min_size=1, max_size=60), seed=st.integers(0, 99))
def test_folds_are_stratified_and_never_hold_out_the_only_example_of_a_class(labels, seed):
    labels = np.array(labels)
    counts = np.bincount(labels)
    assume(counts.max() > 1)
    held_out = held_out_by_class(labels, None, seed)
    np.testing.assert_array_equal(held_out.sum(0), counts[labels] > 1)
    per_class = held_out @ np.eye(7)[labels][:, counts.nonzero()[0]]
    assert (np.ptp(per_class, axis=0) <= 1).all()
    several = labels[counts[labels] > 1]
    if len(several) == len(labels):
        assert np.ptp(held_out.sum(1)) <= 1


def test_folds_hold_out_as_much_of_each_class_as_sklearns():
    labels = np.random.default_rng(0).integers(0, 7, 101)
    ours = held_out_by_class(labels, None, 0) @ np.eye(7)[labels]
    folds = StratifiedKFold(5).split(labels, labels)
    reference = np.array([np.bincount(labels[test], minlength=7) for _, test in folds])
    np.testing.assert_array_equal(np.sort(ours, axis=0), np.sort(reference, axis=0))


@pytest.mark.parametrize("n", [30, 200, 1001, 1503])
def test_groups_of_one_example_are_no_groups(n):
    for seed in range(5):
        labels = np.random.default_rng(seed).integers(0, 7, n)
        shuffled = np.random.default_rng(seed + 1).permutation(n)
        np.testing.assert_array_equal(
            held_out_by_class(labels, shuffled, seed), held_out_by_class(labels, None, seed)
        )


def random_targets(rng, n, labels=4):
    targets = (rng.random((n, labels)) < rng.uniform(0.02, 0.6, labels)).astype(np.float32)
    targets[rng.random((n, labels)) < 0.2] = np.nan
    targets[np.isnan(targets).all(1), 0] = 0
    return targets


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**16), n=st.integers(20, 60), groups=st.integers(3, 30), big=st.booleans()
)
def test_no_fold_divides_a_group(seed, n, groups, big):
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, n) * 7 - 3
    if big:
        group[: n // 2] = group[0]
    assume(len(np.unique(group)) > 1)
    labels = rng.integers(0, 2, n)
    assume(any(len(np.unique(group[labels == c])) > 1 for c in (0, 1)))
    for held_out in (
        held_out_by_class(labels, group, seed),
        held_out_by_label(random_targets(rng, n), group, seed),
        held_out_at_random(n, group, seed),
    ):
        assert held_out.any()
        assert (held_out.sum(0) <= 1).all()
        assert not held_out.all(1).any()
        for fold in held_out:
            assert not np.intersect1d(group[fold], group[~fold]).size


def test_folds_of_groups_are_stratified():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(100), rng.integers(1, 12, 100))[:500]
    labels = rng.integers(0, 4, 100)[group]
    held_out = held_out_by_class(labels, group, 0)
    shares = held_out @ np.eye(4)[labels] / np.bincount(labels)
    np.testing.assert_allclose(shares, 0.2, atol=0.03)


def test_one_fold_of_groups_is_as_near_to_a_fifth_as_they_allow(monkeypatch):
    monkeypatch.setattr(folds, "_CROSS_VALIDATION_LIMIT", 50)
    group = np.repeat(np.arange(20), [60, *[2] * 19])
    [held_out] = held_out_at_random(len(group), group, 0)
    assert held_out.sum() == 10  # the others hold out 60, or 8 to 10, of 98


def test_the_only_group_of_a_class_is_not_held_out_while_there_are_others():
    labels = np.array([0, 1, 0, 1, 0, 1, 2, 0, 0, 1])
    group = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    held_out = held_out_by_class(labels, group, 0)
    np.testing.assert_array_equal(held_out.any(0), group != 3)
    # Each group has a class of its own, but class 0 is in all of them.
    labels = np.array([0, 1, 0, 2, 0, 3])
    group = np.array([0, 0, 1, 1, 2, 2])
    assert held_out_by_class(labels, group, 0).any(0).all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_the_only_known_value_of_a_label_is_not_held_out(seed):
    rng = np.random.default_rng(seed)
    targets = random_targets(rng, 50)
    targets[:, 2] = 0
    targets[17, 2] = 1
    targets[:, 3] = 1
    targets[31, 3] = 0
    held_out = held_out_by_label(targets, None, seed)
    assert not held_out[:, [17, 31]].any()
    assert held_out.sum() > 30


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda: held_out_by_class(np.arange(3), None, 0), "no class has two examples"),
        (lambda: held_out_by_class(np.arange(4) // 2, np.arange(4) // 2, 0), "in two groups"),
        (lambda: held_out_by_label(np.eye(2), None, 0), "no label value has two examples"),
        (lambda: held_out_at_random(1, None, 0), "only one example"),
        (lambda: held_out_at_random(9, np.full(9, 4), 0), "only one group"),
    ],
)
def test_nothing_to_hold_out_is_refused(choose, message):
    with pytest.raises(RequestError, match=message):
        choose()
