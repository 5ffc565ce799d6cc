"""Convolution and pooling of every backbone: one geometry, and what is fast where it runs.

Which way is taken is decided by platform when a program is lowered: no backbone, step or attack
knows. `backend` says otherwise.
"""

import jax
import jax.numpy as jnp
from jax import lax

from tljax.models.convolution import xla
from tljax.models.convolution.geometry import Geometry, Kernel, Padding, Window, resolve
from tljax.models.convolution.primitives import convolution, maximum

__all__ = ["Kernel", "Padding", "adaptive_avg_pool", "avg_pool", "backend", "conv2d", "max_pool"]

backend = jax.make_user_context(default_value="platform")
"""What programs are made of: ``with backend("xla"):`` around the tracing makes them of XLA's own
operations alone, as exporters and other interpreters of jaxprs need them; ``"platform"`` leaves the
choice to where a program is lowered."""


def conv2d(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding = 0, groups: int = 1
) -> jax.Array:
    """Convolve (cross-correlate) in two dimensions.

    Args:
        x: ``[batch, height, width, in]``.
        kernel: ``[height, width, in // groups, out]``, of the same dtype.
        stride: the same in both directions.
        padding: see `Padding`.
        groups: 1, the number of channels (depthwise), or anything between.

    Returns:
        ``[batch, height', width', out]``.
    """
    pads = resolve(padding, x.shape[1:3], kernel.shape[:2], stride)
    convolve = xla.convolve if backend.value == "xla" else convolution
    return convolve(x, kernel, Geometry(stride, pads, groups))


def max_pool(x: jax.Array, k: int, *, stride: int, padding: Padding = 0) -> jax.Array:
    """Return the maxima of ``k`` x ``k`` windows; padding never wins.

    Args:
        x: ``[batch, height, width, channels]``.
        k: side of the window.
        stride: the same in both directions.
        padding: see `Padding`.
    """
    window = Window(k, stride, resolve(padding, x.shape[1:3], (k, k), stride))
    pool = xla.max_pool if backend.value == "xla" else maximum
    return pool(x, window)


def avg_pool(
    x: jax.Array, k: int, *, stride: int, padding: Padding = 0, count_padding: bool = True
) -> jax.Array:
    """Return the means of ``k`` x ``k`` windows.

    Args:
        x: ``[batch, height, width, channels]``.
        k: side of the window.
        stride: the same in both directions.
        padding: see `Padding`.
        count_padding: whether padded zeros count as values, as they do in torch's default;
            TensorFlow's windows are smaller at the border instead.
    """
    pads = ((0, 0), *resolve(padding, x.shape[1:3], (k, k), stride), (0, 0))
    sizes, strides = (1, k, k, 1), (1, stride, stride, 1)
    total = lax.reduce_window(x, 0.0, lax.add, sizes, strides, pads)
    if count_padding:
        return total / (k * k)
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    return total / lax.reduce_window(ones, 0.0, lax.add, sizes, strides, pads)


def adaptive_avg_pool(x: jax.Array, k: int) -> jax.Array:
    """Pool to ``k`` x ``k`` means, whatever the size, as torch does: windows may overlap.

    Args:
        x: ``[batch, height, width, channels]``.
        k: side of the result.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        windows = ((i * n // k, -(-(i + 1) * n // k)) for i in range(k))
        x = jnp.stack([lax.slice_in_dim(x, *w, axis=axis).mean(axis) for w in windows], axis)
    return x
