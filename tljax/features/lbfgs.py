"""L-BFGS that asks for one evaluation of the objective after another.

A search says where it wants the objective, `trial_params`, and is told it by `advance`. Who
evaluates it, in a compiled loop or from a disk, is not its concern. Nearly always one evaluation is
one iteration: the initial inverse Hessian is so good that a step of length 1 is mostly accepted.

Source: L-BFGS with a variable initial matrix, Nocedal and Wright, *Numerical Optimization*, 2nd
edition, algorithm 7.4.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from tljax.runtime.types import Array

HISTORY = 10  # number of pairs in the memory
_TRIALS = 10  # largest number of evaluations in a line search
_SLOPE = 0.9  # a step is long enough when the slope is below this share of the initial slope
_ROUNDING = 1e-6  # relative error of an objective


class Memory(NamedTuple):
    """The last ``m`` pairs of L-BFGS.

    Attributes:
        steps: ``[m, c, r]`` ring buffer: pair ``i`` is in entry ``i % m``.
        changes: ``[m, c, r]`` changes of the gradient along the steps.
        rho: ``[m]`` 1 / <step, change>; 0 for a pair that is not used.
        num_pairs: number of pairs written so far.
    """

    steps: Float[Array, "m c r"]
    changes: Float[Array, "m c r"]
    rho: Float[Array, " m"]
    num_pairs: Int[Array, ""]


def empty_memory(shape: tuple[int, ...]) -> Memory:
    """Return a memory without pairs, for parameters of a shape ``(c, r)``."""
    ring = np.zeros((HISTORY, *shape), np.float32)
    return Memory(ring, ring, np.zeros(HISTORY, np.float32), np.zeros((), np.int32))


def remember(memory: Memory, step: Array, change: Array, is_new: Array) -> Memory:
    """Put a step and the change of the gradient along it in the place of the oldest pair.

    A step of length 0 means that the memory gave a bad direction: its pairs are then not used.
    Without ``is_new``, nothing changes.
    """
    product = jnp.vdot(step, change)
    # A product within rounding error of 0 would make the direction far too long.
    usable = product > 1e-6 * jnp.linalg.norm(step) * jnp.linalg.norm(change)
    entry = memory.num_pairs % HISTORY
    rho = jnp.asarray(memory.rho).at[entry].set(jnp.where(usable, 1 / product, 0))
    rho = jnp.where(jnp.any(step != 0), rho, 0)

    def write(ring, value):
        # Only the entry is selected: a selected ring would be a copy of it.
        return jnp.asarray(ring).at[entry].set(jnp.where(is_new, value, ring[entry]))

    return Memory(
        write(memory.steps, step),
        write(memory.changes, change),
        jnp.where(is_new, rho, memory.rho),
        memory.num_pairs + is_new,
    )


def lower_penalty(memory: Memory, difference: Array) -> Memory:
    """Correct the changes of the gradient for a penalty that is smaller by ``difference``."""
    changes = memory.changes - difference * memory.steps
    product = jnp.sum(memory.steps * changes, (1, 2))
    usable = (memory.rho > 0) & (product > 0)
    return memory._replace(changes=changes, rho=jnp.where(usable, 1 / product, 0))


def lbfgs_direction(gradient: Array, memory: Memory, inverse_hessian: Array) -> Float[Array, "c r"]:
    """Compute minus the L-BFGS inverse Hessian times the gradient, by the two-loop recursion."""
    newest = (memory.num_pairs - 1) % HISTORY
    order = (newest - jnp.arange(HISTORY)) % HISTORY
    steps, changes, rho = memory.steps, memory.changes, memory.rho

    def subtract(vector, i):
        alpha = rho[i] * jnp.vdot(steps[i], vector)
        return vector - alpha * changes[i], alpha

    def add(vector, i_alpha):
        i, alpha = i_alpha
        return vector + (alpha - rho[i] * jnp.vdot(changes[i], vector)) * steps[i], None

    vector, alphas = jax.lax.scan(subtract, gradient, order)
    # The initial matrix is accurate up to a factor, which the newest pair determines.
    scale = rho[newest] * jnp.vdot(changes[newest], inverse_hessian * changes[newest])
    vector = inverse_hessian * vector / jnp.where(scale > 0, scale, 1)
    vector, _ = jax.lax.scan(add, vector, (order, alphas), reverse=True)
    return -vector


class Point(NamedTuple):
    """Parameters and what was evaluated there.

    Attributes:
        params: ``[c, r]``.
        objective: positive.
        gradient: ``[c, r]`` gradient of the objective.
        curvature: ``[c, 1]`` what the initial inverse Hessian depends on.
        scores: what else was summed there.
    """

    params: Float[Array, "c r"]
    objective: Float[Array, ""]
    gradient: Float[Array, "c r"]
    curvature: Float[Array, "c 1"]
    scores: Any = ()


class Search(NamedTuple):
    """L-BFGS between two evaluations.

    Attributes:
        point: the point that was reached.
        direction: ``[c, r]`` of the line search from there.
        slope: derivative of the objective along the direction.
        length: step length of the trial.
        low: largest length so far at which the objective still decreases.
        high: smallest length so far at which it increases.
        last: length of the trial before, and the slope there.
        trials: number of trials in this line search.
        memory: pairs from this search and from earlier ones.
        iterations: number of line searches, without the initial guess.
    """

    point: Point
    direction: Float[Array, "c r"]
    slope: Float[Array, ""]
    length: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    last: tuple[Float[Array, ""], Float[Array, ""]]
    trials: Int[Array, ""]
    memory: Memory
    iterations: Int[Array, ""]


def begin(point: Point, guess: Float[Array, "c r"], memory: Memory) -> Search:
    """Start a search whose first trial is ``point.params + guess``, and its only one if worse."""
    zero, one, infinity = (np.asarray(x, np.float32) for x in (0, 1, np.inf))
    trials, iterations = np.asarray(_TRIALS - 1, np.int32), np.asarray(-1, np.int32)
    return Search(point, guess, zero, one, zero, infinity, (zero, zero), trials, memory, iterations)


def trial_params(search: Search) -> Float[Array, "c r"]:
    """Return the parameters at which the search wants the objective evaluated."""
    return search.point.params + search.length * search.direction


def advance(
    search: Search, trial: Point, inverse_hessian: Callable[[Point], Float[Array, "c r"]]
) -> Search:
    """Continue a search with what was evaluated at its trial.

    Slopes decide about the length of a step, since close to the optimum an objective differs from
    the last one by less than its rounding error.

    Args:
        search: the search.
        trial: the evaluation at `trial_params`.
        inverse_hessian: maps a point to the diagonal ``[c, r]`` of an inverse Hessian.
    """
    point, length = search.point, search.length
    slope = jnp.vdot(trial.gradient, search.direction)
    is_lower = trial.objective <= point.objective * (1 + _ROUNDING)
    is_accurate = jnp.abs(slope) <= _SLOPE * jnp.abs(search.slope)
    trials = search.trials + 1
    done = (is_lower & is_accurate) | (trials >= _TRIALS) | (length == 0)

    # After the last trial: a step, or none if it leads nowhere. Either way it says how the gradient
    # changes along the direction.
    step = trial.params - point.params
    memory = remember(search.memory, step, trial.gradient - point.gradient, done)
    point = jax.tree.map(partial(jnp.where, done & is_lower), trial, point)
    direction = lbfgs_direction(point.gradient, memory, inverse_hessian(point))
    initial_slope = jnp.vdot(point.gradient, direction)
    zero = jnp.zeros(())
    following = Search(
        point, direction, initial_slope,
        jnp.where(initial_slope < 0, 1.0, 0.0),  # rounding can make the slope positive
        zero, jnp.full((), jnp.inf), (zero, initial_slope), jnp.zeros_like(trials), memory,
        search.iterations + 1,
    )  # fmt: skip

    # Before it: another length, from a secant of the slope within the bracket.
    low, high = jnp.where(slope < 0, length, search.low), jnp.where(slope < 0, search.high, length)
    last_length, last_slope = search.last
    secant = length - slope * (length - last_length) / (slope - last_slope)
    middle = jnp.where(jnp.isinf(high), 10 * length, (low + high) / 2)
    secant = jnp.where((low < secant) & (secant < jnp.minimum(high, 10 * length)), secant, middle)
    is_last = trials == _TRIALS - 1
    refined = search._replace(
        point=point, memory=memory, length=jnp.where(is_last, low, secant),
        low=low, high=high, last=(length, slope), trials=trials,
    )  # fmt: skip
    return jax.tree.map(
        lambda new, old: new if new is old else jnp.where(done, new, old), following, refined
    )
