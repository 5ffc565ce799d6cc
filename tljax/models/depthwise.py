"""The depthwise blocks that MobileNets and EfficientNets are made of."""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from flax import linen as nn
from jax import Array

from tljax.models.convolution import Padding
from tljax.models.layers import Conv, ConvNorm, Mode
from tljax.models.model import Stage

Activation = Callable[[Array], Array]


class Convention(NamedTuple):
    """What all convolutions of a network have in common, and two ports of it need not.

    Attributes:
        padding: symmetric, as torch pads; TensorFlow's SAME; or Keras' in MobileNet v1: SAME, but
            what is depthwise and strides is padded by one row below and one column on the right.
        epsilon: of batch norm.
        momentum: of batch norm: the share of the old value.
    """

    padding: Literal["torch", "SAME", "keras"]
    epsilon: float
    momentum: float

    def conv_norm(
        self, features: int, kernel_size: int, stride: int = 1, *, groups: int = 1, name: str
    ) -> ConvNorm:
        """A convolution and its norm, inside of a module."""
        padding: Padding = "SAME"
        if self.padding == "torch":
            padding = kernel_size // 2
        elif self.padding == "keras" and groups > 1 < stride:
            padding = ((0, 1), (0, 1))
        return ConvNorm(
            features,
            kernel_size,
            stride,
            padding=padding,
            groups=groups,
            epsilon=self.epsilon,
            momentum=self.momentum,
            name=name,
        )


class ConvAct(nn.Module):
    """A convolution, its norm and an activation: the stem, and the last map before the pooling."""

    features: int
    kernel_size: int
    stride: int
    convention: Convention
    activation: Activation

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """``[b, h, w, c] -> [b, h/stride, w/stride, features]``."""
        conv = self.convention.conv_norm(self.features, self.kernel_size, self.stride, name="conv")
        return self.activation(conv(x, mode))


class SqueezeExcite(nn.Module):
    """Weighs the channels by what their means say (Hu et al. 2017, with V3's hard sigmoid)."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """``[b, h, w, c] -> [b, h, w, c]``."""
        y = nn.relu(Conv(self.features, 1, name="reduce")(x.mean((1, 2), keepdims=True)))
        return x * nn.hard_sigmoid(Conv(x.shape[-1], 1, name="expand")(y))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection (Sandler et al. 2018, MobileNetV2)."""

    features: int
    kernel_size: int
    stride: int
    expansion: float
    squeeze: bool
    convention: Convention
    activation: Activation

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """``[b, h, w, c] -> [b, h/stride, w/stride, features]``."""
        y, width = x, round_width(x.shape[-1] * self.expansion)
        conv_norm = self.convention.conv_norm
        if self.expansion > 1:
            y = self.activation(conv_norm(width, 1, name="expand")(y, mode))
        depthwise = conv_norm(width, self.kernel_size, self.stride, groups=width, name="depthwise")
        y = self.activation(depthwise(y, mode))
        if self.squeeze:
            y = SqueezeExcite(round_width(width / 4), name="squeeze_excite")(y)
        y = conv_norm(self.features, 1, name="project")(y, mode)
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class Run(NamedTuple):
    """Inverted residuals of one width, in a row; the first one carries the stride.

    Attributes:
        features: width behind each of them.
        kernel_size: of the depthwise convolutions.
        stride: of the first one.
        expansions: of each: how much wider it is inside; 1 for no expansion.
        squeeze: with squeeze and excitation.
        activation: inside.
    """

    features: int
    kernel_size: int
    stride: int
    expansions: tuple[float, ...]
    squeeze: bool = False
    activation: Activation = nn.relu6

    def scaled(self, width: float) -> "Run":
        """The same with so many times the features."""
        return self._replace(features=round_width(self.features * width))


class Blocks(nn.Module):
    """A `Run`."""

    run: Run
    convention: Convention

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """``[b, h, w, c] -> [b, h/stride, w/stride, features]``."""
        run = self.run
        for i, expansion in enumerate(run.expansions):
            block = InvertedResidual(
                run.features,
                run.kernel_size,
                run.stride if i == 0 else 1,
                expansion,
                run.squeeze,
                self.convention,
                run.activation,
                name=f"block{i}",
            )
            x = block(x, mode)
        return x


def stages(runs: Iterable[Run], convention: Convention) -> tuple[Stage, ...]:
    """``stage1, stage2, ...``: one for each run."""
    return tuple(Stage(f"stage{i}", Blocks(run, convention)) for i, run in enumerate(runs, start=1))


def round_width(features: float) -> int:
    """To a multiple of 8, never losing more than a tenth (``make_divisible`` of the references)."""
    rounded = max(8, int(features + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * features else rounded
