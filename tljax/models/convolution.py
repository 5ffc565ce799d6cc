"""Convolution and pooling: one geometry and the fast paths of every backbone.

Which path runs is decided by platform when a program is lowered: no backbone, step or attack knows.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]

Padding = int | Literal["SAME"] | Pads
"""Zeros on each side, as torch pads; TensorFlow's SAME, which depends on the size and is not
symmetric; or ``((top, bottom), (left, right))``."""

Kernel = int | tuple[int, int]
"""The side of a square kernel, or its height and width."""


def conv2d(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding = 0, groups: int = 1
) -> jax.Array:
    """Two-dimensional convolution (cross-correlation), by the path that is fast where it runs.

    Args:
        x: ``[batch, height, width, in]``.
        kernel: ``[height, width, in // groups, out]``.
        stride: the same in both directions.
        padding: see `Padding`.
        groups: 1, the number of channels (depthwise), or anything between.

    Returns:
        ``[batch, height', width', out]``.
    """
    window = kernel.shape[:2]
    pads = _pads(x.shape, window, stride, padding)
    if window == (1, 1) and groups == 1 and pads == ((0, 0), (0, 0)):
        # A 1x1 convolution is a matrix product; XLA's CPU convolution does not know.
        pixels, matrix = x[:, ::stride, ::stride], kernel[0, 0]
        return lax.platform_dependent(pixels, matrix, cpu=_product, default=jnp.matmul)
    plain = partial(plain_conv2d, stride=stride, padding=pads, groups=groups)
    if groups == x.shape[-1] == kernel.shape[-1]:
        on_cpu = partial(_depthwise, stride, pads)
    elif groups == 1 and stride == 2 and x.shape[-1] <= 4 and min(window) > 3:
        on_cpu = partial(_stem, pads)
    elif groups == 1:
        on_cpu = partial(_dense, stride, pads)
    else:
        return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=plain)


def plain_conv2d(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding = 0, groups: int = 1
) -> jax.Array:
    """The same by XLA's own convolution, which is the fast path of GPUs and TPUs."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        _pads(x.shape, kernel.shape[:2], stride, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _pads(shape: tuple[int, ...], window: tuple[int, ...], stride: int, padding: Padding) -> Pads:
    if padding == "SAME":
        height, width = lax.padtype_to_pads(shape[1:3], window, (stride, stride), "SAME")
        return tuple(height), tuple(width)  # pyright: ignore[reportReturnType]
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    return padding


def _forward(
    convolve: Any, stride: int, pads: Pads, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The result, and what the gradients of all of them need again."""
    return convolve(stride, pads, x, kernel), (x, kernel)


def _product(pixels: jax.Array, matrix: jax.Array) -> jax.Array:
    # With one long axis of pixels the matrix's gradient takes half the time.
    multiply = _half_product if pixels.dtype == jnp.bfloat16 else jnp.matmul
    rows = multiply(pixels.reshape(-1, pixels.shape[-1]), matrix)
    return rows.reshape(*pixels.shape[:-1], matrix.shape[1])


@jax.custom_vjp
def _half_product(a: jax.Array, b: jax.Array) -> jax.Array:
    return _sum_product(a, b).astype(a.dtype)


def _half_product_backward(
    saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    a, b = saved
    return _sum_product(dy, b, (1, 1)).astype(a.dtype), _sum_product(a, dy, (0, 0)).astype(b.dtype)


_half_product.defvjp(lambda a, b: (_half_product(a, b), (a, b)), _half_product_backward)


def _sum_product(a: jax.Array, b: jax.Array, axes: tuple[int, int] = (1, 0)) -> jax.Array:
    """Summed in float32 and returned so: two to three times as fast as a bfloat16 result."""
    over = ((axes[0],), (axes[1],)), ((), ())
    return lax.dot_general(a, b, over, preferred_element_type=jnp.float32)


def _stem(pads: Pads, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Stride 2 on few channels, as stride 1 on blocks of 2 x 2 pixels with four times as many.

    XLA's CPU convolution is slow on three channels, and its input gradient slower still where there
    is a stride: 1.5 and 1.8 times as fast for the 7 x 7 of a ResNet.
    """
    (batch, _, _, channels), (rows, columns, _, features) = x.shape, kernel.shape
    blocks = -(-rows // 2), -(-columns // 2)
    ends = []
    for side, k, block, (low, high) in zip(
        x.shape[1:3], (rows, columns), blocks, pads, strict=True
    ):
        needed = 2 * ((side + low + high - k) // 2 + block)
        ends.append((low, needed - side - low, 0))  # cut where the stride leaves a pixel out
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *ends, (0, 0, 0)))
    height, width = x.shape[1] // 2, x.shape[2] // 2
    x = x.reshape(batch, height, 2, width, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, height, width, 4 * channels)
    whole = ((0, 2 * blocks[0] - rows), (0, 2 * blocks[1] - columns), (0, 0), (0, 0))
    kernel = jnp.pad(kernel, whole).reshape(blocks[0], 2, blocks[1], 2, channels, features)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(*blocks, 4 * channels, features)
    return _dense(1, ((0, 0), (0, 0)), x, kernel)


# --- dense convolution on a CPU -----------------------------------------------------------------
#
# XLA's CPU compiler brings the operands of a convolution into the order that its fast path needs,
# but only outside loops. JAX's own input gradient reads the kernel in another order, so within the
# loop of an attack it takes three times as long; here the kernel is turned before.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dense(stride: int, pads: Pads, x: jax.Array, kernel: jax.Array) -> jax.Array:
    # A convolution in bfloat16 is no faster in XLA than one in float32, and Winograd's is.
    exact = jnp.promote_types(x.dtype, jnp.float32)
    wide, factors = x.astype(exact), kernel.astype(exact)
    if stride == 1 and _worth_winograd(x, kernel):
        return _winograd(pads, wide, factors).astype(x.dtype)
    return plain_conv2d(wide, factors, stride=stride, padding=pads).astype(x.dtype)


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


def _winograd(pads: Pads, x: jax.Array, kernel: jax.Array) -> jax.Array:
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
        plain_conv2d(
            _sum(of_pixels, pixels), _settled(_sum(of_kernel, columns)), padding=(rows, (0, 0))
        )
        for of_pixels, of_kernel in zip(_OF_PIXELS, _OF_KERNEL, strict=True)
    ]
    result = jnp.stack([_sum(factors, products) for factors in _OF_RESULT], 3)
    return result.reshape(*result.shape[:2], 4 * tiles, -1)[:, :, :width]


def _settled(kernel: jax.Array) -> jax.Array:
    """So that a loop, as every attack is one, changes its kernels once and not in every turn.

    XLA takes what is the same in every turn out of a loop, but a mere move of values only so.
    """
    return lax.optimization_barrier(kernel)


def _sum(factors: Iterable[float], arrays: Iterable[jax.Array]) -> jax.Array:
    terms = (factor * array for factor, array in zip(factors, arrays, strict=True) if factor)
    return functools.reduce(jnp.add, terms)


def _dense_backward(
    stride: int, pads: Pads, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    exact = jnp.promote_types(x.dtype, jnp.float32)
    wide, factors, moved = (array.astype(exact) for array in (x, kernel, dy))
    _, of_kernel = jax.vjp(lambda k: plain_conv2d(wide, k, stride=stride, padding=pads), factors)
    dkernel = of_kernel(moved)[0].astype(kernel.dtype)

    def around(axis: int) -> tuple[int, int]:
        """The padding of ``dy``, whose pixels stand ``stride`` apart."""
        side, seen, k = x.shape[axis + 1], dy.shape[axis + 1], kernel.shape[axis]
        before = k - 1 - pads[axis][0]
        return before, side + k - 1 - before - (stride * (seen - 1) + 1)

    ends = around(0), around(1)
    turned = _settled(factors[::-1, ::-1].swapaxes(2, 3))
    dx: Any
    if stride == 1:
        dx = _dense(1, ends, moved, turned)
    else:
        dx = lax.conv_general_dilated(
            moved,
            turned,
            (1, 1),
            ends,
            lhs_dilation=(stride, stride),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    return dx.astype(x.dtype), dkernel


_dense.defvjp(partial(_forward, _dense), _dense_backward)


# --- depthwise convolution on a CPU -------------------------------------------------------------
#
# As k * k shifted multiply-adds. XLA's grouped convolution takes ten times as long there, and its
# gradients up to forty.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _depthwise(stride: int, pads: Pads, x: jax.Array, kernel: jax.Array) -> jax.Array:
    rows, columns = kernel.shape[:2]
    exact = jnp.promote_types(x.dtype, jnp.float32)
    taps, factors = _taps(x, (rows, columns), stride, pads), kernel.astype(exact)
    products = (tap.astype(exact) * factors[i, j, 0] for (i, j), tap in taps)
    return functools.reduce(jnp.add, products).astype(x.dtype)


def _taps(
    x: jax.Array, window: tuple[int, int], stride: int, pads: Pads, padding: float = 0
) -> Iterator[tuple[tuple[int, int], jax.Array]]:
    """What each position of the window sees: ``[batch, height', width', channels]``."""
    ends = ((low, high, 0) for low, high in pads)  # negative ones cut
    x = lax.pad(x, jnp.asarray(padding, x.dtype), ((0, 0, 0), *ends, (0, 0, 0)))
    height, width = ((n - k) // stride for n, k in zip(x.shape[1:3], window, strict=True))
    for i, j in itertools.product(*map(range, window)):
        rows = slice(i, i + stride * height + 1, stride)
        yield (i, j), x[:, rows, j : j + stride * width + 1 : stride]


def _depthwise_backward(
    stride: int, pads: Pads, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    return (
        _input_gradient(stride, pads, kernel, dy, x.shape[1:3]),
        _kernel_gradient(stride, pads, x, dy, kernel),
    )


_depthwise.defvjp(partial(_forward, _depthwise), _depthwise_backward)


def _input_gradient(
    stride: int, pads: Pads, kernel: jax.Array, dy: jax.Array, size: tuple[int, ...]
) -> jax.Array:
    """Depthwise convolutions of ``dy``, one for each phase of the stride, interleaved."""
    height, width = size
    (top, bottom), (left, right) = pads
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
        return _depthwise(1, ((0, 0), (0, 0)), seen, taps)

    phases = [[phase(i, j) for j in range(stride)] for i in range(stride)]
    whole = jnp.stack([jnp.stack(row, 3) for row in phases], 2)
    whole = whole.reshape(len(dy), rows * stride, columns * stride, -1)
    return whole[:, top : top + height, left : left + width]


def _kernel_gradient(
    stride: int, pads: Pads, x: jax.Array, dy: jax.Array, kernel: jax.Array
) -> jax.Array:
    """For each tap a sum over all positions, one after the other: a loop compiles quickly."""
    rows, columns, _, channels = kernel.shape
    exact = jnp.promote_types(x.dtype, jnp.float32)
    x, dy = jnp.pad(x, ((0, 0), *pads, (0, 0))).astype(exact), dy.astype(exact)
    height, width = (stride * (side - 1) + 1 for side in dy.shape[1:3])

    def tap(position: jax.Array) -> jax.Array:
        start = (0, position // columns, position % columns, 0)
        seen = lax.dynamic_slice(x, start, (len(x), height, width, channels))
        # XLA's CPU sum over leading axes goes through memory channel by channel, so most of it is
        # done by adding whole images.
        parts = jnp.split(seen[:, ::stride, ::stride] * dy, _divisor(len(x)))
        return functools.reduce(jnp.add, parts).sum((0, 1, 2))

    return lax.map(tap, jnp.arange(rows * columns)).reshape(kernel.shape).astype(kernel.dtype)


def _divisor(n: int, most: int = 8) -> int:
    return max(d for d in range(1, most + 1) if n % d == 0)


# --- pooling ------------------------------------------------------------------------------------


def max_pool(x: jax.Array, k: int, *, stride: int, padding: Padding = 0) -> jax.Array:
    """Maximum over ``k`` x ``k`` windows; padding never wins."""
    pads = _pads(x.shape, (k, k), stride, padding)
    by_taps = partial(_max_pool, k, stride, pads)
    plain = partial(plain_max_pool, k=k, stride=stride, padding=pads)
    return lax.platform_dependent(x, cpu=by_taps, default=plain)


def plain_max_pool(x: jax.Array, k: int, *, stride: int, padding: Padding = 0) -> jax.Array:
    """The same by XLA's own operation."""
    pads = _pads(x.shape, (k, k), stride, padding)
    return lax.reduce_window(
        x, -jnp.inf, lax.max, (1, k, k, 1), (1, stride, stride, 1), ((0, 0), *pads, (0, 0))
    )


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _max_pool(k: int, stride: int, pads: Pads, x: jax.Array) -> jax.Array:
    return plain_max_pool(x, k, stride=stride, padding=pads)


@_max_pool.defjvp
def _max_pool_jvp(
    k: int, stride: int, pads: Pads, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """By the number of the tap that wins, the first of equals, as in XLA and torch.

    XLA's own gradient looks for the winners again, which on a CPU takes four times as long.
    """
    (x,), (dx,) = primals, tangents
    best, winner = jnp.array(-jnp.inf, x.dtype), jnp.uint8(0)
    for number, (_, tap) in enumerate(_taps(x, (k, k), stride, pads, -jnp.inf)):
        winner = jnp.where(tap > best, jnp.uint8(number), winner)
        best = jnp.maximum(tap, best)
    moved = jnp.zeros_like(best)
    for number, (_, tap) in enumerate(_taps(dx, (k, k), stride, pads)):
        moved += jnp.where(winner == number, tap, 0)
    return best, moved


def avg_pool(
    x: jax.Array, k: int, *, stride: int, padding: Padding = 0, count_padding: bool = True
) -> jax.Array:
    """Mean over ``k`` x ``k`` windows.

    Args:
        x: ``[batch, height, width, channels]``.
        k: side of the window.
        stride: the same in both directions.
        padding: see `Padding`.
        count_padding: whether padded zeros count as values, as they do in torch's default;
            TensorFlow's windows are smaller at the border instead.
    """
    pads = ((0, 0), *_pads(x.shape, (k, k), stride, padding), (0, 0))
    sizes, strides = (1, k, k, 1), (1, stride, stride, 1)
    total = lax.reduce_window(x, 0.0, lax.add, sizes, strides, pads)
    if count_padding:
        return total / (k * k)
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    return total / lax.reduce_window(ones, 0.0, lax.add, sizes, strides, pads)


def adaptive_avg_pool(x: jax.Array, k: int) -> jax.Array:
    """To ``k`` x ``k`` means, whatever the size, as torch cuts it: windows differ and may overlap.

    Args:
        x: ``[batch, height, width, channels]``.
        k: side of the result.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        windows = ((i * n // k, -(-(i + 1) * n // k)) for i in range(k))
        x = jnp.stack([lax.slice_in_dim(x, *w, axis=axis).mean(axis) for w in windows], axis)
    return x
