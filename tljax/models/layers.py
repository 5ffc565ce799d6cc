"""Layers of all backbones: convolutions, norms, gates, noise, pooling and heads.

Layers compute in the dtype of their input and cast their kernels to it. Parameters and statistics
are float32; pooled features and logits are at least float32.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Bool, Float

from tljax.models.convolution import Kernel, Padding, conv2d, multiply
from tljax.runtime.types import FeatureMap


class Mode(NamedTuple):
    """Mode in which a stage runs: two independent switches, and what it cannot know by itself.

    Attributes:
        batch_statistics: False normalizes with the running statistics. True normalizes with the
            statistics of the batch and updates the running ones. ``[batch]`` bool does the same
            with the statistics of the selected examples.
        noise: True enables dropout and stochastic depth.
        drop_path: rate of stochastic depth in the last block of the network, in [0, 1); see
            `StochasticDepth`.
        grid: rows and columns of the patches that tokens stand for; None if they are unknown.
    """

    batch_statistics: bool | Bool[jax.Array, " batch"] = False
    noise: bool = False
    drop_path: float = 0.0
    grid: tuple[int, int] | None = None


INFERENCE = Mode()
"""Running statistics, no noise."""

Vectors = Float[jax.Array, "batch channels"]
Features = Float[jax.Array, "batch *positions channels"]

Activation = Callable[[jax.Array], jax.Array]

gelu: Activation = partial(nn.gelu, approximate=False)
"""GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415), as in torch; `flax.linen.gelu` is tanh's."""


