"""From logits to accuracies, a confusion matrix and the worst mistakes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from tljax.features.extract import Outputs
from tljax.metrics.classification import cross_entropies, ranks


class Evaluation(NamedTuple):
    """How a network did on the labelled images of a source that could be read.

    Attributes:
        top1: share of images whose label is the most probable class.
        top5: share of images whose label is among the five most probable.
        loss: mean softmax cross-entropy, nats.
        examples: number of images.
        confusion: ``[classes, classes]`` counts; rows are labels, columns predictions.
        predicted: ``[n]`` most probable class.
        probability: ``[n]`` its probability.
        labels: ``[n]`` class indices.
        indices: ``[n]`` position of each image in its source.
    """

    top1: float
    top5: float
    loss: float
    examples: int
    confusion: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    labels: np.ndarray
    indices: np.ndarray

    def worst(self, count: int) -> np.ndarray:
        """Rows of the wrong predictions, the most confident first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.probability[wrong], kind="stable")][:count]


def settle(labels: np.ndarray, logits: np.ndarray, same: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Labels that stand for any of several classes, as the most probable one of them.

    Args:
        labels: ``[n]`` class indices.
        logits: ``[n, classes]``.
        same: the classes of one name (see `ambiguous`), by that.
    """
    labels = labels.copy()
    for indices in same.values():
        rows = np.isin(labels, indices)
        labels[rows] = np.take(indices, logits[rows][:, indices].argmax(1))
    return labels


def evaluate(logits: Outputs) -> Evaluation:
    """Evaluates the logits of a source (`compute_features` with ``stop=None``)."""
    values, labels = logits.values, logits.labels
    classes = values.shape[1]
    probabilities = np.asarray(jax.nn.softmax(values))
    predicted = values.argmax(1)
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    rank = np.asarray(ranks(values, labels))
    return Evaluation(
        top1=float(np.mean(rank < 1)),
        top5=float(np.mean(rank < 5)),
        loss=float(cross_entropies(values, labels).sum()) / len(labels),
        examples=len(labels),
        confusion=confusion,
        predicted=predicted,
        probability=probabilities[np.arange(len(labels)), predicted],
        labels=labels,
        indices=logits.indices,
    )
