"""ResNetV2 (He et al. 2016, Identity Mappings, arXiv 1603.05027): norm and activation come first.

As in Keras, the last block of a layer has the stride, not the first.
"""

from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from tljax.models.convolution import max_pool
from tljax.models.layers import BatchNorm, Conv, ConvNorm, Mode
from tljax.models.model import Model, Stage, pooled_classifier
from tljax.runtime.preprocess import INCEPTION_PREPROCESS

_KERAS = {"epsilon": 1.001e-5, "momentum": 0.99}
_conv_norm = partial(ConvNorm, **_KERAS)
_norm = partial(BatchNorm, **_KERAS)


class Stem(nn.Module):
    """7x7 convolution and max pooling."""

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:  # noqa: ARG002 - a stage's signature
        """Map ``[b, h, w, 3]`` to ``[b, h/4, w/4, 64]``."""
        x = Conv(64, 7, stride=2, padding=3, name="conv1")(x)
        # Padded with zeros, which differs from -inf because there is no ReLU before the pool.
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return max_pool(x, 3, stride=2)


class Block(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions, without activation after the sum."""

    features: int
    stride: int
    project: bool

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, 4 * features]``."""
        y = nn.relu(_norm(name="preact")(x, mode))
        if self.project:
            x = Conv(4 * self.features, 1, self.stride, name="shortcut")(y)
        else:
            x = x[:, :: self.stride, :: self.stride]
        y = nn.relu(_conv_norm(self.features, 1, name="conv1")(y, mode))
        y = nn.relu(_conv_norm(self.features, 3, self.stride, padding=1, name="conv2")(y, mode))
        return x + Conv(4 * self.features, 1, name="conv3")(y)


class Layer(nn.Module):
    """Sequence of blocks; the first has a convolution in its shortcut, the last has the stride."""

    depth: int
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, 4 * features]``."""
        for i in range(self.depth):
            stride = self.stride if i == self.depth - 1 else 1
            x = Block(self.features, stride, project=i == 0, name=f"block{i}")(x, mode)
        return x


class Norm(nn.Module):
    """Norm and ReLU after the last layer."""

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h, w, c]``."""
        return nn.relu(_norm(name="norm")(x, mode))


DEPTHS = {
    "keras_resnet50v2": (3, 4, 6, 3),
    "keras_resnet101v2": (3, 4, 23, 3),
    "keras_resnet152v2": (3, 8, 36, 3),
}
"""Number of blocks in each layer."""


def resnetv2(name: str, num_classes: int = 1000) -> Model:
    """Build one of `DEPTHS`, with stages ``stem, layer1 ... layer4, norm, pool, head``."""
    layers = (
        Stage(f"layer{i + 1}", Layer(depth, features=64 * 2**i, stride=2 if i < 3 else 1))
        for i, depth in enumerate(DEPTHS[name])
    )
    stages = Stage("stem", Stem()), *layers, Stage("norm", Norm())
    return pooled_classifier(name, stages, num_classes, INCEPTION_PREPROCESS)
