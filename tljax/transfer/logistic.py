"""Multinomial logistic regressions over the same features, solved to their optimum side by side.

The L2 sweep of a linear probe is a batch of convex problems that differ in the penalty and in the
examples they leave out. Two things make L-BFGS quick here; neither moves an optimum:

* The features are centred and rotated into the eigenbasis of their covariance. There the Hessian of
  every problem is nearly diagonal and known up to one number per class, which gives L-BFGS its
  initial inverse Hessian afresh at each iteration, whatever the L2 value and however
  ill-conditioned the features.
* Logits are linear in the parameters, so an almost exact line search needs no matrix product: an
  iteration costs one product forwards and one back.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax.errors import RequestError
from tljax.types import Array

_MEMORY_BUDGET = 2**30  # bytes for the problems that are solved at the same time
_BLOCK = 9  # of them; more only wait for the hardest (measured on a CPU). 45 and 225 are multiples
_HISTORY = 10  # pairs that L-BFGS remembers
_ABSENT = 1e-12  # examples that a class without any is taken to have, so that its bias is finite


class LogisticFit(NamedTuple):
    """The optima of ``k`` logistic regressions with ``d`` features and ``c`` classes.

    Attributes:
        kernel: ``[k, d, c]`` float32.
        bias: ``[k, c]`` float32; logits are ``features @ kernel + bias``. A number added to all
            classes alike changes nothing, so each row is made to sum to 0.
        objective: ``[k]`` the minimised objective.
        gradient_norm: ``[k]`` Euclidean norm of the objective's gradient with respect to the kernel
            and bias of the centred features.
        iterations: ``[k]`` int32 L-BFGS iterations.
        converged: ``[k]`` bool, False where ``max_iterations`` came before ``tolerance``.
    """

    kernel: jax.Array
    bias: jax.Array
    objective: jax.Array
    gradient_norm: jax.Array
    iterations: jax.Array
    converged: jax.Array


def fit_logistic(
    features: Array,
    labels: Array,
    l2: Array | Sequence[float],
    *,
    num_classes: int,
    weights: Array | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
) -> LogisticFit:
    """Solves multinomial logistic regressions over the same features, all in one call.

    Problem ``j`` minimises over kernel ``W`` and bias ``b``

        sum_i weights[j, i] * cross_entropy(features[i] @ W + b, labels[i]) / sum_i weights[j, i]
            + l2[j] / 2 * ||W||^2

    The bias is not penalised. scikit-learn's ``LogisticRegression`` has the same optimum at
    ``C = 1 / (n * l2)`` for ``n`` examples of weight 1. The protocol's papers do not say whether
    their 1e-6 to 1e5 multiplies the mean or the sum of the losses; for a sum, divide by ``n``. For
    the mean and standardised features the sweep covers everything: at 1e-6 separable data is
    fitted to a loss near 0, and once ``l2`` exceeds the Hessian of the loss (of order 1 to 10), the
    kernel shrinks as ``1 / l2`` and the predictions tend to the class frequencies.

    A problem is solved when ``||dW||^2 / l2 + sum_c db_c^2 / h_c <= 2 * tolerance * objective`` for
    the gradients ``dW`` and ``db`` and the bias's curvature ``h``. The objective is ``l2``-strongly
    convex in ``W``, so this bounds how far it lies above its optimum, relatively, by ``tolerance``.
    Features of which one axis is far longer than the rest cost accuracy in float32: standardise.

    A class without examples (of positive weight) is given 1e-12 of one: its kernel stays 0 and its
    bias finite.

    Source: L-BFGS with a variable initial matrix, Nocedal and Wright, *Numerical Optimization*,
    2nd edition, algorithm 7.4.

    Args:
        features: ``[n, d]``, finite; used in float32.
        labels: ``[n]`` int class indices in [0, num_classes).
        l2: ``[k]`` positive.
        num_classes: ``c``.
        weights: ``[k, n]`` weight of each example in each problem, not negative; 0 leaves an
            example out. None weighs all examples alike.
        max_iterations: of each problem.
        tolerance: largest relative distance of the objective from its optimum.

    Raises:
        RequestError: an array has the wrong shape or range, or holds values that are not finite, or
            fewer than two classes have examples.
    """
    features, labels = checked(features, labels, num_classes)
    l2 = np.asarray(l2, np.float32)
    if l2.ndim != 1 or not l2.size or not (np.isfinite(l2) & (l2 > 0)).all():
        raise RequestError(f"l2 must be a list of positive numbers, got {l2}")
    weights = np.ones((len(l2), len(labels))) if weights is None else np.asarray(weights)
    if weights.shape != (len(l2), len(labels)) or (weights < 0).any() or not weights.any(1).all():
        raise RequestError(
            f"weights must be [{len(l2)}, {len(labels)}] (one row per l2 value, one column per "
            f"example), not negative and not all 0 in a row; got shape {list(weights.shape)}"
        )
    weights = np.asarray(weights / weights.sum(1, keepdims=True), np.float32)

    # Neighbours in L2 take about as many iterations, so nobody in a block waits long.
    order = np.argsort(l2)
    rows = min(features.shape) + 1
    bytes_each = 4 * ((2 * _HISTORY + 6) * rows + 6 * len(labels)) * num_classes
    with jax.default_matmul_precision("highest"):
        basis = _eigenbasis(features)
        params, *rest = _solve(
            basis,
            jax.nn.one_hot(labels, num_classes, axis=0),
            weights[order],
            l2[order],
            tolerance,
            max_iterations,
            block=max(1, min(_BLOCK, len(l2), _MEMORY_BUDGET // bytes_each)),
        )
        kernel = jnp.einsum("dr,kcr->kdc", basis.rotation, params[:, :, :-1])
        bias = params[:, :, -1] - basis.mean @ kernel
        bias -= bias.mean(1, keepdims=True)
    return LogisticFit(*(x[np.argsort(order)] for x in (kernel, bias, *rest)))


def finite(features: Array) -> np.ndarray:
    """``features`` as a float32 matrix; RequestError if it is none or holds NaN or infinities."""
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or not features.size:
        raise RequestError(f"features must be [examples, dimensions], got {list(features.shape)}")
    bad = np.count_nonzero(~np.isfinite(features))
    if bad:
        raise RequestError(
            f"{bad} of {features.size} feature values are not finite numbers: "
            "check the weights and the preprocessing of the network that made them"
        )
    return features


def checked(features: Array, labels: Array, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Features in float32 and labels in int32; RequestError if they are no training set."""
    features, labels = finite(features), np.asarray(labels)
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
            f"all {len(labels)} examples are of class {labels[0]}: a classifier needs two classes"
        )
    return features, labels.astype(np.int32)


