"""Calibration: expected calibration error, reliability diagrams and temperature scaling.

Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017,
https://arxiv.org/abs/1706.04599. All functions compute in float64 with NumPy, on the host.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer, Shaped
from scipy.optimize import brentq
from scipy.special import logsumexp, softmax

from tljax.runtime.errors import RequestError

TEMPERATURES = (0.01, 100.0)
"""Lowest and highest temperature that `fit_temperature` returns.

The likelihood has no optimum at a finite temperature above 0 if the logits separate the labels (the
optimum is 0) or are unrelated or opposed to them (it is infinite).
"""


class CalibrationBins(NamedTuple):
    """Examples grouped by confidence into bins of equal width: the data of a reliability diagram.

    Bin ``i`` of ``m`` holds the confidences in ``(i / m, (i + 1) / m]``; the first holds 0 too.

    Attributes:
        examples: ``[bins]`` number of examples.
        confidence: ``[bins]`` mean confidence; NaN for an empty bin.
        accuracy: ``[bins]`` fraction of correct examples; NaN for an empty bin.
    """

    examples: Integer[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]

    @property
    def error(self) -> float:
        """Return the expected calibration error, in [0, 1] (Guo et al. 2017, equation 3).

        It is the mean over examples of ``|accuracy - confidence|`` of their bin. It is biased
        upwards where bins hold few examples: on a hundred images even a perfectly calibrated
        network has a positive error.
        """
        gap = np.abs(self.accuracy - self.confidence)
        return float(np.nansum(self.examples * gap) / self.examples.sum())


class Calibration(NamedTuple):
    """Result of `calibrate`.

    Attributes:
        temperature: fitted on all examples; divide logits by it before the softmax.
        before: bins without temperature scaling.
        after: bins with each half of the examples scaled by the temperature of the other half.
        loss_before: mean softmax cross-entropy without temperature scaling, in nats.
        loss_after: mean softmax cross-entropy, scaled as in ``after``, in nats.
    """

    temperature: float
    before: CalibrationBins
    after: CalibrationBins
    loss_before: float
    loss_after: float


def calibration_bins(
    confidence: Float[np.ndarray, " examples"],
    correct: Shaped[np.ndarray, " examples"],
    bins: int = 15,
) -> CalibrationBins:
    """Group examples into bins by the confidence of their predictions.

    Args:
        confidence: ``[examples]`` probability of the predicted class, in [0, 1]
            (`tljax.features.evaluate.Evaluation.probability`).
        correct: ``[examples]`` bool, True where the predicted class is the label.
        bins: number of bins; Guo et al. use 15.

    Raises:
        RequestError: there are no examples, the two shapes differ, or a confidence is not in
            [0, 1].
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
    indices = np.searchsorted(upper_edges, confidence, side="left")
    examples = np.bincount(indices, minlength=bins)
    counts = np.where(examples, examples, np.nan)
    return CalibrationBins(
        examples,
        np.bincount(indices, confidence, bins) / counts,
        np.bincount(indices, correct, bins) / counts,
    )


def fit_temperature(
    logits: Float[np.ndarray, "examples classes"], labels: Integer[np.ndarray, " examples"]
) -> float:
    """Fit the temperature that maximizes the likelihood of the labels (Guo et al. 2017).

    The mean cross-entropy of ``logits / T`` is convex in ``1 / T``; Brent's method finds the root
    of its derivative.

    Args:
        logits: ``[examples, classes]`` of examples that the network was not trained on.
        labels: ``[examples]`` class indices.

    Returns:
        The temperature, clipped to `TEMPERATURES`; 1 if the logits of every example are equal.

    Raises:
        RequestError: there are no examples, a label is not a class or a logit is not finite.
    """
    logits, labels = _checked(logits, labels)
    shifted = logits - logits.max(1, keepdims=True)
    label_mean = shifted[np.arange(len(labels)), labels].mean()

    def slope(inverse_temperature: float) -> float:
        probabilities = softmax(inverse_temperature * shifted, axis=1)
        return float((probabilities * shifted).sum(1).mean() - label_mean)

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    if not shifted.any():
        return 1.0
    if slope(high) <= 0:
        return TEMPERATURES[0]
    if slope(low) >= 0:
        return TEMPERATURES[1]
    return 1 / float(brentq(slope, low, high, xtol=1e-14, rtol=1e-13))  # pyright: ignore[reportArgumentType]


