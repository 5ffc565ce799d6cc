import warnings

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tljax.features import folds
from tljax.features.folds import held_out_by_class
from tljax.features.knn import knn_predict
from tljax.features.logistic import fit_logistic
from tljax.features.probe import L2_VALUES, fit_probe, predict_logits
from tljax.runtime.errors import DivergenceError, RequestError

pytestmark = pytest.mark.usefixtures("quick_to_compile")

# Problems of one shape share a compiled program, since compiling takes longer than running.
EXAMPLES, DIMENSIONS, CLASSES = 200, 20, 4
NINE_VALUES = L2_VALUES[4::5]


def sampled_labels(rng, features, scale, classes=CLASSES):
    """Draw labels from a softmax model."""
    logits = features @ rng.normal(size=(features.shape[1], classes)) * scale
    return (logits + rng.gumbel(size=logits.shape)).argmax(1)


def random():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(EXAMPLES, DIMENSIONS))
    return features, sampled_labels(rng, features, 0.5)


def separable():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, CLASSES, EXAMPLES)
    means = 3 * rng.normal(size=(CLASSES, DIMENSIONS))
    return means[labels] + rng.normal(size=(EXAMPLES, DIMENSIONS)), labels


def correlated():
    rng = np.random.default_rng(2)
    features = rng.normal(size=(EXAMPLES, 4)) @ rng.normal(size=(4, DIMENSIONS))
    features += 0.02 * rng.normal(size=features.shape)
    labels = sampled_labels(rng, features, 0.3)
    return features * np.logspace(-1, 1, DIMENSIONS) + 5, labels


def one_example_of_a_class():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, CLASSES - 1, EXAMPLES)
    labels[7] = CLASSES - 1
    return rng.normal(size=(EXAMPLES, DIMENSIONS)), labels


def duplicate_and_constant():
    rng = np.random.default_rng(4)
    features = rng.normal(size=(EXAMPLES, DIMENSIONS))
    features[:, 5:10] = features[:, :5]
    features[:, 10] = 2 * features[:, 0] + 1
    features[:, 11:14] = 3.7, 0, 1e4
    return features, sampled_labels(rng, features[:, :5], 1)


def wide():
    rng = np.random.default_rng(5)
    return rng.normal(size=(30, 60)), rng.integers(0, CLASSES, 30)


def digits(every=1):
    features, labels = load_digits(return_X_y=True)
    return StandardScaler().fit_transform(features[::every]), labels[::every]


def a_third_of_the_digits():
    return digits(every=3)


PROBLEMS = [random, separable, correlated, one_example_of_a_class, duplicate_and_constant, wide]


def objective(features, labels, kernel, bias, l2):
    """Compute the formula of fit_logistic's docstring in float64."""
    logits = features.astype(np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias)
    own = logits[np.arange(len(labels)), labels]
    # log1p avoids the rounding of 1 + x: separable data has losses around 1e-6.
    margins = logits - own[:, None]
    margins[np.arange(len(labels)), labels] = -np.inf
    loss = np.logaddexp(0, np.logaddexp.reduce(margins, axis=1))
    return loss.mean() + l2 / 2 * np.square(kernel, dtype=np.float64).sum()


def sklearn_objectives(features, labels, l2_values, solver):
    # The bias absorbs the mean, and scikit-learn converges better without it.
    features = features - features.mean(0, dtype=np.float64)
    for l2 in l2_values:
        model = LogisticRegression(
            C=1 / (len(labels) * l2), solver=solver, tol=1e-10, max_iter=20_000
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lbfgs cannot reach 1e-10 everywhere
            model.fit(features, labels)
        yield objective(features, labels, model.coef_.T, model.intercept_, l2)


def assert_optimal(problem, l2_values, solver):
    features, labels = problem()
    features = features.astype(np.float32)
    fit = fit_logistic(features, labels, np.array(l2_values), num_classes=labels.max() + 1)
    ours = [
        objective(features, labels, kernel, bias, l2)
        for kernel, bias, l2 in zip(fit.kernel, fit.bias, l2_values, strict=True)
    ]
    assert fit.converged.all()
    np.testing.assert_allclose(ours, fit.objective, rtol=1e-5)
    reference = list(sklearn_objectives(features, labels, l2_values, solver))
    np.testing.assert_allclose(ours, reference, rtol=1e-4)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_objective_equals_sklearn_at_all_l2_values(problem):
    # Newton's method, because lbfgs stops up to 1e-3 above the optimum for correlated features.
    assert_optimal(problem, L2_VALUES, "newton-cholesky")


def test_objective_equals_sklearn_on_digits():
    assert_optimal(a_third_of_the_digits, L2_VALUES[10::15], "lbfgs")


@pytest.mark.slow
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p is not correlated] + [digits])
def test_objective_equals_sklearn_lbfgs_at_all_l2_values(problem):
    assert_optimal(problem, L2_VALUES, "lbfgs")


