import warnings

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from tljax.features.binary import fit_binary
from tljax.features.design import check_features, make_design
from tljax.features.folds import held_out_by_label
from tljax.features.probe import L2_VALUES, fit_probe, fit_task_probe, predict_logits
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import data_mesh

pytestmark = pytest.mark.usefixtures("quick_to_compile")

EXAMPLES, DIMENSIONS, LABELS = 200, 20, 6
SWEEP = L2_VALUES[4::5]


def problem(n=EXAMPLES, d=DIMENSIONS, seed=0):
    """Draw standardized features and rare and frequent labels, a fifth of them unknown."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, d)) @ (np.eye(d) + 0.3 * rng.normal(size=(d, d)))
    features = StandardScaler().fit_transform(features).astype(np.float32)
    logits = features @ rng.normal(size=(d, LABELS)) / 2 + np.linspace(-3, 2, LABELS)
    targets = (logits + rng.logistic(size=logits.shape) > 0).astype(np.float32)
    targets[rng.random(targets.shape) < 0.2] = np.nan
    targets[:2] = [0], [1]
    return features, targets


def design_of(features):
    return make_design(check_features(features), LABELS, data_mesh(), standardize=False)


def objective(features, target, weights, kernel, bias, l2):
    """Compute the formula of fit_binary's docstring in float64, for one label."""
    used = ~np.isnan(target) & (weights > 0)
    kernel = np.asarray(kernel, np.float64)
    logits = features[used].astype(np.float64) @ kernel + float(bias)
    losses = np.logaddexp(0, np.where(target[used] == 1, -logits, logits))
    return np.average(losses, weights=weights[used]) + l2 / 2 * kernel @ kernel


