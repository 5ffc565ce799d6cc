"""Blocks of depthwise convolutions, which MobileNet and EfficientNet share."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from flax import linen as nn
from jax import Array

from tljax.models.convolution import Padding
from tljax.models.layers import Activation, ConvNorm, Mode, SqueezeExcite
from tljax.models.model import Stage


class Convention(NamedTuple):
    """Settings of all convolutions of a network, which differ between published versions of it.

    Attributes:
        padding: ``torch`` for symmetric padding, ``SAME`` for TensorFlow's, or ``keras`` for SAME
            with one row below and one column to the right of strided depthwise convolutions
            (MobileNet v1 in Keras).
        epsilon: epsilon of the batch norms.
        momentum: weight of the old running statistics of the batch norms.
    """

    padding: Literal["torch", "SAME", "keras"]
    epsilon: float
    momentum: float

    def conv_norm(
        self, features: int, kernel_size: int, stride: int = 1, *, groups: int = 1, name: str
    ) -> ConvNorm:
        """Create a convolution with batch norm; call it in a compact method of a module."""
        kind, epsilon, momentum = self
        padding: Padding = "SAME"
        if kind == "torch":
            padding = kernel_size // 2
        elif kind == "keras" and groups > 1 < stride:
            padding = ((0, 1), (0, 1))
        return ConvNorm(
            features, kernel_size, stride, padding, groups, epsilon, momentum, name=name
        )


class ConvAct(nn.Module):
    """Convolution, batch norm and activation: the stem and the last layer before the pooling."""

    features: int
    kernel_size: int
    stride: int
    convention: Convention
    activation: Activation

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features]``."""
        conv = self.convention.conv_norm(self.features, self.kernel_size, self.stride, name="conv")
        return self.activation(conv(x, mode))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection (MobileNetV2: Sandler et al. 2018)."""

    run: "Run"
    stride: int
    expansion: float
    convention: Convention

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features]``."""
        features, kernel_size, *_, squeeze, activation = self.run
        y, width = x, round_width(x.shape[-1] * self.expansion)
        conv_norm = self.convention.conv_norm
        if self.expansion > 1:
            y = activation(conv_norm(width, 1, name="expand")(y, mode))
        depthwise = conv_norm(width, kernel_size, self.stride, groups=width, name="depthwise")
        y = activation(depthwise(y, mode))
        if squeeze:
            width, gate = round_width(width / 4), nn.hard_sigmoid
            y = SqueezeExcite(width, gate=gate, name="squeeze_excite")(y)
        y = conv_norm(features, 1, name="project")(y, mode)
        return x + y if self.stride == 1 and x.shape[-1] == features else y


class Run(NamedTuple):
    """Configuration of consecutive inverted residuals of one width; the first has the stride.

    Attributes:
        features: output channels of every block.
        kernel_size: kernel size of the depthwise convolutions.
        stride: stride of the first block.
        expansions: ratio of inner to input channels of each block; 1 for no expansion.
        squeeze: whether the blocks contain squeeze-and-excitation.
        activation: activation inside the blocks.
    """

    features: int
    kernel_size: int
    stride: int
    expansions: tuple[float, ...]
    squeeze: bool = False
    activation: Activation = nn.relu6

    def scaled(self, width: float) -> "Run":
        """Return a copy whose number of features is multiplied by ``width``."""
        return self._replace(features=round_width(self.features * width))


class Blocks(nn.Module):
    """Stage of the inverted residuals of a `Run`."""

    run: Run
    convention: Convention

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features]``."""
        for i, expansion in enumerate(self.run.expansions):
            stride = self.run.stride if i == 0 else 1
            block = InvertedResidual(self.run, stride, expansion, self.convention, name=f"block{i}")
            x = block(x, mode)
        return x


def stages(runs: Iterable[Run], convention: Convention) -> tuple[Stage, ...]:
    """Create the stages ``stage1, stage2, ...``, one for each run."""
    return tuple(Stage(f"stage{i}", Blocks(run, convention)) for i, run in enumerate(runs, start=1))


def round_width(features: float) -> int:
    """Round to a multiple of 8, reducing by at most 10% (``make_divisible`` in the references)."""
    rounded = max(8, int(features + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * features else rounded
