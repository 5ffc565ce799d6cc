"""MobileNet v1 (Howard et al. 2017), v2 (Sandler et al. 2018) and v3 (Howard et al. 2019).

arXiv 1704.04861, 1801.04381 and 1905.02244. Published versions of a network differ in padding and
batch norm, so each is a separate model: names with ``tf_`` are those of TensorFlow
(tensorflow/models, slim), ``keras_`` of Keras, ``tv_`` of torchvision (if its batch norm differs),
and names without prefix are those of timm, with torch's padding.
"""

from dataclasses import replace
from typing import NamedTuple

from flax import linen as nn
from jax import Array

from tljax.models.depthwise import ConvAct, Convention, Run, round_width, stages
from tljax.models.layers import Dense, GlobalAveragePool, LinearHead, Mode
from tljax.models.model import Model, Stage, pooled_classifier
from tljax.runtime.preprocess import INCEPTION_PREPROCESS, Preprocess


class Separable(nn.Module):
    """Sequence of separable blocks of one width; the first one has the stride."""

    depth: int
    features: int
    stride: int
    convention: Convention

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features]``."""
        for i in range(self.depth):
            stride = self.stride if i == 0 else 1
            block = SeparableBlock(self.features, stride, self.convention, name=f"block{i}")
            x = block(x, mode)
        return x


class SeparableBlock(nn.Module):
    """Depthwise 3x3 and 1x1 convolution, each with batch norm and ReLU6."""

    features: int
    stride: int
    convention: Convention

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features]``."""
        conv_norm, width = self.convention.conv_norm, x.shape[-1]
        depthwise = conv_norm(width, 3, self.stride, groups=width, name="depthwise")
        x = nn.relu6(depthwise(x, mode))
        return nn.relu6(conv_norm(self.features, 1, name="pointwise")(x, mode))


class Hidden(nn.Module):
    """Fully connected layer after the pooling of version 3."""

    features: int

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:  # noqa: ARG002 - a stage's signature
        """Map ``[b, c]`` to ``[b, features]``."""
        return nn.hard_swish(Dense(self.features, name="dense")(x))


V1 = ((1, 64, 1), (2, 128, 2), (2, 256, 2), (6, 512, 2), (2, 1024, 2))
"""Depth, width and stride of the stages of version 1."""

V2 = (
    Run(16, 3, 1, (1,)),
    Run(24, 3, 2, (6,) * 2),
    Run(32, 3, 2, (6,) * 3),
    Run(64, 3, 2, (6,) * 4),
    Run(96, 3, 1, (6,) * 3),
    Run(160, 3, 2, (6,) * 3),
    Run(320, 3, 1, (6,)),
)

V3_LARGE = (
    Run(16, 3, 1, (1,), activation=nn.relu),
    Run(24, 3, 2, (4, 3), activation=nn.relu),
    Run(40, 5, 2, (3, 3, 3), squeeze="mobilenetv3", activation=nn.relu),
    Run(80, 3, 2, (6, 2.5, 2.3, 2.3), activation=nn.hard_swish),
    Run(112, 3, 1, (6, 6), squeeze="mobilenetv3", activation=nn.hard_swish),
    Run(160, 5, 2, (6, 6, 6), squeeze="mobilenetv3", activation=nn.hard_swish),
)

V3_SMALL = (
    Run(16, 3, 2, (1,), squeeze="mobilenetv3", activation=nn.relu),
    Run(24, 3, 2, (4.5, 3.67), activation=nn.relu),
    Run(40, 5, 2, (4, 6, 6), squeeze="mobilenetv3", activation=nn.hard_swish),
    Run(48, 5, 1, (3, 3), squeeze="mobilenetv3", activation=nn.hard_swish),
    Run(96, 5, 2, (6, 6, 6), squeeze="mobilenetv3", activation=nn.hard_swish),
)


class Variant(NamedTuple):
    """Multiplier of the widths, convention of the version, and preprocessing of its weights."""

    width: float
    convention: Convention
    preprocess: Preprocess


def mobilenet_v1(name: str, num_classes: int = 1000) -> Model:
    """Build one of `V1_VARIANTS`, with stages ``stem, stage1 ... stage5, pool, head``."""
    width, convention, preprocess = V1_VARIANTS[name]
    body = (
        Stage(f"stage{i}", Separable(depth, round_width(features * width), stride, convention))
        for i, (depth, features, stride) in enumerate(V1, start=1)
    )
    stem = Stage("stem", ConvAct(round_width(32 * width), 3, 2, convention, nn.relu6))
    return pooled_classifier(name, (stem, *body), num_classes, preprocess)