def calibrate(
    logits: Float[np.ndarray, "examples classes"],
    labels: Integer[np.ndarray, " examples"],
    *,
    seed: int = 0,
) -> Calibration:
    """Measure calibration before and after temperature scaling, by two-fold cross-validation.

    The examples are split at random into two halves; the logits of each half are divided by the
    temperature fitted on the other half, so that no temperature is measured on its own examples.

    Args:
        logits: ``[examples, classes]`` of examples that the network was not trained on; at least
            two examples.
        labels: ``[examples]`` class indices.
        seed: seed of the random split.

    Raises:
        RequestError: as for `fit_temperature`, or there is only one example.
    """
    logits, labels = _checked(logits, labels)
    if len(labels) < 2:
        raise RequestError("calibration needs at least two labeled examples; got one")
    first = np.zeros(len(labels), bool)
    first[np.random.default_rng(seed).permutation(len(labels))[::2]] = True
    return _calibrate(logits, labels, first, _confidence_bins)


def calibrate_labels(
    logits: Float[np.ndarray, "examples labels"],
    targets: Float[np.ndarray, "examples labels"],
    *,
    seed: int = 0,
    max_cells: int = 1_000_000,
) -> Calibration:
    """Measure the calibration of the probabilities of several labels, all labels together.

    As `calibrate`, with one temperature for all labels, by which logits are divided before the
    sigmoid. The bins compare the probability that a label applies (``confidence``) with how often
    it does (``accuracy``), over every image and label that is known.

    Args:
        logits: ``[examples, labels]`` of examples that the network was not trained on.
        targets: ``[examples, labels]`` 0, 1 or NaN (unknown); at least two examples have a known
            label.
        seed: seed of the random split, by examples, into two halves.
        max_cells: number of logits from which only a random part of the examples is used.

    Raises:
        RequestError: fewer than two examples have a known label, or a logit is not finite.
    """
    logits, targets = np.asarray(logits, np.float64), np.asarray(targets, np.float64)
    usable = np.flatnonzero((~np.isnan(targets)).any(1))
    if len(usable) < 2:
        raise RequestError(f"calibration needs two examples with a known label; got {len(usable)}")
    order = np.random.default_rng(seed).permutation(usable)
    order = order[: max(2, max_cells // targets.shape[1])]
    rows, columns = np.nonzero(~np.isnan(targets[order]))
    cells = order[rows], columns
    # The sigmoid of a logit is the softmax of 0 and the logit.
    pairs = np.stack([np.zeros(len(rows)), logits[cells]], axis=1)
    pairs, applies = _checked(pairs, targets[cells].astype(np.int64))
    return _calibrate(pairs, applies, rows % 2 == 0, _label_bins)


def _calibrate(
    logits: np.ndarray,
    labels: np.ndarray,
    first: np.ndarray,
    bins: Callable[[np.ndarray, np.ndarray], CalibrationBins],
) -> Calibration:
    """Fit a temperature to the ``first`` half and to the other, and measure each on the other."""
    scaled = np.empty_like(logits)
    for half in (first, ~first):
        scaled[half] = logits[half] / fit_temperature(logits[~half], labels[~half])
    losses = (
        float((logsumexp(x, axis=1) - x[np.arange(len(labels)), labels]).mean())
        for x in (logits, scaled)
    )
    temperature = fit_temperature(logits, labels)
    before, after = (bins(softmax(x, axis=1), labels) for x in (logits, scaled))
    return Calibration(temperature, before, after, *losses)


def _confidence_bins(probabilities: np.ndarray, labels: np.ndarray) -> CalibrationBins:
    return calibration_bins(probabilities.max(1), probabilities.argmax(1) == labels)


def _label_bins(probabilities: np.ndarray, applies: np.ndarray) -> CalibrationBins:
    return calibration_bins(probabilities[:, 1], applies == 1)


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
