"""Ridge regression in closed form, for a list of L2 values at once."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from tljax.features.share import Share, share_of
from tljax.runtime.parallel import sum_over_processes
from tljax.runtime.types import Array


class RidgePath(NamedTuple):
    """The solutions for every L2 value, of regressions with the same weights.

    Attributes:
        mean: ``[d]`` weighted mean of the features.
        basis: ``[d, r]``; the kernel at ``l2`` is ``basis @ (coefficients / (spectrum + l2))``.
        spectrum: ``[r]`` eigenvalues of the smaller Gram matrix of the centered features.
        coefficients: ``[r, t]``.
        target_mean: ``[t]`` weighted mean of the targets.
    """

    mean: Float[np.ndarray, " d"]
    basis: Float[np.ndarray, "d r"]
    spectrum: Float[np.ndarray, " r"]
    coefficients: Float[np.ndarray, "r t"]
    target_mean: Float[np.ndarray, " t"]


def fit_ridge(
    features: Shaped[Array, "n d"] | Share,
    targets: Float[Array, "n t"],
    l2: Float[Array, " k"] | Sequence[float],
    *,
    weights: Float[Array, " n"] | None = None,
) -> tuple[Float[np.ndarray, "k d t"], Float[np.ndarray, "k t"]]:
    """Solve ridge regressions on the same features, for a list of L2 values.

    For each target and each value of ``l2``, minimizes over kernel ``w`` and bias ``b``, with sums
    over the examples whose target is known,

        sum_i weights[i] * (features[i] @ w + b - targets[i])^2 / 2 / sum_i weights[i]
            + l2 / 2 * ||w||^2

    The bias is not penalized. scikit-learn's ``Ridge`` has the same solution at
    ``alpha = l2 * sum_i weights[i]``, which is ``n * l2`` for ``n`` known examples of weight 1.

    Computed in float64, with one eigendecomposition for all L2 values and for all targets that are
    known for the same examples.

    Args:
        features: ``[n, d]`` finite features, or the share of this process.
        targets: ``[n, t]`` numbers, or NaN if unknown; each column has a known number.
        l2: ``[k]`` positive L2 values.
        weights: ``[n]`` nonnegative weights; by default all the same.

    Returns:
        kernels ``[k, d, t]`` and biases ``[k, t]``, float64.
    """
    features, targets = share_of(features), np.asarray(targets, np.float64)
    weights = np.ones(len(targets)) if weights is None else np.asarray(weights, np.float64)
    kernels = np.empty((len(l2), features.values.shape[1], targets.shape[1]))
    biases = np.empty((len(l2), targets.shape[1]))
    for columns, known in columns_by_known_rows(targets):
        path = ridge_path(features, targets[:, columns], weights * known)
        for row, value in enumerate(l2):
            kernel = kernel_at(path, value)
            kernels[row][:, columns] = kernel
            biases[row, columns] = path.target_mean - path.mean @ kernel
    return kernels, biases


def held_out_errors(
    features: Shaped[Array, "n d"] | Share,
    targets: Float[np.ndarray, "n t"],
    l2: Float[np.ndarray, " k"],
    *,
    weights: Float[np.ndarray, " n"],
    held_out: Bool[np.ndarray, "folds n"],
) -> Float[np.ndarray, "k t"]:
    """Compute the mean squared error of every target on the examples that folds hold out.

    Args:
        features: ``[n, d]`` finite features, or the share of this process.
        targets: ``[n, t]`` numbers, or NaN if unknown.
        l2: ``[k]`` positive L2 values.
        weights: ``[n]`` nonnegative weights, in training and in the mean.
        held_out: ``[folds, n]`` the examples that each fold holds out.

    Returns:
        ``[k, t]``; NaN for a target without a known number among the held-out examples.
    """
    features = share_of(features)
    errors, total = np.zeros((len(l2), targets.shape[1])), np.zeros(targets.shape[1])
    for fold in held_out:
        for columns, known in columns_by_known_rows(targets):
            path = ridge_path(features, targets[:, columns], weights * (known & ~fold))
            scored = known & fold
            values, rows, _ = features.select(scored)
            expected = targets[np.ix_(scored, columns)][rows] - path.target_mean
            projected = (values - path.mean) @ path.basis
            for row, value in enumerate(l2):
                predicted = projected @ _shrunk(path, value)
                errors[row, columns] += weights[scored][rows] @ (predicted - expected) ** 2
            total[columns] += weights[scored].sum()
    errors = sum_over_processes(errors)
    return np.divide(errors, total, out=np.full_like(errors, np.nan), where=total > 0)


def columns_by_known_rows(
    targets: Float[np.ndarray, "n t"],
) -> Iterator[tuple[Int[np.ndarray, " c"], Bool[np.ndarray, " n"]]]:
    """Yield the columns that are known for the same rows, with these rows."""
    known, column_pattern = np.unique(~np.isnan(targets), axis=1, return_inverse=True)
    for pattern, rows in enumerate(known.T):
        yield np.flatnonzero(column_pattern == pattern), rows


def ridge_path(
    features: Share,
    targets: Float[np.ndarray, "n t"],
    weights: Float[np.ndarray, " n"],
) -> RidgePath:
    """Decompose the features once for all L2 values.

    Examples of weight 0 may have unknown targets. Without any others, the kernel and the mean of
    the targets are 0. Takes ``8 * m * d`` bytes for each of two copies of the ``m`` rows of this
    process, or of all rows if they are fewer than ``d``.
    """
    used = weights > 0
    d, t = features.values.shape[1], targets.shape[1]
    if not used.any():
        return RidgePath(np.zeros(d), np.zeros((d, 0)), np.zeros(0), np.zeros((0, t)), np.zeros(t))
    share = weights[used] / weights[used].sum()
    features, targets = features.select(used), targets[used].astype(np.float64)
    rows, values = features.rows, features.values.astype(np.float64)
    mean, target_mean = sum_over_processes(share[rows] @ values), share @ targets
    root = np.sqrt(share)[:, None]
    values = root[rows] * (values - mean)
    targets = root * (targets - target_mean)
    if len(targets) < d:
        values = features._replace(values=values).whole()
        spectrum, axes = np.linalg.eigh(values @ values.T)
        basis, coefficients = values.T @ axes, axes.T @ targets
    else:
        spectrum, basis = np.linalg.eigh(sum_over_processes(values.T @ values))
        coefficients = basis.T @ sum_over_processes(values.T @ targets[rows])
    # A Gram matrix has no negative eigenvalues: those that eigh finds are rounding errors.
    return RidgePath(mean, basis, np.maximum(spectrum, 0), coefficients, target_mean)


def kernel_at(path: RidgePath, l2: float) -> Float[np.ndarray, "d t"]:
    """Compute the kernel ``[d, t]`` at one L2 value."""
    return path.basis @ _shrunk(path, l2)


def _shrunk(path, l2):
    return path.coefficients / (path.spectrum + l2)[:, None]