@pytest.mark.slow
def test_solution_does_not_depend_on_the_path_to_it():
    features, labels = correlated()
    alone = fit_logistic(features, labels, [L2_VALUES[16]], num_classes=CLASSES, tolerance=1e-7)
    for others in (L2_VALUES, (1e-6, 1e5), (1e-6, 1e-6), ()):
        l2 = [*others, L2_VALUES[16]]  # in no order
        fit = fit_logistic(features, labels, l2, num_classes=CLASSES, tolerance=1e-7)
        np.testing.assert_allclose(fit.kernel[-1], alone.kernel[0], rtol=0, atol=1e-3)
        np.testing.assert_allclose(fit.objective[-1], alone.objective[0], rtol=1e-6)


@pytest.mark.parametrize("problem", [random, separable, wide])
def test_a_path_takes_fewer_iterations_than_every_fourth_value_alone(problem):
    features, labels = problem()
    path = fit_logistic(features, labels, L2_VALUES, num_classes=CLASSES)
    alone = [
        fit_logistic(features, labels, [l2], num_classes=CLASSES).iterations[0]
        for l2 in L2_VALUES[::4]
    ]
    assert path.converged.all()
    assert path.iterations.sum() < sum(alone)


def test_weight_zero_excludes_an_example_and_weight_two_counts_it_twice():
    features, labels = random()
    weights = np.ones((2, EXAMPLES), int)
    weights[0, :50], weights[0, 50:100] = 0, 2
    weights[1, 30:40], weights[1, 120:130] = 2, 0
    l2 = [0.01, 0.1]
    options = {"num_classes": CLASSES, "tolerance": 1e-7}
    both = fit_logistic(features, labels, l2, weights=weights, **options)
    assert both.kernel.shape == (2, 2, DIMENSIONS, CLASSES)
    for row in range(2):
        count = weights[row]
        repeated = fit_logistic(features.repeat(count, 0), labels.repeat(count), l2, **options)
        one = fit_logistic(features, labels, l2, weights=count, **options)
        for fit in (one, jax.tree.map(lambda x, row=row: x[row], both)):
            np.testing.assert_allclose(fit.kernel, repeated.kernel, rtol=0, atol=2e-3)
            np.testing.assert_allclose(fit.bias, repeated.bias, rtol=0, atol=2e-3)
            np.testing.assert_allclose(fit.objective, repeated.objective, rtol=1e-6)


def test_class_without_examples_is_never_predicted():
    features, _ = random()
    labels = sampled_labels(np.random.default_rng(0), features, 1, CLASSES - 1)
    l2 = [1e-4, 1.0]
    fit = fit_logistic(features, labels, l2, num_classes=CLASSES)
    reference = list(sklearn_objectives(features, labels, l2, "newton-cholesky"))
    np.testing.assert_allclose(fit.objective, reference, rtol=1e-4)
    assert not fit.kernel[:, :, -1].any()
    logits = features @ np.asarray(fit.kernel) + np.asarray(fit.bias)[:, None]
    assert jax.nn.softmax(logits)[..., -1].max() < 1e-9


def test_too_few_iterations_are_reported():
    features, labels = separable()
    fit = fit_logistic(features, labels, [1e-5, 1e5], num_classes=CLASSES, max_iterations=3)
    assert fit.converged.tolist() == [False, True]
    assert fit.iterations.tolist()[0] == 3


