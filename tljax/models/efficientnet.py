"""EfficientNet-Lite0 to 4: EfficientNet with ReLU6 and without squeeze-and-excitation.

Tan and Le 2019, arXiv 1905.11946. Padding (SAME) and batch norm (epsilon 1e-3) are those of the
TensorFlow reference implementation (tensorflow/tpu, efficientnet/lite).
"""

import math
from dataclasses import replace
from typing import Literal, NamedTuple

from flax import linen as nn

from tljax.models.depthwise import ConvAct, Convention, Run, stages
from tljax.models.model import Model, Stage, pooled_classifier
from tljax.runtime.types import INCEPTION_PREPROCESS, Preprocess

_CONVENTION = Convention("SAME", epsilon=1e-3, momentum=0.99)


class Variant(NamedTuple):
    """Multipliers of width and depth, and preprocessing of the published weights."""

    width: float
    depth: float
    preprocess: Preprocess


def _preprocess(
    size: int, crop: float, interpolation: Literal["bilinear", "bicubic"] = "bicubic"
) -> Preprocess:
    resize = math.floor(size / crop)
    return replace(INCEPTION_PREPROCESS, size=size, resize=resize, interpolation=interpolation)


VARIANTS = {
    "efficientnet_lite0": Variant(1.0, 1.0, _preprocess(224, 0.875)),
    "efficientnet_lite1": Variant(1.0, 1.1, _preprocess(240, 0.882)),
    "efficientnet_lite2": Variant(1.1, 1.2, _preprocess(260, 0.890)),
    "efficientnet_lite3": Variant(1.2, 1.4, _preprocess(300, 0.904, "bilinear")),
    "efficientnet_lite4": Variant(1.4, 1.8, _preprocess(380, 0.920, "bilinear")),
}

_RUNS = (
    Run(16, 3, 1, (1,)),
    Run(24, 3, 2, (6,) * 2),
    Run(40, 5, 2, (6,) * 2),
    Run(80, 3, 2, (6,) * 3),
    Run(112, 5, 1, (6,) * 3),
    Run(192, 5, 2, (6,) * 4),
    Run(320, 3, 1, (6,)),
)


def runs(name: str) -> tuple[Run, ...]:
    """Return the configurations of the seven stages.

    The depth multiplier applies to all but the first and last of them, the width multiplier to all.
    """
    width, depth, _ = VARIANTS[name]
    first, *middle, last = _RUNS
    deeper = [
        run._replace(expansions=run.expansions[:1] * math.ceil(len(run.expansions) * depth))
        for run in middle
    ]
    return tuple(run.scaled(width) for run in (first, *deeper, last))


def efficientnet(name: str, num_classes: int = 1000) -> Model:
    """Build one of `VARIANTS`, with stages ``stem, stage1 ... stage7, conv_head, pool, head``.

    Stem and ``conv_head`` have the same width in all variants.
    """
    stem = Stage("stem", ConvAct(32, 3, 2, _CONVENTION, nn.relu6))
    conv_head = Stage("conv_head", ConvAct(1280, 1, 1, _CONVENTION, nn.relu6))
    body = stem, *stages(runs(name), _CONVENTION), conv_head
    return pooled_classifier(name, body, num_classes, VARIANTS[name].preprocess)
