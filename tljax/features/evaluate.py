"""Accuracy, loss, confusion matrix and most confident errors from the logits of a data set."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from tljax.data.examples import Source, find_ambiguous_names, match_classes
from tljax.features.extract import Outputs
from tljax.metrics.classification import cross_entropies, ranks
from tljax.pretrained.catalog import match_class_names


class Evaluation(NamedTuple):
    """Metrics and predictions of a network on the labeled images that could be read.

    Attributes:
        top1: fraction of images whose label is the most probable class.
        top5: fraction of images whose label is among the five most probable classes.
        loss: mean softmax cross-entropy, in nats.
        examples: number of images, ``n``.
        confusion: ``[classes, classes]`` counts; rows are labels, columns are predictions.
        predicted: ``[n]`` index of the most probable class.
        probability: ``[n]`` probability of that class.
        labels: ``[n]`` class indices.
        indices: ``[n]`` position of each image in its source.
    """

    top1: float
    top5: float
    loss: float
    examples: int
    confusion: Int[np.ndarray, "classes classes"]
    predicted: Int[np.ndarray, " n"]
    probability: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    indices: Int[np.ndarray, " n"]

    def worst(self, count: int) -> Int[np.ndarray, " rows"]:
        """Return the rows of up to ``count`` wrong predictions, the most confident ones first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.probability[wrong], kind="stable")][:count]


def match_network(
    source: Source, classes: tuple[str, ...]
) -> tuple[Source, dict[str, list[int]], tuple[str, ...]]:
    """Label a source by the classes of a network, which have the same names.

    Args:
        source: examples labeled with their own list of classes.
        classes: the network's classes, in the order of its logits.

    Returns:
        The examples of known classes; names that several of the network's classes share, for
        `resolve_ambiguous_labels`; and notes to print, one line each.

    Raises:
        RequestError: no example belongs to a class of the network.
    """
    names = match_class_names(classes, source.classes)
    matched, notes = match_classes(source, names)
    return matched, find_ambiguous_names(source.classes, names), notes


def resolve_ambiguous_labels(
    labels: np.ndarray, logits: np.ndarray, same: Mapping[str, Sequence[int]]
) -> np.ndarray:
    """Replace each label that may mean any of several classes by the most probable one of them.

    Args:
        labels: ``[n]`` class indices.
        logits: ``[n, classes]``.
        same: indices of the classes that share a name, by name; see `match_network`.

    Returns:
        ``[n]`` class indices.
    """
    labels = labels.copy()
    for indices in same.values():
        rows = np.isin(labels, indices)
        labels[rows] = np.take(indices, logits[rows][:, indices].argmax(1))
    return labels


def evaluate(logits: Outputs) -> Evaluation:
    """Compute metrics from the logits of a source, as `compute_features(stop=None)` returns."""
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
