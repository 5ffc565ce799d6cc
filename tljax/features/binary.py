"""Many binary logistic regressions on the same features, each for a list of L2 values.

The method is that of `tljax.features.logistic`. Problems are solved side by side, so that one
matrix product serves all of them. Each walks along its own path from the strongest penalty to the
weakest and does not wait for the others: the step to the next L2 value, an extrapolation of the
last two optima, is one more direction among the others.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from tljax.features.lbfgs import (
    Memory,
    empty_memory,
    lbfgs_direction,
    line_search,
    lower_penalty,
    remember,
)
from tljax.features.logistic import Eigenbasis
from tljax.runtime.types import Array

_RARE = 1e-12  # smallest curvature, so that the bias of a rare label can be divided by it
_SIDE_BY_SIDE = 32  # problems; more of them would share no more work and wait for the slowest
_FEWEST = 5  # the folds of one label


class BinaryFit(NamedTuple):
    """The optima of ``f`` rows of weights for ``m`` labels at the last of ``k`` L2 values.

    Attributes:
        kernel: ``[f, d, m]`` float32.
        bias: ``[f, m]`` float32; logits are ``features @ kernel + bias``.
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
    basis: Eigenbasis,
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

    Only the optima at the last L2 value are kept, so memory does not grow with ``k``: besides the
    features and targets, about ``32 * 4 * (12 * n + 50 * d)`` bytes.

    Args:
        basis: the eigenbasis of the features.
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
    blocks = -(-labels // _SIDE_BY_SIDE)
    width = max(_FEWEST, -(-labels // blocks))
    num_values = len(l2) if num_values is None else num_values
    l2 = np.asarray(l2, np.float32)

    def solve_block(block):
        problems = [
            _problem(targets[:, label], weights[row], held_out[row]) for row, label in block
        ]
        # All blocks have the same number of problems, so that they share a compiled program.
        nothing = np.zeros_like(problems[0].sign)
        padding = _Problem(nothing, nothing, nothing, np.zeros((), np.float32))
        problems += [padding] * (width - len(block))
        sign, weight, held, constant = map(np.stack, zip(*problems, strict=True))
        params, *rest = _solve(basis, sign, weight, held, l2, num_values, tolerance, max_iterations)
        kernel = jnp.einsum("dr,pr->pd", basis.rotation, params[:, 0, :-1])
        bias = params[:, 0, -1] - kernel @ basis.mean
        objective, losses, converged = rest
        # A problem with one known value was solved with weights of 0: its kernel is 0.
        single = ~np.isnan(constant)
        bias = np.where(single, constant, bias)
        constant_loss = np.sum(held * np.logaddexp(0, sign * np.nan_to_num(constant)[:, None]), 1)
        losses = np.where(single[:, None], constant_loss[:, None], losses)
        fields = kernel, bias, objective, converged, losses
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


class _Problem(NamedTuple):
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


def _problem(target, weight, held_out):
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
    return _Problem(*(np.asarray(field, np.float32) for field in fields))


class _State(NamedTuple):
    """The state of one problem on its path.

    Attributes:
        value: index of the current L2 value; ``k`` if the path is finished.
        params: ``[1, r + 1]`` kernel in the eigenbasis, and the bias in the last column.
        margins: ``[n]`` logit of the other value minus that of the example's own.
        gradient: ``[1, r + 1]`` gradient of the objective.
        curvature: mean of p (1 - p).
        memory: pairs from this L2 value and the earlier ones.
        iterations: number of iterations at this L2 value.
        optimum: ``[1, r + 1]`` params at the last L2 value.
        velocity: ``[1, r + 1]`` change of the optimum per unit of -log(l2).
        objective: objective at the last optimum.
        held_out_losses: ``[k]`` sum of the losses of the held-out examples at each optimum.
        converged: whether that optimum reached the tolerance.
    """

    value: Int[jax.Array, ""]
    params: Float[jax.Array, "1 r+1"]
    margins: Float[jax.Array, " n"]
    gradient: Float[jax.Array, "1 r+1"]
    curvature: Float[jax.Array, ""]
    memory: Memory
    iterations: Int[jax.Array, ""]
    optimum: Float[jax.Array, "1 r+1"]
    velocity: Float[jax.Array, "1 r+1"]
    objective: Float[jax.Array, ""]
    held_out_losses: Float[jax.Array, " k"]
    converged: Bool[jax.Array, ""]


@jax.jit
def _solve(basis, signs, weights, held_out, l2, num_values, tolerance, max_iterations):
    """Compute the params ``[p, 1, r + 1]``, objectives, held-out losses, and convergence."""
    design, spectrum = basis.design, basis.spectrum
    is_kernel = jnp.arange(len(spectrum)) < len(spectrum) - 1

    def solve(sign, weight, held_out):
        def advance(state):
            now = l2[state.value]
            following = l2[jnp.minimum(state.value + 1, num_values - 1)]
            penalty = jnp.where(is_kernel, now, 0)
            objective = _objective(weight, penalty, state.params, state.margins)
            scale = jnp.where(is_kernel, now, state.curvature)
            # The gap from the optimum is at most this: see `fit_logistic`.
            gap = jnp.sum(state.gradient**2 / scale) / 2
            converged = (gap <= tolerance * objective) & (state.iterations > 0)
            done = converged | (state.iterations >= max_iterations)
            state = _record(state, done, objective, converged, held_out)

            # Either an L-BFGS step, or an extrapolation to the optimum at the following L2 value.
            last_ratio = jnp.log(l2[jnp.maximum(state.value - 1, 0)] / now)
            change = (state.params - state.optimum) / last_ratio
            velocity = jnp.where(done & (last_ratio > 0), change, state.velocity)
            initial = 1 / (spectrum * state.curvature + penalty)
            newton = lbfgs_direction(state.gradient, state.memory, initial)
            direction = jnp.where(done, jnp.log(now / following) * velocity, newton)
            along = sign * (direction @ design.T)[0]

            # An extrapolation is taken as it is if it is better than no step.
            next_penalty = jnp.where(is_kernel, jnp.where(done, following, now), 0)
            here = _objective(weight, next_penalty, state.params, state.margins)
            ahead = _objective(
                weight, next_penalty, state.params + direction, state.margins + along
            )
            slope = jnp.where(done, 0, jnp.vdot(state.gradient, direction))
            step = line_search(_slopes(weight, penalty, state, direction, along), slope)
            length = jnp.where(done, jnp.where(ahead < here, 1.0, 0.0), step)
            params = state.params + length * direction
            margins = state.margins + length * along
            gradient, curvature = _gradient(design, sign, weight, next_penalty, params, margins)

            learned = remember(
                state.memory, params - state.params, gradient - state.gradient, length
            )
            lowered = lower_penalty(state.memory, penalty - next_penalty)
            return state._replace(
                value=state.value + done,
                params=params,
                margins=margins,
                gradient=gradient,
                curvature=curvature,
                memory=jax.tree.map(lambda a, b: jnp.where(done, a, b), lowered, learned),
                iterations=jnp.where(done, 0, state.iterations + 1),
                optimum=jnp.where(done, state.params, state.optimum),
                velocity=velocity,
            )

        state = _initial_state(basis, sign, weight, jnp.where(is_kernel, l2[0], 0), len(l2))
        return jax.lax.while_loop(lambda state: state.value < num_values, advance, state)

    states = jax.vmap(solve)(signs, weights, held_out)
    # At the last value, the extrapolation to the following one has length 0.
    return states.params, states.objective, states.held_out_losses, states.converged


def _initial_state(basis, sign, weight, penalty, num_values):
    """Return a kernel of zeros with the optimal bias for it, the log odds."""
    share = weight @ (sign < 0)
    bias = jnp.log(jnp.maximum(share, _RARE) / jnp.maximum(weight.sum() - share, _RARE))
    params = jnp.zeros((1, len(penalty))).at[:, -1].set(bias)
    margins = sign * bias
    gradient, curvature = _gradient(basis.design, sign, weight, penalty, params, margins)
    return _State(
        value=jnp.zeros((), int),
        params=params,
        margins=margins,
        gradient=gradient,
        curvature=curvature,
        memory=empty_memory(params.shape),
        iterations=jnp.zeros((), int),
        optimum=params,
        velocity=jnp.zeros_like(params),
        objective=jnp.zeros(()),
        held_out_losses=jnp.zeros(num_values),
        converged=jnp.zeros((), bool),
    )


def _record(state, done, objective, converged, held_out):
    """Keep the results at an optimum."""
    losses = state.held_out_losses
    loss = jnp.where(done, held_out @ jax.nn.softplus(state.margins), losses[state.value])
    return state._replace(
        objective=jnp.where(done, objective, state.objective),
        converged=jnp.where(done, converged, state.converged),
        held_out_losses=losses.at[state.value].set(loss),
    )


def _objective(weight, penalty, params, margins):
    return weight @ jax.nn.softplus(margins) + jnp.vdot(penalty * params, params) / 2


def _gradient(design, sign, weight, penalty, params, margins):
    """Compute the gradient of the objective and the mean of p (1 - p)."""
    probability = jax.nn.sigmoid(margins)
    gradient = (weight * sign * probability)[None] @ design + penalty * params
    curvature = weight @ (probability * jax.nn.sigmoid(-margins))
    return gradient, jnp.maximum(curvature, _RARE)


def _slopes(weight, penalty, state, direction, along):
    """Return the first two derivatives of the objective along a direction, as a function."""
    slope_penalty = jnp.vdot(penalty * direction, state.params)
    curvature_penalty = jnp.vdot(penalty * direction, direction)

    def derivatives(length):
        margins = state.margins + length * along
        probability = jax.nn.sigmoid(margins)
        slope = weight @ (probability * along) + slope_penalty + length * curvature_penalty
        curvature = weight @ (probability * jax.nn.sigmoid(-margins) * along**2)
        return slope, curvature + curvature_penalty

    return derivatives
