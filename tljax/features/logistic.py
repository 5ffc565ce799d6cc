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
* With it nearly every step of length 1 is accepted, so that an iteration costs one product with the
  features forward and one backward. No logits are kept: both happen block by block, and memory is
  that of the features.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, Integer, Shaped

from tljax.features.design import Design, check_features, diverged, make_design, probe_layout
from tljax.features.lbfgs import Search, trial_params
from tljax.features.path import (
    RARE,
    Problem,
    State,
    finish,
    first_state,
    has_converged,
    is_done,
    iterate,
    loop_on_host,
    start,
)
from tljax.features.rows import Rows, StreamedRows
from tljax.features.share import Share
from tljax.metrics.classification import cross_entropies
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import data_mesh, replicate
from tljax.runtime.types import Array


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

    kernel: Float[np.ndarray, "*f k d c"]
    bias: Float[np.ndarray, "*f k c"]
    objective: Float[np.ndarray, "*f k"]
    gradient_norm: Float[np.ndarray, "*f k"]
    iterations: Int[np.ndarray, "*f k"]
    converged: Bool[np.ndarray, "*f k"]


def fit_logistic(
    features: Float[Array, "n d"] | Share,
    labels: Integer[Array, " n"],
    l2: Float[Array, " k"] | Sequence[float],
    *,
    num_classes: int,
    weights: Shaped[Array, "*f n"] | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
    mesh: Mesh | None = None,
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

    The features are divided over the devices; where those have too little memory, they stay where
    they are, in memory or in a memory-mapped file, and are read in every iteration.

    Args:
        features: ``[n, d]`` finite features, or the share of this process; used in float32.
        labels: ``[n]`` integer class indices in [0, num_classes).
        l2: ``[k]`` positive L2 values in any order. A weak value takes longer alone than at the end
            of a path of log-spaced values.
        num_classes: number of classes, ``c``.
        weights: ``[n]`` nonnegative weight of each example; 0 excludes an example. ``[f, n]``
            solves for every L2 value under each row of weights. None gives all examples the same
            weight.
        max_iterations: maximum number of iterations for each L2 value.
        tolerance: largest relative distance of the objective from its optimum.
        mesh: devices that share the examples; by default all.

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

    order = np.argsort(-l2, kind="stable")
    design = make_design(features, num_classes, mesh or data_mesh(), standardize=False)
    options = {"tolerance": tolerance, "max_iterations": max_iterations}
    fits = []
    for row in rows:
        for optimum in optima(design, labels, row, l2[order], num_classes=num_classes, **options):
            kernel, bias = kernel_and_bias(design, optimum.params)
            bias = bias - design.mean @ kernel
            fits.append((kernel, bias - bias.mean(), *optimum[1:]))
    fields = [
        np.stack(field).reshape(len(rows), len(l2), *np.shape(field[0]))[:, np.argsort(order)]
        for field in zip(*fits, strict=True)
    ]
    check_fitted(fields[0], features)
    return LogisticFit(*(x if weights.ndim > 1 else x[0] for x in fields))


def check_l2(l2: Float[Array, " k"] | Sequence[float]) -> Float[np.ndarray, " k"]:
    """Convert L2 values to float32.

    Raises:
        RequestError: they are not a list of positive numbers.
    """
    l2 = np.asarray(l2, np.float32)
    if l2.ndim != 1 or not l2.size or not (np.isfinite(l2) & (l2 > 0)).all():
        raise RequestError(f"l2 must be a list of positive numbers, got {l2}")
    return l2


def check_fitted(kernel: Float[Array, "..."], features: Share) -> None:
    """Check that the kernel of a fit is finite.

    Raises:
        DivergenceError: it is not.
    """
    if not np.isfinite(kernel).all():
        raise diverged(features)


def check_training_data(
    features: Shaped[Array, "n d"] | Share, labels: Shaped[Array, " n"], num_classes: int
) -> tuple[Share, Int[np.ndarray, " n"]]:
    """Convert features as `check_features` does, and labels to int32.

    Raises:
        RequestError: shapes do not match, a feature is not finite, a label is out of range, or
            fewer than two classes have examples.
    """
    features, labels = check_features(features), np.asarray(labels)
    if labels.shape != (features.total,) or labels.dtype.kind not in "iu":
        raise RequestError(
            f"labels must be {features.total} integers, one per row of the features, "
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


def trace_solver(num_rows: int, dimensions: int, num_classes: int, mesh: Mesh) -> jax.stages.Traced:
    """Trace the program that solves one L2 value, for devices that need not exist.

    Args:
        num_rows: number of examples of all processes.
        dimensions: number of features.
        num_classes: number of classes.
        mesh: see `data_mesh`; its devices may be those of a topology.
    """
    blocks, rank = probe_layout(num_rows, dimensions, num_classes, mesh)
    data, everywhere = (NamedSharding(mesh, PartitionSpec(*axis)) for axis in (("data",), ()))
    shape = mesh.size, blocks.blocks, blocks.rows
    features = jax.ShapeDtypeStruct((*shape, rank), np.float32, sharding=data)
    examples = tuple(
        jax.ShapeDtypeStruct(shape, dtype, sharding=data) for dtype in (np.int32, np.float32)
    )
    number = np.zeros((), np.float32)
    problem = Problem(
        np.zeros(rank + 1, np.float32), np.zeros(num_classes, bool), number, number, 1e-6, 1000
    )
    state = first_state(np.zeros((num_classes, rank + 1), np.float32))
    problem, state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), np.result_type(x), sharding=everywhere),
        (problem, state),
    )
    with jax.default_matmul_precision("highest"):
        return _solve_on_devices.trace(Rows(features, (), mesh), examples, problem, state)


