"""Convolution and pooling with operations of XLA, for GPUs, TPUs and exporters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from tljax.models.convolution.geometry import Geometry, Window

Convolve = Callable[[jax.Array, jax.Array, Geometry], jax.Array]


def convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolve with XLA's general convolution, which all platforms and exporters support."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (geometry.stride, geometry.stride),
        geometry.pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=geometry.groups,
    )


def convolve_on_tpu(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolve; 1x1 kernels by a matrix product, also with a stride."""
    if not geometry.pointwise(kernel.shape[:2]):
        return convolve(x, kernel, geometry)
    return x[:, :: geometry.stride, :: geometry.stride] @ kernel[0, 0]


def convolve_on_gpu(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolve; 1x1 kernels by a matrix product, but not with a stride.

    XLA fuses the strided slice into the product, for which its GPU compiler (jax 0.10.2) finds no
    tiling or aborts the process.
    """
    return (convolve if geometry.stride > 1 else convolve_on_tpu)(x, kernel, geometry)


def input_gradient(
    convolve: Convolve,
    dy: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    size: tuple[int, ...],
) -> jax.Array:
    """Transpose a convolution with respect to its input, of height and width ``size``."""
    shape = (dy.shape[0], *size, kernel.shape[2] * geometry.groups)
    x = jax.ShapeDtypeStruct(shape, dy.dtype)
    return jax.linear_transpose(lambda x: convolve(x, kernel, geometry), x)(dy)[0]


def kernel_gradient(
    convolve: Convolve, x: jax.Array, dy: jax.Array, geometry: Geometry, size: tuple[int, ...]
) -> jax.Array:
    """Transpose a convolution with respect to its kernel, of height and width ``size``."""
    shape = (*size, x.shape[-1] // geometry.groups, dy.shape[-1])
    kernel = jax.ShapeDtypeStruct(shape, x.dtype)
    return jax.linear_transpose(lambda kernel: convolve(x, kernel, geometry), kernel)(dy)[0]


def max_pool(x: jax.Array, window: Window) -> jax.Array:
    """Compute the maximum of each window."""
    k, stride, pads = window
    return lax.reduce_window(
        x, -jnp.inf, lax.max, (1, k, k, 1), (1, stride, stride, 1), ((0, 0), *pads, (0, 0))
    )


def max_pool_tangent(x: jax.Array, dx: jax.Array, window: Window) -> jax.Array:
    """Gather ``dx`` at the maximum of each window of ``x``."""
    return jax.jvp(lambda x: max_pool(x, window), (x,), (dx,))[1]


def max_pool_gradient(x: jax.Array, dy: jax.Array, window: Window) -> jax.Array:
    """Scatter-add ``dy`` to the maximum of each window of ``x``."""
    return jax.vjp(lambda x: max_pool(x, window), x)[1](dy)[0]
