"""A path of problems with descending L2 values, on which each starts from the optima before it.

Logistic regressions of classes and of labels share it: they differ only in what they evaluate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from tljax.features.lbfgs import (
    Point,
    Search,
    advance,
    begin,
    empty_memory,
    lower_penalty,
    trial_params,
)
from tljax.runtime.types import Array

Carry = TypeVar("Carry")

RARE = 1e-12  # smallest frequency and curvature of a class, so that its bias is finite


class Problem(NamedTuple):
    """One problem of a path.

    Attributes:
        spectrum: ``[r + 1]`` mean square of each column of the design.
        is_present: ``[c]`` whether a class has examples.
        l2: the L2 value.
        last_l2: the L2 value before, or the same for the first.
        tolerance: largest relative distance of the objective from its optimum.
        max_iterations: maximum number of iterations.
    """

    spectrum: Float[Array, " r+1"]
    is_present: Bool[Array, " c"]
    l2: Float[Array, ""]
    last_l2: Float[Array, ""]
    tolerance: float
    max_iterations: int

    def penalty(self, l2: Float[Array, ""]) -> Float[jax.Array, " r+1"]:
        """Return an L2 value for each parameter of a class: 0 for the bias."""
        is_kernel = jnp.arange(len(self.spectrum)) < len(self.spectrum) - 1
        return jnp.where(is_kernel, l2, 0)


class State(NamedTuple):
    """What a problem starts from.

    Attributes:
        search: the search that ended at the last optimum.
        optimum: ``[c, r + 1]`` its params.
        velocity: ``[c, r + 1]`` change of the optimum per unit of -log(l2).
    """

    search: Search
    optimum: Float[Array, "c r+1"]
    velocity: Float[Array, "c r+1"]


def first_state(params: Float[np.ndarray, "c r+1"], scores: Any = ()) -> State:
    """Return the state before the first problem, which starts from ``params``.

    Args:
        params: ``[c, r + 1]`` kernel in the basis of a `Design`, and the bias in the last column.
        scores: zeros in place of `Point.scores`.
    """
    zeros, curvature = np.zeros_like(params), np.ones((len(params), 1), np.float32)
    unknown = Point(params, np.asarray(np.inf, np.float32), zeros, curvature, scores)
    return State(begin(unknown, zeros, empty_memory(params.shape)), params, zeros)


@jax.jit
def start(problem: Problem, state: State) -> Search:
    """Start at the last optimum, or where the last two lead if that is better."""
    point = state.search.point
    change = problem.penalty(problem.l2) - problem.penalty(problem.last_l2)
    point = point._replace(
        objective=point.objective + jnp.vdot(change * point.params, point.params) / 2,
        gradient=point.gradient + change * point.params,
    )
    guess = state.velocity * jnp.log(problem.last_l2 / problem.l2)
    return begin(point, guess, lower_penalty(state.search.memory, -change))


@jax.jit
def iterate(
    problem: Problem,
    search: Search,
    loss: Float[jax.Array, ""],
    gradient: Float[jax.Array, "c r+1"],
    curvature: Float[jax.Array, " c"],
    scores: Any = (),
) -> Search:
    """Continue a search with the loss at its trial.

    Args:
        problem: the problem.
        search: the search.
        loss: the objective without the penalty.
        gradient: its gradient.
        curvature: mean of p (1 - p) for each class.
        scores: see `Point`.
    """
    params, penalty = trial_params(search), problem.penalty(problem.l2)
    # Gradients of classes without examples are rounding errors.
    gradient = jnp.where(problem.is_present[:, None], gradient + penalty * params, 0)
    objective = loss + jnp.vdot(penalty * params, params) / 2
    trial = Point(params, objective, gradient, jnp.maximum(curvature, RARE)[:, None], scores)
    return advance(search, trial, lambda point: 1 / (problem.spectrum * point.curvature + penalty))


@jax.jit
def has_converged(problem: Problem, search: Search) -> Bool[jax.Array, ""]:
    """Return whether the objective is within the tolerance of its optimum; see `fit_logistic`."""
    point, penalty = search.point, problem.penalty(problem.l2)
    bound = jnp.sum(point.gradient**2 / jnp.where(penalty > 0, penalty, point.curvature)) / 2
    # At least one step: with a huge L2, the kernel of zeros is within any tolerance.
    return (bound <= problem.tolerance * point.objective) & (search.iterations > 0)


@jax.jit
def is_done(problem: Problem, search: Search) -> Bool[jax.Array, ""]:
    """Return whether a problem is solved, or has had all of its iterations."""
    return has_converged(problem, search) | (search.iterations >= problem.max_iterations)


def finish(problem: Problem, state: State, search: Search) -> State:
    """Return what the problem after this one starts from."""
    ratio, params = jnp.log(problem.last_l2 / problem.l2), search.point.params
    velocity = jnp.where(ratio > 0, (params - state.optimum) / ratio, state.velocity)
    return State(search, params, velocity)


def loop_on_host(
    condition: Callable[[Carry], Any], body: Callable[[Carry], Carry], carry: Carry
) -> Carry:
    """Loop as `jax.lax.while_loop` does, for a body that reads features from the host."""
    while condition(carry):
        carry = body(carry)
    return carry