class _Eigenbasis(NamedTuple):
    """Centred features in the basis of their principal axes, with a column of ones for the bias.

    Attributes:
        design: ``[n, r + 1]`` for ``r = min(n, d)``: the optimum of an L2-penalised problem lies in
            the span of the centred features.
        spectrum: ``[r + 1]`` mean square of each column of the design.
        rotation: ``[d, r]`` orthonormal columns.
        mean: ``[d]``.
    """

    design: jax.Array
    spectrum: jax.Array
    rotation: jax.Array
    mean: jax.Array


@jax.jit
def _eigenbasis(features) -> _Eigenbasis:
    n, d = features.shape
    mean = features.mean(0)
    centred = features - mean

    def principal_axes(x):
        return jnp.linalg.eigh(x.T @ x / n)[1]

    if n < d:
        span = jnp.linalg.qr(centred.T)[0]
        rotation = span @ principal_axes(centred @ span)
    else:
        rotation = principal_axes(centred)
    design = jnp.concatenate([centred @ rotation, jnp.ones((n, 1))], axis=1)
    return _Eigenbasis(design, jnp.mean(design**2, 0), rotation, mean)


class _State(NamedTuple):
    """One problem on its way: ``r`` rows of kernel and bias, ``m`` remembered pairs.

    Attributes:
        iterations: so far.
        params: ``[c, r]`` kernel in the eigenbasis, and the bias in the last column.
        margins: ``[c, n]`` logits minus the logit of the example's own class.
        objective: at the params.
        gradient: ``[c, r]`` of it.
        curvature: ``[c, 1]`` mean of p (1 - p) of each class.
        steps: ``[m, c, r]`` ring of past steps; iteration ``i`` writes entry ``i % m``.
        changes: ``[m, c, r]`` the changes of gradient along them.
        rho: ``[m]`` 1 / <step, change>; 0 for a pair not to be used.
    """

    iterations: jax.Array
    params: jax.Array
    margins: jax.Array
    objective: jax.Array
    gradient: jax.Array
    curvature: jax.Array
    steps: jax.Array
    changes: jax.Array
    rho: jax.Array


