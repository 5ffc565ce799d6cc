"""Training objectives: ``objective(forward, batch, key) -> (losses, metrics)``."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Shaped

from tljax.data.examples import Source
from tljax.metrics.classification import class_shares, cross_entropies, ranks
from tljax.metrics.sums import Weighted
from tljax.runtime.errors import RequestError
from tljax.runtime.task import Task
from tljax.runtime.types import Array, Batch
from tljax.train.options import FitConfig

if TYPE_CHECKING:
    from tljax.train.step import Forward

Values = Shaped[Array, " batch"] | Weighted
"""``[batch]``, one value per example, optionally with a weight each."""

Objective = Callable[["Forward", Batch, jax.Array], tuple[Values, Mapping[str, Values]]]
"""``(forward, batch, key) -> (losses, metrics)``, with losses ``[batch]`` and each of the named
metrics ``[batch]``. Values of rows that `Batch.mask` leaves out are ignored."""

ASYMMETRIC_GAMMA, ASYMMETRIC_MARGIN = 4.0, 0.05
"""Focusing of negatives and probability margin of `binary_cross_entropy`, as in the paper."""


def make_objective(task: Task, config: FitConfig, source: Source) -> Objective:
    """Build the objective of a task that the options describe.

    Args:
        task: what is learned.
        config: options of the loss.
        source: training examples, whose class frequencies balance the loss.

    Raises:
        RequestError: an option does not fit the task.
    """
    kind, balanced = task.kind, config.class_weights == "balanced"
    losses = {
        "classification": ("cross-entropy", "focal"),
        "multilabel": ("cross-entropy", "focal", "asymmetric"),
        "ordinal": ("cross-entropy",),
        "regression": ("squared-error", "huber"),
    }[kind]
    if config.loss not in (None, *losses):
        raise RequestError(
            f"--loss {config.loss} does not fit the task {kind}: choose {' or '.join(losses)}"
        )
    if config.label_smoothing and kind != "classification":
        raise RequestError(f"--label-smoothing does not fit the task {kind}: leave it out")
    if balanced and kind == "regression":
        raise RequestError("--class-weights balanced: numbers have no classes: leave it out")
    gamma = config.focal_gamma if config.loss == "focal" else 0.0
    if kind == "classification":
        weights = class_weights(source) if balanced else ()
        return cross_entropy(config.label_smoothing, weights, gamma)
    if kind == "multilabel":
        weights = label_weights(source.labels) if balanced else None
        return binary_cross_entropy(weights, gamma, asymmetric=config.loss == "asymmetric")
    if kind == "ordinal":
        return cumulative_cross_entropy(class_weights(source) if balanced else ())
    return squared_error(huber=config.loss == "huber")


def cross_entropy(
    label_smoothing: float = 0.0, class_weights: tuple[float, ...] = (), focal_gamma: float = 0.0
) -> Objective:
    """Return the softmax cross-entropy objective, in nats, for classification.

    Its metrics are ``cross_entropy``, without smoothing and weights, and ``top1``, the accuracy.
    For targets that Mixup or CutMix made, the class with the largest share counts as the label.

    Args:
        label_smoothing: share of the target probability that is spread over all classes, in [0, 1].
        class_weights: weight of each class in the loss; empty for equal weights.
        focal_gamma: exponent of the focal loss, which multiplies the loss of a class by ``(1 -
            probability) ** gamma`` (Lin et al. 2017, arXiv:1708.02002); 0 is the cross-entropy.
    """

    def objective(
        forward: "Forward", batch: Batch, _: jax.Array
    ) -> tuple[Values, dict[str, Values]]:
        logits = forward(batch.inputs).logits
        plain = class_shares(batch.targets, logits.shape[1])
        shares = optax.smooth_labels(plain, label_smoothing)
        log_probabilities = jax.nn.log_softmax(logits)
        focused = log_probabilities
        if focal_gamma:
            # Rounding may make a log probability positive, and a power of it NaN.
            focused *= jnp.maximum(-jnp.expm1(log_probabilities), 1e-12) ** focal_gamma
        weights = jnp.asarray(class_weights or (1.0,) * logits.shape[1])
        losses = -jnp.sum(weights * shares * focused, axis=1)
        hard = batch.targets.ndim == 1
        labels = batch.targets if hard else batch.targets.argmax(1)
        metrics: dict[str, Values] = {
            "cross_entropy": cross_entropies(logits, labels)
            if hard
            else -jnp.sum(plain * log_probabilities, axis=1),
            "top1": ranks(logits, labels) < 1,
        }
        weighted = Weighted(losses, shares @ weights) if class_weights else losses
        return _by_example(weighted, batch), metrics

    return objective


def binary_cross_entropy(
    weights: Float[np.ndarray, "2 labels"] | None = None,
    focal_gamma: float = 0.0,
    *,
    asymmetric: bool = False,
) -> Objective:
    """Return the sigmoid cross-entropy objective, in nats, for several labels.

    It is the mean over the labels of all examples that are known, that is, not NaN. Its metric is
    ``cross_entropy``, without weights and focusing.

    Args:
        weights: ``[2, labels]`` weights of a label where it does not apply, and where it does; by
            default equal.
        focal_gamma: exponent of the focal loss, see `cross_entropy`.
        asymmetric: whether to use the asymmetric loss (Ridnik et al. 2021, arXiv:2009.14119), which
            focuses on labels that apply, for labels that are rare.
    """

    def objective(
        forward: "Forward", batch: Batch, _: jax.Array
    ) -> tuple[Values, dict[str, Values]]:
        logits, targets = forward(batch.inputs).logits, batch.targets
        known = ~jnp.isnan(targets)
        applies = jnp.where(known, targets, 0)
        positive, negative = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        plain = -(applies * positive + (1 - applies) * negative)
        if asymmetric:
            shifted = jnp.maximum(jax.nn.sigmoid(logits) - ASYMMETRIC_MARGIN, 0)
            negative = jnp.log1p(-shifted) * shifted**ASYMMETRIC_GAMMA
            positive *= jax.nn.sigmoid(-logits)
        elif focal_gamma:
            positive *= jax.nn.sigmoid(-logits) ** focal_gamma
            negative *= jax.nn.sigmoid(logits) ** focal_gamma
        each = jnp.ones_like(logits)
        if weights is not None:
            each = applies * weights[1] + (1 - applies) * weights[0]
        losses = -each * (applies * positive + (1 - applies) * negative)
        loss = _mean_of_known(losses, known * each)
        return _by_example(loss, batch), {"cross_entropy": _mean_of_known(plain, known)}

    return objective


def cumulative_cross_entropy(class_weights: tuple[float, ...] = ()) -> Objective:
    """Return the objective of cumulative logits, in nats, for ordered classes.

    Output ``k`` is the logit of the probability that the class is above ``k``; the loss is the mean
    of their sigmoid cross-entropies (Frank and Hall 2001, "A Simple Approach to Ordinal
    Classification"; Niu et al. 2016, CVPR). Its metrics are ``cross_entropy``, without weights, and
    ``top1``, the accuracy of the median class.

    Args:
        class_weights: weight of the examples of each class; empty for equal weights.
    """

    def objective(
        forward: "Forward", batch: Batch, _: jax.Array
    ) -> tuple[Values, dict[str, Values]]:
        logits, labels = forward(batch.inputs).logits, batch.targets
        above = labels[:, None] > jnp.arange(logits.shape[1])
        losses = optax.sigmoid_binary_cross_entropy(logits, above).mean(1)
        predicted = (jax.lax.cummin(logits, axis=1) >= 0).sum(1)
        loss: Values = losses
        if class_weights:
            weights = jnp.asarray(class_weights)[labels]
            loss = Weighted(losses * weights, weights)
        return _by_example(loss, batch), {"cross_entropy": losses, "top1": predicted == labels}

    return objective


def squared_error(*, huber: bool = False) -> Objective:
    """Return the objective of regression: the mean squared error of standardized numbers.

    It is the mean over the numbers of all examples that are known, that is, not NaN. Its metric is
    ``squared_error``. Outputs and targets are standardized.

    Args:
        huber: whether errors above one standard deviation count linearly (Huber 1964), as
            ``2 * |error| - 1``, so that outliers have less influence.
    """

    def objective(
        forward: "Forward", batch: Batch, _: jax.Array
    ) -> tuple[Values, dict[str, Values]]:
        outputs, targets = forward(batch.inputs).logits, batch.targets
        known = ~jnp.isnan(targets)
        errors = outputs - jnp.where(known, targets, 0)
        losses = 2 * optax.huber_loss(errors) if huber else errors**2
        squared = _mean_of_known(errors**2, known)
        return _by_example(_mean_of_known(losses, known), batch), {"squared_error": squared}

    return objective


def class_weights(source: Source) -> tuple[float, ...]:
    """Return class weights inverse to the class frequencies, with mean 1 over the images."""
    counts = np.bincount(source.labels, minlength=len(source.classes))
    return tuple((len(source) / (len(counts) * np.maximum(counts, 1))).tolist())


def label_weights(labels: Float[np.ndarray, "n labels"]) -> Float[np.ndarray, "2 labels"]:
    """Return weights with which each label applies as often as not, with mean 1 over the images.

    Args:
        labels: ``[n, labels]`` 0, 1, or NaN where it is unknown.
    """
    counts = np.stack([(labels == value).sum(0) for value in (0, 1)])
    return (counts.sum(0) / (2 * np.maximum(counts, 1))).astype(np.float32)


def _mean_of_known(values: jax.Array, weights: jax.Array) -> Weighted:
    """Weight the values ``[batch, names]`` of every example; unknown ones have weight 0."""
    return Weighted(jnp.where(weights > 0, values, 0).sum(1), weights.sum(1))


def _by_example(values: Values, batch: Batch) -> Values:
    """Multiply losses by the weights of the examples, if the source has any."""
    if (weight := batch.extra.get("weight")) is None:
        return values
    if not isinstance(values, Weighted):
        values = Weighted(values, jnp.ones(len(batch.mask)))
    return Weighted(values.values * weight, values.weights * weight)
