"""RegNet X and Y (Radosavovic et al. 2020, Designing Network Design Spaces, arXiv 2003.13678).

A RegNet X is a ResNeXt whose bottlenecks are as wide as their outputs; in a RegNet Y the 3x3
convolution is followed by squeeze-and-excitation. Names are those of timm: the digits are hundreds
of millions of multiplications. With ``_tv`` widths are rounded to multiples of the group width as
torchvision does, where that makes a difference.
"""

from functools import partial
from typing import NamedTuple

from flax import linen as nn
from jax import Array

from tljax.models.layers import ConvNorm, Mode, SqueezeExcite, StochasticDepth
from tljax.models.model import Model, Stage, pooled_classifier
from tljax.runtime.preprocess import Preprocess


class Variant(NamedTuple):
    """Configuration of a RegNet.

    Attributes:
        depths: number of blocks in each of the four stages.
        widths: output channels of each stage.
        group_width: channels of each group of the 3x3 convolutions; narrower stages have one group.
        squeeze: whether the blocks contain squeeze-and-excitation (RegNet Y).
        preprocess: preprocessing of most published weights.
    """

    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]
    group_width: int
    squeeze: bool = False
    preprocess: Preprocess = Preprocess(interpolation="bicubic")


class Stem(nn.Module):
    """3x3 convolution with stride 2, batch norm and ReLU."""

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, 3]`` to ``[b, h/2, w/2, 32]``."""
        return nn.relu(ConvNorm(32, 3, 2, padding=1, name="conv")(x, mode))


class Block(nn.Module):
    """Residual block of 1x1, grouped 3x3 and 1x1 convolutions of one width.

    ``depth`` is the position of the block in the network, from 0 to 1; see `StochasticDepth`.
    """

    features: int
    stride: int
    group_width: int
    squeeze: bool
    depth: float

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features]``."""
        features, stride = self.features, self.stride
        y = nn.relu(ConvNorm(features, 1, name="conv1")(x, mode))
        groups = max(1, features // self.group_width)
        spatial = ConvNorm(features, 3, stride, padding=1, groups=groups, name="conv2")
        y = nn.relu(spatial(y, mode))
        if self.squeeze:  # the width between the two layers depends on the input of the block
            y = SqueezeExcite(x.shape[-1] // 4, name="squeeze_excite")(y)
        y = ConvNorm(features, 1, name="conv3")(y, mode)
        if stride > 1 or x.shape[-1] != features:
            x = ConvNorm(features, 1, stride, name="shortcut")(x, mode)
        return nn.relu(x + StochasticDepth(self.depth)(y, mode))


class Blocks(nn.Module):
    """Sequence of blocks of one width; the first one has stride 2.

    ``positions`` has the position of each block in the network, from 0 to 1.
    """

    features: int
    group_width: int
    squeeze: bool
    positions: tuple[float, ...]

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/2, w/2, features]``."""
        for i, position in enumerate(self.positions):
            sizes = self.features, 2 if i == 0 else 1, self.group_width
            x = Block(*sizes, self.squeeze, position, name=f"block{i}")(x, mode)
        return x


_y = partial(Variant, squeeze=True)
_TV2 = Preprocess(224, 232, "bicubic")
_LARGE = Preprocess(384, 384, "bicubic")

VARIANTS = {
    "regnetx_002": Variant((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "regnetx_004": Variant((1, 2, 7, 12), (32, 64, 160, 384), 16),
    "regnetx_004_tv": Variant((1, 2, 7, 12), (32, 64, 160, 400), 16, preprocess=_TV2),
    "regnetx_006": Variant((1, 3, 5, 7), (48, 96, 240, 528), 24),
    "regnetx_008": Variant((1, 3, 7, 5), (64, 128, 288, 672), 16),
    "regnetx_016": Variant((2, 4, 10, 2), (72, 168, 408, 912), 24),
    "regnetx_032": Variant((2, 6, 15, 2), (96, 192, 432, 1008), 48),
    "regnetx_040": Variant((2, 5, 14, 2), (80, 240, 560, 1360), 40),
    "regnetx_064": Variant((2, 4, 10, 1), (168, 392, 784, 1624), 56),
    "regnetx_080": Variant((2, 5, 15, 1), (80, 240, 720, 1920), 120),
    "regnetx_120": Variant((2, 5, 11, 1), (224, 448, 896, 2240), 112),
    "regnetx_160": Variant((2, 6, 13, 1), (256, 512, 896, 2048), 128),
    "regnetx_320": Variant((2, 7, 13, 1), (336, 672, 1344, 2520), 168),
    "regnety_002": _y((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "regnety_004": _y((1, 3, 6, 6), (48, 104, 208, 440), 8),
    "regnety_006": _y((1, 3, 7, 4), (48, 112, 256, 608), 16),
    "regnety_008": _y((1, 3, 8, 2), (64, 128, 320, 768), 16),
    "regnety_008_tv": _y((1, 3, 8, 2), (64, 144, 320, 784), 16, preprocess=_TV2),
    "regnety_016": _y((2, 6, 17, 2), (48, 120, 336, 888), 24),
    "regnety_032": _y((2, 5, 13, 1), (72, 216, 576, 1512), 24),
    "regnety_040": _y((2, 6, 12, 2), (128, 192, 512, 1088), 64),
    "regnety_064": _y((2, 7, 14, 2), (144, 288, 576, 1296), 72),
    "regnety_080": _y((2, 4, 10, 1), (168, 448, 896, 2016), 56),
    "regnety_080_tv": _y((2, 4, 10, 1), (224, 448, 896, 2016), 56, preprocess=_TV2),
    "regnety_120": _y((2, 5, 11, 1), (224, 448, 896, 2240), 112),
    "regnety_160": _y((2, 4, 11, 1), (224, 448, 1232, 3024), 112),
    "regnety_320": _y((2, 5, 12, 1), (232, 696, 1392, 3712), 232),
    "regnety_640": _y((2, 5, 12, 1), (328, 984, 1968, 4920), 328, preprocess=_LARGE),
    "regnety_1280": _y((2, 7, 17, 1), (528, 1056, 2904, 7392), 264, preprocess=_LARGE),
}


def regnet(name: str, num_classes: int = 1000) -> Model:
    """Build one of `VARIANTS`, with stages ``stem, stage1 ... stage4, pool, head``."""
    depths, widths, group_width, squeeze, preprocess = VARIANTS[name]
    last = sum(depths) - 1
    stages, first = [Stage("stem", Stem())], 0
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
        positions = tuple(block / last for block in range(first, first + depth))
        stages.append(Stage(f"stage{i}", Blocks(width, group_width, squeeze, positions)))
        first += depth
    return pooled_classifier(name, stages, num_classes, preprocess)