def test_gradient_norm_is_that_of_the_objective():
    features, labels = random()
    features = (features - features.mean(0)).astype(np.float32)
    fit = fit_logistic(features, labels, [1e-2], num_classes=CLASSES, max_iterations=2)
    kernel, bias = np.asarray(fit.kernel[0], np.float64), np.asarray(fit.bias[0], np.float64)
    logits = features @ kernel + bias
    residual = np.asarray(jax.nn.softmax(logits)) - np.eye(CLASSES)[labels]
    gradient = np.vstack([features.T @ residual / EXAMPLES + 1e-2 * kernel, residual.mean(0)])
    np.testing.assert_allclose(fit.gradient_norm[0], np.linalg.norm(gradient), rtol=1e-3)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_order_of_examples_and_classes_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    features, labels = random()
    examples, classes = rng.permutation(EXAMPLES), rng.permutation(CLASSES)
    l2 = [0.01, 1.0]
    fit = fit_logistic(features, labels, l2, num_classes=CLASSES, tolerance=1e-7)
    permuted = fit_logistic(
        features[examples], classes[labels[examples]], l2, num_classes=CLASSES, tolerance=1e-7
    )
    np.testing.assert_allclose(permuted.kernel[:, :, classes], fit.kernel, rtol=0, atol=2e-3)
    np.testing.assert_allclose(permuted.bias[:, classes], fit.bias, rtol=0, atol=2e-3)


@settings(max_examples=10, deadline=None)
@given(
    shift=st.lists(st.floats(-50, 50, width=32), min_size=DIMENSIONS, max_size=DIMENSIONS),
    log_scale=st.lists(st.floats(-3, 3, width=32), min_size=DIMENSIONS, max_size=DIMENSIONS),
)
def test_probe_ignores_shift_and_scale_of_a_feature(shift, log_scale):
    features, labels = random()
    moved = (features * 10 ** np.array(log_scale) + np.array(shift)).astype(np.float32)
    # Undo the change in float32, so that both have the same rounding errors.
    moved_back = (moved - np.array(shift)) / 10 ** np.array(log_scale)
    l2_values = (0.1,) * 9
    expected = fit_probe(moved_back, labels, num_classes=CLASSES, l2_values=l2_values)
    actual = fit_probe(moved, labels, num_classes=CLASSES, l2_values=l2_values)
    np.testing.assert_allclose(
        jax.nn.softmax(predict_logits(actual, moved)),
        jax.nn.softmax(predict_logits(expected, moved_back)),
        rtol=0,
        atol=5e-3,
    )


def test_probe_is_the_optimum_at_the_chosen_l2_on_standardized_features():
    features, labels = correlated()
    features = features.astype(np.float32)
    fitted = fit_probe(features, labels, num_classes=CLASSES, l2_values=NINE_VALUES)
    assert fitted.converged
    scaler = StandardScaler().fit(features.astype(np.float64))
    kernel = np.asarray(fitted.kernel, np.float64) * scaler.scale_[:, None]
    bias = fitted.bias + scaler.mean_ @ fitted.kernel
    standardized = scaler.transform(features)
    np.testing.assert_allclose(
        objective(standardized, labels, kernel, bias, fitted.l2),
        *sklearn_objectives(standardized, labels, [fitted.l2], "newton-cholesky"),
        rtol=1e-5,
    )


def test_probe_chooses_by_accuracy_then_by_loss():
    features, labels = separable()
    fitted = fit_probe(features, labels, num_classes=CLASSES, l2_values=NINE_VALUES)
    best = fitted.held_out_accuracy == fitted.held_out_accuracy.max()
    assert best.sum() > 1  # otherwise there is no tie to test
    assert fitted.held_out_loss[fitted.l2_values == fitted.l2] == fitted.held_out_loss[best].min()


