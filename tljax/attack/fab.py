"""FAB: minimal perturbations by projections onto the linearized decision boundary."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tljax.attack.contract import choose, compiled, expand_like, prepare
from tljax.attack.losses import loss_and_gradient, mean_logits, top_other_classes
from tljax.attack.norms import get_norm, project_to_ball
from tljax.attack.types import Bounds, DeviceImages, Images, Labels, LogitsFn, PerExample, Values

_NEWTON_STEPS = 15  # upper limit; 3 to 6 are usual for this piecewise linear function


def project_onto_plane(
    points: DeviceImages, normal: DeviceImages, value: Values, norm: str, bounds: Bounds
) -> DeviceImages:
    """Find the nearest points within the bounds at which ``value + normal . (z - point)`` is 0.

    Each pixel moves towards the plane at a rate of 1 (Linf) or ``abs(normal)`` (L2) until it meets
    a bound. The decrease of the absolute value is concave and piecewise linear in the length of the
    movement, so Newton's method from 0 never overshoots and ends exactly.

    Args:
        points: ``[batch, ...]`` within the bounds.
        normal: ``[batch, ...]``, the gradient of the value.
        value: ``[batch]``, the value at the points.
        norm: "linf" or "l2".
        bounds: smallest and largest value of a pixel.

    Returns:
        ``[batch, ...]``; the corner of the bounds nearest to the plane if they do not intersect.
    """
    direction = -jnp.sign(normal) * expand_like(jnp.sign(value), normal)
    margin_to_bound = jnp.where(direction > 0, bounds[1] - points, points - bounds[0])
    weight = jnp.abs(normal)
    rate = jnp.where(weight > 0, 1.0, 0.0) if norm == "linf" else weight
    axes = range(1, points.ndim)

    def newton(carry):
        number, _, length = carry
        moved = expand_like(length, points) * rate
        slope = jnp.sum(jnp.where(moved < margin_to_bound, weight * rate, 0), axes)
        remaining = jnp.abs(value) - jnp.sum(weight * jnp.minimum(moved, margin_to_bound), axes)
        step = jnp.maximum(remaining, 0) / jnp.where(slope > 0, slope, 1)
        return number + 1, length, length + jnp.where(slope > 0, step, 0)

    def moving(carry):
        # A converged length no longer changes, however many steps the other examples need.
        number, previous, length = carry
        return (number == 0) | ((number < _NEWTON_STEPS) & (previous != length).any())

    start = jnp.zeros_like(value)
    *_, length = lax.while_loop(moving, newton, (jnp.int32(0), start, start))
    return points + direction * jnp.minimum(expand_like(length, points) * rate, margin_to_bound)


@partial(compiled, unbounded=True)
def fab_t(
    logits_fn: LogitsFn,
    images: Images,
    labels: Labels,
    key: jax.Array,
    *,
    epsilon: PerExample,
    ids: Labels | None = None,
    norm: str = "linf",
    num_steps: int = 100,
    num_targets: int = 9,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    stop_early: bool = False,
    bounds: Bounds = (0.0, 1.0),
) -> DeviceImages:
    """Search the nearest adversarial image, towards several target classes (FAB-T).

    FAB is the fast adaptive boundary attack. Each step projects the iterate and the original image
    onto the linearized boundary between label and target, and moves to a point between the two
    projections, slightly beyond the boundary. From a misclassified point it moves back towards the
    original image.

    Source: Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary
    attack", 2020 (arXiv 1907.02044), algorithm 1 without restarts.

    Args:
        logits_fn: maps images ``[batch, ...]`` to logits ``[batch, classes]``.
        images: ``[batch, height, width, 3]`` or any ``[batch, ...]``, floating point in ``bounds``.
        labels: ``[batch]`` integers, the true classes.
        key: unused; the attack is deterministic.
        epsilon: radius of the ball in the units of the images, one number or ``[batch]``. Results
            farther away are projected back. ``jnp.inf`` sets no limit.
        ids: unused; the attack is deterministic.
        norm: "linf" or "l2".
        num_steps: number of steps per target.
        num_targets: number of target classes, the most probable ones on the original image.
        alpha_max: largest weight of the original image's projection.
        eta: extrapolation of a step; 1 ends on the boundary.
        beta: fraction of the distance that is kept on the way back from a misclassified point.
        stop_early: stop when all examples are fooled within epsilon.
        bounds: smallest and largest value of a pixel; images must lie within them.

    Returns:
        The nearest misclassified image, or the original image if none was found.

    Raises:
        RequestError: an argument has the wrong shape or dtype, or a value out of range.
    """
    images, labels, epsilon, _ = prepare(images, labels, key, epsilon, ids)
    ball = get_norm(norm)
    logits = mean_logits(logits_fn, images)
    ranked = top_other_classes(logits, labels, num_targets)
    project = partial(project_onto_plane, norm=norm, bounds=bounds)

    def step(x: jax.Array, nearest: jax.Array, distance: jax.Array, target: jax.Array):
        def difference(logits: jax.Array) -> jax.Array:
            pair = jnp.stack([target, labels], axis=1)
            pair_logits = jnp.take_along_axis(logits, pair, axis=1)
            return pair_logits[:, 0] - pair_logits[:, 1]

        value, normal, _ = loss_and_gradient(logits_fn, difference, x)
        from_image = value + jnp.sum(normal * (images - x), range(1, x.ndim))
        step_x = project(x, normal, value) - x
        step_image = project(images, normal, from_image) - images
        lengths = ball.length(step_x), ball.length(step_image)
        total = lengths[0] + lengths[1]
        alpha = jnp.minimum(lengths[0] / jnp.where(total > 0, total, 1), alpha_max)
        alpha = expand_like(alpha, x)
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
        return number + 1, choose(active(state), new, state)

    def active(state) -> jax.Array:
        fooled = state[2] <= epsilon
        return ~fooled if stop_early else jnp.ones_like(fooled)

    wrong = logits.argmax(-1) != labels
    distance = jnp.where(wrong, 0, jnp.inf).astype(images.dtype)
    last = num_steps * ranked.shape[1]
    _, (_, nearest, _) = lax.while_loop(
        lambda carry: (carry[0] < last) & active(carry[1]).any(),
        body,
        (jnp.int32(0), (images, images, distance)),
    )
    return project_to_ball(nearest, images, epsilon, ball, bounds)
