"""Small random movements: what a network must still recognise in another place is no fine noise."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


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
    height, width = image.shape[:2]
    extent = jnp.array([height, width])
    centre = (extent - 1) / 2
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1)
    position = (grid - centre) @ matrix.T + centre + shift
    coordinates = [position[..., 0], position[..., 1]]
    sample = partial(map_coordinates, coordinates=coordinates, order=1, mode="constant", cval=0.5)
    return jax.vmap(sample, -1, -1)(image)
