"""FAB: the nearest mistake, by steps onto the linearised decision boundary."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tljax.attack.contract import LogitsFn, along, choose, compiled, prepare
from tljax.attack.losses import ascent, best_others, mean_logits
from tljax.attack.norms import Bounds, into_ball, norm_of
from tljax.runtime.types import Array

_NEWTON_STEPS = 15  # of a piecewise linear function; it mostly ends after 3 to 6


def onto_plane(
    points: jax.Array, normal: jax.Array, value: jax.Array, norm: str, bounds: Bounds
) -> jax.Array:
    """The nearest points within the bounds at which ``value + normal . (z - point)`` is 0.

    Each pixel moves towards the plane in proportion to 1 (Linf) or ``abs(normal)`` (L2) until it
    meets a bound. What that gains is concave and piecewise linear in the length of the movement, so
    Newton's method from 0 never goes too far and ends exactly. Where the bounds hide the plane, the
    corner nearest to it.

    Args:
        points: ``[n, ...]`` within the bounds.
        normal: ``[n, ...]`` the gradient of the value.
        value: ``[n]`` at the points.
        norm: "linf" or "l2".
        bounds: smallest and largest value of a pixel.
    """
    direction = -jnp.sign(normal) * along(jnp.sign(value), normal)
    room = jnp.where(direction > 0, bounds[1] - points, points - bounds[0])
    weight = jnp.abs(normal)
    rate = jnp.where(weight > 0, 1.0, 0.0) if norm == "linf" else weight
    axes = range(1, points.ndim)

    def newton(carry):
        number, _, length = carry
        moved = along(length, points) * rate
        slope = jnp.sum(jnp.where(moved < room, weight * rate, 0), axes)
        lacking = jnp.abs(value) - jnp.sum(weight * jnp.minimum(moved, room), axes)
        step = jnp.maximum(lacking, 0) / jnp.where(slope > 0, slope, 1)
        return number + 1, length, length + jnp.where(slope > 0, step, 0)

    def moving(carry):
        # Who has arrived stays there, however long the others take.
        number, before, length = carry
        return (number == 0) | ((number < _NEWTON_STEPS) & (before != length).any())

    start = jnp.zeros_like(value)
    *_, length = lax.while_loop(moving, newton, (jnp.int32(0), start, start))
    return points + direction * jnp.minimum(along(length, points) * rate, room)


@partial(compiled, unbounded=True)
def fab_t(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    key: jax.Array,
    *,
    epsilon: Array | float,
    ids: Array | None = None,
    norm: str = "linf",
    num_steps: int = 100,
    num_targets: int = 9,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    stop_early: bool = False,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Fast adaptive boundary attack, towards each of the best other classes in turn.

    It knows no radius: it looks for the mistake nearest to the image. Each step projects the
    iterate and the image onto the linearised boundary between the label and the target and goes to
    a point between the two, a little beyond; from a mistake it goes back towards the image.

    Source: Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary
    attack", 2020 (arXiv 1907.02044), algorithm 1 without restarts.

    Args:
        logits_fn: images to logits.
        images: ``[n, height, width, 3]``, or ``[n, ...]``, floating point within ``bounds``.
        labels: ``[n]`` int, the true classes.
        key: makes no difference; FAB starts at the image.
        epsilon: what lies farther away is projected back and so fools nobody; ``jnp.inf`` asks for
            the nearest mistake wherever it is. One number, or ``[n]``.
        ids: make no difference.
        norm: "linf" or "l2".
        num_steps: for each target.
        num_targets: number of classes, counted from the most probable on the image itself.
        alpha_max: largest weight of the image's own projection.
        eta: how far beyond the boundary; 1 is onto it.
        beta: from a mistake, the share of its distance that is kept.
        stop_early: whether a mistake within epsilon ends the search.
        bounds: smallest and largest value of a pixel.

    Returns:
        The nearest mistake, or where none is known the image.

    Raises:
        RequestError: an argument has the wrong shape or type.
    """
    images, labels, epsilon, _ = prepare(images, labels, key, epsilon, ids)
    ball = norm_of(norm)
    logits = mean_logits(logits_fn, images)
    ranked = best_others(logits, labels, num_targets)
    per_target = partial(onto_plane, norm=norm, bounds=bounds)

    def step(x: jax.Array, nearest: jax.Array, distance: jax.Array, target: jax.Array):
        def difference(logits: jax.Array) -> jax.Array:
            pair = jnp.stack([target, labels], axis=1)
            at = jnp.take_along_axis(logits, pair, axis=1)
            return at[:, 0] - at[:, 1]

        here = ascent(logits_fn, difference, x)
        value, normal = here.loss, here.gradient
        from_image = value + jnp.sum(normal * (images - x), range(1, x.ndim))
        step_x = per_target(x, normal, value) - x
        step_image = per_target(images, normal, from_image) - images
        lengths = ball.length(step_x), ball.length(step_image)
        total = lengths[0] + lengths[1]
        alpha = jnp.minimum(lengths[0] / jnp.where(total > 0, total, 1), alpha_max)
        alpha = along(alpha, x)
        new = (1 - alpha) * (x + eta * step_x) + alpha * (images + eta * step_image)
        new = jnp.clip(new, *bounds)

        wrong = mean_logits(logits_fn, new).argmax(-1) != labels
        length = ball.length(new - images)
        closer = wrong & (length < distance)
        nearest, distance = choose(closer, (new, length), (nearest, distance))
        return choose(wrong, images + beta * (new - images), new), nearest, distance

    def body(carry):
        number, state = carry
        target = ranked[:, number // num_steps]
        x = jnp.where(number % num_steps == 0, images, state[0])
        new = step(x, state[1], state[2], target)
        return number + 1, choose(working(state), new, state)

    def working(state) -> jax.Array:
        found = state[2] <= epsilon
        return ~found if stop_early else jnp.ones_like(found)

    wrong = logits.argmax(-1) != labels
    distance = jnp.where(wrong, 0, jnp.inf).astype(images.dtype)
    last = num_steps * ranked.shape[1]
    _, (_, nearest, _) = lax.while_loop(
        lambda carry: (carry[0] < last) & working(carry[1]).any(),
        body,
        (jnp.int32(0), (images, images, distance)),
    )
    return into_ball(nearest, images, epsilon, ball, bounds)
