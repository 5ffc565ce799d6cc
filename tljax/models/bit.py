"""BiT (Kolesnikov et al. 2020, Big Transfer): ResNet version 2 without batch norm.

Group norm and weight standardisation instead, so nothing depends on the batch and there are no
running statistics. Activations come before the convolutions (He et al. 2016, Identity Mappings), so
the last layer is followed by a norm of its own. Geometry of timm's reference implementation:
symmetric padding everywhere.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from tljax.models.convolution import max_pool
from tljax.models.layers import Conv, GlobalAveragePool, GroupNorm, LinearHead, Mode
from tljax.models.model import Model, Stage
from tljax.runtime.types import HALF

_conv = partial(Conv, use_bias=False, standardize=True)


class Stem(nn.Module):
    """7x7 convolution and max pooling, without norm: the first block begins with one."""

    features: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:  # noqa: ARG002 - a stage's signature
        """``[b, h, w, 3] -> [b, h/4, w/4, features]``."""
        x = _conv(self.features, 7, stride=2, padding=3, name="conv")(x)
        # Zeros, which win over negative values: as there is no ReLU, this is not torch's padding.
        return max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 3, stride=2)


class Bottleneck(nn.Module):
    """Norm, ReLU and convolution three times, 1x1, 3x3 and 1x1, around a shortcut.

    Where the shape changes, the shortcut starts behind the first ReLU.
    """

    features: int
    stride: int
    has_shortcut: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """``[b, h, w, c] -> [b, h/stride, w/stride, features]``."""
        width = self.features // 4
        y = nn.relu(GroupNorm(name="norm1")(x))
        if self.has_shortcut:
            x = _conv(self.features, 1, self.stride, name="shortcut")(y)
        y = nn.relu(GroupNorm(name="norm2")(_conv(width, 1, name="conv1")(y)))
        y = _conv(width, 3, self.stride, padding=1, name="conv2")(y)
        return x + _conv(self.features, 1, name="conv3")(nn.relu(GroupNorm(name="norm3")(y)))


class Layer(nn.Module):
    """A run of blocks at one resolution; the first one carries the stride."""

    depth: int
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:  # noqa: ARG002 - a stage's signature
        """``[b, h, w, c] -> [b, h/stride, w/stride, features]``."""
        for i in range(self.depth):
            stride = self.stride if i == 0 else 1
            x = Bottleneck(self.features, stride, has_shortcut=i == 0, name=f"block{i}")(x)
        return x


class Norm(nn.Module):
    """What the last layer lacks: a norm and ReLU."""

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:  # noqa: ARG002 - a stage's signature
        """``[b, h, w, c] -> [b, h, w, c]``."""
        return nn.relu(GroupNorm(name="norm")(x))


class Variant(NamedTuple):
    """Blocks in each of the four layers; a multiplier of all widths; side of the usual images."""

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
"""By timm's names."""


def bit(name: str, num_classes: int = 1000) -> Model:
    """One of `VARIANTS`, with stages ``stem, layer1 ... layer4, norm, pool, head``."""
    depths, width, size = VARIANTS[name]
    layers = (
        Stage(f"layer{i + 1}", Layer(depth, 256 * width * 2**i, stride=min(i, 1) + 1))
        for i, depth in enumerate(depths)
    )
    return Model(
        name,
        (
            Stage("stem", Stem(64 * width)),
            *layers,
            Stage("norm", Norm()),
            Stage("pool", GlobalAveragePool(), "vector"),
            Stage("head", LinearHead(num_classes), "vector"),
        ),
        replace(HALF, size=size, resize=size),
    )
