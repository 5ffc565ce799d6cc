"""Cropping and resizing on the device, for photographs that are not decoded for every crop."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Shaped

from tljax.runtime.types import Array

Interpolation = Literal["bilinear", "bicubic"]
"""Pillow filters that images are resized with."""


def crop_and_resize(
    images: Shaped[Array, "batch height width channels"],
    boxes: Float[Array, "batch 7"],
    size: int,
    interpolation: Interpolation = "bilinear",
) -> Shaped[jax.Array, "batch size size channels"]:
    """Crop a box of each photograph and resize it to a square, as Pillow's ``resize(box=...)``.

    Like Pillow's filter, it reads pixels beyond the box, but not beyond the photograph, and levels
    of 8 bits are rounded after each of the two passes. Width is resized before height, as by Pillow
    but for some tall images since its version 13: then a level of few pixels differs by one.

    Args:
        images: ``[batch, height, width, channels]`` photographs, each at the upper left of a
            canvas, uint8 or floating point.
        boxes: ``[batch, 7]`` top, left, height and width of each box, height and width of the
            photograph, in pixels, and 1 if the photograph is transposed, otherwise 0.
        size: side of the result, in pixels.
        interpolation: Pillow filter of the resize.

    Returns:
        ``[batch, size, size, channels]`` of the dtype of ``images``, not transposed.
    """
    # Gathers are slow on accelerators, where products cost nothing; CPUs take 3 to 10 times as long
    # for the products.
    return jax.lax.platform_dependent(
        jnp.asarray(images),
        jnp.asarray(boxes, jnp.float32),
        cpu=jax.vmap(partial(_resize, _gather, size, interpolation)),
        default=jax.vmap(partial(_resize, _multiply, size, interpolation)),
    )


_Pass = Callable[[jax.Array, int, "_Axis"], jax.Array]


class _Axis(NamedTuple):
    """How one axis is resized: the box along it, the end of the photograph, and the filter.

    Attributes:
        start: first pixel of the box.
        length: length of the box, in pixels.
        end: length of the photograph.
        size: length of the result.
        interpolation: Pillow filter.
    """

    start: jax.Array
    length: jax.Array
    end: jax.Array
    size: int
    interpolation: Interpolation

    @property
    def stride(self) -> jax.Array:
        """Return the distance between the centers of the filter, in pixels."""
        return self.length / self.size

    @property
    def centers(self) -> Float[jax.Array, " size"]:
        """Return the centers of the filter."""
        return self.start + (jnp.arange(self.size) + 0.5) * self.stride

    def weights(self, positions: Int[Array, "pixels ..."]) -> Float[jax.Array, "pixels size"]:
        """Compute the weight of the pixel at each position in each pixel of the result."""
        x = jnp.abs(positions + 0.5 - self.centers) / jnp.maximum(self.stride, 1)
        if self.interpolation == "bilinear":
            weights = jnp.maximum(1 - x, 0)
        else:  # the cubic of Keys 1981 with a = -0.5
            outer = ((2.5 - 0.5 * x) * x - 4) * x + 2
            weights = jnp.where(x < 1, (1.5 * x - 2.5) * x * x + 1, jnp.where(x < 2, outer, 0))
        end = jnp.maximum(self.end, 1)  # 0 in the padding of a batch
        weights = jnp.where((positions >= 0) & (positions < end), weights, 0)
        return weights / weights.sum(0)


def _resize(
    along: _Pass,
    size: int,
    interpolation: Interpolation,
    image: Shaped[jax.Array, "height width channels"],
    box: Float[jax.Array, "7"],
) -> Shaped[jax.Array, "size size channels"]:
    """Resize a box of an image, first along its rows, with a function for one axis."""
    top, left, height, width, full_height, full_width, transposed = box
    pixels = image
    for axis in (
        (1, _Axis(left, width, full_width, size, interpolation)),
        (0, _Axis(top, height, full_height, size, interpolation)),
    ):
        pixels = along(pixels, *axis)
        if image.dtype == jnp.uint8:
            pixels = jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)
    pixels = pixels.astype(image.dtype)
    return jnp.where(transposed > 0, pixels.swapaxes(0, 1), pixels)


def _multiply(pixels: jax.Array, number: int, axis: _Axis) -> jax.Array:
    """Resize one axis by a matrix product with the weights of all its pixels."""
    weights = axis.weights(jnp.arange(pixels.shape[number])[:, None])
    # Levels of 8 bits are exact in bfloat16, so that half the passes of an accelerator are enough.
    precision = "high" if pixels.dtype == jnp.uint8 else "highest"
    pixels = pixels.astype(jnp.float32)
    out = jnp.tensordot(weights, pixels, (0, number), precision=precision)
    return jnp.moveaxis(out, 0, number)


def _gather(pixels: jax.Array, number: int, axis: _Axis) -> jax.Array:
    """Resize one axis by gathering the few pixels that each pixel of the result depends on."""
    end, radius = pixels.shape[number], {"bilinear": 1, "bicubic": 2}[axis.interpolation]
    first = jnp.floor(axis.centers - radius * jnp.maximum(axis.stride, 1) + 0.5).astype(jnp.int32)
    positions = first + jnp.arange(math.ceil(2 * radius * max(end / axis.size, 1)))[:, None]
    out = jnp.zeros(())
    # One gather per tap: XLA takes 30 times as long to sum a single gather of all taps.
    for position, weight in zip(positions, axis.weights(positions), strict=True):
        tap = jnp.take(pixels, position, number, mode="clip")
        out += tap * jnp.expand_dims(weight, range(1, 3 - number))
    return out
