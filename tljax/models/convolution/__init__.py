"""Convolution and pooling of all backbones.

The implementation depends on the platform and is chosen when a program is lowered, so callers are
the same on all platforms. `backend` overrides the choice.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from tljax.models.convolution import xla
from tljax.models.convolution.geometry import Geometry, Kernel, Padding, Window, resolve_padding
from tljax.models.convolution.primitives import convolution, maximum
from tljax.runtime.types import FeatureMap

__all__ = [
    "Kernel",
    "Padding",
    "adaptive_avg_pool",
    "avg_pool",
    "backend",
    "conv2d",
    "max_pool",
    "multiply",
]

backend = jax.make_user_context(default_value="platform")
"""Implementation of convolutions and max pools in programs traced in ``with backend(...):``.

``"platform"``, the default, chooses the fastest one for the platform when a program is lowered.
``"xla"`` uses only operations of XLA, as exporters and other interpreters of jaxprs require.
"""


def conv2d(
    x: FeatureMap,
    kernel: Float[jax.Array, "rows columns inputs outputs"],
    *,
    stride: int = 1,
    padding: Padding = 0,
    groups: int = 1,
) -> FeatureMap:
    """Convolve (cross-correlate) in two dimensions.

    Args:
        x: ``[batch, height, width, channels]``.
        kernel: ``[rows, columns, channels // groups, outputs]``, of the dtype of ``x``.
        stride: stride in both directions.
        padding: see `Padding`; by default none.
        groups: number of groups of channels; equal to ``channels`` for a depthwise convolution.

    Returns:
        ``[batch, height', width', outputs]``.
    """
    pads = resolve_padding(padding, x.shape[1:3], kernel.shape[:2], stride)
    convolve = xla.convolve if backend.value == "xla" else convolution
    return convolve(x, kernel, Geometry(stride, pads, groups))


def multiply(
    x: Float[jax.Array, "batch *positions inputs"], kernel: Float[jax.Array, "inputs outputs"]
) -> Float[jax.Array, "batch *positions outputs"]:
    """Multiply the channels of every position by a matrix, as a convolution by a 1x1 kernel.

    On a CPU all positions are then one axis, and the gradient of the kernel takes no copies.

    Args:
        x: ``[batch, channels]``, ``[batch, tokens, channels]`` or
            ``[batch, height, width, channels]``.
        kernel: ``[channels, outputs]``, of the dtype of ``x``.
    """
    if x.ndim == 2 or backend.value == "xla":
        return x @ kernel
    if x.ndim == 3:
        return multiply(x[:, None], kernel)[:, 0]
    return convolution(x, kernel[None, None], Geometry())


def max_pool(x: FeatureMap, k: int, *, stride: int, padding: Padding = 0) -> FeatureMap:
    """Compute the maxima of ``k`` x ``k`` windows; the padding value is -inf.

    Args:
        x: ``[batch, height, width, channels]``.
        k: side of the window.
        stride: stride in both directions.
        padding: see `Padding`; by default none.
    """
    window = Window(k, stride, resolve_padding(padding, x.shape[1:3], (k, k), stride))
    pool = xla.max_pool if backend.value == "xla" else maximum
    return pool(x, window)


def avg_pool(
    x: FeatureMap, k: int, *, stride: int, padding: Padding = 0, count_padding: bool = True
) -> FeatureMap:
    """Compute the means of ``k`` x ``k`` windows.

    Args:
        x: ``[batch, height, width, channels]``.
        k: side of the window.
        stride: stride in both directions.
        padding: see `Padding`; by default none.
        count_padding: True includes the padded zeros in the means (default of torch), False
            excludes them (TensorFlow).
    """
    pads = ((0, 0), *resolve_padding(padding, x.shape[1:3], (k, k), stride), (0, 0))
    sizes, strides = (1, k, k, 1), (1, stride, stride, 1)
    total = lax.reduce_window(x, 0.0, lax.add, sizes, strides, pads)
    if count_padding:
        return total / (k * k)
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    return total / lax.reduce_window(ones, 0.0, lax.add, sizes, strides, pads)


def adaptive_avg_pool(x: FeatureMap, k: int) -> FeatureMap:
    """Compute ``k`` x ``k`` means from a map of any size, as torch does; windows may overlap.

    Args:
        x: ``[batch, height, width, channels]``.
        k: side of the result.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        windows = ((i * n // k, -(-(i + 1) * n // k)) for i in range(k))
        x = jnp.stack([lax.slice_in_dim(x, *w, axis=axis).mean(axis) for w in windows], axis)
    return x
