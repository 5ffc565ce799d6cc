"""What all weighted metrics share: weights, ratios and means that may be undefined."""

import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy.sparse import csr_array

from tljax.runtime.errors import RequestError

Weights = Float[np.ndarray, "*draws n"]
"""One weight per example, or one per draw and example."""


def as_weights(weights: Any, n: int) -> Weights:
    """Convert weights to float64; None gives every example weight 1.

    Raises:
        RequestError: the last axis of the weights is not ``n``.
    """
    if weights is None:
        return np.ones(n)
    weights = np.asarray(weights, np.float64)
    if weights.shape[-1:] != (n,):
        raise RequestError(
            f"weights of {n} examples need the shape [..., {n}]; got {list(weights.shape)}"
        )
    return weights


def weights_of(weights: Weights, chosen: Bool[np.ndarray, " n"]) -> Weights:
    """Return the weights of the chosen examples; do not copy them if all are chosen."""
    return weights if chosen.all() else weights[..., chosen]


def sums_by_class(
    weights: Weights, classes: Integer[np.ndarray, " n"], count: int
) -> Float[np.ndarray, "*draws count"]:
    """Add up the weights of the examples of each of ``count`` classes."""
    n = len(classes)
    # Sparse, because one-hot classes of 50,000 examples and 1,000 classes would take 400 MB.
    one_hot = csr_array((np.ones(n), classes, np.arange(n + 1)), shape=(n, count))
    leading = weights.shape[:-1]
    sums = weights.reshape(math.prod(leading), n) @ one_hot
    return np.reshape(sums, (*leading, count))


def ratio(numerator: Any, denominator: Any) -> Any:
    """Divide; return NaN where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    undefined = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator != 0)[()]


def mean_of_defined(values: Float[np.ndarray, "*draws columns"]) -> Any:
    """Average the values of the last axis that are defined (not NaN).

    Applied to the average precision of every label this is the mean average precision (mAP) over
    the labels with a known positive example; applied to F1 or AUROC, their macro average. In a
    bootstrap it averages, in each draw, over the labels that are defined in that draw.

    Returns:
        ``[...]``; NaN where no value is defined.
    """
    values = np.asarray(values, np.float64)
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(-1), defined.sum(-1))
