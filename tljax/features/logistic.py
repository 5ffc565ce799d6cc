"""Multinomial logistic regression for a list of L2 values, each solved to its optimum.

The L2 sweep of a linear probe is a path of convex problems. Four things make L-BFGS fast on it;
none of them changes an optimum:

* From the strongest penalty to the weakest, each problem starts from a linear extrapolation of the
  last two optima over the logarithm of L2. That saves all but a few of about 100 iterations.
* The L-BFGS memory is kept between problems: lowering L2 changes the Hessian by a known multiple of
  the identity, so a stored change of gradient can be corrected exactly.
* The features are centered and rotated into the eigenbasis of their covariance. There the Hessian
  of every problem is nearly diagonal and known up to one number per class. This gives L-BFGS a good
  initial inverse Hessian at each iteration, whatever the L2 value and the condition number.
* Logits are linear in the parameters, so a nearly exact line search needs no matrix product: an
  iteration costs one product forward and one backward.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, Integer, Shaped

from tljax.features.lbfgs import (
    Memory,
    empty_memory,
    lbfgs_direction,
    line_search,
    lower_penalty,
    remember,
)
from tljax.runtime.errors import DivergenceError, RequestError
from tljax.runtime.types import Array

_ABSENT = 1e-12  # frequency assumed for a class without examples, so that its bias is finite


class LogisticFit(NamedTuple):
    """The optima of ``k`` logistic regressions with ``d`` features and ``c`` classes.

    With ``f`` rows of weights, each field has an additional first axis of length ``f``.

    Attributes:
        kernel: ``[k, d, c]`` float32.
        bias: ``[k, c]`` float32; logits are ``features @ kernel + bias``. Adding a constant to all
            classes changes no probability, so each row is shifted to sum to 0.
        objective: ``[k]`` the minimized objective.
        gradient_norm: ``[k]`` Euclidean norm of the objective's gradient with respect to the kernel
            and bias of the centered features.
        iterations: ``[k]`` int32 number of L-BFGS iterations.
        converged: ``[k]`` bool; False if ``max_iterations`` was reached before ``tolerance``.
    """

    kernel: Float[jax.Array, "*f k d c"]
    bias: Float[jax.Array, "*f k c"]
    objective: Float[jax.Array, "*f k"]
    gradient_norm: Float[jax.Array, "*f k"]
    iterations: Int[jax.Array, "*f k"]
    converged: Bool[jax.Array, "*f k"]


def fit_logistic(
    features: Float[Array, "n d"],
    labels: Integer[Array, " n"],
    l2: Float[Array, " k"] | Sequence[float],
    *,
    num_classes: int,
    weights: Shaped[Array, "*f n"] | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> LogisticFit:
    """Solve multinomial logistic regressions on the same features, for a list of L2 values.

    For each value of ``l2``, minimizes over kernel ``W`` and bias ``b``

        sum_i weights[i] * cross_entropy(features[i] @ W + b, labels[i]) / sum_i weights[i]
            + l2 / 2 * ||W||^2

    The bias is not penalized. scikit-learn's ``LogisticRegression`` has the same optimum at
    ``C = 1 / (n * l2)`` for ``n`` examples of weight 1. The papers of the protocol do not say
    whether their 1e-6 to 1e5 refers to the mean or the sum of the losses; for a sum, divide by
    ``n``. For the mean and standardized features, this range covers everything: at 1e-6, separable
    data is fitted to a loss near 0, and once ``l2`` exceeds the Hessian of the loss (of order 1 to
    10), the kernel shrinks as ``1 / l2`` and the predictions tend to the class frequencies.

    A problem is solved when ``||dW||^2 / l2 + sum_c db_c^2 / h_c <= 2 * tolerance * objective`` for
    the gradients ``dW`` and ``db`` and the bias's curvature ``h``. The objective is ``l2``-strongly
    convex in ``W``, so this bounds its relative distance from the optimum by ``tolerance``.
    Features that vary far more along one axis than along the others cost accuracy in float32:
    standardize them.

    A class without examples of positive weight gets a kernel of 0 and the bias of a class with a
    fraction of 1e-12 of the examples.

    Source: L-BFGS with a variable initial matrix, Nocedal and Wright, *Numerical Optimization*,
    2nd edition, algorithm 7.4.

    Args:
        features: ``[n, d]`` finite features; used in float32.
        labels: ``[n]`` integer class indices in [0, num_classes).
        l2: ``[k]`` positive L2 values in any order. A weak value takes longer alone than at the end
            of a path of log-spaced values.
        num_classes: number of classes, ``c``.
        weights: ``[n]`` nonnegative weight of each example; 0 excludes an example. ``[f, n]``
            solves for every L2 value under each row of weights. None gives all examples the same
            weight.
        max_iterations: maximum number of iterations for each L2 value.
        tolerance: largest relative distance of the objective from its optimum.

    Raises:
        RequestError: an array has the wrong shape or values out of range or not finite, or fewer
            than two classes have examples.
        DivergenceError: the values are finite, but too large to compute with.
    """
    features, labels = check_training_data(features, labels, num_classes)
    l2 = check_l2(l2)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights)
    rows = np.atleast_2d(weights)
    if rows.shape[1:] != labels.shape or (rows < 0).any() or not rows.any(1).all():
        raise RequestError(
            f"weights must be [{len(labels)}] or rows of that length, not negative and not all 0 "
            f"in a row; got shape {list(weights.shape)}"
        )
    rows = np.asarray(rows / rows.sum(1, keepdims=True), np.float32)

    path = np.argsort(-l2, kind="stable")
    with jax.default_matmul_precision("highest"):
        basis = eigenbasis(features)
        onehot = jax.nn.one_hot(labels, num_classes, axis=0)
        params, *rest = _solve(basis, onehot, rows, l2[path], tolerance, max_iterations)
        kernel = jnp.einsum("dr,fkcr->fkdc", basis.rotation, params[..., :-1])
        # The mean over classes does not change probabilities. It is 0 at the optimum, but with a
        # weak L2 it converges last.
        present = (rows @ onehot.T > 0)[:, None, None]
        shift = jnp.mean(kernel, -1, keepdims=True, where=present)
        kernel = jnp.where(present, kernel - shift, 0)
        bias = params[..., -1] - basis.mean @ kernel
        bias -= bias.mean(-1, keepdims=True)
    check_fitted(kernel, features)
    results = [x[:, np.argsort(path)] for x in (kernel, bias, *rest)]
    return LogisticFit(*(x if weights.ndim > 1 else x[0] for x in results))


_ADVICE = "check the weights and the preprocessing of the network that computed them"


def check_l2(l2: Float[Array, " k"] | Sequence[float]) -> Float[np.ndarray, " k"]:
    """Convert L2 values to float32.

    Raises:
        RequestError: they are not a list of positive numbers.
    """
    l2 = np.asarray(l2, np.float32)
    if l2.ndim != 1 or not l2.size or not (np.isfinite(l2) & (l2 > 0)).all():
        raise RequestError(f"l2 must be a list of positive numbers, got {l2}")
    return l2


def check_fitted(kernel: Float[Array, "..."], features: Float[np.ndarray, "n d"]) -> None:
    """Check that the kernel of a fit is finite.

    Raises:
        DivergenceError: it is not.
    """
    if not np.isfinite(kernel).all():
        raise DivergenceError(
            f"logistic regression diverged on features of up to {np.abs(features).max():.1e}: "
            f"{_ADVICE}"
        )


def check_features(features: Shaped[Array, "n d"]) -> Float[np.ndarray, "n d"]:
    """Convert features to a float32 matrix.

    Raises:
        RequestError: they are not a matrix, or a value is not finite.
    """
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or not features.size:
        raise RequestError(f"features must be [examples, dimensions], got {list(features.shape)}")
    bad = np.count_nonzero(~np.isfinite(features))
    if bad:
        raise RequestError(f"{bad} of {features.size} feature values are not finite: {_ADVICE}")
    return features


def check_training_data(
    features: Shaped[Array, "n d"], labels: Shaped[Array, " n"], num_classes: int
) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    """Convert features to float32 and labels to int32.

    Raises:
        RequestError: shapes do not match, a feature is not finite, a label is out of range, or
            fewer than two classes have examples.
    """
    features, labels = check_features(features), np.asarray(labels)
    if labels.shape != features.shape[:1] or labels.dtype.kind not in "iu":
        raise RequestError(
            f"labels must be {len(features)} integers, one per row of the features, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise RequestError(
            f"labels must lie in [0, {num_classes}), got {labels.min()} to {labels.max()}: "
            "leave out examples without a label, or raise num_classes"
        )
    if labels.min() == labels.max():
        raise RequestError(
            f"all {len(labels)} examples are of class {labels[0]}: add another class"
        )
    return features, labels.astype(np.int32)


class Eigenbasis(NamedTuple):
    """Centered features in the basis of their principal axes, with a column of ones for the bias.

    Attributes:
        design: ``[n, r + 1]`` where ``r = min(n, d)``: the optimum of an L2-penalized problem is in
            the span of the centered features.
        spectrum: ``[r + 1]`` mean square of each column of the design.
        rotation: ``[d, r]`` orthonormal columns.
        mean: ``[d]`` mean of the features.
    """

    design: Float[jax.Array, "n r+1"]
    spectrum: Float[jax.Array, " r+1"]
    rotation: Float[jax.Array, "d r"]
    mean: Float[jax.Array, " d"]


@jax.jit
def eigenbasis(features: Float[Array, "n d"]) -> Eigenbasis:
    """Center features and rotate them to their principal axes."""
    n, d = features.shape
    mean = features.mean(0)
    centered = features - mean

    def principal_axes(x):
        return jnp.linalg.eigh(x.T @ x / n)[1]

    if n < d:
        span = jnp.linalg.qr(centered.T)[0]
        rotation = span @ principal_axes(centered @ span)
    else:
        rotation = principal_axes(centered)
    design = jnp.concatenate([centered @ rotation, jnp.ones((n, 1))], axis=1)
    return Eigenbasis(design, jnp.mean(design**2, 0), rotation, mean)


class _State(NamedTuple):
    """The state of L-BFGS on one problem.

    Attributes:
        params: ``[c, r]`` kernel in the eigenbasis, and the bias in the last column.
        margins: ``[c, n]`` logits minus the logit of the example's own class.
        objective: objective at ``params``.
        gradient: ``[c, r]`` gradient of the objective.
        curvature: ``[c, 1]`` mean of p (1 - p) for each class.
        memory: pairs from this problem and the earlier ones on the path.
        iterations: number of iterations on this problem.
    """

    params: Float[jax.Array, "c r"]
    margins: Float[jax.Array, "c n"]
    objective: Float[jax.Array, ""]
    gradient: Float[jax.Array, "c r"]
    curvature: Float[jax.Array, "c 1"]
    memory: Memory
    iterations: Int[jax.Array, ""]


@jax.jit
def _solve(basis, onehot, weights, l2, tolerance, max_iterations):
    """Compute the params ``[f, k, c, r]`` and the other fields of `LogisticFit`.

    Rows of ``weights`` sum to 1, and ``l2`` is in descending order.
    """
    design, spectrum = basis.design, basis.spectrum
    is_kernel = jnp.arange(len(spectrum)) < len(spectrum) - 1

    def solve(weight, l2, params, predicted, memory):
        """Minimize the objective for one ``l2``, from the better of two starting points."""
        penalty = jnp.where(is_kernel, l2, 0)

        def evaluate(params, margins):
            return _evaluate(design, onehot, weight, penalty, params, margins)

        def converged(state):
            bound = jnp.sum(state.gradient**2 / jnp.where(is_kernel, l2, state.curvature)) / 2
            # At least one step: with a huge L2, the kernel of zeros is within any tolerance.
            return (bound <= tolerance * state.objective) & (state.iterations > 0)

        def iterate(state):
            initial = 1 / (spectrum * state.curvature + penalty)
            direction = lbfgs_direction(state.gradient, state.memory, initial)
            margins = _margins(design, onehot, direction)
            slopes = _slopes(weight, penalty, state, direction, margins)
            length = line_search(slopes, jnp.vdot(state.gradient, direction))
            params = state.params + length * direction
            margins = state.margins + length * margins
            objective, gradient, curvature = evaluate(params, margins)
            memory = remember(
                state.memory, params - state.params, gradient - state.gradient, length
            )
            return _State(
                params, margins, objective, gradient, curvature, memory, state.iterations + 1
            )

        starts = [(start, _margins(design, onehot, start)) for start in (params, predicted)]
        better = evaluate(*starts[1])[0] < evaluate(*starts[0])[0]
        params, margins = (jnp.where(better, new, old) for old, new in zip(*starts, strict=True))
        objective, gradient, curvature = evaluate(params, margins)
        state = jax.lax.while_loop(
            lambda state: ~converged(state) & (state.iterations < max_iterations),
            iterate,
            _State(params, margins, objective, gradient, curvature, memory, jnp.zeros((), int)),
        )
        norm = jnp.linalg.norm(state.gradient)
        result = state.params, state.objective, norm, state.iterations, converged(state)
        return result, state.memory

    def follow(weight):
        """Compute the path of optima for one row of weights."""

        def advance(carry, l2):
            params, velocity, last_l2, memory = carry
            ratio = jnp.log(last_l2 / l2)
            memory = lower_penalty(memory, jnp.where(is_kernel, last_l2 - l2, 0))
            result, memory = solve(weight, l2, params, params + ratio * velocity, memory)
            velocity = jnp.where(ratio > 0, (result[0] - params) / ratio, velocity)
            return (result[0], velocity, l2, memory), result

        # A kernel of zeros and the optimal bias for it: the logarithm of the class frequencies.
        bias = jnp.log(jnp.maximum(onehot @ weight, _ABSENT))
        params = jnp.zeros((len(onehot), len(spectrum))).at[:, -1].set(bias)
        memory = empty_memory(params.shape)
        return jax.lax.scan(advance, (params, jnp.zeros_like(params), l2[0], memory), l2)[1]

    return jax.lax.map(follow, weights)


def trace_solver(
    num_rows: int, dimensions: int, num_classes: int, mesh: Mesh, num_fits: int = 2
) -> jax.stages.Traced:
    """Trace the program that solves all problems of `fit_logistic`, to compile it elsewhere.

    Args:
        num_rows: number of examples.
        dimensions: number of features.
        num_classes: number of classes.
        mesh: devices that the program is for; each solves the same problems.
        num_fits: number of rows of weights.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    shape = partial(jax.ShapeDtypeStruct, dtype=np.float32, sharding=everywhere)
    basis = jax.eval_shape(eigenbasis, shape((num_rows, dimensions)))
    basis = jax.tree.map(lambda leaf: leaf.update(sharding=everywhere), basis)
    onehot, weights = shape((num_classes, num_rows)), shape((num_fits, num_rows))
    return _solve.trace(basis, onehot, weights, shape((45,)), 1e-6, 1000)


