"""The parts of L-BFGS that the solvers of probes share: memory, direction and line search."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

HISTORY = 10  # number of pairs in the memory


class Memory(NamedTuple):
    """The last ``m`` pairs of L-BFGS.

    Attributes:
        steps: ``[m, c, r]`` ring buffer: pair ``i`` is in entry ``i % m``.
        changes: ``[m, c, r]`` changes of the gradient along the steps.
        rho: ``[m]`` 1 / <step, change>; 0 for a pair that is not used.
        num_pairs: number of pairs written so far.
    """

    steps: Float[jax.Array, "m c r"]
    changes: Float[jax.Array, "m c r"]
    rho: Float[jax.Array, " m"]
    num_pairs: Int[jax.Array, ""]


def empty_memory(shape: tuple[int, ...]) -> Memory:
    """Return a memory without pairs, for parameters of a shape ``(c, r)``."""
    ring = jnp.zeros((HISTORY, *shape))
    return Memory(ring, ring, jnp.zeros(HISTORY), jnp.zeros((), int))


def remember(memory, step, change, length):
    """Add a step and the change of the gradient along it, in the place of the oldest pair.

    A step of length 0 means that the memory gave a bad direction: its pairs are then not used.
    """
    product = jnp.vdot(step, change)
    # A product within rounding error of 0 would make the direction far too long.
    usable = product > 1e-6 * jnp.linalg.norm(step) * jnp.linalg.norm(change)
    entry = memory.num_pairs % HISTORY
    rho = memory.rho.at[entry].set(jnp.where(usable, 1 / product, 0))
    return Memory(
        memory.steps.at[entry].set(step),
        memory.changes.at[entry].set(change),
        jnp.where(length > 0, rho, 0),
        memory.num_pairs + 1,
    )


def lower_penalty(memory, difference):
    """Correct the changes of the gradient for a penalty that is smaller by ``difference``."""
    changes = memory.changes - difference * memory.steps
    product = jnp.sum(memory.steps * changes, (1, 2))
    usable = (memory.rho > 0) & (product > 0)
    return memory._replace(changes=changes, rho=jnp.where(usable, 1 / product, 0))


def lbfgs_direction(gradient, memory, inverse_hessian):
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


def line_search(derivatives, initial_slope):
    """Find the step length that reduces the slope to a tenth, by bracketed Newton iteration.

    Args:
        derivatives: a function of the step length that returns the slope and its derivative.
        initial_slope: slope at length 0; the length is 0 if it is not negative.
    """

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
    # If the loop did not converge, the last trial may be far too long; the low end of the bracket
    # is not. If rounding makes the initial slope positive, the step length is 0.
    converged = jnp.abs(slope) <= 0.1 * jnp.abs(initial_slope)
    return jnp.where(initial_slope < 0, jnp.where(converged, length, low), 0)
