"""ResNet (He et al. 2015), version 1.5: the 3x3 convolution of a bottleneck carries the stride.

Geometry of torchvision's reference implementation: symmetric padding everywhere.
"""

from flax import linen as nn
from jax import Array

from tljax.models.layers import ConvNorm, GlobalAveragePool, LinearHead, Train, max_pool
from tljax.models.model import Model, Stage
from tljax.types import Preprocess


class Stem(nn.Module):
    """7x7 convolution and max pooling: a quarter of the resolution."""

    @nn.compact
    def __call__(self, x: Array, train: Train) -> Array:
        """``[b, h, w, 3] -> [b, h/4, w/4, 64]``."""
        x = nn.relu(ConvNorm(64, 7, stride=2, padding=3, name="conv1")(x, train))
        return max_pool(x, 3, stride=2, padding=1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: ResNet-18 and 34."""

    features: int
    stride: int = 1
    expansion = 1

    @nn.compact
    def __call__(self, x: Array, train: Train) -> Array:
        """``[b, h, w, c] -> [b, h/stride, w/stride, features]``."""
        y = ConvNorm(self.features, 3, self.stride, padding=1, name="conv1")(x, train)
        y = ConvNorm(self.features, 3, padding=1, name="conv2")(nn.relu(y), train)
        if self.stride > 1 or x.shape[-1] != self.features:
            x = ConvNorm(self.features, 1, self.stride, name="shortcut")(x, train)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution around a shortcut: ResNet-50, 101 and 152."""

    features: int
    stride: int = 1
    expansion = 4

    @nn.compact
    def __call__(self, x: Array, train: Train) -> Array:
        """``[b, h, w, c] -> [b, h/stride, w/stride, 4 * features]``."""
        out = self.features * self.expansion
        y = nn.relu(ConvNorm(self.features, 1, name="conv1")(x, train))
        y = nn.relu(ConvNorm(self.features, 3, self.stride, padding=1, name="conv2")(y, train))
        y = ConvNorm(out, 1, name="conv3")(y, train)
        if self.stride > 1 or x.shape[-1] != out:
            x = ConvNorm(out, 1, self.stride, name="shortcut")(x, train)
        return nn.relu(x + y)


class Layer(nn.Module):
    """A run of blocks at one resolution; the first one carries the stride."""

    block: type[BasicBlock] | type[Bottleneck]
    depth: int
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, train: Train) -> Array:
        """``[b, h, w, c] -> [b, h/stride, w/stride, features * expansion]``."""
        for i in range(self.depth):
            stride = self.stride if i == 0 else 1
            x = self.block(self.features, stride, name=f"block{i}")(x, train)
        return x


DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
"""Number of blocks in each layer."""


def resnet(name: str, num_classes: int = 1000) -> Model:
    """One of `DEPTHS`, with stages ``stem, layer1 ... layer4, pool, head``."""
    block = BasicBlock if name in ("resnet18", "resnet34") else Bottleneck
    layers = (
        Stage(f"layer{i + 1}", Layer(block, depth, features=64 * 2**i, stride=min(i, 1) + 1))
        for i, depth in enumerate(DEPTHS[name])
    )
    return Model(
        name,
        (
            Stage("stem", Stem()),
            *layers,
            Stage("pool", GlobalAveragePool()),
            Stage("head", LinearHead(num_classes)),
        ),
        Preprocess(),
    )