def sklearn_model(features, target, weights, l2):
    used = ~np.isnan(target) & (weights > 0)
    model = LogisticRegression(
        C=1 / (weights[used].sum() * l2), solver="newton-cholesky", tol=1e-10, max_iter=1000
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newton-cholesky cannot reach 1e-10 everywhere
        return model.fit(features[used], target[used], sample_weight=weights[used])


@pytest.mark.parametrize("shape", [(200, 20), (40, 60)])
def test_objectives_of_labels_equal_sklearn_with_blanks_and_weights(shape):
    features, targets = problem(*shape)
    weights = np.stack([np.ones(len(features)), np.resize([0, 1, 2, 0.5, 1], len(features))])
    weights[:, :2] = 1
    design = design_of(features)
    path = np.array(L2_VALUES[::-4], np.float32)
    for count in (1, 4, 8, len(path)):
        fit = fit_binary(design, targets, path, weights=weights, num_values=count)
        assert fit.converged.all()
        l2 = float(path[count - 1])
        for row, weight in enumerate(weights):
            for label, target in enumerate(targets.T):
                kernel, bias = fit.kernel[row, :, label], fit.bias[row, label]
                model = sklearn_model(features, target, weight, l2)
                best = objective(features, target, weight, model.coef_[0], model.intercept_[0], l2)
                ours = objective(features, target, weight, kernel, bias, l2)
                np.testing.assert_allclose(ours, best, rtol=1e-5)
                np.testing.assert_allclose(fit.objective[row, label], best, rtol=1e-5)


def test_the_objective_is_within_its_tolerance_of_sklearns():
    features, targets = problem()
    ones = np.ones(EXAMPLES)
    path = np.array([1.0, 1e-1, 1e-2], np.float32)
    fit = fit_binary(design_of(features), targets, path, weights=ones[None], tolerance=1e-7)
    for label, target in enumerate(targets.T):
        model = sklearn_model(features, target, ones, path[-1])
        best = objective(features, target, ones, model.coef_[0], model.intercept_[0], path[-1])
        ours = objective(
            features, target, ones, fit.kernel[0, :, label], fit.bias[0, label], path[-1]
        )
        np.testing.assert_allclose(ours, best, rtol=1e-6)


def test_more_labels_than_are_solved_side_by_side_are_the_same_labels():
    features, targets = problem()
    path = np.array([1.0, 0.1], np.float32)
    ones = np.ones((1, EXAMPLES))
    design = design_of(features)
    few = fit_binary(design, targets, path, weights=ones, held_out=ones, tolerance=1e-7)
    many = fit_binary(
        design, np.tile(targets, 7), path, weights=ones, held_out=ones, tolerance=1e-7
    )
    assert many.kernel.shape == (1, DIMENSIONS, 7 * LABELS)
    for actual, expected in zip(many, few, strict=True):
        np.testing.assert_allclose(actual, np.tile(expected, 7), rtol=1e-3, atol=2e-3)


def test_too_few_iterations_are_reported():
    features, targets = problem()
    path = np.array([1e-3, 1e-6], np.float32)
    fit = fit_binary(
        design_of(features), targets, path, weights=np.ones((1, EXAMPLES)), max_iterations=3
    )
    assert not fit.converged.any()


def test_held_out_losses_and_the_choice_equal_sklearn():
    features, targets = problem()
    weights = np.resize([1, 2, 0.5], EXAMPLES)
    fitted = fit_task_probe(
        "multilabel", features, targets, num_outputs=LABELS, weights=weights, l2_values=SWEEP
    )
    assert fitted.held_out_accuracy is None
    assert fitted.converged
    assert fitted.held_out_loss.argmin() == list(SWEEP).index(fitted.l2)
    for row in (3, 5, 7):
        losses = np.zeros(LABELS)
        for out in held_out_by_label(targets, None, 0):
            for label, target in enumerate(targets.T):
                model = sklearn_model(features, target, weights * ~out, SWEEP[row])
                scored = out & ~np.isnan(target)
                sign = np.where(target[scored] == 1, -1, 1)
                margins = sign * model.decision_function(features[scored])
                losses[label] += weights[scored] @ np.logaddexp(0, margins)
        out = held_out_by_label(targets, None, 0).any(0)
        expected = np.mean(losses / ((weights * out) @ ~np.isnan(targets)))
        np.testing.assert_allclose(fitted.held_out_loss[row], expected, rtol=2e-3)


def test_the_label_probe_is_the_optimum_on_standardized_features():
    features, targets = problem()
    raw = features * np.logspace(-2, 2, DIMENSIONS) + 3
    fitted = fit_task_probe("multilabel", raw, targets, num_outputs=LABELS, l2_values=SWEEP)
    scaler = StandardScaler().fit(raw)
    kernel = np.asarray(fitted.kernel, np.float64) * scaler.scale_[:, None]
    bias = np.asarray(fitted.bias) + scaler.mean_ @ np.asarray(fitted.kernel, np.float64)
    standardized, ones = scaler.transform(raw), np.ones(EXAMPLES)
    for label, target in enumerate(targets.T):
        model = sklearn_model(standardized, target, ones, fitted.l2)
        np.testing.assert_allclose(
            objective(standardized, target, ones, kernel[:, label], bias[label], fitted.l2),
            objective(standardized, target, ones, model.coef_[0], model.intercept_[0], fitted.l2),
            rtol=1e-5,
        )


def test_a_label_with_one_known_value_has_a_constant_probability():
    features, targets = problem()
    targets[:, 0] = np.where(np.arange(EXAMPLES) < 9, 1, np.nan)
    targets[:, 1] = 0
    fitted = fit_task_probe("multilabel", features, targets, num_outputs=LABELS, l2_values=SWEEP)
    assert not fitted.kernel[:, :2].any()
    np.testing.assert_allclose(
        fitted.bias[:2], np.log([9.5 / 0.5, 0.5 / (EXAMPLES + 0.5)]), rtol=1e-5
    )
    assert fitted.converged
    assert np.isfinite(fitted.held_out_loss).all()


def standardized_numbers(features):
    rng = np.random.default_rng(1)
    targets = features[:, :3] @ rng.normal(size=(3, 2)) + rng.normal(size=(len(features), 2))
    targets = (targets - targets.mean(0)) / targets.std(0)
    targets[5:20, 1] = np.nan
    return targets


@pytest.mark.parametrize("shape", [(200, 20), (40, 60)])
def test_the_number_probe_equals_sklearns_ridge(shape):
    features = problem(*shape)[0] * 5 + 1
    targets = standardized_numbers(features)
    fitted = fit_task_probe("regression", features, targets, num_outputs=2, l2_values=SWEEP)
    assert fitted.held_out_loss.argmin() == list(SWEEP).index(fitted.l2)
    assert fitted.held_out_loss.min() < 1
    standardized = StandardScaler().fit_transform(features)
    for column, target in enumerate(targets.T):
        known = ~np.isnan(target)
        model = Ridge(alpha=known.sum() * fitted.l2).fit(standardized[known], target[known])
        np.testing.assert_allclose(
            predict_logits(fitted, features)[:, column], model.predict(standardized), atol=1e-5
        )


def test_the_ordinal_probe_is_the_label_probe_of_the_thresholds():
    features, _ = problem()
    classes = np.clip(np.round(features[:, 0] + features[:, 1] + 1.5), 0, 3).astype(int)
    ordinal = fit_task_probe("ordinal", features, classes, num_outputs=3, l2_values=SWEEP)
    above = (classes[:, None] > np.arange(3)).astype(np.float32)
    labels = fit_task_probe("multilabel", features, above, num_outputs=3, l2_values=SWEEP)
    for actual, expected in zip(ordinal, labels, strict=True):
        np.testing.assert_array_equal(actual, expected)
    predicted = (np.asarray(predict_logits(ordinal, features)) > 0).sum(1)
    assert np.abs(predicted - classes).mean() < 0.3


def examples(kind):
    features, targets = problem()
    if kind == "multilabel":
        return features, targets, LABELS
    if kind == "regression":
        return features, standardized_numbers(features), 2
    classes = np.arange(EXAMPLES) % 4
    features[:, 0] += classes
    return features, classes, 3 if kind == "ordinal" else 4


KINDS = ["classification", "multilabel", "regression", "ordinal"]


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_one_and_groups_of_one_change_nothing(kind):
    features, targets, outputs = examples(kind)
    options = {"num_outputs": outputs, "l2_values": SWEEP}
    expected = fit_task_probe(kind, features, targets, **options)
    for extra in ({"weights": np.ones(EXAMPLES)}, {"groups": np.arange(EXAMPLES)}):
        assert_same(fit_task_probe(kind, features, targets, **options, **extra), expected)
    if kind == "classification":
        direct = fit_probe(features, targets, num_classes=outputs, l2_values=SWEEP)
        assert_same(direct, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_examples_of_weight_0_and_rows_of_blanks_have_no_influence(kind):
    features, targets, outputs = examples(kind)
    options = {"num_outputs": outputs, "l2_values": SWEEP}
    weights = np.resize([1.0, 2.0, 0.5], EXAMPLES)
    expected = fit_task_probe(kind, features, targets, weights=weights, **options)
    features = np.concatenate([features, 100 + features[:7]])
    targets = np.concatenate([targets, targets[:7]])
    weights = np.concatenate([weights, np.zeros(7)])
    assert_same(fit_task_probe(kind, features, targets, weights=weights, **options), expected)
    if kind in ("multilabel", "regression"):
        weights[EXAMPLES:] = 3
        targets[EXAMPLES:] = np.nan
        assert_same(fit_task_probe(kind, features, targets, weights=weights, **options), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_duplicates_in_one_group_do_not_improve_the_held_out_loss(kind):
    """Features that only identify their group predict nothing if groups are held out whole."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(EXAMPLES // 4), 4)
    features = rng.normal(size=(EXAMPLES // 4, DIMENSIONS * 3))[groups]
    _, targets, outputs = examples(kind)
    targets = np.nan_to_num(targets)[: EXAMPLES // 4][rng.permutation(EXAMPLES // 4)][groups]
    options = {"num_outputs": outputs, "l2_values": [1e-4, 1e-2]}
    leaky = fit_task_probe(kind, features, targets, **options)
    honest = fit_task_probe(kind, features, targets, groups=groups, **options)
    assert leaky.held_out_loss.min() < 0.25
    assert honest.held_out_loss.min() > 0.5


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("segmentation", {}, "no probe for 'segmentation': choose classification, multi"),
        ("multilabel", {"targets": np.full((EXAMPLES, LABELS), 2.0)}, "must be 0, 1, or NaN"),
        ("multilabel", {"targets": np.ones((EXAMPLES, 5))}, r"targets must be \[200, 6\] numbers"),
        ("multilabel", {"targets": np.ones((EXAMPLES, LABELS))}, "no label has both"),
        ("multilabel", {"targets": np.full((EXAMPLES, LABELS), np.nan)}, "no target is known"),
        ("multilabel", {"l2_values": [0.0]}, "positive"),
        ("multilabel", {"weights": -np.ones(EXAMPLES)}, "weights must be 200 finite numbers"),
        ("multilabel", {"groups": np.ones(EXAMPLES)}, "groups must be 200 integers, got float64"),
        ("multilabel", {"groups": np.ones(EXAMPLES, int)}, "no label value has examples in two"),
        ("regression", {"targets": np.full((EXAMPLES, 2), np.inf)}, "a target is infinite"),
        ("regression", {"l2_values": [-1.0]}, "positive"),
        ("regression", {"groups": np.ones(EXAMPLES, int)}, "only one group"),
        ("ordinal", {"targets": np.full(EXAMPLES, 4)}, r"labels must lie in \[0, 4\)"),
        ("ordinal", {"targets": np.full(EXAMPLES, -1)}, "leave out examples without a label"),
        ("classification", {"weights": np.ones(3)}, "weights must be 200 finite numbers"),
        ("classification", {"weights": np.eye(1, EXAMPLES)[0]}, "examples are of class 0"),
        ("classification", {"groups": np.ones(EXAMPLES, int)}, "no class is in two groups"),
        ("regression", {"features": np.full((EXAMPLES, 3), np.nan)}, "are not finite"),
    ],
)
def test_bad_requests_are_refused(kind, change, message):
    features, targets, outputs = examples(kind)
    arguments = {"features": features, "targets": targets, "num_outputs": outputs} | change
    with pytest.raises(RequestError, match=message):
        fit_task_probe(kind, **arguments)


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_an_output_without_a_known_target_is_refused(kind):
    features, targets, outputs = examples(kind)
    targets[:, 1] = np.nan
    with pytest.raises(RequestError, match="no target of output 1 is known: leave it out"):
        fit_task_probe(kind, features, targets, num_outputs=outputs)
