"""EfficientNet B0 to B7, EfficientNet-Lite and EfficientNetV2.

Tan and Le 2019, arXiv 1905.11946, and 2021, arXiv 2104.00298. EfficientNet-Lite has ReLU6 and no
squeeze-and-excitation (tensorflow/tpu, efficientnet/lite). Published versions of a network differ
in padding and batch norm, so each is a separate model: names with ``tf_`` are those of the
TensorFlow reference implementations (SAME padding, batch norm with epsilon 1e-3), ``tv_`` of
torchvision (if its batch norm differs), and names without prefix are those of timm, with torch's
padding. The exception: ``efficientnet_lite0`` to ``4`` are TensorFlow's, and timm's own have the
prefix ``timm_``.
"""

import math
from dataclasses import replace
from typing import Literal, NamedTuple

from flax import linen as nn

from tljax.models.depthwise import ConvAct, Convention, Run, round_width, stages
from tljax.models.layers import Activation
from tljax.models.model import Model, Stage, pooled_classifier
from tljax.runtime.preprocess import INCEPTION_PREPROCESS, Preprocess

_TENSORFLOW = Convention("SAME", epsilon=1e-3, momentum=0.99)
_TENSORFLOW_V2 = Convention("SAME", epsilon=1e-3, momentum=0.9)
_TORCH = Convention("torch", epsilon=1e-5, momentum=0.9)
_TORCHVISION = Convention("torch", epsilon=1e-3, momentum=0.99)
_TORCHVISION_V2 = Convention("torch", epsilon=1e-3, momentum=0.9)


class Design(NamedTuple):
    """A network whose width and depth are multiplied.

    Attributes:
        runs: configurations of the stages.
        stem: output channels of the stem.
        activation: activation of the stem and of ``conv_head``.
        fixed_ends: whether the widths of stem and ``conv_head`` and the depths of the first and
            last stage are never multiplied.
        least: see `round_width`.
    """

    runs: tuple[Run, ...]
    stem: int = 32
    activation: Activation = nn.silu
    fixed_ends: bool = False
    least: float = 0.9


_LITE = (
    Run(16, 3, 1, (1,)),
    Run(24, 3, 2, (6,) * 2),
    Run(40, 5, 2, (6,) * 2),
    Run(80, 3, 2, (6,) * 3),
    Run(112, 5, 1, (6,) * 3),
    Run(192, 5, 2, (6,) * 4),
    Run(320, 3, 1, (6,)),
)
_B = tuple(run._replace(squeeze="efficientnet", activation=nn.silu) for run in _LITE)


def _fused(features: int, stride: int, expansion: int, depth: int) -> Run:
    """Return a stage of V2 with fused blocks."""
    return Run(features, 3, stride, (expansion,) * depth, activation=nn.silu, fused=True)


def _mbconv(features: int, stride: int, expansion: int, depth: int) -> Run:
    """Return a stage of V2 with depthwise convolutions and squeeze-and-excitation."""
    return Run(features, 3, stride, (expansion,) * depth, "efficientnet", nn.silu)


_V2_B = (
    _fused(16, 1, 1, 1),
    _fused(32, 2, 4, 2),
    _fused(48, 2, 4, 2),
    _mbconv(96, 2, 4, 3),
    _mbconv(112, 1, 6, 5),
    _mbconv(192, 2, 6, 8),
)
_V2_S = (
    _fused(24, 1, 1, 2),
    _fused(48, 2, 4, 4),
    _fused(64, 2, 4, 4),
    _mbconv(128, 2, 4, 6),
    _mbconv(160, 1, 6, 9),
    _mbconv(256, 2, 6, 15),
)
_V2_M = (
    _fused(24, 1, 1, 3),
    _fused(48, 2, 4, 5),
    _fused(80, 2, 4, 5),
    _mbconv(160, 2, 4, 7),
    _mbconv(176, 1, 6, 14),
    _mbconv(304, 2, 6, 18),
    _mbconv(512, 1, 6, 5),
)
_V2_L = (
    _fused(32, 1, 1, 4),
    _fused(64, 2, 4, 7),
    _fused(96, 2, 4, 7),
    _mbconv(192, 2, 4, 10),
    _mbconv(224, 1, 6, 19),
    _mbconv(384, 2, 6, 25),
    _mbconv(640, 1, 6, 7),
)

_DESIGNS = {
    "lite": Design(_LITE, activation=nn.relu6, fixed_ends=True),
    "b": Design(_B),
    "v2_b": Design(_V2_B, least=0),
    "v2_s": Design(_V2_S, stem=24),
    "v2_m": Design(_V2_M, stem=24),
    "v2_l": Design(_V2_L),
}


class Variant(NamedTuple):
    """Design, multipliers of width and depth, convention, and preprocessing of the weights."""

    design: str
    width: float
    depth: float
    convention: Convention
    preprocess: Preprocess


_SCALES = (
    (1.0, 1.0),
    (1.0, 1.1),
    (1.1, 1.2),
    (1.2, 1.4),
    (1.4, 1.8),
    (1.6, 2.2),
    (1.8, 2.6),
    (2.0, 3.1),
)
"""Multipliers of width and depth of B0 to B7, and of the others with these numbers."""


