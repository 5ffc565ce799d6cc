"""Linear probes for every task.

The L2 sweep of the linear-evaluation protocol (Kornblith et al. 2019, arXiv:1805.08974; SimCLR,
arXiv:2002.05709; BYOL, arXiv:2006.07733) is a path of convex problems over the same features, so
one call of ``fit_logistic`` solves all of them to the optimum. Several labels, ordered classes and
numbers are probed alike.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Integer, Shaped

from tljax.features.binary import SIDE_BY_SIDE, fit_binary
from tljax.features.design import check_features, make_design, moments
from tljax.features.folds import held_out_at_random, held_out_by_class, held_out_by_label
from tljax.features.logistic import (
    check_fitted,
    check_l2,
    check_training_data,
    held_out_scores,
    kernel_and_bias,
    optima,
)
from tljax.features.ridge import fit_ridge, held_out_errors
from tljax.features.share import Share
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import data_mesh
from tljax.runtime.types import Array

L2_VALUES: tuple[float, ...] = tuple(np.logspace(-6, 5, 45).tolist())
"""The protocol's 45 log-spaced L2 values, here relative to the *mean* loss: see `fit_logistic`."""


class Probe(NamedTuple):
    """A linear model of raw features, with the scores of the ``k`` candidate L2 values.

    Attributes:
        kernel: ``[d, outputs]`` float32, with the standardization folded in, so that it can be used
            as the kernel of a dense head.
        bias: ``[outputs]`` float32.
        l2: the chosen L2 value; it applies to the kernel of standardized features.
        l2_values: ``[k]`` the candidates.
        held_out_accuracy: ``[k]`` fraction of the held-out examples that are classified correctly;
            None for tasks other than classification.
        held_out_loss: ``[k]`` mean over the held-out examples of the cross-entropy in nats, or of
            the squared error of numbers; with several outputs, the mean over outputs of that mean.
        converged: whether the final fit reached its tolerance.
    """

    kernel: Float[jax.Array, "d outputs"]
    bias: Float[jax.Array, " outputs"]
    l2: float
    l2_values: Float[np.ndarray, " k"]
    held_out_accuracy: Float[np.ndarray, " k"] | None
    held_out_loss: Float[np.ndarray, " k"]
    converged: bool


