"""ResNet (He et al. 2015, arXiv 1512.03385) and its variants, each a line of `VARIANTS`.

ResNets are version 1.5: the 3x3 convolution of a bottleneck has the stride. ResNeXt (Xie et al.
2017, arXiv 1611.05431) groups that convolution, Wide ResNet (Zagoruyko and Komodakis 2016, arXiv
1605.07146) widens it, and ResNet-D (He et al. 2018, Bag of Tricks, arXiv 1812.01187) averages
pixels instead of skipping them in shortcuts. Padding is symmetric, as in torchvision and, for
ResNet-D, in timm.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from flax import linen as nn
from jax import Array

from tljax.models.convolution import avg_pool, max_pool
from tljax.models.layers import ConvNorm, Mode
from tljax.models.model import Model, Stage, pooled_classifier
from tljax.runtime.preprocess import CAFFE_PREPROCESS, Preprocess


class Variant(NamedTuple):
    """Configuration of a ResNet.

    Attributes:
        block: `BasicBlock` or `Bottleneck`.
        depths: number of blocks in each of the four layers.
        groups: number of groups of a bottleneck's 3x3 convolution.
        group_width: channels of each group in layer1; doubled in each further layer.
        deep_stem: whether the stem has three 3x3 convolutions instead of one 7x7 (ResNet-D).
        pooled_shortcut: whether strided shortcuts average 2x2 pixels first (ResNet-D).
        stride_first: whether the first 1x1 convolution of a bottleneck has the stride (version 1).
        conv_norm: creates every convolution.
        preprocess: preprocessing of most published weights.
    """

    block: "type[BasicBlock] | type[Bottleneck]"
    depths: tuple[int, int, int, int]
    groups: int = 1
    group_width: int = 64
    deep_stem: bool = False
    pooled_shortcut: bool = False
    stride_first: bool = False
    conv_norm: Callable[..., ConvNorm] = ConvNorm
    preprocess: Preprocess = Preprocess()


class Stem(nn.Module):
    """7x7 convolution, or three 3x3 convolutions, and max pooling."""

    variant: Variant

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, 3]`` to ``[b, h/4, w/4, 64]``."""
        conv_norm = self.variant.conv_norm
        if self.variant.deep_stem:
            x = nn.relu(conv_norm(32, 3, stride=2, padding=1, name="conv1")(x, mode))
            x = nn.relu(conv_norm(32, 3, padding=1, name="conv2")(x, mode))
            x = nn.relu(conv_norm(64, 3, padding=1, name="conv3")(x, mode))
        else:
            x = nn.relu(conv_norm(64, 7, stride=2, padding=3, name="conv1")(x, mode))
        return max_pool(x, 3, stride=2, padding=1)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions: ResNet-18 and 34."""

    variant: Variant
    features: int
    stride: int = 1
    expansion = 1
    convolutions = 2

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features]``."""
        conv_norm = self.variant.conv_norm
        y = nn.relu(conv_norm(self.features, 3, self.stride, padding=1, name="conv1")(x, mode))
        y = conv_norm(self.features, 3, padding=1, name="conv2")(y, mode)
        return nn.relu(_shortcut(self.variant, x, self.features, self.stride, mode) + y)


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions: ResNet-50, 101 and 152."""

    variant: Variant
    features: int
    stride: int = 1
    expansion = 4
    convolutions = 3

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, 4 * features]``."""
        _, _, groups, group_width, *_ = self.variant
        conv_norm = self.variant.conv_norm
        width, out = self.features * group_width // 64 * groups, self.features * self.expansion
        first, second = (self.stride, 1) if self.variant.stride_first else (1, self.stride)
        y = nn.relu(conv_norm(width, 1, first, name="conv1")(x, mode))
        spatial = conv_norm(width, 3, second, padding=1, groups=groups, name="conv2")
        y = conv_norm(out, 1, name="conv3")(nn.relu(spatial(y, mode)), mode)
        return nn.relu(_shortcut(self.variant, x, out, self.stride, mode) + y)


def _shortcut(variant: Variant, x: Array, features: int, stride: int, mode: Mode) -> Array:
    """Return the input of a block in the shape of its output."""
    if stride == 1 and x.shape[-1] == features:
        return x
    if stride > 1 and variant.pooled_shortcut:
        # In a map of odd size, the windows of the last row and column are smaller.
        x, stride = avg_pool(x, 2, stride=stride, padding="SAME", count_padding=False), 1
    return variant.conv_norm(features, 1, stride, name="shortcut")(x, mode)


class Layer(nn.Module):
    """Sequence of blocks; the first one has the stride."""

    variant: Variant
    depth: int
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features * expansion]``."""
        for i in range(self.depth):
            stride = self.stride if i == 0 else 1
            x = self.variant.block(self.variant, self.features, stride, name=f"block{i}")(x, mode)
        return x


VARIANTS = {
    "resnet18": Variant(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Variant(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Variant(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Variant(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Variant(Bottleneck, (3, 8, 36, 3)),
    "resnext50_32x4d": Variant(Bottleneck, (3, 4, 6, 3), groups=32, group_width=4),
    "resnext101_32x8d": Variant(Bottleneck, (3, 4, 23, 3), groups=32, group_width=8),
    "resnext101_64x4d": Variant(Bottleneck, (3, 4, 23, 3), groups=64, group_width=4),
    "wide_resnet50_2": Variant(Bottleneck, (3, 4, 6, 3), group_width=128),
    "wide_resnet101_2": Variant(Bottleneck, (3, 4, 23, 3), group_width=128),
}


VARIANTS |= {  # ResNet-D of timm
    f"{name}d": VARIANTS[name]._replace(
        deep_stem=True, pooled_shortcut=True, preprocess=Preprocess(*sizes, "bicubic")
    )
    for sizes, names in (
        ((224, 256), ("resnet18", "resnet34", "resnet50")),
        ((256, 269), ("resnet101", "resnet152")),
    )
    for name in names
}

_keras_conv_norm = partial(ConvNorm, use_bias=True, epsilon=1.001e-5, momentum=0.99)
VARIANTS |= {  # version 1 of Keras
    f"keras_{name}": VARIANTS[name]._replace(
        stride_first=True, conv_norm=_keras_conv_norm, preprocess=CAFFE_PREPROCESS
    )
    for name in ("resnet50", "resnet101", "resnet152")
}


def resnet(name: str, num_classes: int = 1000) -> Model:
    """Build one of `VARIANTS`, with stages ``stem, layer1 ... layer4, pool, head``."""
    variant = VARIANTS[name]
    layers = (
        Stage(f"layer{i + 1}", Layer(variant, depth, features=64 * 2**i, stride=min(i, 1) + 1))
        for i, depth in enumerate(variant.depths)
    )
    stages = Stage("stem", Stem(variant)), *layers
    return pooled_classifier(name, stages, num_classes, variant.preprocess)