@partial(jax.jit, static_argnames=("block",))
def _solve(basis, onehot, weights, l2, tolerance, max_iterations, *, block):
    """Params ``[k, c, r]`` and the other fields of LogisticFit. Rows of ``weights`` sum to 1."""
    design, spectrum = basis.design, basis.spectrum
    is_kernel = jnp.arange(len(spectrum)) < len(spectrum) - 1

    def solve(problem):
        weight, l2 = problem
        penalty = jnp.where(is_kernel, l2, 0)

        def converged(state):
            bound = jnp.sum(state.gradient**2 / jnp.where(is_kernel, l2, state.curvature)) / 2
            # One step at least: a huge L2 starts within any tolerance, but with a kernel of zeros.
            return (bound <= tolerance * state.objective) & (state.iterations > 0)

        def iterate(state):
            initial = 1 / (spectrum * state.curvature + penalty)
            direction = _direction(state, initial)
            margins = _margins(design, onehot, direction)
            length = _line_search(weight, penalty, state, direction, margins)
            params = state.params + length * direction
            margins = state.margins + length * margins
            objective, gradient, curvature = _evaluate(
                design, onehot, weight, penalty, params, margins
            )
            step, change = params - state.params, gradient - state.gradient
            product = jnp.vdot(step, change)
            # A pair whose product is lost in rounding would blow the direction up.
            usable = product > 1e-6 * jnp.linalg.norm(step) * jnp.linalg.norm(change)
            newest = state.iterations % _HISTORY
            rho = state.rho.at[newest].set(jnp.where(usable, 1 / product, 0))
            return _State(
                state.iterations + 1,
                params,
                margins,
                objective,
                gradient,
                curvature,
                state.steps.at[newest].set(step),
                state.changes.at[newest].set(change),
                # No way down: the memory is at fault, so it starts afresh.
                jnp.where(length > 0, rho, 0),
            )

        # Kernel 0 and the best bias for it: the logarithm of the class frequencies.
        bias = jnp.log(jnp.maximum(onehot @ weight, _ABSENT))
        params = jnp.zeros((len(onehot), len(spectrum))).at[:, -1].set(bias)
        margins = bias[:, None] - bias @ onehot
        ring = jnp.zeros((_HISTORY, *params.shape))
        state = jax.lax.while_loop(
            lambda state: ~converged(state) & (state.iterations < max_iterations),
            iterate,
            _State(
                jnp.zeros((), int),
                params,
                margins,
                *_evaluate(design, onehot, weight, penalty, params, margins),
                ring,
                ring,
                jnp.zeros(_HISTORY),
            ),
        )
        norm = jnp.linalg.norm(state.gradient)
        return state.params, state.objective, norm, state.iterations, converged(state)

    return jax.lax.map(solve, (weights, l2), batch_size=block)


