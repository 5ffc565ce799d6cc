"""Convolution, batch norm and pooling: one geometry and one fast path for every backbone.

Compute follows the input: kernels are cast to the dtype of the images that reach them, parameters
and statistics stay in float32, and the head returns at least float32 logits.
"""

import functools
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

Padding = int | Literal["SAME"]
"""Symmetric zeros on each side, as torch pads; or TensorFlow's SAME, which depends on the size."""


Train = bool | jax.Array
"""False: on running statistics. True, or ``[batch]`` bool of the rows that count: training mode."""


def conv2d(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding = 0, groups: int = 1
) -> jax.Array:
    """Two-dimensional convolution (cross-correlation), by the path that is fast where it runs.

    Args:
        x: ``[batch, height, width, in]``.
        kernel: ``[k, k, in // groups, out]``.
        stride: the same in both directions.
        padding: see `Padding`.
        groups: 1, the number of channels (depthwise), or anything between.

    Returns:
        ``[batch, height', width', out]``.
    """
    k = kernel.shape[0]
    pads = _pads(x.shape, k, stride, padding)
    if k == 1 and groups == 1 and pads == ((0, 0), (0, 0)):
        # A 1x1 convolution is a matrix product; XLA's CPU convolution does not know.
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    if groups == x.shape[-1] == kernel.shape[-1]:
        return _depthwise(x, kernel, stride, pads)
    return _xla_conv(x, kernel, stride, pads, groups)


def _pads(
    shape: tuple[int, ...], k: int, stride: int, padding: Padding
) -> tuple[tuple[int, int], tuple[int, int]]:
    if padding == "SAME":
        height, width = lax.padtype_to_pads(shape[1:3], (k, k), (stride, stride), "SAME")
        return tuple(height), tuple(width)  # pyright: ignore[reportReturnType]
    return (padding, padding), (padding, padding)


def _xla_conv(
    x: jax.Array,
    kernel: jax.Array,
    stride: int,
    pads: tuple[tuple[int, int], tuple[int, int]],
    groups: int,
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _depthwise(
    x: jax.Array, kernel: jax.Array, stride: int, pads: tuple[tuple[int, int], tuple[int, int]]
) -> jax.Array:
    """A depthwise convolution; on a CPU as k * k shifted multiply-adds.

    XLA's grouped convolution on a CPU takes ten times as long, and its gradients up to forty.
    """

    def shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        k = kernel.shape[0]
        height, width = ((size - k) // stride + 1 for size in x.shape[1:3])
        taps = (
            x[:, i : i + stride * height : stride, j : j + stride * width : stride]
            * kernel[i, j, 0]
            for i in range(k)
            for j in range(k)
        )
        return functools.reduce(jnp.add, taps)

    grouped = partial(_xla_conv, stride=stride, pads=pads, groups=x.shape[-1])
    return lax.platform_dependent(x, kernel, cpu=shifted, default=grouped)


def max_pool(x: jax.Array, k: int, *, stride: int, padding: Padding = 0) -> jax.Array:
    """Maximum over ``k`` x ``k`` windows; padding never wins."""
    pads = _pads(x.shape, k, stride, padding)
    return lax.reduce_window(
        x, -jnp.inf, lax.max, (1, k, k, 1), (1, stride, stride, 1), ((0, 0), *pads, (0, 0))
    )


class ConvNorm(nn.Module):
    """A convolution and the batch norm behind it: the brick that convnets are built of.

    On running statistics the norm is an affine map per output channel, so it is folded into the
    kernel: the same function and the same gradients in one pass over the activations.

    In training mode the norm uses the statistics of the batch (of the rows that count: padding must
    not move them) and moves the running ones as torch does: the variance with Bessel's correction,
    ``momentum`` being the share of the old value.
    """

    features: int
    kernel_size: int
    stride: int = 1
    padding: Padding = 0
    groups: int = 1
    epsilon: float = 1e-5
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, train: Train) -> jax.Array:
        """``[b, h, w, c] -> [b, h', w', features]``, without activation."""
        k, out = self.kernel_size, (self.features,)
        shape = (k, k, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        scale = self.param("scale", nn.initializers.ones, out)
        bias = self.param("bias", nn.initializers.zeros, out)
        mean = self.variable("batch_stats", "mean", jnp.zeros, out)
        var = self.variable("batch_stats", "var", jnp.ones, out)
        conv = partial(conv2d, stride=self.stride, padding=self.padding, groups=self.groups)

        if train is False:
            factor = scale * lax.rsqrt(var.value + self.epsilon)
            shift = bias - mean.value * factor
            return conv(x, (kernel * factor).astype(x.dtype)) + shift.astype(x.dtype)

        y = conv(x, kernel.astype(x.dtype))
        y32 = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        rows = jnp.ones(len(y)) if train is True else train.astype(jnp.float32)
        counts = rows[:, None, None, None]
        count = jnp.maximum(rows.sum(), 1) * (y.shape[1] * y.shape[2])
        batch_mean = (y32 * counts).sum((0, 1, 2)) / count
        batch_var = (jnp.square(y32 - batch_mean) * counts).sum((0, 1, 2)) / count
        if not self.is_initializing():
            unbiased = batch_var * (count / jnp.maximum(count - 1, 1))
            mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
            var.value = self.momentum * var.value + (1 - self.momentum) * unbiased
        factor = scale * lax.rsqrt(batch_var + self.epsilon)
        return (y32 * factor + (bias - batch_mean * factor)).astype(y.dtype)


class GlobalAveragePool(nn.Module):
    """``[b, h, w, c] -> [b, c]``: the features that a probe reads."""

    @nn.compact
    def __call__(self, x: jax.Array, train: Train) -> jax.Array:  # noqa: ARG002 - a stage's signature
        """The mean over all positions, in at least float32."""
        return x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


class LinearHead(nn.Module):
    """``[b, c] -> [b, num_classes]`` logits in at least float32, with dropout before them.

    A new head starts at zero (Kolesnikov et al. 2020, BiT): every class equally likely.
    """

    num_classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: Train) -> jax.Array:
        """The logits."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.dropout:
            x = nn.Dropout(self.dropout, deterministic=train is False)(x)
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.num_classes))
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        return x @ kernel + bias
