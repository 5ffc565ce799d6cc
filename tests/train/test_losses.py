"""The losses of the tasks against PyTorch and timm, with blanks and weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from tljax.data.examples import Source, balancing_weights
from tljax.data.loader import batch_rows
from tljax.metrics.sums import masked_sum
from tljax.models.model import Output
from tljax.runtime.errors import RequestError
from tljax.runtime.task import Task
from tljax.runtime.types import Batch
from tljax.train.objectives import (
    binary_cross_entropy,
    cross_entropy,
    cumulative_cross_entropy,
    label_weights,
    make_objective,
    squared_error,
)
from tljax.train.options import FitConfig

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (40, 6)).astype(np.float32)
APPLIES = RNG.integers(0, 2, (40, 6)).astype(np.float32)
BLANK = RNG.random((40, 6)) < 0.3
BLANK[3] = True
BLANKED = np.where(BLANK, np.nan, APPLIES).astype(np.float32)


def run(objective, targets, outputs=LOGITS, **extra):
    """Return the mean loss, its gradient by the outputs, and the mean metrics."""
    mask = np.ones(len(outputs), bool)
    batch = Batch(np.zeros(len(outputs)), targets, mask, np.arange(len(outputs)), extra)

    def mean(values):
        total, count = masked_sum(values, jnp.asarray(mask))
        return total / count

    def loss(outputs):
        losses, metrics = objective(lambda _: Output(outputs, {}, {}), batch, None)
        return mean(losses), {name: mean(x) for name, x in metrics.items()}

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(outputs)
    return float(value), np.asarray(gradient), {name: float(x) for name, x in metrics.items()}


def torch_mean(loss, outputs=LOGITS):
    """Return a loss of PyTorch and its gradient, in float64."""
    x = torch.tensor(outputs.astype(np.float64), requires_grad=True)
    value = loss(x)
    value.backward()
    assert x.grad is not None
    return value.item(), x.grad.numpy()


def assert_same(ours, reference):
    np.testing.assert_allclose(ours[0], reference[0], rtol=2e-6)
    np.testing.assert_allclose(ours[1], reference[1], atol=2e-7)


def test_several_labels_are_the_mean_over_known_ones():
    known, applies = torch.tensor(~BLANK), torch.tensor(APPLIES.astype(np.float64))
    reference = torch_mean(
        lambda x: functional.binary_cross_entropy_with_logits(x[known], applies[known])
    )
    ours = run(binary_cross_entropy(), BLANKED)
    assert_same(ours, reference)
    assert ours[2] == {"cross_entropy": pytest.approx(reference[0], rel=1e-6)}
    assert not ours[1][3].any()


def test_a_batch_without_known_labels_has_no_gradient():
    targets = np.full_like(APPLIES, np.nan)
    objective = binary_cross_entropy(asymmetric=True)
    batch = Batch(np.zeros(40), targets, np.ones(40, bool), np.arange(40), {})
    losses, _ = objective(lambda _: Output(jnp.asarray(LOGITS), {}, {}), batch, jax.random.key(0))
    assert not np.asarray(losses.values).any()  # pyright: ignore[reportAttributeAccessIssue]
    assert not np.asarray(losses.weights).any()  # pyright: ignore[reportAttributeAccessIssue]


def test_label_weights_balance_each_label():
    weights = label_weights(BLANKED)
    counts = np.stack([(BLANKED == 0).sum(0), (BLANKED == 1).sum(0)])
    np.testing.assert_allclose(
        weights * counts, np.broadcast_to(counts.sum(0) / 2, (2, 6)), rtol=1e-6
    )
    known, applies = torch.tensor(~BLANK), torch.tensor(APPLIES.astype(np.float64))
    each = torch.tensor(np.where(APPLIES == 1, weights[1], weights[0]).astype(np.float64))
    reference = torch_mean(
        lambda x: (
            functional.binary_cross_entropy_with_logits(
                x[known], applies[known], each[known], reduction="sum"
            )
            / each[known].sum()
        )
    )
    assert_same(run(binary_cross_entropy(weights), BLANKED), reference)


def test_the_asymmetric_loss_is_the_formula_of_the_paper():
    applies = torch.tensor(APPLIES.astype(np.float64))

    def loss(x):
        p = x.sigmoid()
        shifted = (p - 0.05).clamp(min=0)
        positive, negative = (1 - p) * p.log(), shifted**4 * (1 - shifted).log()
        return -torch.where(applies == 1, positive, negative).mean()

    assert_same(run(binary_cross_entropy(asymmetric=True), APPLIES), torch_mean(loss))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.5])
def test_the_focal_loss_is_the_formula_of_the_paper(gamma: float):
    applies = torch.tensor(APPLIES.astype(np.float64))

    def binary(x):
        p = torch.where(applies == 1, x.sigmoid(), 1 - x.sigmoid())
        return (-((1 - p) ** gamma) * p.log()).mean()

    assert_same(run(binary_cross_entropy(focal_gamma=gamma), APPLIES), torch_mean(binary))
    labels = RNG.integers(0, 6, 40).astype(np.int32)

    def softmax(x):
        p = x.softmax(1)[torch.arange(40), torch.tensor(labels).long()]
        return (-((1 - p) ** gamma) * p.log()).mean()

    ours = run(cross_entropy(focal_gamma=gamma), labels)
    assert_same(ours, torch_mean(softmax))
    plain = functional.cross_entropy(torch.tensor(LOGITS), torch.tensor(labels).long())
    assert ours[2]["cross_entropy"] == pytest.approx(float(plain), rel=1e-6)


def test_numbers_are_standardized_and_blanks_left_out():
    task = Task("regression", mean=(10.0, -1.0), scale=(5.0, 0.1))
    targets = (RNG.normal(0, 2, (40, 2)) * task.scale + task.mean).astype(np.float32)
    targets[RNG.random((40, 2)) < 0.2] = np.nan
    known = torch.tensor(~np.isnan(targets))
    standardized = torch.tensor(task.standardize(targets))
    outputs = LOGITS[:, :2]
    for huber, loss in (
        (False, functional.mse_loss),
        (True, lambda x, y: 2 * functional.huber_loss(x, y)),
    ):
        reference = torch_mean(lambda x, loss=loss: loss(x[known], standardized[known]), outputs)
        ours = run(squared_error(huber=huber), task.standardize(targets), outputs)
        np.testing.assert_allclose(ours[0], reference[0], rtol=1e-5)
        np.testing.assert_allclose(ours[1], reference[1], atol=1e-6)


def test_ordered_classes_are_binary_problems_above_each_class():
    labels = RNG.integers(0, 7, 40).astype(np.int32)
    above = torch.tensor((labels[:, None] > np.arange(6)).astype(np.float64))
    reference = torch_mean(lambda x: functional.binary_cross_entropy_with_logits(x, above))
    ours = run(cumulative_cross_entropy(), labels)
    assert_same(ours, reference)
    predicted = (np.minimum.accumulate(LOGITS, axis=1) >= 0).sum(1)
    assert ours[2]["top1"] == pytest.approx((predicted == labels).mean())


@pytest.mark.slow
def test_examples_count_by_their_weights():
    labels = RNG.integers(0, 6, 40).astype(np.int32)
    weight = RNG.integers(0, 3, 40).astype(np.float32)
    repeated = np.repeat(np.arange(40), weight.astype(int))
    for objective, targets in (
        (cross_entropy(), labels),
        (cross_entropy(class_weights=(1, 2, 3, 4, 5, 6)), labels),
        (binary_cross_entropy(), BLANKED),
        (cumulative_cross_entropy((1, 1, 2, 2, 3, 3, 4)), labels),
    ):
        weighted = run(objective, targets, weight=weight)[0]
        assert weighted == pytest.approx(run(objective, targets[repeated], LOGITS[repeated])[0])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("regression", {"loss": "focal"}, "--loss focal does not fit the task regression"),
        ("classification", {"loss": "asymmetric"}, "choose cross-entropy or focal"),
        ("multilabel", {"label_smoothing": 0.1}, "--label-smoothing does not fit"),
        ("regression", {"class_weights": "balanced"}, "numbers have no classes"),
    ],
)
def test_options_that_do_not_fit_the_task_are_refused(kind, options, message):
    source = Source(np.zeros(2), np.zeros(2, np.int32), ("a", "b"), ("0", "1"))
    with pytest.raises(RequestError, match=message):
        make_objective(Task(kind), FitConfig(**options), source)


def test_balanced_sampling_draws_classes_equally_often():
    labels = np.repeat([0, 1, 2], [70, 25, 5]).astype(np.int32)
    source = Source(np.zeros(100), labels, ("a", "b", "c"), [""] * 100)
    weights = balancing_weights(source)
    np.testing.assert_allclose(np.bincount(labels, weights), 100 / 3)
    drawn = [batch_rows(100, 10, seed, 1, 4, weights) for seed in range(20)]
    assert {rows.shape for rows in drawn} == {(10, 12)}
    assert all((rows[:, 10:] == -1).all() for rows in drawn)
    for rows in drawn:
        times = np.bincount(rows[rows >= 0], minlength=100)
        assert ((times == np.floor(weights)) | (times == np.ceil(weights))).all()
        assert abs(np.bincount(labels[rows[rows >= 0]]) - 100 / 3).max() < 1.5
    np.testing.assert_array_equal(drawn[3], batch_rows(100, 10, 3, 1, 4, weights))
    assert (drawn[3] != drawn[4]).any()
    # Examples of equal weight are drawn once each, in the order of an unweighted epoch.
    plain = batch_rows(100, 10, 5, 2)
    np.testing.assert_array_equal(batch_rows(100, 10, 5, 2, frequencies=np.ones(100)), plain)


def test_rare_labels_are_drawn_more_often():
    applies = np.zeros((100, 3), np.float32)
    applies[:60, 0], applies[50:55, 1], applies[55:60, 2] = 1, 1, np.nan
    source = Source(np.zeros(100), applies, ("a", "b", "c"), [""] * 100, task=Task("multilabel"))
    weights = balancing_weights(source)
    assert weights.mean() == pytest.approx(1)
    assert weights[50] == weights.max() > weights[0]
    assert weights[99] == pytest.approx(100 / 40 * weights[0] * 60 / 100, rel=1e-6)
