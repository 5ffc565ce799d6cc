"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545) and V2 (Woo et al. 2023, arXiv 2301.00808).

V2 has global response normalization in place of layer scale. Atto to nano are timm's; the others
have the sizes of the papers. The ConvNeXts of DINOv3 (Simeoni et al. 2025, arXiv 2508.10104) are
the same networks without a head.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from tljax.models.layers import (
    Conv,
    Dense,
    GlobalAveragePool,
    LayerNorm,
    LayerScale,
    LinearHead,
    Mode,
    StochasticDepth,
    gelu,
)
from tljax.models.model import Model, Stage
from tljax.runtime.preprocess import Preprocess


class GlobalResponseNorm(nn.Module):
    """Scale every channel by its norm over the image, relative to the mean of all channels.

    With scale and bias 0, as initialized, the output is the input.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h, w, c]``; norms in at least float32."""
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        squares = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        energy = squares.sum((1, 2), keepdims=True)
        # Without the inner `where` the gradient of an image of zeros would be NaN.
        norm = jnp.where(energy > 0, jnp.sqrt(jnp.where(energy > 0, energy, 1)), 0)
        factor = 1 + scale * norm / (norm.mean(-1, keepdims=True) + 1e-6)
        return x * factor.astype(x.dtype) + bias.astype(x.dtype)


class Block(nn.Module):
    """Residual block: 7x7 depthwise convolution, layer norm and two fully connected layers.

    ``depth`` is that of `StochasticDepth`; ``response_norm`` replaces layer scale (V2).
    """

    depth: float
    response_norm: bool

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h, w, c]``."""
        features = x.shape[-1]
        y = Conv(features, 7, padding=3, groups=features, name="depthwise")(x)
        y = LayerNorm(name="norm")(y)
        y = gelu(Dense(4 * features, name="fc1")(y))
        if self.response_norm:
            y = GlobalResponseNorm(name="grn")(y)
        y = Dense(features, name="fc2")(y)
        if not self.response_norm:
            y = LayerScale(name="layer_scale")(y)
        return x + StochasticDepth(self.depth)(y, mode)


class Stem(nn.Module):
    """4x4 convolution of stride 4 and layer norm."""

    features: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:  # noqa: ARG002 - a stage's signature
        """Map ``[b, h, w, 3]`` to ``[b, h // 4, w // 4, features]``."""
        return LayerNorm(name="norm")(Conv(self.features, 4, stride=4, name="conv")(x))


class Downsample(nn.Module):
    """Layer norm and 2x2 convolution of stride 2."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h // 2, w // 2, features]``."""
        return Conv(self.features, 2, stride=2, name="conv")(LayerNorm(name="norm")(x))


class Blocks(nn.Module):
    """Sequence of blocks of one width, after downsampling if the width changes.

    ``depths`` are those of the blocks; see `Block`.
    """

    features: int
    depths: tuple[float, ...]
    response_norm: bool

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h // stride, w // stride, features]``."""
        if x.shape[-1] != self.features:
            x = Downsample(self.features, name="downsample")(x)
        for i, depth in enumerate(self.depths):
            x = Block(depth, self.response_norm, name=f"block{i}")(x, mode)
        return x


class Norm(nn.Module):
    """Layer norm of the pooled features."""

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:  # noqa: ARG002 - a stage's signature
        """Map ``[b, c]`` to ``[b, c]``."""
        return LayerNorm(name="norm")(x)


class Variant(NamedTuple):
    """Configuration of a network.

    Attributes:
        depths: number of blocks in each of the four stages.
        width: channels of the first stage; each further stage has twice as many.
        resize: length of the short side before the crop of 224 pixels.
        response_norm: whether the network is of version 2.
    """

    depths: tuple[int, int, int, int]
    width: int
    resize: int = 256
    response_norm: bool = False


VARIANTS = {
    "convnext_atto": Variant((2, 2, 6, 2), 40),
    "convnext_femto": Variant((2, 2, 6, 2), 48),
    "convnext_pico": Variant((2, 2, 6, 2), 64),
    "convnext_nano": Variant((2, 2, 8, 2), 80, resize=235),
    "convnext_tiny": Variant((3, 3, 9, 3), 96),
    "convnext_small": Variant((3, 3, 27, 3), 96),
    "convnext_base": Variant((3, 3, 27, 3), 128),
    "convnext_large": Variant((3, 3, 27, 3), 192),
    "convnext_xlarge": Variant((3, 3, 27, 3), 256),
    "convnextv2_atto": Variant((2, 2, 6, 2), 40, response_norm=True),
    "convnextv2_femto": Variant((2, 2, 6, 2), 48, response_norm=True),
    "convnextv2_pico": Variant((2, 2, 6, 2), 64, response_norm=True),
    "convnextv2_nano": Variant((2, 2, 8, 2), 80, response_norm=True),
    "convnextv2_tiny": Variant((3, 3, 9, 3), 96, response_norm=True),
    "convnextv2_base": Variant((3, 3, 27, 3), 128, response_norm=True),
    "convnextv2_large": Variant((3, 3, 27, 3), 192, response_norm=True),
    "convnextv2_huge": Variant((3, 3, 27, 3), 352, response_norm=True),
}
"""Networks by their names in timm."""


def convnext(name: str, num_classes: int = 1000) -> Model:
    """Build one of `VARIANTS`, with stages ``stem, stage1 ... stage4, pool, norm, head``."""
    depths, width, resize, response_norm = VARIANTS[name]
    blocks = sum(depths)
    positions = [i / (blocks - 1) for i in range(blocks)]
    stages = [Stage("stem", Stem(width))]
    for i, depth in enumerate(depths):
        first = sum(depths[:i])
        module = Blocks(width << i, tuple(positions[first : first + depth]), response_norm)
        stages.append(Stage(f"stage{i + 1}", module))
    top = (
        Stage("pool", GlobalAveragePool(), "vector"),
        Stage("norm", Norm(), "vector"),
        Stage("head", LinearHead(num_classes), "vector"),
    )
    return Model(name, (*stages, *top), Preprocess(224, resize, "bicubic"))
