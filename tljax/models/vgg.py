"""VGG (Simonyan and Zisserman 2014, arXiv 1409.1556), with or without batch norm.

As in torchvision, adaptive pooling makes any image size possible.
"""

from flax import linen as nn
from jax import Array

from tljax.models.convolution import adaptive_avg_pool, max_pool
from tljax.models.layers import Conv, ConvNorm, Dense, LinearHead, Mode
from tljax.models.model import Model, Stage
from tljax.runtime.preprocess import Preprocess


class Block(nn.Module):
    """3x3 convolutions of one width and max pooling."""

    depth: int
    features: int
    norm: bool

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/2, w/2, features]``."""
        for i in range(1, self.depth + 1):
            if self.norm:
                conv = ConvNorm(self.features, 3, padding=1, use_bias=True, name=f"conv{i}")
                x = nn.relu(conv(x, mode))
            else:
                x = nn.relu(Conv(self.features, 3, padding=1, name=f"conv{i}")(x))
        return max_pool(x, 2, stride=2)


class FlattenedPool(nn.Module):
    """Adaptive average pooling to 7x7 positions, flattened to a vector."""

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:  # noqa: ARG002 - a stage's signature
        """Map ``[b, h, w, c]`` to ``[b, 49 * c]`` in the order height, width, channel."""
        return adaptive_avg_pool(x, 7).reshape(len(x), -1)


class Hidden(nn.Module):
    """Fully connected layer with ReLU and dropout of rate 0.5."""

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, c]`` to ``[b, 4096]``."""
        x = nn.relu(Dense(4096, name="dense")(x))
        return nn.Dropout(0.5, deterministic=not mode.noise)(x)


_DEPTHS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}

DEPTHS = _DEPTHS | {f"{name}_bn": depths for name, depths in _DEPTHS.items()}
"""Number of convolutions in each block."""


def vgg(name: str, num_classes: int = 1000) -> Model:
    """Build one of `DEPTHS`, with stages ``block1 ... block5, pool, fc1, fc2, head``.

    `replace_head` after ``pool``, ``fc1`` or ``fc2`` keeps none, one or both hidden layers.
    """
    norm = name.endswith("_bn")
    widths = (64, 128, 256, 512, 512)
    blocks = (
        Stage(f"block{i}", Block(depth, features, norm))
        for i, (depth, features) in enumerate(zip(DEPTHS[name], widths, strict=True), start=1)
    )
    return Model(
        name,
        (
            *blocks,
            Stage("pool", FlattenedPool(), "vector"),
            Stage("fc1", Hidden(), "vector"),
            Stage("fc2", Hidden(), "vector"),
            Stage("head", LinearHead(num_classes), "vector"),
        ),
        Preprocess(),
    )
