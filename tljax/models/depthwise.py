"""Blocks of depthwise convolutions, which MobileNet and EfficientNet share."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from flax import linen as nn
from jax import Array

from tljax.models.convolution import Padding
from tljax.models.layers import Activation, ConvNorm, Mode, SqueezeExcite, StochasticDepth
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
    """1x1 expansion, depthwise convolution, 1x1 projection (MobileNetV2: Sandler et al. 2018).

    ``depth`` is that of `StochasticDepth`; None for networks without it.
    """

    run: "Run"
    stride: int
    expansion: float
    convention: Convention
    depth: float | None = None

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features]``."""
        run, conv_norm = self.run, self.convention.conv_norm
        y, width = x, round_width(x.shape[-1] * self.expansion)
        if self.expansion > 1:
            y = run.activation(conv_norm(width, 1, name="expand")(y, mode))
        depthwise = conv_norm(width, run.kernel_size, self.stride, groups=width, name="depthwise")
        y = run.activation(depthwise(y, mode))
        if run.squeeze == "mobilenetv3":
            y = SqueezeExcite(round_width(width / 4), gate=nn.hard_sigmoid, name="squeeze_excite")(
                y
            )
        elif run.squeeze == "efficientnet":
            y = SqueezeExcite(x.shape[-1] // 4, run.activation, name="squeeze_excite")(y)
        y = conv_norm(run.features, 1, name="project")(y, mode)
        return residual(x, y, mode, self.stride, self.depth)


class FusedResidual(nn.Module):
    """Expansion by a whole convolution, 1x1 projection (EfficientNetV2: Tan and Le 2021).

    arXiv 2104.00298. Without an expansion it is one convolution with an activation. For ``depth``
    see `InvertedResidual`.
    """

    run: "Run"
    stride: int
    expansion: float
    convention: Convention
    depth: float | None = None

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features]``."""
        run, conv_norm = self.run, self.convention.conv_norm
        if self.expansion > 1:
            width = round_width(x.shape[-1] * self.expansion)
            y = conv_norm(width, run.kernel_size, self.stride, name="expand")(x, mode)
            y = conv_norm(run.features, 1, name="project")(run.activation(y), mode)
        else:
            y = conv_norm(run.features, run.kernel_size, self.stride, name="conv")(x, mode)
            y = run.activation(y)
        return residual(x, y, mode, self.stride, self.depth)


def residual(x: Array, y: Array, mode: Mode, stride: int, depth: float | None) -> Array:
    """Add the input of a block to the output of its branch, where the two have the same shape.

    Call it in a compact method of a module. For ``depth`` see `InvertedResidual`.
    """
    if stride > 1 or x.shape[-1] != y.shape[-1]:
        return y
    return x + (y if depth is None else StochasticDepth(depth)(y, mode))


class Run(NamedTuple):
    """Configuration of consecutive blocks of one width; the first has the stride.

    Attributes:
        features: output channels of every block.
        kernel_size: kernel size of the depthwise or fused convolutions.
        stride: stride of the first block.
        expansions: ratio of inner to input channels of each block; 1 for no expansion.
        squeeze: kind of squeeze-and-excitation in the blocks: a quarter of the inner channels and
            a hard sigmoid, or a quarter of the input channels and a sigmoid; None for none.
        activation: activation inside the blocks.
        fused: whether the blocks are `FusedResidual` instead of `InvertedResidual`.
    """

    features: int
    kernel_size: int
    stride: int
    expansions: tuple[float, ...]
    squeeze: Literal["mobilenetv3", "efficientnet"] | None = None
    activation: Activation = nn.relu6
    fused: bool = False

    def scaled(self, width: float) -> "Run":
        """Return a copy whose number of features is multiplied by ``width``."""
        return self._replace(features=round_width(self.features * width))


class Blocks(nn.Module):
    """Stage of the blocks of a `Run`.

    Attributes:
        run: configuration of the blocks.
        convention: settings of their convolutions.
        first: position of the first block in the network.
        count: number of blocks in the network; 0 for networks without stochastic depth.
    """

    run: Run
    convention: Convention
    first: int = 0
    count: int = 0

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features]``."""
        kind = FusedResidual if self.run.fused else InvertedResidual
        for i, expansion in enumerate(self.run.expansions):
            stride = self.run.stride if i == 0 else 1
            depth = (self.first + i) / (self.count - 1) if self.count else None
            block = kind(self.run, stride, expansion, self.convention, depth, name=f"block{i}")
            x = block(x, mode)
        return x


def stages(
    runs: Iterable[Run], convention: Convention, *, stochastic_depth: bool = False
) -> tuple[Stage, ...]:
    """Create the stages ``stage1, stage2, ...``, one for each run."""
    runs = tuple(runs)
    depths = [len(run.expansions) for run in runs]
    count = sum(depths) if stochastic_depth else 0
    return tuple(
        Stage(f"stage{i + 1}", Blocks(run, convention, sum(depths[:i]) if count else 0, count))
        for i, run in enumerate(runs)
    )


def round_width(features: float, least: float = 0.9) -> int:
    """Round to a multiple of 8, reducing at most to the fraction ``least``.

    The references call it ``make_divisible``.
    """
    rounded = max(8, int(features + 4) // 8 * 8)
    return rounded + 8 if rounded < least * features else rounded
