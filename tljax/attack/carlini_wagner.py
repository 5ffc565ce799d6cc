"""The L2 attack of Carlini and Wagner: minimal perturbations by Adam and a binary search."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from tljax.attack.contract import choose, compiled, prepare
from tljax.attack.losses import loss_and_gradient, make_goal
from tljax.attack.norms import get_norm, project_to_ball
from tljax.attack.types import Bounds, DeviceImages, Images, Labels, LogitsFn, PerExample

_SHRINK = 0.999999  # scales pixels into (-1, 1), where the inverse of tanh is finite
_CHECKS = 10  # number of checks for progress in each round of the search


class _Search(NamedTuple):
    """State of the binary search: the nearest adversarial image and the interval of constants."""

    nearest: jax.Array
    distance: jax.Array
    constant: jax.Array
    low: jax.Array
    high: jax.Array


@partial(compiled, unbounded=True)
def carlini_wagner(
    logits_fn: LogitsFn,
    images: Images,
    labels: Labels,
    key: jax.Array,
    *,
    epsilon: PerExample = jnp.inf,
    ids: Labels | None = None,
    targets: Labels | None = None,
    num_steps: int = 1000,
    search_steps: int = 9,
    learning_rate: float = 0.01,
    first_constant: float = 1e-3,
    confidence: float = 0.0,
    abort_early: bool = True,
    bounds: Bounds = (0.0, 1.0),
) -> DeviceImages:
    """Minimize the L2 norm of a perturbation that fools the network (the C&W attack).

    Adam minimizes ``norm ** 2 + constant * max(0, confidence - margin)`` over images ``tanh(w)``,
    scaled to the bounds; see `tljax.attack.losses.margin`. The constant is multiplied by 10 until
    the attack succeeds and is then found by bisection, for each example separately.

    Source: Carlini and Wagner, "Towards evaluating the robustness of neural networks", 2017
    (arXiv 1608.04644), section VI.A.

    Args:
        logits_fn: maps images ``[batch, ...]`` to logits ``[batch, classes]``.
        images: ``[batch, height, width, 3]`` or any ``[batch, ...]``, floating point in ``bounds``.
        labels: ``[batch]`` integers, the true classes.
        key: unused; the attack is deterministic.
        epsilon: L2 radius in the units of the images, one number or ``[batch]``. Results farther
            away are projected back. The default is no limit.
        ids: unused; the attack is deterministic.
        targets: ``[batch]`` integers, the classes to be predicted; by default any but the label.
        num_steps: number of steps of Adam in each round of the search.
        search_steps: number of rounds.
        learning_rate: learning rate of Adam, for ``w``.
        first_constant: first value of the constant.
        confidence: required margin of the wrong class, in logits.
        abort_early: end a round for an example when a tenth of the steps improves the loss by less
            than 0.01%. This is faster, with slightly larger perturbations.
        bounds: smallest and largest value of a pixel; images must lie within them.

    Returns:
        The nearest image that fools the network, or the original image if none was found.

    Raises:
        RequestError: an argument has the wrong shape or dtype, or a value out of range.
    """
    images, labels, epsilon, _ = prepare(images, labels, key, epsilon, ids)
    goal, ball = make_goal("margin", labels, targets), get_norm("l2")
    adam = optax.adam(learning_rate)
    center, half = (bounds[1] + bounds[0]) / 2, (bounds[1] - bounds[0]) / 2
    origin = jnp.arctanh(jnp.clip((images - center) / half, -1, 1) * _SHRINK)
    check_interval = max(1, num_steps // _CHECKS)

    def to_image(change: jax.Array) -> jax.Array:
        return jnp.tanh(origin + change) * half + center

    def objective(logits: jax.Array, constant: jax.Array) -> jax.Array:
        return -constant * jnp.maximum(confidence - goal.objective(logits), 0)

    def descend(search: _Search) -> tuple[_Search, jax.Array]:
        """Run one round of Adam with fixed constants."""

        def body(carry):
            number, (change, moments, search, success, checked_loss, active) = carry
            x, pull = jax.vjp(to_image, change)
            current = loss_and_gradient(logits_fn, partial(objective, constant=search.constant), x)
            delta = x - to_image(jnp.zeros_like(change))
            loss = jnp.sum(delta**2, range(1, x.ndim)) - current.loss
            # Adam is elementwise, so the examples are independent of each other.
            step, moments = adam.update(pull(2 * delta - current.gradient)[0], moments)
            x = jnp.clip(x, *bounds)
            fooled = goal.reached(current.logits) & (goal.objective(current.logits) >= confidence)
            distance = ball.length(x - images)
            closer = fooled & active & (distance < search.distance)
            nearest, distance = choose(closer, (x, distance), (search.nearest, search.distance))
            check = jnp.asarray(abort_early) & (number % check_interval == 0)
            active &= ~check | (loss <= 0.9999 * checked_loss)
            checked_loss = jnp.where(check, loss, checked_loss)
            search = search._replace(nearest=nearest, distance=distance)
            success |= fooled & active
            state = (change + step, moments, search, success, checked_loss, active)
            return number + 1, state

        zeros = jnp.zeros_like(images)
        infinite = jnp.full_like(search.distance, jnp.inf)
        all_active = jnp.ones(len(images), bool)
        state = (zeros, adam.init(zeros), search, ~all_active, infinite, all_active)
        _, state = lax.while_loop(
            lambda carry: (carry[0] < num_steps) & carry[1][-1].any(), body, (jnp.int32(0), state)
        )
        return state[2], state[3]

    def bisect(_, search: _Search) -> _Search:
        search, success = descend(search)
        high = jnp.where(success, search.constant, search.high)
        low = jnp.where(success, search.low, search.constant)
        constant = jnp.where(jnp.isinf(high), search.constant * 10, (low + high) / 2)
        return search._replace(constant=constant, low=low, high=high)

    each = jnp.zeros(len(images), images.dtype)
    start = _Search(images, each + jnp.inf, each + first_constant, each, each + jnp.inf)
    nearest = lax.fori_loop(0, search_steps, bisect, start).nearest
    return project_to_ball(nearest, images, epsilon, ball, bounds)
