"""The layers of every backbone: convolutions and their norms, pooling to a vector, heads.

Compute follows the input: kernels are cast to the dtype of the images that reach them, parameters
and statistics stay in float32, and the head returns at least float32 logits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from tljax.models.convolution import Kernel, Padding, conv2d


class Mode(NamedTuple):
    """How a stage runs: two switches, which do not depend on each other.

    Attributes:
        batch_statistics: False lets batch norms use their running statistics; True those of the
            batch, which move the running ones; ``[batch]`` bool those of the rows that count.
        noise: whether dropout and stochastic depth draw.
    """

    batch_statistics: bool | jax.Array = False
    noise: bool = False


INFERENCE = Mode()


class Conv(nn.Module):
    """A convolution with a bias, or without.

    ``standardize`` gives the kernel of every output channel mean 0 and variance 1 first (Qiao et
    al. 2019, Weight Standardization).
    """

    features: int
    kernel_size: Kernel
    stride: int = 1
    padding: Padding = 0
    groups: int = 1
    use_bias: bool = True
    standardize: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[b, h, w, c] -> [b, h', w', features]``, without activation."""
        kernel = _kernel(self, self.kernel_size, x.shape[-1] // self.groups, self.features)
        if self.standardize:
            kernel -= kernel.mean((0, 1, 2))
            kernel *= lax.rsqrt(jnp.square(kernel).mean((0, 1, 2)) + 1e-8)
        y = _convolve(self, x, kernel)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return y + bias.astype(y.dtype)


def _kernel(module: nn.Module, size: Kernel, inputs: int, features: int) -> jax.Array:
    height, width = (size, size) if isinstance(size, int) else size
    return module.param("kernel", nn.initializers.he_normal(), (height, width, inputs, features))


def _convolve(module: "Conv | ConvNorm", x: jax.Array, kernel: jax.Array) -> jax.Array:
    kernel, stride, padding = kernel.astype(x.dtype), module.stride, module.padding
    return conv2d(x, kernel, stride=stride, padding=padding, groups=module.groups)


class _Norm(NamedTuple):
    """The parameters and statistics of one batch norm, each ``[channels]``."""

    scale: jax.Array
    bias: jax.Array
    mean: nn.Variable
    var: nn.Variable

    def affine(self, epsilon: float) -> tuple[jax.Array, jax.Array]:
        """The map that it is on running statistics: a factor and a shift."""
        factor = self.scale * lax.rsqrt(self.var.value + epsilon)
        return factor, self.bias - self.mean.value * factor


def _norm(module: nn.Module, channels: int, *, use_scale: bool = True) -> _Norm:
    one, zero, shape = nn.initializers.ones, nn.initializers.zeros, (channels,)
    return _Norm(
        module.param("scale", one, shape) if use_scale else jnp.ones(shape),
        module.param("bias", zero, shape),
        module.variable("batch_stats", "mean", jnp.zeros, shape),
        module.variable("batch_stats", "var", jnp.ones, shape),
    )


def _batch_normalize(
    y: jax.Array, norm: _Norm, mode: Mode, *, epsilon: float, momentum: float, move: bool
) -> jax.Array:
    """In training mode: by the statistics of the rows that count, which move the running ones.

    A row that does not count leaves as ``bias``, whatever it held: by selection, as a product with
    0 would let infinities through, and no variance of others scales it up from layer to layer.
    Where no row counts the running statistics stay. The running variance gets Bessel's correction,
    as in torch; ``momentum`` is the share of the old value.
    """
    y32 = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    counted = mode.batch_statistics
    rows = jnp.ones(len(y), bool) if counted is True else jnp.asarray(counted)
    counts = rows[:, None, None, None]
    count = jnp.maximum(rows.sum(), 1) * (y.shape[1] * y.shape[2])
    mean = y32.sum((0, 1, 2), where=counts) / count
    centered = jnp.where(counts, y32 - mean, 0)
    var = jnp.square(centered).sum((0, 1, 2)) / count
    if move:
        kept = jnp.where(rows.any(), momentum, 1)
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        norm.mean.value = kept * norm.mean.value + (1 - kept) * mean
        norm.var.value = kept * norm.var.value + (1 - kept) * unbiased
    factor = norm.scale * lax.rsqrt(var + epsilon)
    return (centered * factor + norm.bias).astype(y.dtype)


class ConvNorm(nn.Module):
    """A convolution and the batch norm behind it: the brick that convnets are built of.

    On running statistics the norm is an affine map per output channel, so it is folded into the
    kernel: the same function and the same gradients in one pass over the activations.

    Some networks carry what changes nothing or little and has to be ported all the same: a bias of
    the convolution (``use_bias``: Keras' ResNets), or no scale (Keras' Inception).
    """

    features: int
    kernel_size: Kernel
    stride: int = 1
    padding: Padding = 0
    groups: int = 1
    epsilon: float = 1e-5
    momentum: float = 0.9
    use_bias: bool = False
    use_scale: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        """``[b, h, w, c] -> [b, h', w', features]``, without activation."""
        kernel = _kernel(self, self.kernel_size, x.shape[-1] // self.groups, self.features)
        norm = _norm(self, self.features, use_scale=self.use_scale)
        zero = nn.initializers.zeros
        before = self.param("conv_bias", zero, (self.features,)) if self.use_bias else None

        if mode.batch_statistics is False:
            factor, shift = norm.affine(self.epsilon)
            if before is not None:
                shift += before * factor
            return _convolve(self, x, kernel * factor) + shift.astype(x.dtype)

        y = _convolve(self, x, kernel)
        if before is not None:
            y += before.astype(y.dtype)
        move = not self.is_initializing()
        return _batch_normalize(
            y, norm, mode, epsilon=self.epsilon, momentum=self.momentum, move=move
        )


class BatchNorm(nn.Module):
    """A batch norm by itself, where no convolution stands right before it."""

    epsilon: float = 1e-5
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        """``[b, h, w, c] -> [b, h, w, c]``; see `ConvNorm`."""
        norm = _norm(self, x.shape[-1])
        if mode.batch_statistics is False:
            factor, shift = norm.affine(self.epsilon)
            return x * factor.astype(x.dtype) + shift.astype(x.dtype)
        move = not self.is_initializing()
        return _batch_normalize(
            x, norm, mode, epsilon=self.epsilon, momentum=self.momentum, move=move
        )


class GroupNorm(nn.Module):
    """Group norm (Wu and He 2018): by the statistics of one image, over groups of channels.

    The same in training mode; there are no running statistics.
    """

    groups: int = 32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[b, h, w, c] -> [b, h, w, c]``; statistics in at least float32."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        grouped = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        grouped = grouped.reshape(*x.shape[:-1], self.groups, channels // self.groups)
        grouped -= grouped.mean((1, 2, 4), keepdims=True)
        variance = jnp.square(grouped).mean((1, 2, 4), keepdims=True)
        y = (grouped * lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return (y * scale + bias).astype(x.dtype)


class Dense(nn.Module):
    """A fully connected layer between features, not the head."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[b, c] -> [b, features]``, without activation."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


LAYERS = (Conv, ConvNorm, BatchNorm, GroupNorm, Dense)
"""What `layer_outputs` reports, besides the head."""


class GlobalAveragePool(nn.Module):
    """``[b, h, w, c]`` or ``[b, tokens, c]`` to ``[b, c]``: the features that a probe reads.

    The first ``prefix_tokens`` of the tokens do not count.
    """

    prefix_tokens: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:  # noqa: ARG002 - a stage's signature
        """The mean over all positions, in at least float32."""
        positions = tuple(range(1, x.ndim - 1))
        x = x[:, self.prefix_tokens :] if self.prefix_tokens else x
        return x.mean(positions, dtype=jnp.promote_types(x.dtype, jnp.float32))


class LinearHead(nn.Module):
    """``[b, c] -> [b, num_classes]`` logits in at least float32, with dropout before them.

    A new head starts at zero (Kolesnikov et al. 2020, BiT): every class equally likely. For 0
    classes there is none: the features are handed on, and there are no parameters.
    """

    num_classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        """The logits."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if not self.num_classes:
            return x
        if self.dropout:
            x = nn.Dropout(self.dropout, deterministic=not mode.noise)(x)
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.num_classes))
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        return x @ kernel + bias