class Optimum(NamedTuple):
    """The solution for one L2 value.

    Attributes:
        params: ``[c, r + 1]`` kernel in the basis of a `Design`, and the bias in the last column.
        objective: the minimized objective.
        gradient_norm: norm of its gradient.
        iterations: number of L-BFGS iterations.
        converged: whether the tolerance was reached.
    """

    params: Float[Array, "c r+1"]
    objective: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]


def optima(
    design: Design,
    labels: Int[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
    l2: Float[np.ndarray, " k"],
    *,
    num_classes: int,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
) -> Iterator[Optimum]:
    """Solve the regressions for descending L2 values, one after the other; see `fit_logistic`."""
    weights = weights / weights.sum()
    frequency = np.bincount(labels, weights, num_classes).astype(np.float32)
    examples = design.place(labels, np.int32), design.place(weights, np.float32)
    # A kernel of zeros and the optimal bias for it: the logarithm of the class frequencies.
    params = np.zeros((num_classes, len(design.spectrum)), np.float32)
    params[:, -1] = np.log(np.maximum(frequency, RARE))
    state = replicate(first_state(params), design.layout.mesh)
    solve = _solve_on_devices if isinstance(design.rows, Rows) else partial(_solve, loop_on_host)
    for value, before in zip(l2, (l2[0], *l2), strict=False):
        problem = Problem(design.spectrum, frequency > 0, value, before, tolerance, max_iterations)
        with jax.default_matmul_precision("highest"):
            state, optimum = solve(design.rows, examples, problem, state)
        yield optimum


def kernel_and_bias(
    design: Design, params: Float[Array, "c r+1"]
) -> tuple[Float[np.ndarray, "d c"], Float[np.ndarray, " c"]]:
    """Return params as the kernel and the bias of standardized features."""
    values = np.asarray(params)
    return design.rotation @ values[:, :-1].T, values[:, -1]


def held_out_scores(
    design: Design,
    labels: Int[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
    params: Float[Array, "c r+1"],
) -> tuple[Float[jax.Array, ""], Float[jax.Array, ""]]:
    """Sum the correct predictions and the cross-entropies, weighted by ``weights``."""
    examples = design.place(labels, np.int32), design.place(weights, np.float32)
    with jax.default_matmul_precision("highest"):
        return design.rows.sum(_scores, examples, params)


def _solve(
    while_loop: Callable[..., Search],
    rows: Rows | StreamedRows,
    examples: tuple[jax.Array, jax.Array],
    problem: Problem,
    state: State,
) -> tuple[State, Optimum]:
    """Minimize the objective for one L2 value, from an extrapolation of the last two optima."""
    search = while_loop(
        lambda search: ~is_done(problem, search),
        lambda search: iterate(problem, search, *rows.sum(_terms, examples, trial_params(search))),
        start(problem, state),
    )
    return _finish(problem, state, search, rows.mesh)


_solve_on_devices = jax.jit(partial(_solve, jax.lax.while_loop), donate_argnames="state")


@partial(jax.jit, static_argnums=3)
def _finish(problem: Problem, state: State, search: Search, mesh: Mesh) -> tuple[State, Optimum]:
    # The mean over classes does not change probabilities. It is 0 at the optimum, but with a weak
    # L2 it converges last.
    params, is_present = search.point.params, problem.is_present[:, None]
    shift = params.mean(0, where=is_present, keepdims=True).at[:, -1].set(0)
    optimum = Optimum(
        jnp.where(is_present, params - shift, params),
        search.point.objective,
        jnp.linalg.norm(search.point.gradient - problem.penalty(problem.l2) * shift * is_present),
        search.iterations,
        has_converged(problem, search),
    )
    # The same sharding as before, so that the next problem runs the same program.
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint((finish(problem, state, search), optimum), replicated)


def _terms(features, labels, weight, params):
    """Compute the loss, its gradient, and the mean of p (1 - p) of each class for a block."""
    logits = _logits(features, params)
    is_own = labels == jnp.arange(len(logits))[:, None]
    margins = logits - jnp.sum(logits, 0, where=is_own)
    top = jnp.max(margins, 0)  # at least 0, the margin of the example's own class
    exponential = jnp.where(is_own, 0, jnp.exp(margins - top))
    others = jnp.sum(exponential, 0)
    # 1 - p of the own class is computed as a sum of small numbers rather than a difference of large
    # ones: at a weak L2, the objective is far below the rounding error of p.
    loss = top + jnp.log1p(others + jnp.expm1(-top))
    residual = jnp.where(is_own, -others, exponential) / (others + jnp.exp(-top))
    curvature = (jnp.abs(residual) * (1 - jnp.abs(residual))) @ weight
    residual = residual * weight
    gradient = jnp.concatenate([residual @ features, residual.sum(1, keepdims=True)], 1)
    return weight @ loss, gradient, curvature


def _scores(features, labels, weight, params):
    """Sum the correct predictions and the cross-entropies of a block."""
    logits = _logits(features, params)
    loss = cross_entropies(logits.T, labels)
    return weight @ (logits.argmax(0) == labels), weight @ loss


def _logits(features, params) -> Float[jax.Array, "c rows"]:
    return params[:, :-1] @ features.T + params[:, -1:]
