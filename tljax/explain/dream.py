"""DeepDream: amplify the features that a network detects in an image."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from tljax.explain.gradients import Images, as_images
from tljax.explain.visualize import Objective
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array


def mean_square(features_fn: Callable[[jax.Array], jax.Array]) -> Objective:
    """Return an objective for `deep_dream`: the mean square of a feature map.

    Args:
        features_fn: maps images of any size to ``[batch, h, w, channels]``.

    Returns:
        A function from images to ``[batch]`` values.
    """
    return lambda images: jnp.square(features_fn(images)).mean((1, 2, 3))


def deep_dream(
    objective: Objective,
    images: Images,
    *,
    num_octaves: int = 3,
    octave_scale: float = 1.4,
    num_steps: int = 20,
    step_size: float | Array = 0.005,
    multiple: int = 1,
) -> Float[jax.Array, "batch height width channels"]:
    """Maximize an objective by gradient ascent on images, from coarse to fine.

    The ascent starts from a downscaled copy, so that large shapes appear first. After each
    upscaling the detail that the image lost by downscaling is added back. Each step follows the
    gradient divided by its mean absolute value. The result is deterministic.

    Source: Mordvintsev, Olah and Tyka, "Inceptionism: going deeper into neural networks", Google
    Research blog, 2015.

    Args:
        objective: maps images of any size to ``[batch]`` values, which are maximized.
        images: ``[batch, height, width, 3]`` floating point in [0, 1].
        num_octaves: number of sizes, including the original one.
        octave_scale: ratio between consecutive sizes.
        num_steps: number of gradient steps at each size.
        step_size: mean absolute change of a pixel value per step, for values in [0, 1]. The default
            corresponds to the usual 0.01 for inputs in [-1, 1].
        multiple: smaller sizes are rounded down to multiples of this number of pixels; pass the
            side of a patch for a network that divides images into patches.

    Returns:
        ``[batch, height, width, 3]`` in [0, 1].

    Raises:
        RequestError: ``num_octaves`` is 0, or the smallest size is less than one pixel or
            ``multiple``.
    """
    images = as_images(images)
    batch, height, width, channels = images.shape

    def shrink(side: int, octave: int) -> int:
        return int(side / octave_scale**octave) // multiple * multiple if octave else side

    sizes = [(shrink(height, i), shrink(width, i)) for i in reversed(range(num_octaves))]
    if not sizes or min(map(min, sizes)) < 1:
        raise RequestError(
            f"{num_octaves} octaves of scale {octave_scale} are impossible for {height} x {width} "
            "pixels: choose fewer, but at least one"
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
"""Lower limit of the mean absolute gradient, so that rounding errors are not amplified."""
