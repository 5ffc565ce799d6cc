"""Whether a network that says 80% is right four times in five, and the one number that mends it.

Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017,
https://arxiv.org/abs/1706.04599. Everything here is numpy in float64, on the host.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import root_scalar
from scipy.special import logsumexp, softmax

from tljax.runtime.errors import RequestError

TEMPERATURES = (0.01, 100.0)
"""The range that a fitted temperature is kept in.

The likelihood of logits that separate the labels grows for ever as the temperature falls to 0, and
that of logits which say nothing, or the opposite, as it rises; neither has an optimum inside.
"""


class CalibrationBins(NamedTuple):
    """Examples by confidence, in bins of equal width: a reliability diagram as numbers.

    Bin ``i`` of ``m`` holds the confidences in ``(i / m, (i + 1) / m]``; the first holds 0 too.

    Attributes:
        examples: ``[bins]`` how many examples fall into each.
        confidence: ``[bins]`` their mean confidence; nan for an empty bin.
        accuracy: ``[bins]`` the share of them that is correct; nan for an empty bin.
    """

    examples: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the mean over examples of their bin's gap, in [0, 1]."""
        gap = np.abs(self.accuracy - self.confidence)
        return float(np.nansum(self.examples * gap) / self.examples.sum())


class Calibration(NamedTuple):
    """What `calibrate` measured.

    Attributes:
        temperature: fitted on all examples: divide logits by it before the softmax.
        before: the bins of the network as it is.
        after: the bins when every example is divided by a temperature fitted on others.
        loss_before: mean softmax cross-entropy of the network as it is, nats.
        loss_after: the same after temperature, again from the other half's.
    """

    temperature: float
    before: CalibrationBins
    after: CalibrationBins
    loss_before: float
    loss_after: float


def calibration_bins(
    confidence: np.ndarray, correct: np.ndarray, bins: int = 15
) -> CalibrationBins:
    """Sorts examples into bins by how sure the network was.

    Args:
        confidence: ``[n]`` probability of the predicted class, in [0, 1]
            (`tljax.features.evaluate.Evaluation.probability`).
        correct: ``[n]`` whether that class is the label.
        bins: their number; Guo et al. use 15.

    Raises:
        RequestError: there are no examples, not one ``correct`` for each, or a confidence is
            outside [0, 1].
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if not len(confidence) or confidence.shape != correct.shape:
        raise RequestError(
            f"calibration needs one confidence and one outcome for each of at least one example;"
            f" got shapes {confidence.shape} and {correct.shape}"
        )
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise RequestError("calibration needs confidences in [0, 1]; apply the softmax first")
    upper_edges = np.arange(1, bins) / bins
    bin_ = np.searchsorted(upper_edges, confidence, side="left")
    examples = np.bincount(bin_, minlength=bins)
    filled = np.where(examples, examples, np.nan)
    return CalibrationBins(
        examples,
        np.bincount(bin_, confidence, bins) / filled,
        np.bincount(bin_, correct, bins) / filled,
    )


def expected_calibration_error(
    confidence: np.ndarray, correct: np.ndarray, bins: int = 15
) -> float:
    """The mean distance between confidence and accuracy, in [0, 1] (Guo et al. 2017, equation 3).

    It is biased upwards where bins hold few examples: even a perfectly calibrated network has a
    positive error on a hundred images. Arguments and errors are those of `calibration_bins`.
    """
    return calibration_bins(confidence, correct, bins).error


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The one temperature that makes the labels most likely: temperature scaling, Guo et al. 2017.

    The mean cross-entropy of ``logits / T`` is convex in ``1 / T``; the root of its slope is found
    by Brent's method.

    Args:
        logits: ``[n, classes]``, of examples that the network was not trained on.
        labels: ``[n]`` class indices.

    Returns:
        The temperature, within `TEMPERATURES`; an end of that range where the optimum is not
        inside, and 1 where the likelihood does not depend on it.

    Raises:
        RequestError: there are no examples, a label is not a class or a logit not finite.
    """
    logits, labels = _checked(logits, labels)
    shifted = logits - logits.max(1, keepdims=True)
    of_label = shifted[np.arange(len(labels)), labels].mean()

    def slope(inverse: float) -> float:
        probabilities = softmax(inverse * shifted, axis=1)
        return float((probabilities * shifted).sum(1).mean() - of_label)

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    if not shifted.any():
        return 1.0
    if slope(high) <= 0:
        return TEMPERATURES[0]
    if slope(low) >= 0:
        return TEMPERATURES[1]
    return 1 / float(root_scalar(slope, bracket=(low, high), xtol=1e-14, rtol=1e-13).root)


def calibrate(
    logits: np.ndarray, labels: np.ndarray, *, bins: int = 15, seed: int = 0
) -> Calibration:
    """Measures calibration before and after temperature scaling, without measuring on the fit.

    The examples are split at random into two halves, and each half is scaled with the temperature
    fitted on the other, so that no example has a say in its own temperature.

    Args:
        logits: ``[n, classes]``, of examples that the network was not trained on; at least two.
        labels: ``[n]`` class indices.
        bins: see `calibration_bins`.
        seed: of the split.

    Raises:
        RequestError: as `fit_temperature`, or there is only one example.
    """
    logits, labels = _checked(logits, labels)
    if len(labels) < 2:
        raise RequestError("calibration needs at least two labelled examples; got one")
    order = np.random.default_rng(seed).permutation(len(labels))
    halves = order[::2], order[1::2]
    scaled = np.empty_like(logits)
    for half, other in (halves, halves[::-1]):
        scaled[half] = logits[half] / fit_temperature(logits[other], labels[other])
    before, loss_before = _measure(logits, labels, bins)
    after, loss_after = _measure(scaled, labels, bins)
    return Calibration(fit_temperature(logits, labels), before, after, loss_before, loss_after)


def _measure(logits: np.ndarray, labels: np.ndarray, bins: int) -> tuple[CalibrationBins, float]:
    probabilities = softmax(logits, axis=1)
    correct = probabilities.argmax(1) == labels
    loss = (logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]).mean()
    return calibration_bins(probabilities.max(1), correct, bins), float(loss)


def _checked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or not logits.size or labels.shape != logits.shape[:1]:
        raise RequestError(
            "calibration needs logits [n, classes] and labels [n] of at least one example;"
            f" got shapes {logits.shape} and {labels.shape}"
        )
    if not ((labels >= 0) & (labels < logits.shape[1])).all():
        raise RequestError(
            f"calibration needs labels from 0 to {logits.shape[1] - 1};"
            f" got {labels.min()} to {labels.max()}"
        )
    if not np.isfinite(logits).all():
        raise RequestError("calibration needs finite logits; the network returned inf or nan")
    return logits, labels
