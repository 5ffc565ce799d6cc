"""Small random movements: what a network must still recognise in another place is no fine noise."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Transforms:
    """How far a picture moves before the network sees it. Hashable; all zero keeps it where it is.

    The defaults are those of lucid (Olah, Mordvintsev and Schubert 2017), jitter on both sides.

    Attributes:
        jitter: largest shift, in pixels, in each direction.
        scale: the picture is enlarged by a factor between ``1 - scale`` and ``1 + scale``.
        rotate: largest angle, in degrees, both ways.
        flip: whether every second picture, at random, is mirrored.
    """

    jitter: float = 6
    scale: float = 0.1
    rotate: float = 10
    flip: bool = False

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """Moves one picture at random, in a single bilinear resampling.

        Args:
            key: of the draws.
            image: ``[height, width, channels]``, [0, 1].

        Returns:
            ``[height, width, channels]``, [0, 1]; mid-grey where the picture does not reach.
        """
        if self == STILL:
            return image
        draws = jax.random.uniform(key, (5,), minval=-1.0)
        angle = jnp.deg2rad(self.rotate * draws[0])
        zoom = 1 + self.scale * draws[1]
        matrix = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
        if self.flip:
            matrix = matrix * jnp.where(draws[4] < 0, jnp.array([1, -1]), 1)
        return warp(image, matrix / zoom, self.jitter * draws[2:4])


MOVING = Transforms()
"""The usual movements."""

STILL = Transforms(0, 0, 0)
"""None at all."""


def warp(image: jax.Array, matrix: jax.Array, shift: jax.Array) -> jax.Array:
    """Samples a picture on a moved grid, bilinearly.

    Args:
        image: ``[height, width, channels]``, [0, 1].
        matrix: ``[2, 2]``, applied to positions (row, column) relative to the centre.
        shift: ``[2]`` rows and columns, in pixels, added after that.

    Returns:
        ``[height, width, channels]``: the picture at these positions; mid-grey outside of it.
    """
    height, width, channels = image.shape
    extent = jnp.array([height, width])
    centre = (extent - 1) / 2
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1)
    position = (grid - centre) @ matrix.T + centre + shift
    corner = jnp.floor(position).astype(int)
    pixels = image.reshape(-1, channels)
    moved = jnp.zeros_like(image)
    for offset in ((0, 0), (0, 1), (1, 0), (1, 1)):
        at = corner + jnp.array(offset)
        weight = jnp.prod(1 - jnp.abs(position - at), -1, keepdims=True)
        inside = jnp.all((at >= 0) & (at < extent), -1, keepdims=True)
        row, column = jnp.moveaxis(jnp.clip(at, 0, extent - 1), -1, 0)
        moved += weight * jnp.where(inside, pixels[row * width + column], 0.5)
    return moved
