import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from tljax.features.ridge import fit_ridge, held_out_errors

L2 = [1e-6, 1e-3, 0.1, 10.0]


def problem(n, d, targets=3, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, d))
    return features, features[:, :2] @ rng.normal(size=(2, targets)) + rng.normal(size=(n, targets))


def near_duplicate_and_constant():
    features, targets = problem(80, 12)
    features[:, 5] = features[:, 4] * (1 + 1e-7)
    features[:, 6], features[:, 7] = 3.7, 0
    return features, targets


def assert_equals_sklearn(features, targets, weights=None):
    kernels, biases = fit_ridge(features, targets, L2, weights=weights)
    count = np.ones(len(features)) if weights is None else weights
    for kernel, bias, l2 in zip(kernels, biases, L2, strict=True):
        for column, target in enumerate(targets.T):
            known = ~np.isnan(target) & (count > 0)
            model = Ridge(alpha=l2 * count[known].sum(), solver="svd").fit(
                features[known], target[known], sample_weight=count[known]
            )
            np.testing.assert_allclose(kernel[:, column], model.coef_, rtol=1e-8, atol=1e-8)
            np.testing.assert_allclose(bias[column], model.intercept_, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "data", [problem(100, 20), problem(20, 50), problem(30, 30), near_duplicate_and_constant()]
)
def test_ridge_equals_sklearn(data):
    assert_equals_sklearn(*data)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(8, 40), d=st.integers(2, 40))
def test_ridge_with_blanks_and_weights_equals_sklearn(seed, n, d):
    features, targets = problem(n, d, seed=seed)
    rng = np.random.default_rng(seed)
    targets[rng.random(targets.shape) < 0.2] = np.nan
    targets[:2] = 1, 2, 3
    weights = rng.integers(0, 4, n) * 0.5
    weights[:2] = 1
    assert_equals_sklearn(features, targets, weights)


def test_targets_known_for_the_same_rows_share_a_decomposition(monkeypatch):
    features, targets = problem(40, 10, targets=30)
    targets[:5, ::2] = np.nan
    calls = []
    monkeypatch.setattr(np.linalg, "eigh", lambda x, f=np.linalg.eigh: calls.append(0) or f(x))
    fit_ridge(features, targets, L2)
    assert len(calls) == 2


@pytest.mark.parametrize("shape", [(60, 10), (20, 50)])
def test_held_out_errors_are_those_of_the_fits_without_a_fold(shape):
    features, targets = problem(*shape)
    targets[::4, 1] = np.nan
    weights = np.random.default_rng(1).uniform(0.5, 2, len(features))
    held_out = np.arange(len(features)) % 3 == np.arange(3)[:, None]
    actual = held_out_errors(features, targets, np.array(L2), weights=weights, held_out=held_out)
    squares = np.empty((len(L2), *targets.shape))
    for fold in held_out:
        kernels, biases = fit_ridge(features, targets, L2, weights=weights * ~fold)
        squares[:, fold] = (features[fold] @ kernels + biases[:, None] - targets[fold]) ** 2
    known = ~np.isnan(targets)
    expected = np.nansum(squares * weights[:, None], 1) / (weights @ known)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_a_target_that_no_training_example_knows_is_predicted_as_0():
    features, targets = problem(20, 5)
    targets[4:, 0] = np.nan
    held_out = (np.arange(20) < 4)[None]
    errors = held_out_errors(
        features, targets, np.array(L2), weights=np.ones(20), held_out=held_out
    )
    np.testing.assert_allclose(errors[:, 0], np.mean(targets[:4, 0] ** 2))
