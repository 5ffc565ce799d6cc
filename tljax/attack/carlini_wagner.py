"""Carlini and Wagner's L2 attack: the shortest perturbation, by Adam and a binary search."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from tljax.attack.contract import LogitsFn, choose, compiled, prepare
from tljax.attack.losses import ascent, goal
from tljax.attack.norms import Bounds, into_ball, norm_of
from tljax.runtime.types import Array

_INSIDE = 0.999999  # of (-1, 1), so that the inverse of tanh is finite
_CHECKS = 10  # for progress, in each round of the search


class _Search(NamedTuple):
    """Of each example: the shortest perturbed image, and the constants to search between."""

    nearest: jax.Array
    distance: jax.Array
    constant: jax.Array
    low: jax.Array
    high: jax.Array


@partial(compiled, unbounded=True)
def carlini_wagner(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    key: jax.Array,
    *,
    epsilon: Array | float = jnp.inf,
    ids: Array | None = None,
    targets: Array | None = None,
    num_steps: int = 1000,
    search_steps: int = 9,
    learning_rate: float = 0.01,
    first_constant: float = 1e-3,
    confidence: float = 0.0,
    abort_early: bool = True,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """A perturbation of small L2 norm that fools the network, found slowly and well.

    Adam minimises ``norm ** 2 + constant * max(0, confidence - margin)`` over images
    ``tanh(w)``, scaled to the bounds; the margin is that of the mistake over the best other class.
    The constant grows tenfold until an example is fooled and is then searched by bisection, for
    each example by itself.

    Source: Carlini and Wagner, "Towards evaluating the robustness of neural networks", 2017
    (arXiv 1608.04644), section VI.A.

    Args:
        logits_fn: images to logits.
        images: ``[n, height, width, 3]``, or ``[n, ...]``, floating point within ``bounds``.
        labels: ``[n]`` int, the true classes.
        key: makes no difference.
        epsilon: L2 radius; what lies farther away is projected back; by default nothing is. One
            number, or ``[n]``.
        ids: make no difference.
        targets: ``[n]`` int, the classes wanted instead; by default any but the label.
        num_steps: of Adam, in each round.
        search_steps: number of rounds.
        learning_rate: of Adam, in the space of ``w``.
        first_constant: of the search.
        confidence: margin of the mistake, in logits.
        abort_early: whether a round ends for an example when a tenth of its steps improved the loss
            by less than 0.01%: sooner, and a little farther away.
        bounds: smallest and largest value of a pixel.

    Returns:
        The nearest image that fools the network; the image itself where none was found.

    Raises:
        RequestError: an argument has the wrong shape or type.
    """
    images, labels, epsilon, _ = prepare(images, labels, key, epsilon, ids)
    aim, ball, adam = goal("margin", labels, targets), norm_of("l2"), optax.adam(learning_rate)
    centre, half = (bounds[1] + bounds[0]) / 2, (bounds[1] - bounds[0]) / 2
    origin = jnp.arctanh(jnp.clip((images - centre) / half, -1, 1) * _INSIDE)
    every = max(1, num_steps // _CHECKS)

    def to_image(change: jax.Array) -> jax.Array:
        return jnp.tanh(origin + change) * half + centre

    def objective(logits: jax.Array, constant: jax.Array) -> jax.Array:
        return -constant * jnp.maximum(confidence - aim.objective(logits), 0)

    def descend(search: _Search) -> tuple[_Search, jax.Array]:
        """One round: Adam with the constants as they are."""

        def body(carry):
            number, (change, moments, search, found, checked, going) = carry
            x, pull = jax.vjp(to_image, change)
            here = ascent(logits_fn, partial(objective, constant=search.constant), x)
            away = x - to_image(jnp.zeros_like(change))
            loss = jnp.sum(away**2, range(1, x.ndim)) - here.loss
            # Adam is elementwise: the examples do not know of each other.
            step, moments = adam.update(pull(2 * away - here.gradient)[0], moments)
            x = jnp.clip(x, *bounds)
            fooled = aim.reached(here.logits) & (aim.objective(here.logits) >= confidence)
            distance = ball.length(x - images)
            closer = fooled & going & (distance < search.distance)
            nearest, distance = choose(closer, (x, distance), (search.nearest, search.distance))
            check = jnp.asarray(abort_early) & (number % every == 0)
            going &= ~check | (loss <= 0.9999 * checked)
            checked = jnp.where(check, loss, checked)
            search = search._replace(nearest=nearest, distance=distance)
            state = (change + step, moments, search, found | (fooled & going), checked, going)
            return number + 1, state

        nothing = jnp.zeros_like(images)
        infinite = jnp.full_like(search.distance, jnp.inf)
        everyone = jnp.ones(len(images), bool)
        state = (nothing, adam.init(nothing), search, ~everyone, infinite, everyone)
        _, state = lax.while_loop(
            lambda carry: (carry[0] < num_steps) & carry[1][-1].any(), body, (jnp.int32(0), state)
        )
        return state[2], state[3]

    def bisect(_, search: _Search) -> _Search:
        search, found = descend(search)
        high = jnp.where(found, search.constant, search.high)
        low = jnp.where(found, search.low, search.constant)
        constant = jnp.where(jnp.isinf(high), search.constant * 10, (low + high) / 2)
        return search._replace(constant=constant, low=low, high=high)

    each = jnp.zeros(len(images), images.dtype)
    start = _Search(images, each + jnp.inf, each + first_constant, each, each + jnp.inf)
    nearest = lax.fori_loop(0, search_steps, bisect, start).nearest
    return into_ball(nearest, images, epsilon, ball, bounds)
