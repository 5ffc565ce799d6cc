"""Xception (Chollet 2016, arXiv 1610.02357): residual blocks of depthwise separable convolutions.

``xception`` is `legacy_xception` of timm: max pools are padded symmetrically, and the epsilon of
batch norm is 1e-5. ``keras_xception``, the source of its weights, pads max pools as TensorFlow does
and has epsilon 1e-3.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from flax import linen as nn
from jax import Array

from tljax.models.convolution import Padding, max_pool
from tljax.models.layers import Conv, ConvNorm, Mode
from tljax.models.model import Model, Stage, pooled_classifier
from tljax.runtime.preprocess import INCEPTION_PREPROCESS


class Variant(NamedTuple):
    """Differences between the versions: convolutions, and padding of the max pools."""

    conv_norm: Callable[..., ConvNorm]
    pool_padding: Padding


class Stem(nn.Module):
    """Two 3x3 convolutions without padding; the first one has stride 2."""

    variant: Variant

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, 3]`` to ``[b, h/2, w/2, 64]``."""
        x = nn.relu(self.variant.conv_norm(32, 3, stride=2, name="conv1")(x, mode))
        return nn.relu(self.variant.conv_norm(64, 3, name="conv2")(x, mode))


class SeparableConv(nn.Module):
    """Depthwise 3x3 convolution directly followed by a 1x1 convolution with batch norm."""

    variant: Variant
    features: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h, w, features]``, without activation."""
        width = x.shape[-1]
        x = Conv(width, 3, padding=1, groups=width, use_bias=False, name="depthwise")(x)
        return self.variant.conv_norm(self.features, 1, name="pointwise")(x, mode)


class Block(nn.Module):
    """Residual block of separable convolutions, each after a ReLU.

    A block with a stride has a max pool at its end and a convolution in its shortcut.
    """

    variant: Variant
    features: tuple[int, ...]
    stride: int
    relu_first: bool = True

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features[-1]]``."""
        y = x
        for i, features in enumerate(self.features, start=1):
            y = nn.relu(y) if i > 1 or self.relu_first else y
            y = SeparableConv(self.variant, features, name=f"conv{i}")(y, mode)
        if self.stride > 1:
            y = max_pool(y, 3, stride=self.stride, padding=self.variant.pool_padding)
            shortcut = self.variant.conv_norm(self.features[-1], 1, self.stride, name="shortcut")
            x = shortcut(x, mode)
        return x + y


class ConvHead(nn.Module):
    """Two separable convolutions before the pooling."""

    variant: Variant

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h, w, 2048]``."""
        x = nn.relu(SeparableConv(self.variant, 1536, name="conv1")(x, mode))
        return nn.relu(SeparableConv(self.variant, 2048, name="conv2")(x, mode))


BLOCKS = {
    "block1": ((128, 128), 2),
    "block2": ((256, 256), 2),
    "block3": ((728, 728), 2),
    **{f"block{i}": ((728, 728, 728), 1) for i in range(4, 12)},
    "block12": ((728, 1024), 2),
}
"""Features of the convolutions, and stride, of each block."""

VARIANTS = {
    "xception": Variant(ConvNorm, pool_padding=1),
    "keras_xception": Variant(partial(ConvNorm, epsilon=1e-3, momentum=0.99), pool_padding="SAME"),
}

PREPROCESS = replace(INCEPTION_PREPROCESS, size=299, resize=333, interpolation="bicubic")
"""Preprocessing of the published weights."""


def xception(name: str, num_classes: int = 1000) -> Model:
    """Build one of `VARIANTS`, with stages ``stem, block1 ... block12, conv_head, pool, head``."""
    variant = VARIANTS[name]
    blocks = (
        Stage(stage, Block(variant, features, stride, relu_first=stage != "block1"))
        for stage, (features, stride) in BLOCKS.items()
    )
    stages = Stage("stem", Stem(variant)), *blocks, Stage("conv_head", ConvHead(variant))
    return pooled_classifier(name, stages, num_classes, PREPROCESS)