def _margins(design, onehot, params):
    logits = params @ design.T
    return logits - jnp.sum(logits * onehot, 0)


def _evaluate(design, onehot, weight, penalty, params, margins):
    """The objective, its gradient, and the mean of p (1 - p) for each class, ``[c, 1]``."""
    top = jnp.max(margins, 0)  # at least 0, the margin of the own class
    exponential = jnp.exp(margins - top) * (1 - onehot)
    others = jnp.sum(exponential, 0)
    # 1 - p of the own class is a sum of small numbers, not a difference of large ones: at a weak L2
    # all that is left of the objective is far below the rounding of p.
    loss = top + jnp.log1p(others + jnp.expm1(-top))
    residual = (exponential - onehot * others) / (others + jnp.exp(-top))
    curvature = (jnp.abs(residual) * (1 - jnp.abs(residual))) @ weight
    objective = weight @ loss + jnp.vdot(penalty * params, params) / 2
    gradient = (residual * weight) @ design + penalty * params
    return objective, gradient, jnp.maximum(curvature, _ABSENT)[:, None]


def _direction(state, inverse_hessian):
    """Minus the L-BFGS inverse Hessian times the gradient."""
    newest = (state.iterations - 1) % _HISTORY
    order = (newest - jnp.arange(_HISTORY)) % _HISTORY
    steps, changes, rho = state.steps, state.changes, state.rho

    def subtract(vector, i):
        alpha = rho[i] * jnp.vdot(steps[i], vector)
        return vector - alpha * changes[i], alpha

    def add(vector, i_alpha):
        i, alpha = i_alpha
        return vector + (alpha - rho[i] * jnp.vdot(changes[i], vector)) * steps[i], None

    vector, alphas = jax.lax.scan(subtract, state.gradient, order)
    # The initial matrix is right up to a factor, which the newest pair measures.
    scale = rho[newest] * jnp.vdot(changes[newest], inverse_hessian * changes[newest])
    vector = inverse_hessian * vector / jnp.where(scale > 0, scale, 1)
    vector, _ = jax.lax.scan(add, vector, (order, alphas), reverse=True)
    return -vector


def _line_search(weight, penalty, state, direction, margin_direction):
    """Step length at which the slope has fallen to a tenth: Newton's method, kept in a bracket."""
    initial_slope = jnp.vdot(state.gradient, direction)
    slope_penalty = jnp.vdot(penalty * direction, state.params)
    curvature_penalty = jnp.vdot(penalty * direction, direction)

    def derivatives(length):
        probabilities = jax.nn.softmax(state.margins + length * margin_direction, axis=0)
        mean = jnp.sum(probabilities * margin_direction, 0)
        variance = jnp.sum(probabilities * margin_direction**2, 0) - mean**2
        slope = weight @ mean + slope_penalty + length * curvature_penalty
        return slope, weight @ variance + curvature_penalty

    def refine(search):
        trial, length, low, high, slope, curvature = search
        low, high = jnp.where(slope < 0, length, low), jnp.where(slope < 0, high, length)
        newton = jnp.minimum(length - slope / curvature, 10 * length)
        middle = jnp.where(jnp.isinf(high), 10 * length, (low + high) / 2)
        length = jnp.where((low < newton) & (newton < high), newton, middle)
        return trial + 1, length, low, high, *derivatives(length)

    _, length, low, _, slope, _ = jax.lax.while_loop(
        lambda s: (s[0] < 10) & (jnp.abs(s[4]) > 0.1 * jnp.abs(initial_slope)),
        refine,
        (0, 1.0, 0.0, jnp.inf, *derivatives(1.0)),
    )
    # A trial that the loop gave up on may overshoot by far; the low end of the bracket never does.
    # Rounding alone can make the slope of a descent direction positive: then stay.
    settled = jnp.abs(slope) <= 0.1 * jnp.abs(initial_slope)
    return jnp.where(initial_slope < 0, jnp.where(settled, length, low), 0)
