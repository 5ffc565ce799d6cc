"""Classification metrics: of every example in JAX, and of all examples in NumPy.

The latter take predicted class indices or probabilities; a label of -1 is unknown. See
`tljax.metrics` for weights, unknown labels and undefined metrics.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Integer

from tljax.metrics.curves import auroc_of, score_counts
from tljax.metrics.weighted import (
    Weights,
    as_weights,
    mean_of_defined,
    ratio,
    sums_by_class,
    weights_of,
)
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array, Labels, Logits

Classes = Integer[np.ndarray, " n"]
"""Class indices, one per example."""


def cross_entropies(logits: Logits, labels: Labels) -> Float[jax.Array, " examples"]:
    """Compute the softmax cross-entropy of every example, in nats.

    Args:
        logits: ``[examples, classes]``.
        labels: ``[examples]`` class indices.

    Returns:
        ``[examples]``.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def ranks(logits: Logits, labels: Labels) -> Integer[jax.Array, " examples"]:
    """Count the classes ranked above the label; a top-k prediction is correct if ``rank < k``.

    Equal logits are ranked by class index, lower first. NaN logits always rank above the label.

    Args:
        logits: ``[examples, classes]``.
        labels: ``[examples]`` class indices.

    Returns:
        ``[examples]``, from 0 (the label is the prediction) to ``classes``.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    label_logits = jnp.take_along_axis(logits, labels[:, None], axis=1)
    lower_index = jnp.arange(logits.shape[1]) < labels[:, None]
    # `~(a <= b)` instead of `a > b`: a diverged network returns NaN, which must not be correct.
    return (~(logits <= label_logits) | ((logits == label_logits) & lower_index)).sum(1)


def class_shares(targets: Array, classes: int) -> Float[jax.Array, "examples classes"]:
    """Convert classification targets to one probability per class.

    Args:
        targets: ``[examples]`` class indices, which are one-hot encoded, or ``[examples, classes]``
            probabilities (as produced by mixup), which are returned unchanged.
        classes: number of classes.

    Returns:
        ``[examples, classes]`` floats. A class index of -1 gives a row of zeros.
    """
    targets = jnp.asarray(targets)
    return jax.nn.one_hot(targets, classes) if targets.ndim == 1 else targets


def standard_error(share: float, count: int) -> float:
    """Compute the standard error of a share, ``sqrt(share * (1 - share) / count)``.

    Args:
        share: fraction of examples with some property, such as an accuracy, in [0, 1].
        count: number of examples, at least 1.
    """
    return math.sqrt(share * (1 - share) / count)


def accuracy(predictions: Classes, labels: Classes, weights: Weights | None = None) -> Any:
    """Compute the share of correct predictions, in [0, 1].

    Args:
        predictions: ``[n]`` predicted class indices.
        labels: ``[n]`` class indices; -1 for unknown.
        weights: ``[..., n]``.

    Returns:
        ``[...]``; NaN without a known label.

    Raises:
        RequestError: the shapes differ, or a prediction is not a class index.
    """
    predictions, labels, weights = _checked(predictions, labels, weights)
    return ratio(weights @ (predictions == labels).astype(np.float64), weights.sum(-1))


def balanced_accuracy(predictions: Classes, labels: Classes, weights: Weights | None = None) -> Any:
    """Compute the mean over classes of the share of their examples that is predicted correctly.

    Only classes that occur in the labels count. Arguments, result and errors are those of
    `accuracy`.
    """
    correct, examples, _ = _class_counts(predictions, labels, weights)
    return mean_of_defined(ratio(correct, examples))


def macro_f1(predictions: Classes, labels: Classes, weights: Weights | None = None) -> Any:
    """Compute the mean of F1 over the classes that occur in the labels or in the predictions.

    Arguments, result and errors are those of `accuracy`.
    """
    correct, examples, predicted = _class_counts(predictions, labels, weights)
    return mean_of_defined(ratio(2 * correct, examples + predicted))


def macro_auroc(
    probabilities: Float[np.ndarray, "n classes"], labels: Classes, weights: Weights | None = None
) -> Any:
    """Compute the mean over classes of the area under the ROC curve of one class versus the rest.

    Equal probabilities count half. Classes without an example, or without an example of another
    class, do not count.

    Args:
        probabilities: ``[n, classes]``; logits give another result, because they are not comparable
            between examples.
        labels: ``[n]`` class indices; -1 for unknown.
        weights: ``[..., n]``.

    Returns:
        ``[...]``; NaN with fewer than two classes, or if a probability of a known example is NaN.

    Raises:
        RequestError: the shapes differ, or a label is not below ``classes``.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise RequestError(
            "AUROC needs probabilities [n, classes] and labels [n];"
            f" got shapes {list(probabilities.shape)} and {list(labels.shape)}"
        )
    if labels.max(initial=-1) >= probabilities.shape[1]:
        raise RequestError(
            f"AUROC needs labels below {probabilities.shape[1]}; got {labels.max(initial=-1)}"
        )
    weights, known = as_weights(weights, len(labels)), labels >= 0
    probabilities, labels, weights = probabilities[known], labels[known], weights_of(weights, known)
    if np.isnan(probabilities).any():
        return np.full(weights.shape[:-1], np.nan)[()]
    present = np.unique(labels)
    areas = np.empty((*weights.shape[:-1], len(present)))
    for i, label in enumerate(present):
        areas[..., i] = auroc_of(score_counts(probabilities[:, label], labels == label, weights))
    return mean_of_defined(areas)


