"""DeepFool: to the nearest linearised decision boundary, again and again."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tljax.attack.contract import LogitsFn, along, choose, compiled, prepare
from tljax.attack.losses import best_others, mean_logits
from tljax.attack.norms import Bounds, into_ball, norm_of
from tljax.runtime.types import Array


@partial(compiled, unbounded=True)
def deepfool(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    key: jax.Array,
    *,
    epsilon: Array | float = jnp.inf,
    ids: Array | None = None,
    norm: str = "l2",
    num_steps: int = 50,
    candidates: int = 10,
    overshoot: float = 0.02,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """A small perturbation that fools the network; its length measures robustness.

    Each step goes to the nearest of the linearised boundaries between the label and the other
    candidates; an example that is fooled stays where it is.

    Source: Moosavi-Dezfooli et al., "DeepFool: a simple and accurate method to fool deep neural
    networks", 2016 (arXiv 1511.04599), algorithm 2 and, for Linf, its section 3.3.

    Args:
        logits_fn: images to logits.
        images: ``[n, height, width, 3]``, or ``[n, ...]``, floating point within ``bounds``.
        labels: ``[n]`` int, the true classes.
        key: makes no difference.
        epsilon: what lies farther away is projected back; by default nothing is. One number, or
            ``[n]``.
        ids: make no difference.
        norm: "linf" or "l2".
        num_steps: at most.
        candidates: how many classes are looked at, the label included, the most probable first.
        overshoot: by how much of the whole perturbation to go beyond the boundary.
        bounds: smallest and largest value of a pixel.

    Raises:
        RequestError: an argument has the wrong shape or type.
    """
    images, labels, epsilon, _ = prepare(images, labels, key, epsilon, ids)
    ball = norm_of(norm)
    others = best_others(mean_logits(logits_fn, images), labels, candidates - 1)

    def linearise(x: jax.Array):
        """Logits, and for each candidate its lead over the label ``[c, n]`` and the gradient."""
        logits, pull = jax.vjp(lambda x: mean_logits(logits_fn, x), x)
        directions = jax.nn.one_hot(others.T, logits.shape[-1], dtype=logits.dtype)
        directions -= jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        return logits, jnp.sum(directions * logits, -1), jax.vmap(lambda d: pull(d)[0])(directions)

    def body(carry):
        number, (x, total, fooled) = carry
        logits, lead, gradient = linearise(x)
        fooled |= logits.argmax(-1) != labels
        # The lead grows by `slope` along the perturbation of length 1.
        unit = jax.vmap(ball.steepest)(gradient)
        slope = jnp.sum(unit * gradient, range(2, gradient.ndim))
        distance = jnp.where(slope > 0, jnp.abs(lead) / jnp.where(slope > 0, slope, 1), jnp.inf)
        nearest, row = distance.argmin(0), jnp.arange(len(x))
        length = distance[nearest, row]
        step = along(jnp.where(jnp.isfinite(length), length, 0), x) * unit[nearest, row]
        new = jnp.clip(images + (1 + overshoot) * (total + step), *bounds)
        moved = choose(fooled, (x, total), (new, total + step))
        return number + 1, (*moved, fooled)

    state = (images, jnp.zeros_like(images), jnp.zeros(len(images), bool))
    _, (x, _, _) = lax.while_loop(
        lambda carry: (carry[0] < num_steps) & ~carry[1][2].all(), body, (jnp.int32(0), state)
    )
    return into_ball(x, images, epsilon, ball, bounds)
