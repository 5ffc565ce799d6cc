"""Metrics of several labels per example, of which any number applies and some may be unknown.

Targets are 0, 1 and NaN (unknown). Every metric is per label; `mean_of_defined` makes mAP, macro F1
and macro AUROC of them. See `tljax.metrics` for weights, unknown targets and undefined metrics.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tljax.metrics.curves import ScoreCounts, auroc_of, average_precision_of, score_counts
from tljax.metrics.weighted import Weights, as_weights, ratio
from tljax.runtime.errors import RequestError

Scores = Float[np.ndarray, "n labels"]
"""One score per example and label, higher where the label is likelier."""

Targets = Float[np.ndarray, "n labels"]
"""1 where the label applies, 0 where it does not, NaN where that is unknown."""

PerLabel = Float[np.ndarray, "*draws labels"]
"""One metric per label, and per draw if the weights have draws."""


class ThresholdMetrics(NamedTuple):
    """Metrics of the decisions ``score >= threshold``, in [0, 1].

    Attributes:
        precision: ``[..., labels]``, share of the predicted that apply; NaN if none is predicted.
        recall: ``[..., labels]``, share of those that apply that are predicted; NaN if none does.
        f1: ``[..., labels]``, harmonic mean of the two; NaN if none applies and none is predicted,
            0 if only one of the two is so.
    """

    precision: PerLabel
    recall: PerLabel
    f1: PerLabel


def average_precision(scores: Scores, targets: Targets, weights: Weights | None = None) -> PerLabel:
    """Compute the average precision of every label, without interpolation, as scikit-learn does.

    It is the sum over the distinct scores of precision times gain in recall; equal scores are one
    step. Its mean over labels is the mean average precision (mAP).

    Args:
        scores: ``[n, labels]`` probabilities or logits.
        targets: ``[n, labels]``.
        weights: ``[..., n]``.

    Returns:
        ``[..., labels]``; NaN for a label without a known positive example.

    Raises:
        RequestError: the shapes differ, or a target is neither 0, 1 nor NaN.
    """
    return _per_label(average_precision_of, scores, targets, weights)


def auroc(scores: Scores, targets: Targets, weights: Weights | None = None) -> PerLabel:
    """Compute the area under the ROC curve of every label; equal scores count half.

    Args:
        scores: ``[n, labels]`` probabilities or logits.
        targets: ``[n, labels]``.
        weights: ``[..., n]``.

    Returns:
        ``[..., labels]``; NaN for a label without a known positive or without a known negative
        example.

    Raises:
        RequestError: the shapes differ, or a target is neither 0, 1 nor NaN.
    """
    return _per_label(auroc_of, scores, targets, weights)


def threshold_metrics(
    scores: Scores,
    targets: Targets,
    thresholds: float | Float[np.ndarray, " labels"],
    weights: Weights | None = None,
) -> ThresholdMetrics:
    """Compute precision, recall and F1 of every label at given thresholds.

    They equal scikit-learn's with ``zero_division=nan``.

    Args:
        scores: ``[n, labels]``.
        targets: ``[n, labels]``.
        thresholds: ``[labels]``, or one for all; a label is predicted where its score is not below.
        weights: ``[..., n]``.

    Raises:
        RequestError: the shapes differ, or a target is neither 0, 1 nor NaN.
    """
    scores, targets, known = _checked(scores, targets)
    weights = as_weights(weights, len(scores))
    positive, predicted = targets == 1, known & (scores >= np.asarray(thresholds))
    true_positives = weights @ (positive & predicted).astype(np.float64)
    positives = weights @ positive.astype(np.float64)
    predictions = weights @ predicted.astype(np.float64)
    undefined = (known & np.isnan(scores)).any(0)
    return ThresholdMetrics(
        *(
            np.where(undefined, np.nan, ratio(numerator, denominator))
            for numerator, denominator in (
                (true_positives, predictions),
                (true_positives, positives),
                (2 * true_positives, positives + predictions),
            )
        )
    )


def best_thresholds(
    probabilities: Scores, targets: Targets, weights: Float[np.ndarray, " n"] | None = None
) -> Float[np.ndarray, " labels"]:
    """Choose the threshold of every label that has the highest F1 on these examples.

    A threshold lies midway between the lowest probability that it accepts and the next lower one
    of a known example (0 if there is none), rounded to the type of ``probabilities``. Of several
    with the same F1 the highest is chosen, which predicts the fewest examples.

    Args:
        probabilities: ``[n, labels]``, in [0, 1], of examples that the network was not trained on.
        targets: ``[n, labels]``.
        weights: ``[n]``.

    Returns:
        ``[labels]``, to be compared as ``probability >= threshold``; 0.5 for a label without a
        known positive or without a known negative example.

    Raises:
        RequestError: the shapes differ, a target is neither 0, 1 nor NaN, or the probability of a
            known target is not in [0, 1].
    """
    dtype = np.asarray(probabilities).dtype
    probabilities, targets, known = _checked(probabilities, targets)
    weights = as_weights(weights, len(probabilities))
    if not (~known | ((probabilities >= 0) & (probabilities <= 1))).all():
        raise RequestError("thresholds need probabilities in [0, 1]; apply the sigmoid first")
    thresholds = np.full(probabilities.shape[1], 0.5)
    for label in range(len(thresholds)):
        rows = known[:, label] & (weights > 0)
        positive = targets[rows, label] == 1
        if positive.any() and not positive.all():
            counts = score_counts(probabilities[rows, label], positive, weights[rows])
            thresholds[label] = _best_threshold(counts, dtype)
    return thresholds


def _best_threshold(counts: ScoreCounts, dtype: np.dtype[Any]) -> float:
    positives, negatives = counts.positives.cumsum(), counts.negatives.cumsum()
    best = int(np.argmax(2 * positives / (positives + negatives + positives[-1])))
    accepted = counts.scores[best]
    rejected = counts.scores[best + 1] if best + 1 < len(counts.scores) else 0.0
    middle = np.asarray((accepted + rejected) / 2).astype(dtype).astype(np.float64)
    # Between neighboring floating-point numbers lies none.
    return float(middle if middle > rejected else accepted)


def _per_label(
    metric: Callable[[ScoreCounts], Any], scores: Any, targets: Any, weights: Any
) -> PerLabel:
    scores, targets, known = _checked(scores, targets)
    weights = as_weights(weights, len(scores))
    values = np.full((*weights.shape[:-1], scores.shape[1]), np.nan)
    for label in range(scores.shape[1]):
        rows = np.flatnonzero(known[:, label])
        column, positive = scores[rows, label], targets[rows, label] == 1
        if not np.isnan(column).any():
            values[..., label] = metric(score_counts(column, positive, weights[..., rows]))
    return values


def _checked(scores: Any, targets: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores and targets in float64, and which targets are known."""
    scores, targets = np.asarray(scores, np.float64), np.asarray(targets, np.float64)
    if scores.ndim != 2 or scores.shape != targets.shape:
        raise RequestError(
            "metrics of several labels need scores and targets [n, labels];"
            f" got shapes {list(scores.shape)} and {list(targets.shape)}"
        )
    known = ~np.isnan(targets)
    if not (~known | (targets == 0) | (targets == 1)).all():
        wrong = targets[known & (targets != 0) & (targets != 1)][0]
        raise RequestError(f"targets of labels must be 0, 1 or NaN (unknown); got {wrong:g}")
    return scores, targets, known