def quadratic_kappa(predictions: Classes, labels: Classes, weights: Weights | None = None) -> Any:
    """Compute Cohen's kappa of ordered classes, with quadratic weights.

    It is 1 minus the mean squared distance, in classes, between prediction and label, divided by
    the one expected if the two were independent: 1 if they agree, 0 for chance. Cohen, "Weighted
    kappa", Psychological Bulletin 70, 1968. Classes that do not occur still count in the distance
    of others, as in scikit-learn if its ``labels`` lists all classes.

    Arguments and errors are those of `accuracy`.

    Returns:
        ``[...]``, at most 1; NaN if only one class occurs in both labels and predictions.
    """
    predictions, labels, weights = _checked(predictions, labels, weights)
    classes = _count(predictions, labels)
    distances = np.subtract.outer(np.arange(classes), np.arange(classes)) ** 2.0
    expected = sums_by_class(weights, predictions, classes) @ distances
    expected = (expected * sums_by_class(weights, labels, classes)).sum(-1)
    observed = (weights @ (predictions - labels) ** 2.0) * weights.sum(-1)
    return 1 - ratio(observed, expected)


def mean_class_distance(
    predictions: Classes, labels: Classes, weights: Weights | None = None
) -> Any:
    """Compute the mean absolute distance between prediction and label of ordered classes.

    It is the mean absolute error in classes: 1 if every prediction is the class next to the label.
    Arguments, result and errors are those of `accuracy`.
    """
    predictions, labels, weights = _checked(predictions, labels, weights)
    return ratio(weights @ np.abs(predictions - labels).astype(np.float64), weights.sum(-1))


def _class_counts(predictions: Any, labels: Any, weights: Any) -> tuple[Any, Any, Any]:
    """Return the weights of correct, of all and of predicted examples, each ``[..., classes]``."""
    predictions, labels, weights = _checked(predictions, labels, weights)
    classes, correct = _count(predictions, labels), predictions == labels
    return (
        sums_by_class(weights_of(weights, correct), labels[correct], classes),
        sums_by_class(weights, labels, classes),
        sums_by_class(weights, predictions, classes),
    )


def _count(predictions: np.ndarray, labels: np.ndarray) -> int:
    return int(max(predictions.max(initial=-1), labels.max(initial=-1))) + 1


def _checked(
    predictions: Any, labels: Any, weights: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return predictions, labels and weights of the examples with a known label."""
    predictions, labels = np.asarray(predictions, np.int64), np.asarray(labels, np.int64)
    if labels.ndim != 1 or predictions.shape != labels.shape:
        raise RequestError(
            "classification metrics need predictions and labels [n];"
            f" got shapes {list(predictions.shape)} and {list(labels.shape)}"
        )
    weights, known = as_weights(weights, len(labels)), labels >= 0
    predictions, labels = predictions[known], labels[known]
    if predictions.min(initial=0) < 0:
        raise RequestError(f"a predicted class cannot be negative; got {predictions.min()}")
    return predictions, labels, weights_of(weights, known)
