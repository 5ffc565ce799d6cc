"""Image parametrizations for gradient ascent: pixels or Fourier coefficients.

Both are unbounded numbers that a sigmoid maps to an RGB image in [0, 1]. The constants are those of
lucid (Olah, Mordvintsev and Schubert, "Feature visualization", Distill, 2017).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

# A square root of the covariance matrix of ImageNet's pixel colors.
_COLOR_SQRT = np.array([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]])
_COLOR_CORRELATION = _COLOR_SQRT / np.linalg.norm(_COLOR_SQRT, axis=0).max()


class Parametrization(NamedTuple):
    """A representation of square images by an array of parameters.

    Attributes:
        init: ``(key, size) -> params``, the parameters of a random image that is nearly gray.
        image: ``(params, size) -> image``, an RGB image ``[size, size, 3]`` in [0, 1].
    """

    init: Callable[[jax.Array, int], jax.Array]
    image: Callable[[jax.Array, int], jax.Array]


def correlate_colors(x: Float[jax.Array, "... 3"]) -> Float[jax.Array, "... 3"]:
    """Map decorrelated color coordinates to RGB with the color correlations of ImageNet.

    The first coordinate is brightness, which has by far the largest variance in photographs.
    Gradient ascent in these coordinates avoids oversaturated colors.

    Args:
        x: ``[..., 3]`` unbounded.

    Returns:
        ``[..., 3]`` unbounded RGB values, before the sigmoid.
    """
    return x @ jnp.asarray(_COLOR_CORRELATION.T, x.dtype)


def fourier_field(params: jax.Array, size: int) -> Float[jax.Array, "size size channels"]:
    """Compute the inverse Fourier transform of scaled coefficients.

    Coefficients are divided by their frequency, as in the spectrum of photographs.

    Args:
        params: ``[2, size, size // 2 + 1, channels]``, real and imaginary parts.
        size: side of the image, in pixels.

    Returns:
        ``[size, size, channels]``.
    """
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    scale = size / np.maximum(frequency, 1 / size)
    spectrum = jax.lax.complex(*params) * jnp.asarray(scale[..., None], params.dtype)
    return jnp.fft.irfft2(spectrum, (size, size), axes=(0, 1)) / 4


PIXELS = Parametrization(
    init=lambda key, size: 0.01 * jax.random.normal(key, (size, size, 3)),
    image=lambda params, _: jax.nn.sigmoid(params),
)
"""One parameter per pixel value; gradient ascent tends to add high-frequency noise."""

FOURIER = Parametrization(
    init=lambda key, size: 0.01 * jax.random.normal(key, (2, size, size // 2 + 1, 3)),
    image=lambda params, size: jax.nn.sigmoid(correlate_colors(fourier_field(params, size))),
)
"""Fourier coefficients of decorrelated colors; favors low frequencies and natural colors."""
