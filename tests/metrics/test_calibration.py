"""Calibration, compared with a plain loop, SciPy's minimizer and known temperatures."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, softmax

from tljax.metrics.calibration import (
    TEMPERATURES,
    calibrate,
    calibrate_labels,
    calibration_bins,
    fit_temperature,
)
from tljax.runtime.errors import RequestError


def network(temperature: float, count: int, classes: int = 4, seed: int = 0):
    """Logits whose labels are drawn from the softmax of ``logits / temperature``."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (count, classes))
    probabilities = softmax(logits, 1)
    labels = (rng.random((count, 1)) > probabilities.cumsum(1)).sum(1)
    return temperature * logits, labels


def loss(logits: np.ndarray, labels: np.ndarray) -> float:
    return -log_softmax(logits, 1)[np.arange(len(labels)), labels].mean()


def error_by_loop(confidence: list[float], correct: list[bool], bins: int) -> float:
    total = 0.0
    for m in range(bins):
        inside = [
            (p, c)
            for p, c in zip(confidence, correct, strict=True)
            if m / bins < p <= (m + 1) / bins or (m == 0 and p == 0)
        ]
        if inside:
            accuracy = sum(c for _, c in inside) / len(inside)
            mean = sum(p for p, _ in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean)
    return total


# Multiples of 1/60 fall on the edges of bins.
confidences = st.floats(0, 1) | st.integers(0, 60).map(lambda i: i / 60)


@given(st.lists(st.tuples(confidences, st.booleans()), min_size=1, max_size=40), st.integers(1, 20))
def test_the_calibration_error_equals_that_of_a_plain_loop(
    pairs: list[tuple[float, bool]], bins: int
):
    confidence, correct = map(list, zip(*pairs, strict=True))
    result = calibration_bins(np.array(confidence), np.array(correct), bins)
    assert result.error == pytest.approx(error_by_loop(confidence, correct, bins), abs=1e-12)
    assert result.examples.sum() == len(pairs)


def test_confidence_1_with_accuracy_one_half_has_error_one_half():
    bins = calibration_bins(np.ones(10), np.arange(10) % 2 == 0)
    assert bins.examples.tolist() == [0] * 14 + [10]
    assert bins.accuracy[-1] == 0.5
    assert np.isnan(bins.accuracy[:-1]).all()
    assert bins.error == 0.5


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-1.5, 1.5), st.integers(2, 6), st.integers(2, 200))
def test_the_temperature_is_the_optimum_that_scipy_finds(
    seed: int, log_scale: float, classes: int, count: int
):
    logits, labels = network(10**log_scale, count, classes, seed)
    temperature = fit_temperature(logits, labels)
    span = np.log(TEMPERATURES)
    oracle = minimize_scalar(
        lambda log_t: loss(logits / np.exp(log_t), labels),
        bounds=span,
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert loss(logits / temperature, labels) <= oracle.fun + 1e-12
    # For separable logits the loss near its minimum is too flat to compare positions.
    if oracle.fun > 1e-3 and span[0] + 0.01 < oracle.x < span[1] - 0.01:
        assert np.log(temperature) == pytest.approx(oracle.x, abs=1e-5)


def test_a_known_temperature_is_recovered():
    logits, labels = network(3.0, 20_000)
    assert fit_temperature(logits, labels) == pytest.approx(3, rel=0.03)
    assert fit_temperature(logits.astype(np.float32), labels) == pytest.approx(3, rel=0.03)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_the_temperature_is_clipped_if_the_optimum_is_out_of_bounds(scale: float):
    labels = np.arange(12) % 3
    separable = scale * np.eye(3)[labels]
    lowest = fit_temperature(separable, labels)
    assert lowest == pytest.approx(TEMPERATURES[0]) or loss(separable / lowest, labels) == 0
    assert fit_temperature(-separable, labels) == pytest.approx(TEMPERATURES[1])


def test_the_temperature_of_equal_logits_is_one():
    assert fit_temperature(np.full((4, 3), 7.0), np.array([0, 1, 2, 0])) == 1


def test_temperatures_are_measured_on_other_examples_than_they_are_fitted_on():
    # The two halves have different optimal temperatures, so measuring on the fit would show.
    rng = np.random.default_rng(5)
    half = rng.permutation(400)[::2]
    sharp, labels = network(5.0, 400)
    logits = sharp / 25
    logits[half] = sharp[half]
    calibration = calibrate(logits, labels, seed=5)
    other = np.setdiff1d(np.arange(400), half)
    scaled = logits.copy()
    scaled[half] /= fit_temperature(logits[other], labels[other])
    scaled[other] /= fit_temperature(logits[half], labels[half])
    probabilities = softmax(scaled, 1)
    expected = calibration_bins(probabilities.max(1), probabilities.argmax(1) == labels).error
    assert calibration.after.error == pytest.approx(expected)
    assert calibration.loss_after == pytest.approx(loss(scaled, labels))
    assert calibration.loss_after > calibration.loss_before
    assert calibration.loss_before == pytest.approx(loss(logits, labels))
    assert calibration.temperature == fit_temperature(logits, labels)


def test_scaling_calibrates_an_overconfident_network():
    logits, labels = network(4.0, 5000)
    calibration = calibrate(logits, labels)
    assert calibration.before.error > 0.15
    assert calibration.after.error < 0.03
    assert calibration.loss_after < calibration.loss_before
    assert calibration.before.examples.sum() == calibration.after.examples.sum() == 5000


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((0, 3)), np.zeros(0, int), "at least one example"),
        (np.zeros((2, 3)), np.zeros(3, int), r"\(2, 3\) and \(3,\)"),
        (np.zeros((2, 3)), np.array([0, -1]), "labels from 0 to 2; got -1 to 0"),
        (np.zeros((2, 3)), np.array([0, 3]), "got 0 to 3"),
        (np.array([[0, np.nan]]), np.array([0]), "finite"),
    ],
)
def test_invalid_logits_and_labels_are_refused(
    logits: np.ndarray, labels: np.ndarray, message: str
):
    for function in (fit_temperature, calibrate):
        with pytest.raises(RequestError, match=message):
            function(logits, labels)


