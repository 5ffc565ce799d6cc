"""Errors of numbers, compared with scikit-learn on blanks, outliers and constants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from tljax.metrics.regression import regression_metrics
from tljax.metrics.weighted import mean_of_defined
from tljax.runtime.errors import RequestError


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 50),
    st.integers(1, 3),
    st.sampled_from([0.0, 1.0, -300.0, 1e4]),
    st.sampled_from([0.01, 1.0, 1e3]),
)
def test_errors_of_numbers_equal_those_of_scikit_learn(
    seed: int, n: int, numbers: int, offset: float, scale: float
):
    rng = np.random.default_rng(seed)
    targets = offset + scale * rng.normal(size=(n, numbers)).round(1)
    predictions = targets + scale * rng.normal(size=(n, numbers))
    targets[rng.random((n, numbers)) < rng.choice([0, 0.2, 0.9], numbers)] = np.nan
    weights = rng.integers(0, 3, n) if seed % 2 else rng.random(n) * (rng.random(n) < 0.8)
    ours = np.stack(regression_metrics(predictions, targets, weights))
    for number in range(numbers):
        rows = ~np.isnan(targets[:, number]) & (weights > 0)
        if not rows.any():
            assert np.isnan(ours[:, number]).all()
            continue
        data = targets[rows, number], predictions[rows, number]
        constant = len(np.unique(data[0])) == 1
        expected = [
            sk.mean_absolute_error(*data, sample_weight=weights[rows]),
            sk.root_mean_squared_error(*data, sample_weight=weights[rows]),
            np.nan if constant else sk.r2_score(*data, sample_weight=weights[rows]),
        ]
        np.testing.assert_allclose(ours[:, number], expected, rtol=1e-9, atol=1e-9)


def test_means_over_numbers_equal_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    predictions, targets = rng.normal(size=(2, 40, 3))
    ours = [mean_of_defined(values) for values in regression_metrics(predictions, targets)]
    oracles = (sk.mean_absolute_error, sk.root_mean_squared_error, sk.r2_score)
    assert ours == pytest.approx([oracle(targets, predictions) for oracle in oracles], abs=1e-9)


def test_r2_does_not_lose_digits_to_a_large_offset_or_an_outlier():
    rng = np.random.default_rng(0)
    targets = 1e7 + rng.normal(size=(100, 1))
    predictions = targets + 0.1 * rng.normal(size=(100, 1))
    assert regression_metrics(predictions, targets).r2 == pytest.approx(
        [sk.r2_score(targets, predictions)], abs=1e-9
    )
    weights = np.append(np.ones(99), 0)
    targets[99] = 1e12  # of weight 0
    assert regression_metrics(predictions, targets, weights).r2 == pytest.approx(
        [sk.r2_score(targets[:99], predictions[:99])], abs=1e-9
    )


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_r2_of_a_constant_target_is_nan_whatever_the_rounding(value: float, n: int, seed: int):
    weights = np.random.default_rng(seed).random((5, n))
    result = regression_metrics(np.zeros((n, 1)), np.full((n, 1), value), weights)
    assert np.isnan(result.r2).all()


def test_weights_of_many_draws_give_the_errors_of_each():
    rng = np.random.default_rng(0)
    predictions, targets = rng.normal(size=(2, 20, 2))
    targets[rng.random((20, 2)) < 0.3] = np.nan
    weights = rng.integers(0, 3, (2, 4, 20))
    together = regression_metrics(predictions, targets, weights)
    for i, j in np.ndindex(2, 4):
        copies = np.repeat(np.arange(20), weights[i, j])
        alone = regression_metrics(predictions[copies], targets[copies])
        for many, one in zip(together, alone, strict=True):
            assert many.shape == (2, 4, 2)
            np.testing.assert_allclose(many[i, j], one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_prediction_that_is_not_finite_gives_nan_unless_its_target_is_unknown(bad: float):
    predictions = np.array([[1.0, 1.0], [bad, bad], [3.0, 4.0]])
    targets = np.array([[1.0, 1.0], [2.0, np.nan], [3.0, 3.0]])
    result = np.stack(regression_metrics(predictions, targets))
    assert np.isnan(result[:, 0]).all()
    np.testing.assert_allclose(result[:, 1], [0.5, np.sqrt(0.5), 0.5])


def test_no_examples_give_nan():
    for values in regression_metrics(np.zeros((0, 2)), np.zeros((0, 2)), np.ones((3, 0))):
        assert values.shape == (3, 2)
        assert np.isnan(values).all()


def test_shapes_and_targets_that_cannot_be_are_refused():
    with pytest.raises(RequestError, match=r"got shapes \[3\] and \[3\]"):
        regression_metrics(np.zeros(3), np.zeros(3))
    with pytest.raises(RequestError, match="a target is infinite"):
        regression_metrics(np.zeros((2, 1)), np.array([[0], [np.inf]]))
    with pytest.raises(RequestError, match=r"need the shape \[..., 2\]; got \[2, 1\]"):
        regression_metrics(np.zeros((2, 1)), np.zeros((2, 1)), np.ones((2, 1)))