def _margins(design, onehot, params):
    logits = params @ design.T
    return logits - jnp.sum(logits * onehot, 0)


def _evaluate(design, onehot, weight, penalty, params, margins):
    """Compute the objective, its gradient, and the mean of p (1 - p) of each class, ``[c, 1]``."""
    top = jnp.max(margins, 0)  # at least 0, the margin of the example's own class
    exponential = jnp.exp(margins - top) * (1 - onehot)
    others = jnp.sum(exponential, 0)
    # 1 - p of the own class is computed as a sum of small numbers rather than a difference of large
    # ones: at a weak L2, the objective is far below the rounding error of p.
    loss = top + jnp.log1p(others + jnp.expm1(-top))
    residual = (exponential - onehot * others) / (others + jnp.exp(-top))
    curvature = (jnp.abs(residual) * (1 - jnp.abs(residual))) @ weight
    objective = weight @ loss + jnp.vdot(penalty * params, params) / 2
    is_present = (onehot @ weight > 0)[:, None]  # gradients of other classes are rounding errors
    gradient = is_present * ((residual * weight) @ design + penalty * params)
    return objective, gradient, jnp.maximum(curvature, _ABSENT)[:, None]


def _slopes(weight, penalty, state, direction, margin_direction):
    """Return the first two derivatives of the objective along a direction, as a function."""
    slope_penalty = jnp.vdot(penalty * direction, state.params)
    curvature_penalty = jnp.vdot(penalty * direction, direction)

    def derivatives(length):
        probabilities = jax.nn.softmax(state.margins + length * margin_direction, axis=0)
        mean = jnp.sum(probabilities * margin_direction, 0)
        variance = jnp.sum(probabilities * margin_direction**2, 0) - mean**2
        slope = weight @ mean + slope_penalty + length * curvature_penalty
        return slope, weight @ variance + curvature_penalty

    return derivatives
