"""BiT (Kolesnikov et al. 2020, Big Transfer, arXiv 1912.11370): ResNetV2 without batch norm.

Group norm and weight standardization replace batch norm, so that there are no running statistics.
Norm and activation precede each convolution (He et al. 2016, Identity Mappings, arXiv 1603.05027),
so another norm follows the last layer. Padding is symmetric, as in timm.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from tljax.models.convolution import max_pool
from tljax.models.layers import Conv, GroupNorm, Mode
from tljax.models.model import Model, Stage, pooled_classifier
from tljax.runtime.preprocess import INCEPTION_PREPROCESS

_conv = partial(Conv, use_bias=False, standardize=True)


class Stem(nn.Module):
    """7x7 convolution and max pooling; the first block begins with a norm."""

    features: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:  # noqa: ARG002 - a stage's signature
        """Map ``[b, h, w, 3]`` to ``[b, h/4, w/4, features]``."""
        x = _conv(self.features, 7, stride=2, padding=3, name="conv")(x)
        # Padded with zeros, which differs from -inf because there is no ReLU before the pool.
        return max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 3, stride=2)


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions, each after a norm and ReLU.

    If the shape changes, the input of the shortcut's convolution is the output of the first ReLU.
    """

    features: int
    stride: int
    has_shortcut: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features]``."""
        width = self.features // 4
        y = nn.relu(GroupNorm(name="norm1")(x))
        if self.has_shortcut:
            x = _conv(self.features, 1, self.stride, name="shortcut")(y)
        y = nn.relu(GroupNorm(name="norm2")(_conv(width, 1, name="conv1")(y)))
        y = _conv(width, 3, self.stride, padding=1, name="conv2")(y)
        return x + _conv(self.features, 1, name="conv3")(nn.relu(GroupNorm(name="norm3")(y)))


class Layer(nn.Module):
    """Sequence of blocks; the first one has the stride."""

    depth: int
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:  # noqa: ARG002 - a stage's signature
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features]``."""
        for i in range(self.depth):
            stride = self.stride if i == 0 else 1
            x = Bottleneck(self.features, stride, has_shortcut=i == 0, name=f"block{i}")(x)
        return x


class Norm(nn.Module):
    """Norm and ReLU after the last layer."""

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:  # noqa: ARG002 - a stage's signature
        """Map ``[b, h, w, c]`` to ``[b, h, w, c]``."""
        return nn.relu(GroupNorm(name="norm")(x))


class Variant(NamedTuple):
    """Configuration of a network.

    Attributes:
        depths: number of blocks in each of the four layers.
        width: multiplier of all widths.
        size: side of the input images, in pixels.
    """

    depths: tuple[int, int, int, int]
    width: int
    size: int = 448


VARIANTS = {
    "resnetv2_50x1_bit": Variant((3, 4, 6, 3), 1),
    "resnetv2_50x3_bit": Variant((3, 4, 6, 3), 3),
    "resnetv2_101x1_bit": Variant((3, 4, 23, 3), 1),
    "resnetv2_101x3_bit": Variant((3, 4, 23, 3), 3),
    "resnetv2_152x2_bit": Variant((3, 8, 36, 3), 2),
    "resnetv2_152x4_bit": Variant((3, 8, 36, 3), 4, size=480),
}
"""Networks by their names in timm."""


def bit(name: str, num_classes: int = 1000) -> Model:
    """Build one of `VARIANTS`, with stages ``stem, layer1 ... layer4, norm, pool, head``."""
    depths, width, size = VARIANTS[name]
    layers = (
        Stage(f"layer{i + 1}", Layer(depth, 256 * width * 2**i, stride=min(i, 1) + 1))
        for i, depth in enumerate(depths)
    )
    stages = Stage("stem", Stem(64 * width)), *layers, Stage("norm", Norm())
    return pooled_classifier(
        name, stages, num_classes, replace(INCEPTION_PREPROCESS, size=size, resize=size)
    )