def _at(
    size: int,
    crop: float,
    normalization: Literal["torch", "tf"] = "torch",
    interpolation: Literal["bilinear", "bicubic"] = "bicubic",
) -> Preprocess:
    """Return the preprocessing for an image size in pixels and the fraction that is cropped."""
    base = Preprocess() if normalization == "torch" else INCEPTION_PREPROCESS
    return replace(base, size=size, resize=math.floor(size / crop), interpolation=interpolation)


def _numbered(
    prefix: str, design: str, convention: Convention, *preprocess: Preprocess, first: int = 0
) -> dict[str, Variant]:
    """Return variants ``prefix0``, ``prefix1``, ..., one for each preprocessing."""
    return {
        f"{prefix}{i}": Variant(design, *_SCALES[i], convention, each)
        for i, each in enumerate(preprocess, start=first)
    }


VARIANTS = {
    **_numbered(
        "efficientnet_lite",
        "lite",
        _TENSORFLOW,
        _at(224, 0.875, "tf"),
        _at(240, 0.882, "tf"),
        _at(260, 0.890, "tf"),
        _at(300, 0.904, "tf", "bilinear"),
        _at(380, 0.920, "tf", "bilinear"),
    ),
    **_numbered(
        "timm_efficientnet_lite",
        "lite",
        _TORCH,
        _at(224, 0.875),
        _at(240, 0.882),
        _at(260, 0.890),
        _at(300, 0.904),
        _at(380, 0.922),
    ),
    **_numbered(
        "efficientnet_b",
        "b",
        _TORCH,
        _at(224, 0.875),
        _at(240, 0.9, "tf"),
        _at(256, 0.875),
        _at(288, 0.875),
        _at(320, 0.875),
        _at(448, 1.0),
    ),
    **_numbered(
        "tf_efficientnet_b",
        "b",
        _TENSORFLOW,
        _at(224, 0.875),
        _at(240, 0.882),
        _at(260, 0.890),
        _at(300, 0.904),
        _at(380, 0.922),
        _at(456, 0.934),
        _at(528, 0.942),
        _at(600, 0.949),
    ),
    **_numbered(
        "tv_efficientnet_b", "b", _TORCHVISION, _at(456, 1), _at(528, 1), _at(600, 1), first=5
    ),
    **_numbered(
        "tf_efficientnetv2_b",
        "v2_b",
        _TENSORFLOW_V2,
        _at(192, 0.875),
        _at(192, 0.882),
        _at(208, 0.890),
        _at(240, 0.9, "tf"),
    ),
    "tf_efficientnetv2_s": Variant("v2_s", 1.0, 1.0, _TENSORFLOW_V2, _at(300, 1, "tf")),
    "tf_efficientnetv2_m": Variant("v2_m", 1.0, 1.0, _TENSORFLOW_V2, _at(384, 1, "tf")),
    "tf_efficientnetv2_l": Variant("v2_l", 1.0, 1.0, _TENSORFLOW_V2, _at(384, 1, "tf")),
    "tv_efficientnetv2_s": Variant(
        "v2_s", 1.0, 1.0, _TORCHVISION_V2, _at(384, 1, interpolation="bilinear")
    ),
    "tv_efficientnetv2_m": Variant(
        "v2_m", 1.0, 1.0, _TORCHVISION_V2, _at(480, 1, interpolation="bilinear")
    ),
    "tv_efficientnetv2_l": Variant("v2_l", 1.0, 1.0, _TORCHVISION_V2, _at(480, 1, "tf")),
}


def runs(name: str) -> tuple[Run, ...]:
    """Return the configurations of the stages, with multiplied widths and depths."""
    design, width, depth, *_ = VARIANTS[name]
    _, *middle, _ = unscaled = _DESIGNS[design].runs
    deeper = middle if _DESIGNS[design].fixed_ends else unscaled

    def scale(run: Run) -> Run:
        count = math.ceil(len(run.expansions) * depth) if run in deeper else len(run.expansions)
        features = round_width(run.features * width, _DESIGNS[design].least)
        return run._replace(features=features, expansions=run.expansions[:1] * count)

    return tuple(map(scale, unscaled))


def efficientnet(name: str, num_classes: int = 1000) -> Model:
    """Build one of `VARIANTS`, with stages ``stem, stage1 ..., conv_head, pool, head``.

    EfficientNet has stages to ``stage7``, EfficientNetV2 B and S to ``stage6``.
    """
    key, width, _, convention, preprocess = VARIANTS[name]
    design = _DESIGNS[key]
    if design.fixed_ends:
        width = 1
    first, last = (round_width(features * width, design.least) for features in (design.stem, 1280))
    stem = Stage("stem", ConvAct(first, 3, 2, convention, design.activation))
    conv_head = Stage("conv_head", ConvAct(last, 1, 1, convention, design.activation))
    body = stages(runs(name), convention, stochastic_depth=True)
    return pooled_classifier(name, (stem, *body, conv_head), num_classes, preprocess)
