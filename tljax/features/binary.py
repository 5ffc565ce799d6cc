"""Many binary logistic regressions on the same features, each for a list of L2 values.

The method is that of `tljax.features.logistic`. Problems are solved side by side, so that one
matrix product serves all of them. Each walks along its own path from the strongest penalty to the
weakest and does not wait for the others.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from tljax.features.design import Design
from tljax.features.lbfgs import trial_params
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
from tljax.runtime.parallel import replicate
from tljax.runtime.types import Array

SIDE_BY_SIDE = 32  # problems; more of them would share no more work and wait for the slowest
_FEWEST = 5  # the folds of one label


class BinaryFit(NamedTuple):
    """The optima of ``f`` rows of weights for ``m`` labels at the last of ``k`` L2 values.

    Attributes:
        kernel: ``[f, d, m]`` float32.
        bias: ``[f, m]`` float32; logits are ``standardized @ kernel + bias``.
        objective: ``[f, m]`` the minimized objective; 0 for a label with one known value.
        converged: ``[f, m]`` bool; False if ``max_iterations`` was reached before ``tolerance``.
        held_out_loss: ``[f, k, m]`` cross-entropies of the held-out examples at every L2 value,
            weighted and summed, in nats.
    """

    kernel: Float[np.ndarray, "f d m"]
    bias: Float[np.ndarray, "f m"]
    objective: Float[np.ndarray, "f m"]
    converged: Bool[np.ndarray, "f m"]
    held_out_loss: Float[np.ndarray, "f k m"]


def fit_binary(
    design: Design,
    targets: Float[np.ndarray, "n m"],
    l2: Float[Array, " k"],
    *,
    weights: Float[Array, "f n"],
    held_out: Float[Array, "f n"] | None = None,
    num_values: int | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> BinaryFit:
    """Solve a binary logistic regression for every label, along a path of L2 values.

    For each row of weights, each label and each value of ``l2``, minimizes over kernel ``w`` and
    bias ``b``, with sums over the examples whose target is known,

        sum_i weights[i] * cross_entropy(features[i] @ w + b, targets[i]) / sum_i weights[i]
            + l2 / 2 * ||w||^2

    scikit-learn's ``LogisticRegression`` has the same optimum at ``C = 1 / (n * l2)`` for ``n``
    known examples of weight 1. A label with one known value gets a kernel of 0, and a bias of the
    log odds with half an example added to both values.

    Only the optima at the last L2 value are kept, so memory does not grow with ``k``.

    Args:
        design: the standardized features.
        targets: ``[n, m]`` 0, 1, or NaN if unknown.
        l2: ``[k]`` positive L2 values in descending order.
        weights: ``[f, n]`` nonnegative rows of weights.
        held_out: ``[f, n]`` nonnegative weights of the examples on which each row is scored; by
            default none.
        num_values: solve for this many of the L2 values only; by default for all.
        max_iterations: maximum number of iterations for each L2 value.
        tolerance: largest relative distance of the objective from its optimum.
    """
    weights = np.asarray(weights, np.float64)
    held_out = np.zeros_like(weights) if held_out is None else np.asarray(held_out)
    rows, labels = len(weights), targets.shape[1]
    pairs = [(row, label) for row in range(rows) for label in range(labels)]
    blocks = -(-labels // SIDE_BY_SIDE)
    width = max(_FEWEST, -(-labels // blocks))
    num_values = len(l2) if num_values is None else num_values
    path = _Path(design.spectrum, np.asarray(l2, np.float32), num_values, tolerance, max_iterations)
    on_devices = isinstance(design.rows, Rows)
    solve = _solve_on_devices if on_devices else partial(_solve, loop_on_host)

    def solve_block(block):
        problems = [_label(targets[:, label], weights[row], held_out[row]) for row, label in block]
        # All blocks have the same number of problems, so that they share a compiled program.
        nothing = np.zeros_like(problems[0].sign)
        problems += [_Label(nothing, nothing, nothing, np.zeros((), np.float32))] * (
            width - len(block)
        )
        sign, weight, held, constant = map(np.stack, zip(*problems, strict=True))
        walks = [
            _first_walk(*fields, len(design.spectrum), len(l2))
            for fields in zip(sign, weight, strict=True)
        ]
        walks = replicate(jax.tree.map(lambda *fields: np.stack(fields), *walks), design.rows.mesh)
        examples = tuple(design.place(x.T, np.float32) for x in (sign, weight, held))
        walks = solve(design.rows, examples, path, walks)
        params = np.asarray(walks.state.optimum[:, 0])
        kernel, bias = params[:, :-1] @ design.rotation.T, params[:, -1]
        # A problem with one known value was solved with weights of 0: its kernel is 0.
        single = ~np.isnan(constant)
        bias = np.where(single, constant, bias)
        constant_loss = np.sum(held * np.logaddexp(0, sign * np.nan_to_num(constant)[:, None]), 1)
        losses = np.where(single[:, None], constant_loss[:, None], walks.held_out_losses)
        fields = kernel, bias, walks.objective, walks.converged, losses
        return [np.asarray(field)[: len(block)] for field in fields]

    with jax.default_matmul_precision("highest"):
        parts = [solve_block(pairs[i : i + width]) for i in range(0, len(pairs), width)]
    kernel, bias, objective, converged, losses = (
        np.concatenate(field).reshape(rows, labels, *field[0].shape[1:])
        for field in zip(*parts, strict=True)
    )
    return BinaryFit(
        kernel.swapaxes(1, 2), bias, objective, converged, held_out_loss=losses.swapaxes(1, 2)
    )


class _Label(NamedTuple):
    """One label under one row of weights.

    Attributes:
        sign: ``[n]`` -1 for a target of 1, and 1 for others.
        weight: ``[n]`` weights with sum 1; all 0 for a label with one known value.
        held_out: ``[n]`` weights of the held-out examples with a known target.
        constant: bias of a label with one known value; NaN for others.
    """

    sign: Float[np.ndarray, " n"]
    weight: Float[np.ndarray, " n"]
    held_out: Float[np.ndarray, " n"]
    constant: Float[np.ndarray, ""]


def _label(target, weight, held_out):
    known, positive = ~np.isnan(target), target == 1
    weight = np.where(known, weight, 0)
    positives = np.count_nonzero(positive & (weight > 0))
    negatives = np.count_nonzero(weight) - positives
    constant = np.nan
    if not positives or not negatives:
        constant = np.log((positives + 0.5) / (negatives + 0.5))
        weight = np.zeros_like(weight)
    weight = weight / max(weight.sum(), np.finfo(np.float64).tiny)
    fields = np.where(positive, -1, 1), weight, np.where(known, held_out, 0), constant
    return _Label(*(np.asarray(field, np.float32) for field in fields))


class _Walk(NamedTuple):
    """One problem on its path.

    Attributes:
        value: index of the current L2 value; the number of values when the path is finished.
        state: what it started from at that value, with the current search.
        objective: objective at the last optimum.
        held_out_losses: ``[k]`` sum of the losses of the held-out examples at each optimum.
        converged: whether the last optimum reached the tolerance.
    """

    value: Int[Array, ""]
    state: State
    objective: Float[Array, ""]
    held_out_losses: Float[Array, " k"]
    converged: Bool[Array, ""]


class _Path(NamedTuple):
    """What all problems have in common; see `fit_binary`."""

    spectrum: Float[Array, " r+1"]
    l2: Float[np.ndarray, " k"]
    num_values: int
    tolerance: float
    max_iterations: int

    def problem(self, value: Int[Array, ""]) -> Problem:
        """Return the problem at one of the L2 values, or at the last one."""
        l2 = jnp.asarray(self.l2)
        at = jnp.minimum(value, self.num_values - 1)
        l2, last_l2 = l2[at], l2[jnp.maximum(value - 1, 0)]
        is_present = np.ones(1, bool)
        options = self.tolerance, self.max_iterations
        return Problem(self.spectrum, is_present, l2, last_l2, *options)


def _first_walk(sign, weight, width, num_values) -> _Walk:
    """Return a kernel of zeros with the optimal bias for it, the log odds."""
    share = weight @ (sign < 0)
    params = np.zeros((1, width), np.float32)
    params[:, -1] = np.log(max(share, RARE) / max(weight.sum() - share, RARE))
    zero, losses = np.zeros((), np.float32), np.zeros(num_values, np.float32)
    state = first_state(params, scores=zero)
    return _Walk(np.zeros((), np.int32), state, zero, losses, np.zeros((), bool))


def _solve(
    while_loop: Callable[..., _Walk],
    rows: Rows | StreamedRows,
    examples: tuple[jax.Array, ...],
    path: _Path,
    walks: _Walk,
) -> _Walk:
    """Solve problems side by side; each field of ``walks`` has a first axis of them."""

    def advance(walks):
        params = jax.vmap(trial_params)(walks.state.search)
        return _advance(path, walks, rows.sum(_terms, examples, params))

    return while_loop(lambda walks: jnp.any(walks.value < path.num_values), advance, walks)


_solve_on_devices = jax.jit(partial(_solve, jax.lax.while_loop), donate_argnames="walks")


@jax.jit
@partial(jax.vmap, in_axes=(None, 0, 0))
def _advance(path, walk, sums):
    """Continue the search, and at an optimum begin that for the following L2 value."""
    value, problem = walk.value, path.problem(walk.value)
    search = iterate(problem, walk.state.search, *sums)
    converged = has_converged(problem, search)
    done, point = is_done(problem, search), search.point
    state = finish(problem, walk.state, search)
    ended = _Walk(
        value + 1,
        state._replace(search=start(path.problem(value + 1), state)),
        point.objective,
        walk.held_out_losses.at[value].set(point.scores),
        converged,
    )
    going_on = walk._replace(state=walk.state._replace(search=search))
    following = jax.tree.map(partial(jnp.where, done), ended, going_on)
    return jax.tree.map(partial(jnp.where, value < path.num_values), following, walk)


def _terms(features, sign, weight, held_out, params):
    """Compute the loss, gradient, curvature and held-out loss of ``p`` problems for a block.

    Args:
        features: ``[rows, r]``.
        sign: ``[rows, p]``; see `_Label`.
        weight: ``[rows, p]``.
        held_out: ``[rows, p]``.
        params: ``[p, 1, r + 1]``.
    """
    margins = sign * (features @ params[:, 0, :-1].T + params[:, 0, -1])
    losses, probability = jax.nn.softplus(margins), jax.nn.sigmoid(margins)
    residual = weight * sign * probability
    gradient = jnp.concatenate([residual.T @ features, residual.sum(0)[:, None]], 1)
    curvature = jnp.sum(weight * probability * jax.nn.sigmoid(-margins), 0)
    loss, held_out_loss = jnp.sum(weight * losses, 0), jnp.sum(held_out * losses, 0)
    return loss, gradient[:, None], curvature[:, None], held_out_loss
