"""What gradient ascent may change about a picture: its pixels, or its Fourier coefficients.

Both are numbers without bounds that a sigmoid turns into an RGB picture in [0, 1]. The constants
are those of lucid, described by Olah, Mordvintsev and Schubert 2017 ("Feature Visualization").
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The square root of the covariance of the colours of ImageNet's pixels.
_COLOUR = np.array([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]])
_COLOUR_CORRELATION = _COLOUR / np.linalg.norm(_COLOUR, axis=0).max()


class Parametrization(NamedTuple):
    """A way to write a picture as parameters.

    Attributes:
        init: ``(key, size) -> params``, an array for a random square picture, nearly grey.
        image: ``(params, size) -> image``, ``[size, size, 3]`` RGB in [0, 1].
    """

    init: Callable[[jax.Array, int], jax.Array]
    image: Callable[[jax.Array, int], jax.Array]


def correlate_colours(x: jax.Array) -> jax.Array:
    """Independent colours to RGB that vary together as a photograph's do.

    Along the first axis lies brightness, by far the largest in photographs; gradient ascent in
    these coordinates does not paint everything in loud colours.

    Args:
        x: ``[..., 3]``, without bounds.

    Returns:
        ``[..., 3]`` RGB before the sigmoid.
    """
    return x @ jnp.asarray(_COLOUR_CORRELATION.T, x.dtype)


def _init_pixels(key: jax.Array, size: int) -> jax.Array:
    return 0.01 * jax.random.normal(key, (size, size, 3))


def _image_of_pixels(params: jax.Array, size: int) -> jax.Array:  # noqa: ARG001 - a Parametrization
    return jax.nn.sigmoid(params)


def _init_fourier(key: jax.Array, size: int) -> jax.Array:
    return 0.01 * jax.random.normal(key, (2, size, size // 2 + 1, 3))


def fourier_field(params: jax.Array, size: int) -> jax.Array:
    """The plane waves that the parameters are amplitudes of, summed.

    An amplitude counts the more the longer its wave, as in photographs, whose spectrum falls as one
    over the frequency.

    Args:
        params: ``[2, size, size // 2 + 1, channels]``: real and imaginary parts.
        size: of the picture, in pixels.

    Returns:
        ``[size, size, channels]``.
    """
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    scale = size / np.maximum(frequency, 1 / size)
    spectrum = jax.lax.complex(*params) * jnp.asarray(scale[..., None], params.dtype)
    return jnp.fft.irfft2(spectrum, (size, size), axes=(0, 1)) / 4


def _image_of_fourier(params: jax.Array, size: int) -> jax.Array:
    return jax.nn.sigmoid(correlate_colours(fourier_field(params, size)))


PIXELS = Parametrization(_init_pixels, _image_of_pixels)
"""One parameter for each value of the picture: what gradients make of it is full of fine noise."""

FOURIER = Parametrization(_init_fourier, _image_of_fourier)
"""Amplitudes of waves and decorrelated colours: the same pictures, but the steepest way up leads
first through broad shapes and natural colours."""
