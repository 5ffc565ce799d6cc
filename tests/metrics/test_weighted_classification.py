"""Metrics of classes, compared with scikit-learn on examples that weights stand for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from tljax.metrics.classification import (
    accuracy,
    balanced_accuracy,
    macro_auroc,
    macro_f1,
    mean_class_distance,
    quadratic_kappa,
)
from tljax.runtime.errors import RequestError

ALL = (accuracy, balanced_accuracy, macro_f1, mean_class_distance, quadratic_kappa)


def by_sklearn(predictions: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> list[float]:
    """Compute `ALL` with scikit-learn."""
    present = np.unique(labels)
    return [
        sk.accuracy_score(labels, predictions, sample_weight=weights),
        # Its own balanced accuracy warns of classes that are only predicted.
        sk.recall_score(
            labels, predictions, labels=present, average="macro", sample_weight=weights
        ),
        sk.f1_score(labels, predictions, average="macro", sample_weight=weights),
        sk.mean_absolute_error(labels, predictions, sample_weight=weights),
        # Without ``labels`` it would skip classes that do not occur, and so shorten distances.
        sk.cohen_kappa_score(
            labels,
            predictions,
            labels=np.arange(max(labels.max(), predictions.max()) + 1),
            weights="quadratic",
            sample_weight=weights,
        )
        if len(np.unique([labels, predictions])) > 1
        else np.nan,
    ]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 7), st.booleans())
def test_metrics_of_classes_equal_those_of_scikit_learn(
    seed: int, n: int, classes: int, counts: bool
):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, classes, n).astype(np.int32)
    predictions = np.where(rng.random(n) < 0.6, labels, rng.integers(0, classes, n))
    predictions = np.maximum(predictions, 0)
    weights = rng.integers(0, 3, n) if counts else rng.random(n) * (rng.random(n) < 0.8)
    used = (labels >= 0) & (weights > 0)
    ours = [metric(predictions, labels, weights) for metric in ALL]
    if not used.any():
        assert np.isnan(ours).all()
        return
    expected = by_sklearn(predictions[used], labels[used], weights[used])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(2, 5), st.booleans())
def test_macro_auroc_equals_that_of_scikit_learn(seed: int, n: int, classes: int, counts: bool):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, classes, n)
    # Multiples of 1/8 tie often and are exact.
    probabilities = rng.multinomial(8, np.ones(classes) / classes, n) / 8
    weights = rng.integers(0, 3, n) if counts else rng.random(n) * (rng.random(n) < 0.8)
    ours = macro_auroc(probabilities, labels, weights)
    used = (labels >= 0) & (weights > 0)
    labels, probabilities, weights = labels[used], probabilities[used], weights[used]
    present = np.unique(labels)
    if len(present) < 2:
        assert np.isnan(ours)
        return
    expected = np.mean(
        [
            sk.roc_auc_score(labels == label, probabilities[:, label], sample_weight=weights)
            for label in present
        ]
    )
    assert ours == pytest.approx(expected, abs=1e-9)
    if len(present) == classes > 2:
        whole = sk.roc_auc_score(labels, probabilities, multi_class="ovr")
        assert macro_auroc(probabilities, labels) == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.__name__)
def test_weights_of_many_draws_give_the_metric_of_each(metric):
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(-1, 4, 30), rng.integers(0, 4, 30)
    weights = rng.integers(0, 3, (2, 5, 30))
    values = metric(predictions, labels, weights)
    assert values.shape == (2, 5)
    for i, j in np.ndindex(2, 5):
        copies = np.repeat(np.arange(30), weights[i, j])
        assert values[i, j] == pytest.approx(metric(predictions[copies], labels[copies]), abs=1e-12)


def test_macro_auroc_of_many_draws_is_that_of_each():
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(-1, 4, 30), rng.random((30, 4)).round(1)
    weights = rng.integers(0, 3, (6, 30))
    values = macro_auroc(probabilities, labels, weights)
    for value, counts in zip(values, weights, strict=True):
        copies = np.repeat(np.arange(30), counts)
        assert value == pytest.approx(macro_auroc(probabilities[copies], labels[copies]), abs=1e-12)


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.__name__)
def test_metrics_are_nan_without_a_known_label(metric):
    assert np.isnan(metric(np.zeros(3, int), np.full(3, -1)))
    assert np.isnan(metric(np.zeros(0, int), np.zeros(0, int)))
    assert np.isnan(metric(np.zeros(0, int), np.zeros(0, int), np.ones((4, 0)))).all()


def test_kappa_is_nan_if_only_one_class_occurs_whatever_the_weights():
    weights = np.random.default_rng(0).random((100, 7))
    assert np.isnan(quadratic_kappa(np.full(7, 3), np.full(7, 3), weights)).all()


def test_macro_auroc_is_nan_if_a_probability_of_a_known_example_is_nan():
    probabilities = np.array([[0.2, 0.8], [0.9, 0.1], [np.nan, np.nan]])
    assert macro_auroc(probabilities, np.array([1, 0, -1])) == 1
    assert np.isnan(macro_auroc(probabilities, np.array([1, 0, 0])))


def test_kappa_counts_classes_between_two_that_do_not_occur():
    predictions, labels = np.array([0, 3, 1, 0]), np.array([0, 1, 3, 3])  # none of class 2
    observed, by_chance = (0 + 4 + 4 + 9) / 4, (19 + 13 + 9 + 19) / 16
    assert quadratic_kappa(predictions, labels) == pytest.approx(1 - observed / by_chance)


def test_a_class_that_is_only_predicted_counts_in_f1_but_not_in_balanced_accuracy():
    labels, predictions = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])
    assert balanced_accuracy(predictions, labels) == pytest.approx(0.75)
    assert macro_f1(predictions, labels) == pytest.approx((1 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.__name__)
def test_shapes_and_classes_that_cannot_be_are_refused(metric):
    with pytest.raises(RequestError, match=r"predictions and labels \[n\]; got shapes \[2\]"):
        metric(np.zeros(2, int), np.zeros(3, int))
    with pytest.raises(RequestError, match="cannot be negative; got -1"):
        metric(np.array([0, -1]), np.zeros(2, int))
    with pytest.raises(RequestError, match=r"need the shape \[..., 2\]; got \[3\]"):
        metric(np.zeros(2, int), np.zeros(2, int), np.ones(3))


def test_macro_auroc_refuses_labels_without_a_probability():
    with pytest.raises(RequestError, match="labels below 2; got 2"):
        macro_auroc(np.ones((3, 2)) / 2, np.array([0, 1, 2]))
    with pytest.raises(RequestError, match=r"got shapes \[3\] and \[3\]"):
        macro_auroc(np.ones(3), np.array([0, 1, 1]))