def test_invalid_confidences_are_refused():
    with pytest.raises(RequestError, match="two labeled"):
        calibrate(np.zeros((1, 3)), np.array([0]))
    with pytest.raises(RequestError, match="at least one example"):
        calibration_bins(np.zeros(0), np.zeros(0))
    with pytest.raises(RequestError, match=r"\[0, 1\]"):
        calibration_bins(np.array([0.5, np.nan]), np.array([True, False]))
    with pytest.raises(RequestError, match="softmax first"):
        calibration_bins(np.array([3.0]), np.array([True]))


def labels_network(temperature: float, count: int, labels: int = 3):
    """Logits whose labels apply with the sigmoid of ``logits / temperature``."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 2, (count, labels))
    targets = (rng.random(logits.shape) < expit(logits)).astype(np.float64)
    return temperature * logits, targets


def test_labels_get_the_temperature_by_which_their_logits_are_too_large():
    logits, targets = labels_network(3.0, 4000)
    result = calibrate_labels(logits, targets)
    assert result.temperature == pytest.approx(3, rel=0.05)
    assert result.before.error > 0.1
    assert result.after.error < 0.02
    assert result.loss_after < result.loss_before
    assert result.before.examples.sum() == targets.size
    expected = calibration_bins(expit(logits).ravel(), targets.ravel() == 1)
    for actual, wanted in zip(result.before, expected, strict=True):
        np.testing.assert_allclose(actual, wanted)


def test_unknown_labels_do_not_count():
    logits, targets = labels_network(2.0, 300, 1)
    wide = np.concatenate([logits, 100 - logits], axis=1)
    blank = np.concatenate([targets, np.full_like(targets, np.nan)], axis=1)
    for half, whole in zip(
        calibrate_labels(logits, targets), calibrate_labels(wide, blank), strict=True
    ):
        np.testing.assert_allclose(half, whole)


def test_of_many_labels_a_part_of_the_images_is_used():
    logits, targets = labels_network(2.0, 300)
    result = calibrate_labels(logits, targets, max_cells=150)
    assert result.before.examples.sum() == 150


def test_labels_without_two_known_images_cannot_be_calibrated():
    logits, targets = labels_network(2.0, 3)
    targets[1:] = np.nan
    with pytest.raises(RequestError, match="two examples with a known label; got 1"):
        calibrate_labels(logits, targets)
