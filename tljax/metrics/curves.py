"""Ranking of the examples of one label: average precision and area under the ROC curve.

Both follow from the weights of the positive and the negative examples of each score. The scores are
sorted once for all draws of a bootstrap.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from tljax.metrics.weighted import Weights, ratio


class ScoreCounts(NamedTuple):
    """Examples of each score; a count is the sum of their weights.

    Attributes:
        scores: ``[distinct]`` distinct scores, from highest to lowest.
        positives: ``[..., distinct]`` positive examples of each score.
        negatives: ``[..., distinct]`` negative examples of each score.
    """

    scores: Float[np.ndarray, " distinct"]
    positives: Float[np.ndarray, "*draws distinct"]
    negatives: Float[np.ndarray, "*draws distinct"]


def score_counts(
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], weights: Weights
) -> ScoreCounts:
    """Count the positive and the negative examples of each distinct score.

    Args:
        scores: ``[n]``, higher for positive examples; not NaN.
        positive: ``[n]``.
        weights: ``[..., n]``.
    """
    order = np.argsort(-scores, kind="stable")
    scores, positive, weights = scores[order], positive[order], weights[..., order]
    positives, negatives = weights * positive, weights * ~positive
    first = np.flatnonzero(np.append(True, scores[1:] != scores[:-1]))  # of equal scores
    if len(first) < len(scores):
        scores = scores[first]
        positives = np.add.reduceat(positives, first, axis=-1)
        negatives = np.add.reduceat(negatives, first, axis=-1)
    return ScoreCounts(scores, positives, negatives)


def average_precision_of(counts: ScoreCounts) -> Any:
    """Compute the average precision: the precision at each score, averaged over the positives.

    Returns:
        ``[...]``; NaN without a positive example.
    """
    positives = counts.positives.cumsum(-1)
    total = positives + counts.negatives.cumsum(-1)
    # Above the first example of a positive weight, where the total is 0, nothing is added anyway.
    precision = positives / np.maximum(total, np.finfo(np.float64).tiny)
    return ratio((counts.positives * precision).sum(-1), counts.positives.sum(-1))


def auroc_of(counts: ScoreCounts) -> Any:
    """Compute the area under the ROC curve: how often a positive outranks a negative example.

    Equal scores count half.

    Returns:
        ``[...]``; NaN without a positive or without a negative example.
    """
    outranking = counts.positives.cumsum(-1) - counts.positives / 2
    pairs = counts.positives.sum(-1) * counts.negatives.sum(-1)
    return ratio((counts.negatives * outranking).sum(-1), pairs)
