"""EfficientNet-Lite0 to 4: EfficientNet (Tan and Le 2019) without squeeze-excitation, with ReLU6.

Geometry of the TensorFlow reference implementation (tensorflow/tpu, efficientnet/lite): SAME
padding, batch-norm epsilon 1e-3.
"""

import math
from functools import partial
from typing import NamedTuple

from flax import linen as nn
from jax import Array

from tljax.models.layers import ConvNorm, GlobalAveragePool, LinearHead, Train
from tljax.models.model import Model, Stage
from tljax.types import Preprocess

_conv_norm = partial(ConvNorm, padding="SAME", epsilon=1e-3, momentum=0.99)


class Stem(nn.Module):
    """3x3 convolution at stride 2; the same width in every variant."""

    @nn.compact
    def __call__(self, x: Array, train: Train) -> Array:
        """``[b, h, w, 3] -> [b, h/2, w/2, 32]``."""
        return nn.relu6(_conv_norm(32, 3, stride=2, name="conv")(x, train))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection (Sandler et al. 2018, MobileNetV2)."""

    features: int
    kernel_size: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: Array, train: Train) -> Array:
        """``[b, h, w, c] -> [b, h/stride, w/stride, features]``."""
        y, width = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            y = nn.relu6(_conv_norm(width, 1, name="expand")(y, train))
        depthwise = _conv_norm(
            width, self.kernel_size, stride=self.stride, groups=width, name="depthwise"
        )
        y = nn.relu6(depthwise(y, train))
        y = _conv_norm(self.features, 1, name="project")(y, train)
        return x + y if x.shape == y.shape else y


class Blocks(nn.Module):
    """A run of inverted residuals of one width; the first one carries the stride."""

    depth: int
    features: int
    kernel_size: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: Array, train: Train) -> Array:
        """``[b, h, w, c] -> [b, h/stride, w/stride, features]``."""
        for i in range(self.depth):
            stride = self.stride if i == 0 else 1
            block = InvertedResidual(
                self.features, self.kernel_size, stride, self.expansion, name=f"block{i}"
            )
            x = block(x, train)
        return x


class ConvHead(nn.Module):
    """1x1 convolution to the features that are pooled; the same width in every variant."""

    @nn.compact
    def __call__(self, x: Array, train: Train) -> Array:
        """``[b, h, w, c] -> [b, h, w, 1280]``."""
        return nn.relu6(_conv_norm(1280, 1, name="conv")(x, train))


class Variant(NamedTuple):
    """Multipliers of width and depth, and the preprocessing of the published weights."""

    width: float
    depth: float
    preprocess: Preprocess


def _preprocess(size: int, crop: float, interpolation: str = "bicubic") -> Preprocess:
    half = (0.5, 0.5, 0.5)
    resize = math.floor(size / crop)
    return Preprocess(size, resize, interpolation, mean=half, std=half)  # pyright: ignore[reportArgumentType]


VARIANTS = {
    "efficientnet_lite0": Variant(1.0, 1.0, _preprocess(224, 0.875)),
    "efficientnet_lite1": Variant(1.0, 1.1, _preprocess(240, 0.882)),
    "efficientnet_lite2": Variant(1.1, 1.2, _preprocess(260, 0.890)),
    "efficientnet_lite3": Variant(1.2, 1.4, _preprocess(300, 0.904, "bilinear")),
    "efficientnet_lite4": Variant(1.4, 1.8, _preprocess(380, 0.920, "bilinear")),
}

# Of variant 0: depth, features, kernel size, stride, expansion.
_STAGES = (
    (1, 16, 3, 1, 1),
    (2, 24, 3, 2, 6),
    (2, 40, 5, 2, 6),
    (3, 80, 3, 2, 6),
    (3, 112, 5, 1, 6),
    (4, 192, 5, 2, 6),
    (1, 320, 3, 1, 6),
)


def _round_width(features: float) -> int:
    """To a multiple of 8, never losing more than a tenth (the reference's ``round_filters``)."""
    rounded = max(8, int(features + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * features else rounded


def depths(name: str) -> tuple[int, ...]:
    """Number of blocks in each of the seven stages; the first and the last never grow."""
    scale = VARIANTS[name].depth
    return tuple(
        depth if i in (0, len(_STAGES) - 1) else math.ceil(depth * scale)
        for i, (depth, *_) in enumerate(_STAGES)
    )


def efficientnet(name: str, num_classes: int = 1000) -> Model:
    """One of `VARIANTS`, with stages ``stem, stage1 ... stage7, conv_head, pool, head``."""
    variant = VARIANTS[name]
    stages = (
        Stage(
            f"stage{i}",
            Blocks(depth, _round_width(features * variant.width), kernel_size, stride, expansion),
        )
        for i, (depth, (_, features, kernel_size, stride, expansion)) in enumerate(
            zip(depths(name), _STAGES, strict=True), start=1
        )
    )
    return Model(
        name,
        (
            Stage("stem", Stem()),
            *stages,
            Stage("conv_head", ConvHead()),
            Stage("pool", GlobalAveragePool()),
            Stage("head", LinearHead(num_classes)),
        ),
        variant.preprocess,
    )
