"""Errors of one or several predicted numbers per example, of which some may be unknown.

See `tljax.metrics` for weights, unknown targets and undefined metrics.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tljax.metrics.weighted import Weights, as_weights, ratio
from tljax.runtime.errors import RequestError

PerNumber = Float[np.ndarray, "*draws numbers"]
"""One metric per number, and per draw if the weights have draws."""


class RegressionMetrics(NamedTuple):
    """Errors of every number; `tljax.metrics.weighted.mean_of_defined` averages over numbers.

    Attributes:
        mae: ``[..., numbers]`` mean absolute error, in the unit of the number.
        rmse: ``[..., numbers]`` root of the mean squared error, in the unit of the number.
        r2: ``[..., numbers]`` coefficient of determination, at most 1; 0 is as good as predicting
            the mean of these targets. NaN for a target that is constant up to rounding.
    """

    mae: PerNumber
    rmse: PerNumber
    r2: PerNumber


def regression_metrics(
    predictions: Float[np.ndarray, "n numbers"],
    targets: Float[np.ndarray, "n numbers"],
    weights: Weights | None = None,
) -> RegressionMetrics:
    """Compute mean absolute error, root mean squared error and R2 of every number.

    Args:
        predictions: ``[n, numbers]``, in the units of the targets. An infinite prediction is
            treated like NaN.
        targets: ``[n, numbers]``; NaN where unknown.
        weights: ``[..., n]``.

    Returns:
        Metrics ``[..., numbers]``; NaN for a number without a known target.

    Raises:
        RequestError: the shapes differ, or a target is infinite.
    """
    predictions, targets = np.asarray(predictions, np.float64), np.asarray(targets, np.float64)
    if predictions.ndim != 2 or predictions.shape != targets.shape:
        raise RequestError(
            "regression metrics need predictions and targets [n, numbers];"
            f" got shapes {list(predictions.shape)} and {list(targets.shape)}"
        )
    if np.isinf(targets).any():
        raise RequestError("a target is infinite; give NaN where it is unknown")
    known = ~np.isnan(targets)
    errors = np.where(known, np.where(np.isfinite(predictions), predictions, np.nan) - targets, 0)
    weights = as_weights(weights, len(targets))
    total = weights @ known.astype(np.float64)
    squared = weights @ errors**2
    spread = np.empty_like(total)
    for number in range(targets.shape[1]):
        rows = np.flatnonzero(known[:, number])
        spread[..., number] = _spread(targets[rows, number], weights[..., rows])
    return RegressionMetrics(
        ratio(weights @ np.abs(errors), total),
        np.sqrt(ratio(squared, total)),
        1 - ratio(squared, spread),
    )


def _spread(targets: np.ndarray, weights: np.ndarray) -> Any:
    """Compute the weighted sum of squared deviations from the weighted mean; 0 if constant."""
    total = weights.sum(-1)
    means = np.where(total > 0, ratio(weights @ targets, total), 0)
    # Deviations, not the difference of two sums of squares, which would cancel.
    spread = np.einsum("...n,...n->...", weights, (targets - means[..., None]) ** 2)
    rounding = len(targets) * np.finfo(np.float64).eps * np.abs(means)
    return np.where(spread <= total * rounding**2, 0, spread)