def fit_task_probe(
    kind: str,
    features: Float[Array, "n d"] | Share,
    targets: Shaped[Array, "n ..."],
    *,
    num_outputs: int,
    weights: Float[Array, " n"] | None = None,
    groups: Integer[Array, " n"] | None = None,
    l2_values: Float[Array, " k"] | Sequence[float] = L2_VALUES,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Probe:
    """Fit the linear probe of a task to features, choosing the L2 value on held-out examples.

    ``classification`` is `fit_probe`. The others choose the L2 value with the lowest held-out loss,
    one for all outputs, and standardize features and hold out examples as `fit_probe` does.
    ``multilabel`` is a binary logistic regression for each label: see `fit_binary`. ``ordinal`` is
    the same for the labels "class > 0", "class > 1", .... ``regression`` is ridge regression: see
    `fit_ridge`. Rows without a known target have no influence.

    Args:
        kind: ``classification``, ``multilabel``, ``ordinal`` or ``regression``.
        features: ``[n, d]`` finite features, or the share of this process; used in float32.
        targets: class indices ``[n]`` for ``classification`` and ``ordinal``; ``[n, num_outputs]``
            of 0, 1 and NaN (unknown) for ``multilabel``; numbers and NaN for ``regression``, which
            should be standardized.
        num_outputs: number of columns of the kernel: classes, labels, numbers, or for ``ordinal``
            classes - 1.
        weights: ``[n]`` nonnegative weights in training and in the held-out scores; 0 excludes an
            example. By default all the same.
        groups: ``[n]`` integers; examples of one group are held out together.
        l2_values: ``[k]`` positive candidates, in units of the mean loss.
        seed: seed of the assignment of examples to folds.
        mesh: devices that share the examples, except for ``regression``; by default all.

    Raises:
        RequestError: an array has the wrong shape or values out of range or not finite, an output
            has no known target, no label has both values, or no example can be held out.
        DivergenceError: the values are finite, but too large to compute with.
    """
    options = {"weights": weights, "groups": groups, "l2_values": l2_values, "seed": seed}
    solver = {**options, "mesh": mesh}
    if kind == "classification":
        return fit_probe(features, targets, num_classes=num_outputs, **solver)
    if kind == "ordinal":
        features, labels = check_training_data(features, targets, num_outputs + 1)
        above = labels[:, None] > np.arange(num_outputs)
        return _fit_labels(features, above.astype(np.float32), **solver)
    if kind not in ("multilabel", "regression"):
        raise RequestError(
            f"there is no probe for {kind!r}: choose classification, multilabel, ordinal or "
            "regression"
        )
    features = check_features(features)
    targets = _check_columns(targets, (features.total, num_outputs))
    if kind == "multilabel":
        if not np.isin(targets[~np.isnan(targets)], (0, 1)).all():
            raise RequestError("targets of labels must be 0, 1, or NaN if unknown")
        return _fit_labels(features, targets, **solver)
    return _fit_numbers(features, targets, **options)


def fit_probe(
    features: Float[Array, "n d"] | Share,
    labels: Integer[Array, " n"],
    *,
    num_classes: int,
    weights: Float[Array, " n"] | None = None,
    groups: Integer[Array, " n"] | None = None,
    l2_values: Float[Array, " k"] | Sequence[float] = L2_VALUES,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Probe:
    """Fit a linear probe to features, choosing the L2 value on held-out examples.

    Features are standardized; a constant feature is only centered. With up to 1,000 examples, each
    L2 value is scored by stratified 5-fold cross-validation; with more, a single fold of 20% is
    held out. The only example of a class is never held out. The L2 value with the highest accuracy
    over all held-out examples is chosen, or the one with the lowest cross-entropy among equals, and
    then fitted to all examples.

    Source: the linear-evaluation protocol of Kornblith et al. 2019, arXiv:1805.08974.

    Args:
        features: ``[n, d]`` finite features, or the share of this process; used in float32.
        labels: ``[n]`` integer class indices in [0, num_classes).
        num_classes: number of classes, ``c``.
        weights: ``[n]`` nonnegative weights in training and in the held-out scores; 0 excludes an
            example. By default all the same.
        groups: ``[n]`` integers; examples of one group are held out together. The only group of a
            class is not held out, unless there are no others.
        l2_values: ``[k]`` positive candidates, in units of the mean loss; see `fit_logistic`. By
            default 45 log-spaced values from 1e-6 to 1e5.
        seed: seed of the assignment of examples to folds.
        mesh: devices that share the examples; by default all.

    Raises:
        RequestError: an array has the wrong shape or values out of range or not finite, fewer than
            two classes have examples, or no class has two examples, so none can be held out.
        DivergenceError: the values are finite, but too large to compute with.
    """
    features, labels = check_training_data(features, labels, num_classes)
    used, weights, groups = _check_examples(len(labels), weights, groups)
    if not used.all():
        features, labels = check_training_data(features.select(used), labels[used], num_classes)
    l2_values = np.asarray(l2_values, np.float64)
    l2 = check_l2(l2_values)
    order = np.argsort(-l2, kind="stable")
    held_out = held_out_by_class(labels, groups, seed)
    design = make_design(features, num_classes, mesh or data_mesh(), standardize=True)
    solve = partial(optima, design, labels, num_classes=num_classes)
    scores = np.zeros((2, len(l2)))
    for fold in held_out:
        for value, optimum in zip(order, solve(weights * ~fold, l2[order]), strict=True):
            scores[:, value] += held_out_scores(design, labels, weights * fold, optimum.params)
    accuracy, loss = scores / (weights * held_out).sum()
    best = np.lexsort((loss, -accuracy))[0]
    # The path again, on all examples, down to the chosen value.
    chosen = order[: int(np.flatnonzero(order == best)[0]) + 1]
    *_, optimum = solve(weights, l2[chosen])
    standardized = kernel_and_bias(design, optimum.params)
    kernel, bias = _on_raw_features(*standardized, design.mean, design.scale)
    check_fitted(kernel, features)
    converged = bool(optimum.converged)
    return Probe(kernel, bias, float(l2_values[best]), l2_values, accuracy, loss, converged)


def _fit_labels(features, targets, *, weights, groups, l2_values, seed, mesh) -> Probe:
    """Fit a binary logistic regression for each column of 0, 1 and NaN."""
    known = ~np.isnan(targets).all(1)
    used, weights, groups = _check_examples(len(targets), weights, groups, known)
    features, targets = features.select(used), targets[used]
    _check_known(targets)
    if not np.any(np.nanmin(targets, 0) < np.nanmax(targets, 0)):
        raise RequestError("no label has both a 0 and a 1: add examples of the other value")
    l2_values, l2 = np.asarray(l2_values, np.float64), check_l2(l2_values)
    held_out = held_out_by_label(targets, groups, seed)
    path = np.argsort(-l2, kind="stable")
    outputs = min(SIDE_BY_SIDE, targets.shape[1])
    design = make_design(features, outputs, mesh or data_mesh(), standardize=True)
    scores = fit_binary(
        design, targets, l2[path], weights=weights * ~held_out, held_out=weights * held_out
    )
    sums = np.empty((len(l2), targets.shape[1]))
    sums[path] = scores.held_out_loss.sum(0, dtype=np.float64)
    totals = (weights * held_out.any(0)) @ ~np.isnan(targets)
    loss = np.mean(sums[:, totals > 0] / totals[totals > 0], axis=1)
    best = np.argmin(loss)
    # The path again, on all examples, down to the chosen value.
    num_values = int(np.flatnonzero(path == best)[0]) + 1
    fit = fit_binary(design, targets, l2[path], weights=weights[None], num_values=num_values)
    check_fitted(fit.kernel, features)
    kernel, bias = _on_raw_features(fit.kernel[0], fit.bias[0], design.mean, design.scale)
    converged = bool(fit.converged.all())
    return Probe(kernel, bias, float(l2_values[best]), l2_values, None, loss, converged)


def _fit_numbers(features, targets, *, weights, groups, l2_values, seed) -> Probe:
    """Fit a ridge regression for each column of numbers and NaN."""
    known = ~np.isnan(targets).all(1)
    used, weights, groups = _check_examples(len(targets), weights, groups, known)
    features, targets = features.select(used), targets[used]
    _check_known(targets)
    check_l2(l2_values)
    l2_values = np.asarray(l2_values, np.float64)
    mean, scale = moments(features, standardize=True)
    standardized = features._replace(values=(features.values - mean) / scale)
    held_out = held_out_at_random(len(targets), groups, seed)
    errors = held_out_errors(standardized, targets, l2_values, weights=weights, held_out=held_out)
    loss = np.nanmean(errors, axis=1)
    best = np.argmin(loss)
    kernels, biases = fit_ridge(standardized, targets, l2_values[[best]], weights=weights)
    kernel, bias = _on_raw_features(kernels[0], biases[0], mean, scale)
    check_fitted(kernel, features)
    return Probe(kernel, bias, float(l2_values[best]), l2_values, None, loss, converged=True)


def _check_columns(targets, shape):
    targets = np.asarray(targets)
    if targets.shape != shape or targets.dtype.kind not in "fiub":
        raise RequestError(
            f"targets must be {list(shape)} numbers, one row per row of the features, "
            f"got {targets.dtype} {list(targets.shape)}"
        )
    if np.isinf(targets).any():
        raise RequestError("a target is infinite: correct it, or replace it by NaN if unknown")
    return targets.astype(np.float64 if targets.dtype == np.float64 else np.float32)


def _check_known(targets):
    """Refuse outputs without a known target."""
    if (unknown := np.flatnonzero(np.isnan(targets).all(0))).size:
        columns = ", ".join(map(str, unknown[:5])) + (", ..." if unknown.size > 5 else "")
        raise RequestError(f"no target of output {columns} is known: leave it out or add examples")


def _check_examples(n, weights, groups, known=True):
    """Return which examples have an influence, and their weights and groups.

    Raises:
        RequestError: weights or groups have the wrong shape or values, or nothing is left.
    """
    weights = np.ones(n) if weights is None else np.asarray(weights)
    valid = weights.shape == (n,) and weights.dtype.kind in "fiub"
    if not valid or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise RequestError(
            f"weights must be {n} finite numbers, not negative and not all 0; "
            f"got {weights.dtype} {list(weights.shape)}"
        )
    if groups is not None:
        groups = np.asarray(groups)
        if groups.shape != (n,) or groups.dtype.kind not in "iu":
            raise RequestError(
                f"groups must be {n} integers, got {groups.dtype} {list(groups.shape)}"
            )
    used = (weights > 0) & known
    if not used.any():
        raise RequestError("no target is known: add examples with targets")
    return used, weights[used].astype(np.float64), None if groups is None else groups[used]


def _on_raw_features(kernel, bias, mean, scale):
    """Fold the standardization into a kernel and a bias."""
    kernel = np.asarray(kernel, np.float64) / scale[:, None]
    bias = np.asarray(bias) - mean @ kernel
    return jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32)


def predict_logits(probe: Probe, features: Float[Array, "m d"]) -> Float[jax.Array, "m outputs"]:
    """Compute the outputs ``[m, outputs]``, logits or numbers, of raw features ``[m, d]``."""
    return jnp.matmul(features, probe.kernel, precision="highest") + probe.bias
