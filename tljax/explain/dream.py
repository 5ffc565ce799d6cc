"""DeepDream: a photograph in which a network sees more and more of what it knows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tljax.explain.gradients import as_images
from tljax.explain.visualize import Objective
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array


def mean_square(features_fn: Callable[[jax.Array], jax.Array]) -> Objective:
    """The mean square of a feature map: whatever a stage sees, see more of it.

    Args:
        features_fn: images of any size to ``[batch, h, w, channels]``.
    """
    return lambda images: jnp.square(features_fn(images)).mean((1, 2, 3))


def deep_dream(
    objective: Objective,
    images: Array,
    *,
    num_octaves: int = 3,
    octave_scale: float = 1.4,
    num_steps: int = 20,
    step_size: float | Array = 0.005,
) -> jax.Array:
    """Gradient ascent on photographs, from coarse to fine (Mordvintsev, Olah and Tyka 2015).

    It starts on a shrunk copy, so that large shapes come first. Each enlargement is given back the
    detail that the photograph lost by shrinking. A step follows the gradient divided by its own
    mean absolute value. Nothing is random.

    Args:
        objective: images of any size to ``[batch]``: what is to become large.
        images: ``[batch, height, width, 3]`` floating point, [0, 1].
        num_octaves: sizes, the photograph's own included.
        octave_scale: between one size and the next.
        num_steps: at each size.
        step_size: mean absolute change of a value in a step, in [0, 1]; the default is the 0.01 of
            networks that see [-1, 1].

    Returns:
        ``[batch, height, width, 3]`` in [0, 1].

    Raises:
        RequestError: the smallest size would be less than a pixel.
    """
    images = as_images(images)
    batch, height, width, channels = images.shape
    sizes = [
        (int(height / octave_scale**i), int(width / octave_scale**i))
        for i in reversed(range(num_octaves))
    ]
    if not sizes or min(map(min, sizes)) < 1:
        raise RequestError(
            f"{num_octaves} octaves of {octave_scale} leave nothing of {height} x {width} pixels; "
            "ask for fewer, but at least one"
        )

    def resized(x: jax.Array, size: tuple[int, int]) -> jax.Array:
        return jax.image.resize(x, (batch, *size, channels), "bilinear")

    def step(_: int, x: jax.Array) -> jax.Array:
        gradient = jax.grad(lambda x: objective(x).sum())(x)
        mean = jnp.abs(gradient).mean((1, 2, 3), keepdims=True)
        return jnp.clip(x + step_size * gradient / jnp.maximum(mean, _NO_GRADIENT), 0, 1)

    shrunk = dream = resized(images, sizes[0])
    for size in sizes:
        original = resized(images, size)
        dream = jnp.clip(resized(dream, size) + original - resized(shrunk, size), 0, 1)
        dream = jax.lax.fori_loop(0, num_steps, step, dream)
        shrunk = original
    return dream


_NO_GRADIENT = 1e-12
"""Below this mean there is nothing to follow; rounding must not become a picture."""
