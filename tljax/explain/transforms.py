"""Random geometric transformations that make feature visualization robust to fine noise."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Float

Image = Float[jax.Array, "height width channels"]


@dataclass(frozen=True)
class Transforms:
    """Ranges of the random translation, scaling, rotation and flip of an image. Hashable.

    The defaults are those of lucid (Olah, Mordvintsev and Schubert, "Feature visualization",
    Distill, 2017).

    Attributes:
        jitter: largest translation in each direction, in pixels.
        scale: images are scaled by a factor between ``1 - scale`` and ``1 + scale``.
        rotate: largest rotation in either direction, in degrees.
        flip: mirror images horizontally with probability 1/2.
    """

    jitter: float = 6
    scale: float = 0.1
    rotate: float = 10
    flip: bool = False

    def __call__(self, key: jax.Array, image: Image) -> Image:
        """Transform one image at random, by a single bilinear resampling.

        Args:
            key: random key.
            image: ``[height, width, channels]`` in [0, 1].

        Returns:
            ``[height, width, channels]`` in [0, 1]; 0.5 outside of the image.
        """
        if self == NO_TRANSFORMS:
            return image
        draws = jax.random.uniform(key, (5,), minval=-1.0)
        angle = jnp.deg2rad(self.rotate * draws[0])
        zoom = 1 + self.scale * draws[1]
        matrix = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
        if self.flip:
            matrix = matrix * jnp.where(draws[4] < 0, jnp.array([1, -1]), 1)
        return warp(image, matrix / zoom, self.jitter * draws[2:4])


DEFAULT_TRANSFORMS = Transforms()
"""The default ranges."""

NO_TRANSFORMS = Transforms(0, 0, 0)
"""No transformation."""


def warp(image: Image, matrix: Float[jax.Array, "2 2"], shift: Float[jax.Array, "2"]) -> Image:
    """Resample an image bilinearly on an affine grid.

    Args:
        image: ``[height, width, channels]`` in [0, 1].
        matrix: ``[2, 2]``, applied to positions (row, column) relative to the center.
        shift: ``[2]`` rows and columns, in pixels, added to the transformed positions.

    Returns:
        ``[height, width, channels]``, the image at these positions; 0.5 outside of it.
    """
    center = (jnp.array(image.shape[:2]) - 1) / 2
    grid = jnp.moveaxis(jnp.indices(image.shape[:2]), 0, -1)
    positions = (grid - center) @ matrix.T + center + shift
    coordinates = [positions[..., 0], positions[..., 1]]
    sample = partial(map_coordinates, coordinates=coordinates, order=1, mode="constant", cval=0.5)
    return jax.vmap(sample, -1, -1)(image)