class Conv(nn.Module):
    """Convolution with an optional bias.

    ``standardize`` first scales the kernel of every output channel to mean 0 and variance 1 (weight
    standardization: Qiao et al. 2019, https://arxiv.org/abs/1903.10520).
    """

    features: int
    kernel_size: Kernel
    stride: int = 1
    padding: Padding = 0
    groups: int = 1
    use_bias: bool = True
    standardize: bool = False

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Map ``[b, h, w, c]`` to ``[b, h', w', features]``, without activation."""
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
    """Parameters and running statistics of a batch norm, each ``[channels]``."""

    scale: jax.Array
    bias: jax.Array
    mean: nn.Variable
    var: nn.Variable

    def affine(self, epsilon: float) -> tuple[jax.Array, jax.Array]:
        """Return the factor and shift that normalize with the running statistics."""
        factor = self.scale * lax.rsqrt(self.var.value + epsilon)
        return factor, self.bias - self.mean.value * factor


def _norm(module: nn.Module, channels: int, *, use_scale: bool = True) -> _Norm:
    shape = (channels,)
    return _Norm(
        module.param("scale", nn.initializers.ones, shape) if use_scale else jnp.ones(shape),
        module.param("bias", nn.initializers.zeros, shape),
        module.variable("batch_stats", "mean", jnp.zeros, shape),
        module.variable("batch_stats", "var", jnp.ones, shape),
    )


def _batch_normalize(
    module: "ConvNorm | BatchNorm", x: FeatureMap, norm: _Norm, mode: Mode
) -> FeatureMap:
    """Normalize with the statistics of the selected examples and update the running ones.

    Both moments are taken in one pass, about the running mean: they lose digits only if the mean is
    many standard deviations away from it. The two sums of the derivative then need one pass, too.

    An example that is not selected is replaced by the running mean, which adds 0 to the sums, and
    has no gradient. It is replaced by `jnp.where`, because a product with 0 would keep infinities,
    and because its values, scaled by the variance of other examples, could grow from layer to
    layer. If no example is selected, the running statistics do not change. The running variance is
    unbiased (Bessel's correction), as in torch; ``momentum`` is the weight of the old value.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    selected = jnp.broadcast_to(jnp.asarray(mode.batch_statistics), (len(x),))
    center = _rounded(lax.stop_gradient(norm.mean.value).astype(dtype), x.dtype)
    x = jnp.where(selected[:, None, None, None], x, center.astype(x.dtype))
    moved = x.astype(dtype) - center
    examples = selected.sum(dtype=dtype)
    count = jnp.maximum(examples, 1) * (x.shape[1] * x.shape[2])
    mean = moved.sum((0, 1, 2)) / count
    square = jnp.square(moved).sum((0, 1, 2)) / count
    var = jnp.maximum(square - jnp.square(mean), 0)  # rounding may leave less than 0
    if not module.is_initializing():
        momentum = jnp.where(examples > 0, module.momentum, 1)
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        norm.mean.value = momentum * norm.mean.value + (1 - momentum) * (center + mean)
        norm.var.value = momentum * norm.var.value + (1 - momentum) * unbiased
    factor = norm.scale * lax.rsqrt(var + module.epsilon)
    return (moved * factor + (norm.bias - mean * factor)).astype(x.dtype)


def _rounded(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Round to what a narrower dtype holds; XLA may remove a cast there and back."""
    narrow = jnp.finfo(dtype)
    return lax.reduce_precision(values, narrow.nexp, narrow.nmant)


class ConvNorm(nn.Module):
    """Convolution followed by a batch norm.

    With running statistics the norm is an affine function per output channel, which is folded into
    the kernel: the outputs and gradients are the same, with one pass over the activations.

    ``momentum`` is the weight of the old running statistics. Two options exist for ports:
    ``use_bias`` adds a bias before the norm (ResNets in Keras), and ``use_scale=False`` omits the
    scale of the norm (Inception in Keras).
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
    def __call__(self, x: FeatureMap, mode: Mode) -> FeatureMap:
        """Map ``[b, h, w, c]`` to ``[b, h', w', features]``, without activation."""
        kernel = _kernel(self, self.kernel_size, x.shape[-1] // self.groups, self.features)
        norm = _norm(self, self.features, use_scale=self.use_scale)
        zeros = nn.initializers.zeros
        conv_bias = self.param("conv_bias", zeros, (self.features,)) if self.use_bias else None

        if mode.batch_statistics is False:
            factor, shift = norm.affine(self.epsilon)
            if conv_bias is not None:
                shift += conv_bias * factor
            return _convolve(self, x, kernel * factor) + shift.astype(x.dtype)

        y = _convolve(self, x, kernel)
        if conv_bias is not None:
            y += conv_bias.astype(y.dtype)
        return _batch_normalize(self, y, norm, mode)


class BatchNorm(nn.Module):
    """Batch norm that does not directly follow a convolution; see `ConvNorm`."""

    epsilon: float = 1e-5
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: FeatureMap, mode: Mode) -> FeatureMap:
        """Map ``[b, h, w, c]`` to ``[b, h, w, c]``."""
        norm = _norm(self, x.shape[-1])
        if mode.batch_statistics is False:
            factor, shift = norm.affine(self.epsilon)
            return x * factor.astype(x.dtype) + shift.astype(x.dtype)
        return _batch_normalize(self, x, norm, mode)


class GroupNorm(nn.Module):
    """Group norm over groups of channels of one image (Wu and He 2018, arXiv 1803.08494).

    There are no running statistics; training and inference are the same.
    """

    groups: int = 32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Map ``[b, h, w, c]`` to ``[b, h, w, c]``; statistics in at least float32."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        grouped = x.reshape(*x.shape[:-1], self.groups, channels // self.groups)
        mean, variance = _moments(grouped, (1, 2, 4))
        y = ((grouped - mean) * lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return (y * scale + bias).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the channels of each position (Ba et al. 2016, arXiv 1607.06450)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Features) -> Features:
        """Map ``[b, ..., c]`` to ``[b, ..., c]``; statistics in at least float32."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        mean, variance = _moments(x, -1)
        y = (x - mean) * lax.rsqrt(variance + self.epsilon)
        return (y * scale + bias).astype(x.dtype)


def _moments(x: Features, axes: int | tuple[int, ...]) -> tuple[Features, Features]:
    """Return the mean and variance over some axes, which have length 1 then, at least in float32.

    bfloat16 numbers are read once. That the mean of their squares and the square of their mean
    cancel costs less than the rounding of the numbers themselves, which have 8 digits and not 24.
    """
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = exact.mean(axes, keepdims=True)
    if x.dtype != jnp.bfloat16:
        return mean, jnp.square(exact - mean).mean(axes, keepdims=True)
    variance = jnp.square(exact).mean(axes, keepdims=True) - jnp.square(mean)
    return mean, jnp.maximum(variance, 0)  # rounding may leave less than 0


class Dense(nn.Module):
    """Fully connected layer of every position; the head is a `LinearHead`."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Features) -> Features:
        """Map ``[b, ..., c]`` to ``[b, ..., features]``, without activation."""
        kernel = self.param("kernel", nn.initializers.he_normal(), (x.shape[-1], self.features))
        y = multiply(x, kernel.astype(x.dtype))
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return y + bias.astype(x.dtype)


LAYERS = (Conv, ConvNorm, BatchNorm, GroupNorm, LayerNorm, Dense)
"""Layers that `layer_outputs` reports, in addition to the head."""


class LayerScale(nn.Module):
    """Learned factor of each channel of a residual branch (Touvron et al. 2021, arXiv 2103.17239).

    New branches begin at ``initial``; published networks have learned other values.
    """

    initial: float = 1e-6

    @nn.compact
    def __call__(self, x: Features) -> Features:
        """Map ``[b, ..., c]`` to ``[b, ..., c]``."""
        scale = self.param("scale", nn.initializers.constant(self.initial), x.shape[-1:])
        return x * scale.astype(x.dtype)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: gate every channel by the average of all (Hu et al. 2017).

    arXiv 1709.01507. ``features`` is the width between the two layers.
    """

    features: int
    activation: Activation = nn.relu
    gate: Activation = nn.sigmoid

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Map ``[b, h, w, c]`` to ``[b, h, w, c]``."""
        y = Conv(self.features, 1, name="reduce")(x.mean((1, 2), keepdims=True))
        return x * self.gate(Conv(x.shape[-1], 1, name="expand")(self.activation(y)))


class StochasticDepth(nn.Module):
    """Drop a residual branch of random examples (Huang et al. 2016, arXiv 1603.09382).

    ``depth`` is the position of the block, from 0 for the first one to 1 for the last one. The
    rate increases with it from 0 to ``mode.drop_path``. What is kept is scaled, so that the mean
    does not change. Without ``mode.noise`` nothing is dropped.
    """

    depth: float

    @nn.compact
    def __call__(self, x: Features, mode: Mode) -> Features:
        """Map the output of a branch ``[b, ..., c]`` to ``[b, ..., c]``."""
        rate = mode.drop_path * self.depth if mode.noise else 0.0
        if not rate:
            return x
        shape = len(x), *(1 for _ in x.shape[1:])
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, shape)
        return jnp.where(keep, x / (1 - rate), 0)


class GlobalAveragePool(nn.Module):
    """Mean over all positions of a map, or over all tokens except the first ``prefix_tokens``."""

    prefix_tokens: int = 0

    @nn.compact
    def __call__(self, x: Float[jax.Array, "batch *positions channels"], mode: Mode) -> Vectors:  # noqa: ARG002 - a stage's signature
        """Map ``[b, h, w, c]`` or ``[b, tokens, c]`` to ``[b, c]``, in at least float32."""
        positions = tuple(range(1, x.ndim - 1))
        x = x[:, self.prefix_tokens :] if self.prefix_tokens else x
        return x.mean(positions, dtype=jnp.promote_types(x.dtype, jnp.float32))


class LinearHead(nn.Module):
    """Linear classification head with optional dropout before it.

    Kernel and bias are initialized to zero, so that all classes are equally likely (Kolesnikov et
    al. 2020, BiT). With ``num_classes=0`` the head has no parameters and returns its input.
    """

    num_classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Vectors, mode: Mode) -> Vectors:
        """Map ``[b, c]`` to logits ``[b, num_classes]``, in at least float32."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if not self.num_classes:
            return x
        if self.dropout:
            x = nn.Dropout(self.dropout, deterministic=not mode.noise)(x)
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.num_classes))
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        return x @ kernel + bias


class SimilarityHead(LinearHead):
    """Linear head of inputs that are scaled to length 1.

    A logit is a cosine times the length of a column of the kernel, plus the bias.
    """

    def __call__(self, x: Vectors, mode: Mode) -> Vectors:
        """Map ``[b, c]`` to logits ``[b, num_classes]``, in at least float32."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        lengths = jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
        return super().__call__(x / lengths, mode)
