"""Metrics of several labels, compared with scikit-learn on ties, blanks and constants."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from tljax.metrics.multilabel import (
    auroc,
    average_precision,
    best_thresholds,
    threshold_metrics,
)
from tljax.metrics.weighted import mean_of_defined
from tljax.runtime.errors import RequestError

seeds = st.integers(0, 2**32 - 1)


def example(seed: int, n: int, labels: int, steps: int = 6):
    """Return probabilities with ties, targets with blanks and constants, and weights with zeros."""
    rng = np.random.default_rng(seed)
    scores = rng.random((n, labels))
    scores = np.where(rng.random((n, labels)) < 0.7, np.round(scores * steps) / steps, scores)
    targets = (rng.random((n, labels)) < rng.choice([0, 0.1, 0.5, 1], labels)).astype(float)
    targets[rng.random((n, labels)) < rng.choice([0, 0.2, 0.9], labels)] = np.nan
    weights = rng.integers(0, 3, n) if seed % 2 else rng.random(n) * (rng.random(n) < 0.8)
    return scores.astype(np.float32), targets.astype(np.float32), weights.astype(float)


def used(targets: np.ndarray, weights: np.ndarray, label: int) -> np.ndarray:
    return ~np.isnan(targets[:, label]) & (weights > 0)


@settings(deadline=None, max_examples=300)
@given(seeds, st.integers(1, 50), st.integers(1, 4))
def test_average_precision_and_auroc_equal_those_of_scikit_learn(seed: int, n: int, labels: int):
    scores, targets, weights = example(seed, n, labels)
    precision, area = (metric(scores, targets, weights) for metric in (average_precision, auroc))
    for label in range(labels):
        rows = used(targets, weights, label)
        target, score, weight = targets[rows, label], scores[rows, label], weights[rows]
        if not target.any():
            assert np.isnan(precision[label])
        else:
            expected = sk.average_precision_score(target, score, sample_weight=weight)
            assert precision[label] == pytest.approx(expected, abs=1e-9)
        if len(np.unique(target)) < 2:
            assert np.isnan(area[label])
        else:
            expected = sk.roc_auc_score(target, score, sample_weight=weight)
            assert area[label] == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=300)
@given(seeds, st.integers(1, 50), st.integers(1, 4))
def test_precision_recall_and_f1_equal_those_of_scikit_learn(seed: int, n: int, labels: int):
    scores, targets, weights = example(seed, n, labels)
    thresholds = np.random.default_rng(seed).choice([0, 1 / 3, 0.5, 0.9, 1], labels)
    ours = threshold_metrics(scores, targets, thresholds, weights)
    for label in range(labels):
        rows = used(targets, weights, label)
        if not rows.any():
            assert np.isnan([values[label] for values in ours]).all()
            continue
        predicted = scores[rows, label] >= thresholds[label]
        expected = sk.precision_recall_fscore_support(
            targets[rows, label],
            predicted,
            average="binary",
            sample_weight=weights[rows],
            zero_division=np.nan,
        )[:3]
        np.testing.assert_allclose([values[label] for values in ours], expected, rtol=0, atol=1e-9)


def test_means_over_labels_equal_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    scores, targets = rng.random((80, 5)).round(1), (rng.random((80, 5)) < 0.3).astype(float)
    assert mean_of_defined(average_precision(scores, targets)) == pytest.approx(
        sk.average_precision_score(targets, scores), abs=1e-9
    )
    assert mean_of_defined(auroc(scores, targets)) == pytest.approx(
        sk.roc_auc_score(targets, scores), abs=1e-9
    )
    assert mean_of_defined(threshold_metrics(scores, targets, 0.5).f1) == pytest.approx(
        sk.f1_score(targets, scores >= 0.5, average="macro"), abs=1e-9
    )


def test_labels_without_a_known_positive_do_not_count_in_the_mean_average_precision():
    scores = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.5]])
    targets = np.array([[1, 0, np.nan], [0, 0, np.nan]])
    per_label = average_precision(scores, targets)
    np.testing.assert_array_equal(per_label, [1, np.nan, np.nan])
    assert mean_of_defined(per_label) == 1
    assert np.isnan(mean_of_defined(per_label[1:]))


@settings(deadline=None)
@given(seeds, st.integers(1, 30), st.integers(0, 3))
def test_weights_of_many_draws_give_the_metrics_of_each(seed: int, n: int, labels: int):
    scores, targets, _ = example(seed, n, labels)
    weights = np.random.default_rng(seed).integers(0, 3, (2, 3, n))

    def metrics(rows: slice | np.ndarray, weights: np.ndarray | None = None):
        data = scores[rows], targets[rows]
        at_half = threshold_metrics(*data, 0.5, weights)
        return average_precision(*data, weights), auroc(*data, weights), *at_half

    together = metrics(slice(None), weights)
    for i, j in np.ndindex(2, 3):
        alone = metrics(np.repeat(np.arange(n), weights[i, j]))
        for many, one in zip(together, alone, strict=True):
            assert many.shape == (2, 3, labels)
            np.testing.assert_allclose(many[i, j], one, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=300)
@given(seeds, st.integers(1, 50), st.booleans())
def test_the_best_threshold_has_the_highest_f1_of_the_precision_recall_curve(
    seed: int, n: int, weighted: bool
):
    scores, targets, weights = example(seed, n, 3)
    weights = weights if weighted else np.ones(n)
    thresholds = best_thresholds(scores, targets, weights)
    f1 = threshold_metrics(scores, targets, thresholds, weights).f1
    for label in range(3):
        rows = used(targets, weights, label)
        target = targets[rows, label]
        if len(np.unique(target)) < 2:
            assert thresholds[label] == 0.5
            continue
        precision, recall, _ = sk.precision_recall_curve(
            target, scores[rows, label], sample_weight=weights[rows]
        )
        harmonic = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
        assert f1[label] == pytest.approx(harmonic.max(), abs=1e-9)


def test_thresholds_lie_midway_between_the_neighboring_scores_of_known_examples():
    scores = np.array([[0.9], [0.75], [0.5], [0.25], [0.0]])
    targets = np.array([[1], [1], [np.nan], [0], [0]])
    np.testing.assert_array_equal(best_thresholds(scores, targets), [0.5])
    np.testing.assert_array_equal(best_thresholds(scores[:2], np.array([[0], [1]])), [0.375])


def test_of_equal_f1_the_highest_threshold_is_chosen():
    scores = np.array([[0.8], [0.6], [0.4], [0.2]])
    targets = np.array([[1], [0], [0], [1]])  # F1 is 2/3 for the first alone and for all four
    np.testing.assert_allclose(best_thresholds(scores, targets), [0.7])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_threshold_separates_neighboring_floating_point_numbers(dtype: type):
    for lower in (0.0, 0.1, 0.3, 0.5, 0.7):
        low = dtype(lower)
        high = np.nextafter(low, dtype(1))
        for pair in itertools.permutations((low, high)):
            scores = np.array(pair, dtype)[:, None]
            (threshold,) = best_thresholds(scores, (scores == high).astype(float))
            assert dtype(threshold) == threshold
            assert (scores >= dtype(threshold)).tolist() == (scores == high).tolist()


def test_a_nan_score_of_a_known_target_makes_the_metrics_of_its_label_nan():
    scores = np.array([[0.9, 0.9], [np.nan, 0.2], [0.1, np.nan]])
    targets = np.array([[1, 1], [1, 0], [0, np.nan]])
    at_half = threshold_metrics(scores, targets, 0.5)
    for values in (average_precision(scores, targets), auroc(scores, targets), *at_half):
        np.testing.assert_array_equal(values, [np.nan, 1])


def test_infinite_logits_are_ranked_and_tie():
    scores = np.array([[np.inf], [np.inf], [0], [-np.inf], [-np.inf]])
    targets = np.array([[1], [0], [1], [0], [0]])
    assert auroc(scores, targets) == pytest.approx([4.5 / 6])
    assert average_precision(scores, targets) == pytest.approx([(1 / 2 + 2 / 3) / 2])


def test_no_examples_and_no_labels_give_nan_and_nothing():
    assert np.isnan(average_precision(np.zeros((0, 2)), np.zeros((0, 2)))).all()
    assert np.isnan(auroc(np.zeros((0, 2)), np.zeros((0, 2)), np.ones((3, 0)))).all()
    assert np.isnan(threshold_metrics(np.zeros((0, 2)), np.zeros((0, 2)), 0.5).f1).all()
    assert best_thresholds(np.zeros((0, 2)), np.zeros((0, 2))).tolist() == [0.5, 0.5]
    assert average_precision(np.zeros((3, 0)), np.zeros((3, 0))).shape == (0,)


@pytest.mark.parametrize("metric", [average_precision, auroc, best_thresholds])
def test_targets_and_shapes_that_cannot_be_are_refused(metric):
    with pytest.raises(RequestError, match=r"must be 0, 1 or NaN .* got 2"):
        metric(np.zeros((2, 1)), np.array([[0], [2]]))
    with pytest.raises(RequestError, match=r"got shapes \[2, 1\] and \[2\]"):
        metric(np.zeros((2, 1)), np.zeros(2))
    with pytest.raises(RequestError, match=r"need the shape \[..., 2\]; got \[3\]"):
        metric(np.zeros((2, 1)), np.zeros((2, 1)), np.ones(3))


def test_thresholds_are_refused_for_logits_but_not_for_what_is_unknown():
    scores = np.array([[0.2], [3.0]])
    with pytest.raises(RequestError, match="apply the sigmoid first"):
        best_thresholds(scores, np.array([[0], [1]]))
    assert best_thresholds(scores, np.array([[0], [np.nan]])).tolist() == [0.5]
