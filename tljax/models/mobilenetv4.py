"""MobileNetV4 of convolutions, as in timm (Qin et al. 2024, arXiv 2404.10518)."""

from typing import NamedTuple

from flax import linen as nn
from jax import Array

from tljax.models.depthwise import (
    ConvAct,
    Convention,
    FusedResidual,
    Run,
    residual,
    round_width,
)
from tljax.models.layers import ConvNorm, GlobalAveragePool, LinearHead, Mode
from tljax.models.model import Model, Stage
from tljax.runtime.preprocess import Preprocess

_CONVENTION = Convention("torch", epsilon=1e-5, momentum=0.9)


class Conv(NamedTuple):
    """A convolution with batch norm and ReLU."""

    features: int
    kernel_size: int
    stride: int = 1


class Fused(NamedTuple):
    """A fused 3x3 block with the stride 2 and an expansion of 4; see `FusedResidual`."""

    features: int


class Universal(NamedTuple):
    """A universal inverted bottleneck: an inverted residual with two depthwise convolutions.

    Attributes:
        features: output channels.
        start: kernel size of the depthwise convolution before the expansion; 0 for none.
        middle: kernel size of the depthwise convolution after the expansion; 0 for none.
        expansion: ratio of inner to input channels.
        stride: stride of the second of these two convolutions, or of the only one.
    """

    features: int
    start: int
    middle: int
    expansion: int
    stride: int = 1


Block = Conv | Fused | Universal

SMALL: tuple[tuple[Block, ...], ...] = (
    (Conv(32, 3, 2), Conv(32, 1)),
    (Conv(96, 3, 2), Conv(64, 1)),
    (
        Universal(96, 5, 5, 3, 2),
        *(Universal(96, 0, 3, 2),) * 4,
        Universal(96, 3, 0, 4),
    ),
    (
        Universal(128, 3, 3, 6, 2),
        Universal(128, 5, 5, 4),
        Universal(128, 0, 5, 4),
        Universal(128, 0, 5, 3),
        *(Universal(128, 0, 3, 4),) * 2,
    ),
)

MEDIUM: tuple[tuple[Block, ...], ...] = (
    (Fused(48),),
    (Universal(80, 3, 5, 4, 2), Universal(80, 3, 3, 2)),
    (
        Universal(160, 3, 5, 6, 2),
        *(Universal(160, 3, 3, 4),) * 2,
        Universal(160, 3, 5, 4),
        Universal(160, 3, 3, 4),
        Universal(160, 3, 0, 4),
        Universal(160, 0, 0, 2),
        Universal(160, 3, 0, 4),
    ),
    (
        Universal(256, 5, 5, 6, 2),
        Universal(256, 5, 5, 4),
        *(Universal(256, 3, 5, 4),) * 2,
        Universal(256, 0, 0, 4),
        Universal(256, 3, 0, 4),
        Universal(256, 3, 5, 2),
        Universal(256, 5, 5, 4),
        *(Universal(256, 0, 0, 4),) * 2,
        Universal(256, 5, 0, 2),
    ),
)

LARGE: tuple[tuple[Block, ...], ...] = (
    (Fused(48),),
    (Universal(96, 3, 5, 4, 2), Universal(96, 3, 3, 4)),
    (
        Universal(192, 3, 5, 4, 2),
        *(Universal(192, 3, 3, 4),) * 3,
        Universal(192, 3, 5, 4),
        *(Universal(192, 5, 3, 4),) * 5,
        Universal(192, 3, 0, 4),
    ),
    (
        Universal(512, 5, 5, 4, 2),
        *(Universal(512, 5, 5, 4),) * 3,
        Universal(512, 5, 0, 4),
        Universal(512, 5, 3, 4),
        *(Universal(512, 5, 0, 4),) * 2,
        Universal(512, 5, 3, 4),
        Universal(512, 5, 5, 4),
        *(Universal(512, 5, 0, 4),) * 3,
    ),
)


class Variant(NamedTuple):
    """Output channels of the stem, blocks of the stages, and preprocessing of the weights."""

    stem: int
    stages: tuple[tuple[Block, ...], ...]
    preprocess: Preprocess


VARIANTS = {
    "mobilenetv4_conv_small": Variant(32, SMALL, Preprocess(224, 256, "bicubic")),
    "mobilenetv4_conv_medium": Variant(32, MEDIUM, Preprocess(256, 269, "bicubic")),
    "mobilenetv4_conv_large": Variant(24, LARGE, Preprocess(384, 404, "bicubic")),
}


class UniversalBottleneck(nn.Module):
    """Depthwise convolution, 1x1 expansion, depthwise convolution, 1x1 projection."""

    block: Universal
    depth: float

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features]``."""
        features, start, middle, expansion, stride = self.block
        y, inputs, width = x, x.shape[-1], round_width(x.shape[-1] * expansion)
        conv_norm = _CONVENTION.conv_norm
        if start:
            step = 1 if middle else stride
            y = conv_norm(inputs, start, step, groups=inputs, name="start")(y, mode)
        y = nn.relu(conv_norm(width, 1, name="expand")(y, mode))
        if middle:
            y = nn.relu(conv_norm(width, middle, stride, groups=width, name="middle")(y, mode))
        y = conv_norm(features, 1, name="project")(y, mode)
        return residual(x, y, mode, stride, self.depth)


class Blocks(nn.Module):
    """Stage of any blocks; ``first`` and ``count`` are those of `depthwise.Blocks`."""

    blocks: tuple[Block, ...]
    first: int
    count: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features]``."""
        for i, block in enumerate(self.blocks):
            name, depth = f"block{i}", (self.first + i) / (self.count - 1)
            if isinstance(block, Conv):
                module = ConvAct(*block, _CONVENTION, nn.relu, name=name)
            elif isinstance(block, Fused):
                run = Run(block.features, 3, 2, (4,), activation=nn.relu)
                module = FusedResidual(run, 2, 4, _CONVENTION, depth, name=name)
            else:
                module = UniversalBottleneck(block, depth, name=name)
            x = module(x, mode)
        return x


class Hidden(nn.Module):
    """Fully connected layer with batch norm and ReLU after the pooling."""

    features: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, c]`` to ``[b, features]``."""
        conv = ConvNorm(self.features, 1, name="conv")
        return nn.relu(conv(x[:, None, None], mode)[:, 0, 0])


def mobilenet_v4(name: str, num_classes: int = 1000) -> Model:
    """Build one of `VARIANTS`, with stages ``stem, stage1 ..., conv_head, pool, hidden, head``."""
    stem, body, preprocess = VARIANTS[name]
    depths = [len(blocks) for blocks in body]
    return Model(
        name,
        (
            Stage("stem", ConvAct(stem, 3, 2, _CONVENTION, nn.relu)),
            *(
                Stage(f"stage{i + 1}", Blocks(blocks, sum(depths[:i]), sum(depths)))
                for i, blocks in enumerate(body)
            ),
            Stage("conv_head", ConvAct(960, 1, 1, _CONVENTION, nn.relu)),
            Stage("pool", GlobalAveragePool(), "vector"),
            Stage("hidden", Hidden(1280), "vector"),
            Stage("head", LinearHead(num_classes), "vector"),
        ),
        preprocess,
    )