@pytest.mark.parametrize(
    ("limit", "l2_values"),
    [(folds._CROSS_VALIDATION_LIMIT, NINE_VALUES), (EXAMPLES - 1, L2_VALUES)],
)
def test_held_out_metrics_equal_sklearn(monkeypatch, limit, l2_values):
    monkeypatch.setattr(folds, "_CROSS_VALIDATION_LIMIT", limit)
    features, labels = random()
    fitted = fit_probe(features, labels, num_classes=CLASSES, l2_values=l2_values, seed=3)
    standardized = StandardScaler().fit_transform(features)
    held_out = held_out_by_class(labels, None, seed=3)
    assert len(held_out) == (5 if limit >= EXAMPLES else 1)
    for row in range(2, len(l2_values), 3):
        l2 = l2_values[row]
        log_probability = []
        correct = []
        for out in held_out:
            model = LogisticRegression(
                C=1 / ((~out).sum() * l2), solver="newton-cholesky", tol=1e-10
            ).fit(standardized[~out], labels[~out])
            own = np.arange(out.sum()), labels[out]
            log_probability.extend(model.predict_log_proba(standardized[out])[own])
            correct.extend(model.predict(standardized[out]) == labels[out])
        np.testing.assert_allclose(fitted.held_out_accuracy[row], np.mean(correct), rtol=1e-6)
        np.testing.assert_allclose(fitted.held_out_loss[row], -np.mean(log_probability), rtol=2e-3)


def test_probe_is_finite_with_a_lone_example_and_constant_features():
    features, labels = duplicate_and_constant()
    labels = labels % 2
    labels[0] = 2
    fitted = fit_probe(features, labels, num_classes=CLASSES, l2_values=NINE_VALUES)
    assert np.isfinite(fitted.kernel).all()
    assert np.isfinite(fitted.held_out_loss).all()
    np.testing.assert_allclose(fitted.kernel[11:14], 0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e19, 1e30])
def test_very_large_or_small_features_do_not_change_the_predictions(scale):
    """Their squares would overflow or underflow."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = (rng.normal(size=(60, 8)) + labels[:, None]).astype(np.float32)
    exact = features * np.float32(2.0 ** round(np.log2(scale)))

    def predictions(features):
        probe = fit_probe(features, labels, num_classes=3, l2_values=[1e-3, 1.0])
        votes = knn_predict(features, labels, features, num_classes=3, k=5)
        return predict_logits(probe, features).argmax(1), np.argmax(votes, 1)

    for scaled, expected in zip(predictions(exact), predictions(features), strict=True):
        np.testing.assert_array_equal(scaled, expected)


def test_a_regression_that_overflows_is_reported():
    features = np.random.default_rng(0).normal(size=(60, 8)) * 1e19
    with pytest.raises(DivergenceError, match=r"diverged on features of up to \d.\de\+19: check"):
        fit_logistic(features, np.arange(60) % 3, [1.0], num_classes=3)


def with_nan(features):
    features = features.copy()
    features[[3, 3, 8], [0, 1, 2]] = np.nan, np.inf, -np.inf
    return features


@pytest.mark.parametrize(
    "fit", [fit_probe, lambda x, y, num_classes: fit_logistic(x, y, [1.0], num_classes=num_classes)]
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (with_nan(x), y), f"3 of {EXAMPLES * DIMENSIONS} feature values"),
        (lambda x, y: (x[:, 0], y), "features must be"),
        (lambda x, y: (x, y[:-1]), f"labels must be {EXAMPLES} integers"),
        (lambda x, y: (x, y.astype(float)), "integers"),
        (lambda x, y: (x, y - 1), r"\[0, 4\), got -1 to 2"),
        (lambda x, y: (x, y + 1), r"\[0, 4\), got 1 to 4"),
        (lambda x, y: (x, np.full_like(y, 2)), "all 200 examples are of class 2"),
    ],
)
def test_bad_training_data_is_refused(fit, change, message):
    features, labels = change(*random())
    with pytest.raises(RequestError, match=message):
        fit(features, labels, num_classes=CLASSES)


@pytest.mark.parametrize("l2", [[0.0], [-1.0], [np.nan], [], 1.0])
def test_bad_l2_is_refused(l2):
    with pytest.raises(RequestError, match="positive"):
        fit_logistic(*random(), l2, num_classes=CLASSES)


@pytest.mark.parametrize(
    "weights", [np.ones(EXAMPLES - 1), np.zeros((2, EXAMPLES)), -np.ones((2, EXAMPLES))]
)
def test_bad_weights_are_refused(weights):
    with pytest.raises(RequestError, match="weights must be"):
        fit_logistic(*random(), [1.0, 2.0], num_classes=CLASSES, weights=weights)


def test_probe_needs_two_examples_of_a_class():
    with pytest.raises(RequestError, match="no class has two examples"):
        fit_probe(np.eye(3), np.arange(3), num_classes=3)
