"""The fast paths of a CPU for convolution, its gradients and pooling.

XLA's own convolution there knows neither matrix products nor depthwise kernels, and is slow on few
channels. Every function here is called while a program is lowered for a CPU, and never for another
platform.
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


class _Way(NamedTuple):
    """How a kind of convolution is computed, and its two gradients."""

    convolve: Callable[[jax.Array, jax.Array, Geometry], jax.Array]
    input_gradient: Callable[[jax.Array, jax.Array, Geometry, Size], jax.Array]
    kernel_gradient: Callable[[jax.Array, jax.Array, Geometry, Size], jax.Array]


def convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolve by the way that is fast for this kind of kernel."""
    return _way(kernel.shape, geometry).convolve(x, kernel, geometry)


def input_gradient(dy: jax.Array, kernel: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    """Transpose `convolve` with respect to its input, of height and width ``size``."""
    return _way(kernel.shape, geometry).input_gradient(dy, kernel, geometry, size)


def kernel_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    """Transpose `convolve` with respect to its kernel, of height and width ``size``."""
    kernel = *size, x.shape[-1] // geometry.groups, dy.shape[-1]
    return _way(kernel, geometry).kernel_gradient(x, dy, geometry, size)


def _way(kernel: tuple[int, ...], geometry: Geometry) -> _Way:
    rows, columns, inputs, features = kernel
    if geometry.pointwise((rows, columns)):
        return _PRODUCT
    if geometry.groups == inputs * geometry.groups == features:
        return _DEPTHWISE
    if geometry.groups > 1:
        return _GROUPED
    return _STEM if geometry.stride == 2 and inputs <= 4 and min(rows, columns) > 3 else _DENSE


# --- 1x1: a matrix product ----------------------------------------------------------------------
#
# With one long axis of pixels the gradient of the matrix takes half the time.


def _product(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    pixels = x[:, :: geometry.stride, :: geometry.stride]
    rows = _multiply(_rows(pixels), kernel[0, 0], (1, 0))
    return rows.reshape(*pixels.shape[:-1], -1)


def _product_input(dy: jax.Array, kernel: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    rows = _multiply(_rows(dy), kernel[0, 0], (1, 1))
    between = geometry.stride - 1
    ends = (
        (0, side - (geometry.stride * (n - 1) + 1), between)
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
    """Sum in at least float32: two to three times as fast as summing in bfloat16."""
    over = ((axes[0],), (axes[1],)), ((), ())
    exact = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, over, preferred_element_type=exact).astype(a.dtype)


_PRODUCT = _Way(_product, _product_input, _product_kernel)


# --- dense ----------------------------------------------------------------------------------------
#
# XLA's CPU compiler brings the operands of a convolution into the order that its fast path needs,
# but only outside loops. JAX's own input gradient reads the kernel in another order, so within the
# loop of an attack it takes three times as long; here the kernel is turned before. A convolution in
# bfloat16 is no faster in XLA than one in float32, and Winograd's is.


def _widened(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Compute in at least float32.

    What is cast back is settled: jaxlib 0.12 merges such convolutions into the sum behind them, and
    where there are two and one is padded the sum is not finite (ResNet-18's, 97 x 128 pixels).
    """

    @functools.wraps(function)
    def wide(a: jax.Array, b: jax.Array, *static: Geometry | Size) -> jax.Array:
        exact = jnp.promote_types(a.dtype, jnp.float32)
        y = function(a.astype(exact), b.astype(exact), *static).astype(a.dtype)
        return y if exact == a.dtype else _settled(y)

    return wide


@_widened
def _dense(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    if geometry.stride == 1 and _worth_winograd(x, kernel):
        return _winograd(x, kernel, geometry.pads)
    return xla.convolve(x, kernel, geometry)


@_widened
def _dense_input(dy: jax.Array, kernel: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    def around(axis: int) -> tuple[int, int]:
        """Pad ``dy``, whose pixels stand ``stride`` apart."""
        side, seen, k = size[axis], dy.shape[axis + 1], kernel.shape[axis]
        before = k - 1 - geometry.pads[axis][0]
        return before, side + k - 1 - before - (geometry.stride * (seen - 1) + 1)

    ends = around(0), around(1)
    turned = _settled(kernel[::-1, ::-1].swapaxes(2, 3))
    if geometry.stride == 1:
        return _dense(dy, turned, Geometry(pads=ends))
    return lax.conv_general_dilated(
        dy,
        turned,
        (1, 1),
        ends,
        lhs_dilation=(geometry.stride, geometry.stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


_dense_kernel = _widened(partial(xla.kernel_gradient, xla.convolve))

_DENSE = _Way(_dense, _dense_input, _dense_kernel)


def _worth_winograd(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether the products that it saves outweigh the sums before and behind them.

    Those of the kernel are many where there are few pixels; of how many images must not matter, or
    the same image would have another result in another batch. So it is a batch of 16 that decides.
    """
    _, columns, channels, features = kernel.shape
    pixels = 16 * x.shape[1] * x.shape[2]
    return columns == 3 and min(channels, features) >= 32 and pixels >= features


# Winograd's F(4, 3) at the points 0, 1, -1, 2, -2 and infinity (Lavin and Gray 2015).
_OF_PIXELS = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_OF_KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OF_RESULT = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


def _winograd(x: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """Four pixels of a row from six products instead of twelve, for kernels three columns wide.

    In one direction only: in both there would be a quarter of the products, but on a CPU the sums
    that they are made of go through memory too often for that, and the result is less exact.
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
            _sum(of_pixels, pixels),
            _settled(_sum(of_kernel, columns)),
            Geometry(pads=(rows, (0, 0))),
        )
        for of_pixels, of_kernel in zip(_OF_PIXELS, _OF_KERNEL, strict=True)
    ]
    result = jnp.stack([_sum(factors, products) for factors in _OF_RESULT], 3)
    return result.reshape(*result.shape[:2], 4 * tiles, -1)[:, :, :width]


def _settled(x: jax.Array) -> jax.Array:
    """Let XLA compute this by itself, and not as a part of what comes behind it.

    For kernels, so that a loop, as every attack is one, changes them once and not in every turn:
    what is the same in every turn is taken out of a loop, but a mere move of values only so.
    """
    return lax.optimization_barrier(x)


def _sum(factors: Iterable[float], arrays: Iterable[jax.Array]) -> jax.Array:
    terms = (factor * array for factor, array in zip(factors, arrays, strict=True) if factor)
    return functools.reduce(jnp.add, terms)


# --- the stem: stride 2 on few channels ---------------------------------------------------------
#
# As stride 1 on blocks of 2 x 2 pixels with four times as many channels. XLA's CPU convolution is
# slow on three channels, and its input gradient slower still where there is a stride: 1.5 and 1.8
# times as fast for the 7 x 7 of a ResNet.


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


_STEM = _Way(_stem, _stem_input, _stem_kernel)


def _pixel_blocks(x: jax.Array, window: Size, pads: Pads) -> jax.Array:
    """``[b, h, w, c] -> [b, h' / 2, w' / 2, 4 c]``, padded, or cut where the stride leaves some."""
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
    """``[h, w, c, out] -> [h' / 2, w' / 2, 4 c, out]``, padded to an even window."""
    rows, columns, channels, features = kernel.shape
    height, width = -(-rows // 2), -(-columns // 2)
    kernel = jnp.pad(kernel, ((0, 2 * height - rows), (0, 2 * width - columns), (0, 0), (0, 0)))
    kernel = kernel.reshape(height, 2, width, 2, channels, features).transpose(0, 2, 1, 3, 4, 5)
    return kernel.reshape(height, width, 4 * channels, features)


# --- depthwise ----------------------------------------------------------------------------------
#
# As k * k shifted multiply-adds. XLA's grouped convolution takes ten times as long, and its
# gradients up to forty.


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
    """Yield what each position of the window sees: ``[batch, height', width', channels]``."""
    ends = ((low, high, 0) for low, high in pads)  # negative ones cut
    x = lax.pad(x, jnp.asarray(padding, x.dtype), ((0, 0, 0), *ends, (0, 0, 0)))
    height, width = ((n - k) // stride for n, k in zip(x.shape[1:3], window, strict=True))
    for i, j in itertools.product(*map(range, window)):
        rows = slice(i, i + stride * height + 1, stride)
        yield (i, j), x[:, rows, j : j + stride * width + 1 : stride]


def _depthwise_input(dy: jax.Array, kernel: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    """Convolve ``dy``, once for each phase of the stride, and interleave."""
    height, width = size
    stride, ((top, bottom), (left, right)), _ = geometry
    rows = -(-(height + top + bottom) // stride)
    columns = -(-(width + left + right) // stride)

    # Padded once, for the phases that have the most taps; the others see a part of it.
    most, widest = ((side - 1) // stride for side in kernel.shape[:2])
    below, right_of = rows - dy.shape[1], columns - dy.shape[2]
    padded = jnp.pad(dy, ((0, 0), (most, below), (widest, right_of), (0, 0)))

    def phase(i: int, j: int) -> jax.Array:
        """The gradient of every ``stride``-th padded row and column from ``(i, j)`` on."""
        taps = kernel[i::stride, j::stride][::-1, ::-1]
        if not taps.size:  # of a kernel that is smaller than the stride
            return jnp.zeros((len(dy), rows, columns, dy.shape[-1]), dy.dtype)
        seen = padded[:, most + 1 - taps.shape[0] :, widest + 1 - taps.shape[1] :]
        return _depthwise(seen, taps, Geometry())

    phases = [[phase(i, j) for j in range(stride)] for i in range(stride)]
    whole = jnp.stack([jnp.stack(row, 3) for row in phases], 2)
    whole = whole.reshape(len(dy), rows * stride, columns * stride, -1)
    return whole[:, top : top + height, left : left + width]


def _depthwise_kernel(x: jax.Array, dy: jax.Array, geometry: Geometry, size: Size) -> jax.Array:
    """Sum over all positions for each tap, one after the other: a loop compiles quickly."""
    (rows, columns), channels, stride, dtype = size, x.shape[-1], geometry.stride, x.dtype
    exact = jnp.promote_types(dtype, jnp.float32)
    x, dy = jnp.pad(x, ((0, 0), *geometry.pads, (0, 0))).astype(exact), dy.astype(exact)
    height, width = (stride * (side - 1) + 1 for side in dy.shape[1:3])

    def tap(position: jax.Array) -> jax.Array:
        start = (0, position // columns, position % columns, 0)
        seen = lax.dynamic_slice(x, start, (len(x), height, width, channels))
        # XLA's CPU sum over leading axes goes through memory channel by channel, so most of it is
        # done by adding whole images.
        parts = jnp.split(seen[:, ::stride, ::stride] * dy, _divisor(len(x)))
        return functools.reduce(jnp.add, parts).sum((0, 1, 2))

    sums = lax.map(tap, jnp.arange(rows * columns))
    return sums.reshape(rows, columns, 1, channels).astype(dtype)


def _divisor(n: int, most: int = 8) -> int:
    return max(d for d in range(1, most + 1) if n % d == 0)


_DEPTHWISE = _Way(_depthwise, _depthwise_input, _depthwise_kernel)

_GROUPED = _Way(
    xla.convolve,
    partial(xla.input_gradient, xla.convolve),
    partial(xla.kernel_gradient, xla.convolve),
)


# --- pooling ------------------------------------------------------------------------------------
#
# By the number of the tap that wins, the first of equals, as in XLA and torch: XLA's own gradient
# takes four times as long.


def max_pool_tangent(x: jax.Array, dx: jax.Array, window: Window) -> jax.Array:
    """Return what the winner of each window in ``x`` has in ``dx``."""
    return _of_winners(_winners(x, window), dx, window)


def max_pool_gradient(x: jax.Array, dy: jax.Array, window: Window) -> jax.Array:
    """Add ``dy`` where the winner of each window in ``x`` stands."""
    pick = partial(_of_winners, _winners(x, window), window=window)
    return jax.linear_transpose(pick, x)(dy)[0]


def _winners(x: jax.Array, window: Window) -> jax.Array:
    best, winner = jnp.array(-jnp.inf, x.dtype), jnp.uint8(0)
    for number, tap in enumerate(_pool_taps(x, window, -jnp.inf)):
        winner = jnp.where(tap > best, jnp.uint8(number), winner)
        best = jnp.maximum(tap, best)
    return winner


def _of_winners(winner: jax.Array, dx: jax.Array, window: Window) -> jax.Array:
    picked = (
        jnp.where(winner == number, tap, 0) for number, tap in enumerate(_pool_taps(dx, window))
    )
    return functools.reduce(jnp.add, picked)


def _pool_taps(x: jax.Array, window: Window, padding: float = 0) -> Iterator[jax.Array]:
    k, stride, pads = window
    return (tap for _, tap in _taps(x, (k, k), stride, pads, padding))
