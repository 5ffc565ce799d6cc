"""DeepFool: repeated steps to the nearest linearized decision boundary."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tljax.attack.contract import choose, compiled, expand_like, prepare
from tljax.attack.losses import mean_logits, top_other_classes
from tljax.attack.norms import get_norm, project_to_ball
from tljax.attack.types import Bounds, DeviceImages, Images, Labels, LogitsFn, PerExample


@partial(compiled, unbounded=True)
def deepfool(
    logits_fn: LogitsFn,
    images: Images,
    labels: Labels,
    key: jax.Array,
    *,
    epsilon: PerExample = jnp.inf,
    ids: Labels | None = None,
    norm: str = "l2",
    num_steps: int = 50,
    candidates: int = 10,
    overshoot: float = 0.02,
    bounds: Bounds = (0.0, 1.0),
) -> DeviceImages:
    """Find a small perturbation that fools the network (DeepFool); its norm measures robustness.

    Each step moves to the nearest of the linearized decision boundaries between the label and the
    other candidates. An example is no longer changed once it is fooled.

    Source: Moosavi-Dezfooli et al., "DeepFool: a simple and accurate method to fool deep neural
    networks", 2016 (arXiv 1511.04599), algorithm 2 and, for Linf, its section 3.3.

    Args:
        logits_fn: maps images ``[batch, ...]`` to logits ``[batch, classes]``.
        images: ``[batch, height, width, 3]`` or any ``[batch, ...]``, floating point in ``bounds``.
        labels: ``[batch]`` integers, the true classes.
        key: unused; the attack is deterministic.
        epsilon: radius of the ball in the units of the images, one number or ``[batch]``. Results
            farther away are projected back. The default is no limit.
        ids: unused; the attack is deterministic.
        norm: "linf" or "l2".
        num_steps: largest number of steps.
        candidates: number of classes to consider, including the label, the most probable first.
        overshoot: fraction of the perturbation that is added to cross the boundary.
        bounds: smallest and largest value of a pixel; images must lie within them.

    Returns:
        The last iterate, which fools the network unless ``num_steps`` or ``epsilon`` is too small.

    Raises:
        RequestError: an argument has the wrong shape or dtype, or a value out of range.
    """
    images, labels, epsilon, _ = prepare(images, labels, key, epsilon, ids)
    ball = get_norm(norm)
    others = top_other_classes(mean_logits(logits_fn, images), labels, candidates - 1)

    def body(carry):
        number, (x, total, fooled) = carry
        logits, pull = jax.vjp(lambda x: mean_logits(logits_fn, x), x)
        # The lead of each candidate over the label, [candidates, batch], and its gradient.
        directions = jax.nn.one_hot(others.T, logits.shape[-1], dtype=logits.dtype)
        directions -= jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        lead = jnp.sum(directions * logits, -1)
        gradient = jax.vmap(lambda d: pull(d)[0])(directions)
        fooled |= logits.argmax(-1) != labels
        # The lead grows by `slope` along the perturbation of length 1.
        unit = jax.vmap(ball.steepest)(gradient)
        slope = jnp.sum(unit * gradient, range(2, gradient.ndim))
        distance = jnp.where(slope > 0, jnp.abs(lead) / jnp.where(slope > 0, slope, 1), jnp.inf)
        nearest, row = distance.argmin(0), jnp.arange(len(x))
        length = distance[nearest, row]
        step = expand_like(jnp.where(jnp.isfinite(length), length, 0), x) * unit[nearest, row]
        new = jnp.clip(images + (1 + overshoot) * (total + step), *bounds)
        moved = choose(fooled, (x, total), (new, total + step))
        return number + 1, (*moved, fooled)

    state = (images, jnp.zeros_like(images), jnp.zeros(len(images), bool))
    _, (x, _, _) = lax.while_loop(
        lambda carry: (carry[0] < num_steps) & ~carry[1][2].all(), body, (jnp.int32(0), state)
    )
    return project_to_ball(x, images, epsilon, ball, bounds)
