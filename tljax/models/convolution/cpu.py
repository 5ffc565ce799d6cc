"""Fast convolution, its gradients, and max pooling on CPUs.

XLA's convolution on CPUs has no fast path for 1x1 or depthwise kernels and is slow on few channels.
These functions are only called when a program is lowered for a CPU.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tljax.models.convolution import xla
from tljax.models.convolution.geometry import Geometry, Pads, Window

Size = tuple[int, ...]


class _Algorithm(NamedTuple):
    """Convolution and its two gradients, for one kind of kernel."""

    convolve: Callable[[jax.Array, jax.Array, Geometry], jax.Array]
    input_gradient: Callable[[jax.Array, jax.Array, Geometry, Size], jax.Array]
    kernel_gradient: Callable[[jax.Array, jax.Array, Geometry, Size], jax.Array]


def convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolve with the fastest algorithm for the kernel."""
    return _choose(kernel.shape, geometry).convolve(x, kernel, geometry)


def input_gradient(dy: jax.Array, kernel: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    """Transpose `convolve` with respect to its input, of height and width ``size``."""
    return _choose(kernel.shape, geometry).input_gradient(dy, kernel, geometry, size)


def kernel_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    """Transpose `convolve` with respect to its kernel, of height and width ``size``."""
    kernel = *size, x.shape[-1] // geometry.groups, dy.shape[-1]
    return _choose(kernel, geometry).kernel_gradient(x, dy, geometry, size)


def _choose(kernel: tuple[int, ...], geometry: Geometry) -> _Algorithm:
    rows, columns, inputs, features = kernel
    if geometry.pointwise((rows, columns)):
        return _PRODUCT
    if geometry == Geometry(stride=rows) and rows == columns:
        return _PATCHES
    if geometry.groups == inputs * geometry.groups == features:
        return _DEPTHWISE
    if geometry.groups > 1:
        return _GROUPED
    return _STEM if geometry.stride == 2 and inputs <= 4 and min(rows, columns) > 3 else _DENSE


# --- 1x1: a matrix product ----------------------------------------------------------------------
#
# With all pixels in one axis, the gradient of the kernel takes half the time.


def _product(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    pixels = x[:, :: geometry.stride, :: geometry.stride]
    rows = _multiply(_rows(pixels), kernel[0, 0], (1, 0))
    return rows.reshape(*pixels.shape[:-1], -1)


def _product_input(dy: jax.Array, kernel: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    rows = _multiply(_rows(dy), kernel[0, 0], (1, 1))
    ends = (
        (0, side - (geometry.stride * (n - 1) + 1), geometry.stride - 1)
        for side, n in zip(size, dy.shape[1:3], strict=True)
    )
    dx = rows.reshape(*dy.shape[:-1], -1)
    return lax.pad(dx, jnp.zeros((), dx.dtype), ((0, 0, 0), *ends, (0, 0, 0)))


def _product_kernel(x: jax.Array, dy: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    pixels = x[:, :: geometry.stride, :: geometry.stride]
    return _multiply(_rows(pixels), _rows(dy), (0, 0)).reshape(*size, x.shape[-1], dy.shape[-1])


def _rows(pixels: jax.Array) -> jax.Array:
    return pixels.reshape(-1, pixels.shape[-1])


def _multiply(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Multiply matrices; accumulating in float32 is 2 to 3 times as fast as in bfloat16."""
    contracted = ((axes[0],), (axes[1],)), ((), ())
    exact = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, contracted, preferred_element_type=exact).astype(a.dtype)


_PRODUCT = _Algorithm(_product, _product_input, _product_kernel)


# --- patches: a kernel of the size of the stride --------------------------------------------------
#
# A matrix product too, after the pixels are sorted by patch. The gradients take half the time.


def _patches(x: jax.Array, side: int) -> jax.Array:
    """Reshape ``[b, h, w, c]`` to ``[b, h // side, w // side, side * side * c]``."""
    batch, height, width, channels = x.shape
    height, width = height // side, width // side
    x = x[:, : height * side, : width * side]
    x = x.reshape(batch, height, side, width, side, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height, width, -1)


def _patch(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    patches = _patches(x, geometry.stride)
    rows = _multiply(_rows(patches), kernel.reshape(-1, kernel.shape[-1]), (1, 0))
    return rows.reshape(*patches.shape[:-1], -1)


def _patch_input(dy: jax.Array, kernel: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    rows = _multiply(_rows(dy), kernel.reshape(-1, kernel.shape[-1]), (1, 1))
    x = jax.ShapeDtypeStruct((len(dy), *size, kernel.shape[2]), dy.dtype)
    sort = partial(_patches, side=geometry.stride)
    return jax.linear_transpose(sort, x)(rows.reshape(*dy.shape[:-1], -1))[0]


def _patch_kernel(x: jax.Array, dy: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    product = _multiply(_rows(_patches(x, geometry.stride)), _rows(dy), (0, 0))
    return product.reshape(*size, x.shape[-1], dy.shape[-1])


_PATCHES = _Algorithm(_patch, _patch_input, _patch_kernel)


# --- dense ----------------------------------------------------------------------------------------
#
# XLA's CPU compiler transposes the operands of a convolution for its fast path, but only outside
# loops. JAX's input gradient reads the kernel in another layout, so in the loop of an attack it
# takes three times as long; here the kernel is flipped and transposed first. A convolution in
# bfloat16 is not faster in XLA than in float32, where Winograd's algorithm can be used.
#
# An optimization barrier around a transformed kernel keeps XLA from fusing the transform into the
# convolution. XLA then hoists the transform out of a loop such as that of an attack.


def _in_float32(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Wrap a function to compute in at least float32.

    The barrier after the cast back is a workaround: jaxlib 0.12 fuses such convolutions into a sum
    that follows, which is not finite if one of two is padded (ResNet-18 with 97 x 128 pixels).
    """

    @functools.wraps(function)
    def wide(a: jax.Array, b: jax.Array, *static: Geometry | Size) -> jax.Array:
        exact = jnp.promote_types(a.dtype, jnp.float32)
        y = function(a.astype(exact), b.astype(exact), *static).astype(a.dtype)
        return y if exact == a.dtype else lax.optimization_barrier(y)

    return wide


@_in_float32
def _dense(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    if geometry.stride == 1 and _worth_winograd(x, kernel):
        return _winograd(x, kernel, geometry.pads)
    return xla.convolve(x, kernel, geometry)


@_in_float32
def _dense_input(dy: jax.Array, kernel: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    def pad(axis: int) -> tuple[int, int]:
        """Return the padding of ``dy``, dilated by the stride."""
        k = kernel.shape[axis]
        before = k - 1 - geometry.pads[axis][0]
        dilated = geometry.stride * (dy.shape[axis + 1] - 1) + 1
        return before, size[axis] + k - 1 - before - dilated

    pads = pad(0), pad(1)
    transposed = lax.optimization_barrier(kernel[::-1, ::-1].swapaxes(2, 3))
    if geometry.stride == 1:
        return _dense(dy, transposed, Geometry(pads=pads))
    return lax.conv_general_dilated(
        dy,
        transposed,
        (1, 1),
        pads,
        lhs_dilation=(geometry.stride, geometry.stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


_dense_kernel = _in_float32(partial(xla.kernel_gradient, xla.convolve))

_DENSE = _Algorithm(_dense, _dense_input, _dense_kernel)


def _worth_winograd(x: jax.Array, kernel: jax.Array) -> bool:
    """Return True if Winograd's algorithm saves more products than its transforms cost.

    The transform of the kernel is expensive relative to few pixels. A batch size of 16 is assumed,
    because the results for an image must not depend on the batch size.
    """
    _, columns, channels, features = kernel.shape
    pixels = 16 * x.shape[1] * x.shape[2]
    return columns == 3 and min(channels, features) >= 32 and pixels >= features


# Winograd's F(4, 3) at the points 0, 1, -1, 2, -2 and infinity (Lavin and Gray 2015,
# arXiv 1509.09308).
_INPUT_TRANSFORM = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_KERNEL_TRANSFORM = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT_TRANSFORM = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


def _winograd(x: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """Convolve with a kernel of three columns: 6 instead of 12 products for 4 pixels of a row.

    Only the columns are transformed. Transforming both directions would halve the products again,
    but the additional sums are limited by memory bandwidth, and the result is less exact.
    """
    rows, (left, right) = pads
    width = x.shape[2] + left + right - 2
    tiles = -(-width // 4)
    ends = (left, 4 * tiles + 2 - left - x.shape[2], 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 0, 0), ends, (0, 0, 0)))
    pixels = [x[:, :, i : i + 4 * tiles - 3 : 4] for i in range(6)]
    columns = [kernel[:, i : i + 1] for i in range(3)]
    products = [
        xla.convolve(
            _weighted_sum(input_factors, pixels),
            lax.optimization_barrier(_weighted_sum(kernel_factors, columns)),
            Geometry(pads=(rows, (0, 0))),
        )
        for input_factors, kernel_factors in zip(_INPUT_TRANSFORM, _KERNEL_TRANSFORM, strict=True)
    ]
    result = jnp.stack([_weighted_sum(factors, products) for factors in _OUTPUT_TRANSFORM], 3)
    return result.reshape(*result.shape[:2], 4 * tiles, -1)[:, :, :width]


def _weighted_sum(factors: Iterable[float], arrays: Iterable[jax.Array]) -> jax.Array:
    terms = (factor * array for factor, array in zip(factors, arrays, strict=True) if factor)
    return functools.reduce(jnp.add, terms)


# --- the stem: stride 2 on few channels ---------------------------------------------------------
#
# Computed with stride 1 on blocks of 2 x 2 pixels with four times as many channels. XLA's CPU
# convolution is slow on three channels, and its strided input gradient is even slower: the speedup
# of the 7x7 convolution of a ResNet is 1.5, that of its input gradient 1.8.


def _stem(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    pixels = _pixel_blocks(x, kernel.shape[:2], geometry.pads)
    return _dense(pixels, _kernel_blocks(kernel), Geometry())


def _stem_input(dy: jax.Array, kernel: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    x = jax.ShapeDtypeStruct((dy.shape[0], *size, kernel.shape[2]), dy.dtype)
    blocks = partial(_pixel_blocks, window=kernel.shape[:2], pads=geometry.pads)
    inner = jax.eval_shape(blocks, x).shape[1:3]
    dx = _dense_input(dy, _kernel_blocks(kernel), Geometry(), inner)
    return jax.linear_transpose(blocks, x)(dx)[0]


def _stem_kernel(x: jax.Array, dy: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    kernel = jax.ShapeDtypeStruct((*size, x.shape[-1], dy.shape[-1]), x.dtype)
    inner = jax.eval_shape(_kernel_blocks, kernel).shape[:2]
    dkernel = _dense_kernel(_pixel_blocks(x, size, geometry.pads), dy, Geometry(), inner)
    return jax.linear_transpose(_kernel_blocks, kernel)(dkernel)[0]


_STEM = _Algorithm(_stem, _stem_input, _stem_kernel)


def _pixel_blocks(x: jax.Array, window: Size, pads: Pads) -> jax.Array:
    """Reshape ``[b, h, w, c]`` to ``[b, h' / 2, w' / 2, 4 c]``, padded or cropped."""
    batch, channels = x.shape[0], x.shape[-1]
    ends = []
    for side, k, (low, high) in zip(x.shape[1:3], window, pads, strict=True):
        needed = 2 * ((side + low + high - k) // 2 + -(-k // 2))
        ends.append((low, needed - side - low, 0))
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *ends, (0, 0, 0)))
    height, width = x.shape[1] // 2, x.shape[2] // 2
    x = x.reshape(batch, height, 2, width, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height, width, 4 * channels)


def _kernel_blocks(kernel: jax.Array) -> jax.Array:
    """Reshape ``[h, w, c, out]`` to ``[h' / 2, w' / 2, 4 c, out]``, padded to an even size."""
    rows, columns, channels, features = kernel.shape
    height, width = -(-rows // 2), -(-columns // 2)
    kernel = jnp.pad(kernel, ((0, 2 * height - rows), (0, 2 * width - columns), (0, 0), (0, 0)))
    kernel = kernel.reshape(height, 2, width, 2, channels, features).transpose(0, 2, 1, 3, 4, 5)
    return kernel.reshape(height, width, 4 * channels, features)


# --- depthwise ----------------------------------------------------------------------------------
#
# Computed by k * k shifted multiply-adds. XLA's grouped convolution takes ten times as long, its
# gradients up to forty times.


def _depthwise(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    rows, columns = kernel.shape[:2]
    exact = jnp.promote_types(x.dtype, jnp.float32)
    taps = _taps(x, (rows, columns), geometry.stride, geometry.pads)
    factors = kernel.astype(exact)
    products = (tap.astype(exact) * factors[i, j, 0] for (i, j), tap in taps)
    return functools.reduce(jnp.add, products).astype(x.dtype)


def _taps(
    x: jax.Array, window: tuple[int, int], stride: int, pads: Pads, padding: float = 0
) -> Iterator[tuple[tuple[int, int], jax.Array]]:
    """Yield each position in the window and its pixels ``[batch, height', width', channels]``."""
    ends = ((low, high, 0) for low, high in pads)  # negative padding crops
    x = lax.pad(x, jnp.asarray(padding, x.dtype), ((0, 0, 0), *ends, (0, 0, 0)))
    height, width = ((n - k) // stride for n, k in zip(x.shape[1:3], window, strict=True))
    for i, j in itertools.product(*map(range, window)):
        rows = slice(i, i + stride * height + 1, stride)
        yield (i, j), x[:, rows, j : j + stride * width + 1 : stride]


def _depthwise_input(dy: jax.Array, kernel: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    """Convolve ``dy`` once for each phase of the stride, and interleave the results."""
    height, width = size
    stride, ((top, bottom), (left, right)), _ = geometry
    rows = -(-(height + top + bottom) // stride)
    columns = -(-(width + left + right) // stride)

    # Padded once, for the phase with the most taps; other phases use a part of it.
    above, before = ((side - 1) // stride for side in kernel.shape[:2])
    below, after = rows - dy.shape[1], columns - dy.shape[2]
    padded = jnp.pad(dy, ((0, 0), (above, below), (before, after), (0, 0)))

    def phase(i: int, j: int) -> jax.Array:
        """Compute every ``stride``-th row and column of the padded gradient from ``(i, j)`` on."""
        taps = kernel[i::stride, j::stride][::-1, ::-1]
        if not taps.size:  # the kernel is smaller than the stride
            return jnp.zeros((len(dy), rows, columns, dy.shape[-1]), dy.dtype)
        pixels = padded[:, above + 1 - taps.shape[0] :, before + 1 - taps.shape[1] :]
        return _depthwise(pixels, taps, Geometry())

    phases = [[phase(i, j) for j in range(stride)] for i in range(stride)]
    dx = jnp.stack([jnp.stack(row, 3) for row in phases], 2)
    dx = dx.reshape(len(dy), rows * stride, columns * stride, -1)
    return dx[:, top : top + height, left : left + width]


def _depthwise_kernel(x: jax.Array, dy: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    """Sum over all pixels for each tap of the kernel, in a loop, which compiles quickly."""
    (rows, columns), channels, stride, dtype = size, x.shape[-1], geometry.stride, x.dtype
    exact = jnp.promote_types(dtype, jnp.float32)
    x, dy = jnp.pad(x, ((0, 0), *geometry.pads, (0, 0))).astype(exact), dy.astype(exact)
    height, width = (stride * (side - 1) + 1 for side in dy.shape[1:3])

    def tap(position: jax.Array) -> jax.Array:
        start = (0, position // columns, position % columns, 0)
        pixels = lax.dynamic_slice(x, start, (len(x), height, width, channels))
        # XLA's CPU sum over leading axes reads memory channel by channel: add images first.
        parts = jnp.split(pixels[:, ::stride, ::stride] * dy, _divisor(len(x)))
        return functools.reduce(jnp.add, parts).sum((0, 1, 2))

    sums = lax.map(tap, jnp.arange(rows * columns))
    return sums.reshape(rows, columns, 1, channels).astype(dtype)


def _divisor(n: int, most: int = 8) -> int:
    return max(d for d in range(1, most + 1) if n % d == 0)


_DEPTHWISE = _Algorithm(_depthwise, _depthwise_input, _depthwise_kernel)

_GROUPED = _Algorithm(
    xla.convolve,
    partial(xla.input_gradient, xla.convolve),
    partial(xla.kernel_gradient, xla.convolve),
)


# --- pooling ------------------------------------------------------------------------------------
#
# XLA compares bfloat16 numbers one by one; as integers of the same order it takes many at once.
# Gradients are computed from the index of the maximum in each window (the first of equals, as in
# XLA and torch). XLA's own gradient takes four times as long.


def max_pool(x: jax.Array, window: Window) -> jax.Array:
    """Compute the maximum of each window, of bfloat16 numbers first over rows, then columns."""
    if x.dtype != jnp.bfloat16:
        return xla.max_pool(x, window)
    ends = ((low, high, 0) for low, high in window[-1])
    lowest = _ordered(jnp.array(-jnp.inf, x.dtype))
    # Without the barriers, XLA would compute a number again for each window that it is in.
    ordered = lax.optimization_barrier(_ordered(x))
    padded = lax.pad(ordered, lowest, ((0, 0, 0), *ends, (0, 0, 0)))
    of_rows = lax.optimization_barrier(_maxima(padded, window, axis=1))
    return lax.bitcast_convert_type(_flipped(_maxima(of_rows, window, axis=2)), x.dtype)


def _maxima(values: jax.Array, window: Window, axis: int) -> jax.Array:
    k, stride, _ = window
    last = (values.shape[axis] - k) // stride * stride
    taps = (lax.slice_in_dim(values, i, i + last + 1, stride, axis) for i in range(k))
    return functools.reduce(jnp.maximum, taps)


def _ordered(x: jax.Array) -> jax.Array:
    """Return int16 numbers of the same order as bfloat16 numbers, with NaN as the largest."""
    positive_nan = jnp.where(jnp.isnan(x), jnp.nan, x)
    return _flipped(lax.bitcast_convert_type(positive_nan, jnp.int16))


def _flipped(bits: jax.Array) -> jax.Array:
    """Flip all bits of negative numbers but the sign, as a larger one has a smaller magnitude."""
    return bits ^ ((bits >> 15) & jnp.int16(0x7FFF))


def max_pool_tangent(x: jax.Array, dx: jax.Array, window: Window) -> jax.Array:
    """Gather ``dx`` at the maximum of each window of ``x``."""
    return _gather(_argmax(x, window), dx, window)


def max_pool_gradient(x: jax.Array, dy: jax.Array, window: Window) -> jax.Array:
    """Scatter-add ``dy`` to the maximum of each window of ``x``."""
    gather = partial(_gather, _argmax(x, window), window=window)
    return jax.linear_transpose(gather, x)(dy)[0]


def _argmax(x: jax.Array, window: Window) -> jax.Array:
    maximum, index = jnp.array(-jnp.inf, x.dtype), jnp.uint8(0)
    for i, tap in enumerate(_pool_taps(x, window, -jnp.inf)):
        index = jnp.where(tap > maximum, jnp.uint8(i), index)
        maximum = jnp.maximum(tap, maximum)
    return index


def _gather(index: jax.Array, dx: jax.Array, window: Window) -> jax.Array:
    taps = (jnp.where(index == i, tap, 0) for i, tap in enumerate(_pool_taps(dx, window)))
    return functools.reduce(jnp.add, taps)


def _pool_taps(x: jax.Array, window: Window, padding: float = 0) -> Iterator[jax.Array]:
    k, stride, pads = window
    return (tap for _, tap in _taps(x, (k, k), stride, pads, padding))