def mobilenet_v2(name: str, num_classes: int = 1000) -> Model:
    """Build one of `V2_VARIANTS`, with stages ``stem, stage1 ... stage7, conv_head, pool, head``.

    ``conv_head`` has at least 1280 features, also in networks narrower than the original.
    """
    width, convention, preprocess = V2_VARIANTS[name]
    last = round_width(1280 * max(1, width))
    stem = Stage("stem", ConvAct(round_width(32 * width), 3, 2, convention, nn.relu6))
    conv_head = Stage("conv_head", ConvAct(last, 1, 1, convention, nn.relu6))
    body = stem, *stages((run.scaled(width) for run in V2), convention), conv_head
    return pooled_classifier(name, body, num_classes, preprocess)


def mobilenet_v3(name: str, num_classes: int = 1000) -> Model:
    """Build one of `V3_VARIANTS`, with stages ``stem, stage1 ..., conv_head, pool, hidden, head``.

    The large network has stages to ``stage6``, the small one to ``stage5``. Stem and hidden layer
    have the same width in all variants.
    """
    width, convention, preprocess = V3_VARIANTS[name]
    runs, hidden = (V3_LARGE, 1280) if "large" in name else (V3_SMALL, 1024)
    last = round_width(6 * runs[-1].features * width)
    return Model(
        name,
        (
            Stage("stem", ConvAct(16, 3, 2, convention, nn.hard_swish)),
            *stages((run.scaled(width) for run in runs), convention),
            Stage("conv_head", ConvAct(last, 1, 1, convention, nn.hard_swish)),
            Stage("pool", GlobalAveragePool(), "vector"),
            Stage("hidden", Hidden(hidden), "vector"),
            Stage("head", LinearHead(num_classes), "vector"),
        ),
        preprocess,
    )


_TORCH = Convention("torch", epsilon=1e-5, momentum=0.9)
_TORCHVISION_V3 = Convention("torch", epsilon=1e-3, momentum=0.99)
_SLIM_V1 = Convention("SAME", epsilon=1e-3, momentum=0.9997)
_KERAS_V1 = Convention("keras", epsilon=1e-3, momentum=0.99)
_SLIM = Convention("SAME", epsilon=1e-3, momentum=0.997)

_TIMM = Preprocess(interpolation="bicubic")
_TIMM_V1 = replace(INCEPTION_PREPROCESS, interpolation="bicubic")


def _variants(
    prefix: str, widths: tuple[int, ...], convention: Convention, preprocess: Preprocess
) -> dict[str, Variant]:
    """Return variants named ``prefix_075`` etc., from widths in percent."""
    return {
        f"{prefix}_{width:03}": Variant(width / 100, convention, preprocess) for width in widths
    }


V1_VARIANTS = {
    **_variants("mobilenetv1", (100,), _TORCH, _TIMM_V1),
    **_variants("tf_mobilenetv1", (25, 50, 75, 100), _SLIM_V1, INCEPTION_PREPROCESS),
    **_variants("keras_mobilenetv1", (25, 50, 75, 100), _KERAS_V1, INCEPTION_PREPROCESS),
}
V2_VARIANTS = {
    **_variants("mobilenetv2", (50, 100, 140), _TORCH, _TIMM),
    **_variants("tf_mobilenetv2", (35, 50, 75, 100, 130, 140), _SLIM, INCEPTION_PREPROCESS),
}
V3_VARIANTS = {
    **_variants("mobilenetv3_large", (75, 100), _TORCH, _TIMM),
    **_variants("mobilenetv3_small", (50, 75, 100), _TORCH, _TIMM),
    **_variants("tv_mobilenetv3_large", (100,), _TORCHVISION_V3, Preprocess()),
    **_variants("tv_mobilenetv3_small", (100,), _TORCHVISION_V3, Preprocess()),
    **_variants("tf_mobilenetv3_large", (75, 100), _SLIM, INCEPTION_PREPROCESS),
    **_variants("tf_mobilenetv3_small", (75, 100), _SLIM, INCEPTION_PREPROCESS),
}
