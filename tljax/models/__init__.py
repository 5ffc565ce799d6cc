"""Networks as lists of named stages. Only this package imports Flax."""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from tljax.models import (
    bit,
    convnext,
    efficientnet,
    inception,
    mobilenet,
    mobilenetv4,
    regnet,
    resnet,
    resnetv2,
    vgg,
    vit,
    xception,
)
from tljax.models.inputs import adapt_input as adapt_input
from tljax.models.inputs import input_kernel as input_kernel
from tljax.models.maps import feature_map as feature_map
from tljax.models.maps import grad_cam_stage as grad_cam_stage
from tljax.models.model import Model as Model
from tljax.models.model import Output as Output
from tljax.models.model import Stage as Stage
from tljax.models.model import abstract_activations as abstract_activations
from tljax.models.model import abstract_images as abstract_images
from tljax.models.model import abstract_outputs as abstract_outputs
from tljax.models.model import abstract_variables as abstract_variables
from tljax.models.model import add_similarity_head as add_similarity_head
from tljax.models.model import apply as apply
from tljax.models.model import init as init
from tljax.models.model import layer_outputs as layer_outputs
from tljax.models.model import normalize as normalize
from tljax.models.model import replace_head as replace_head
from tljax.models.model import select_outputs as select_outputs
from tljax.models.model import with_head as with_head
from tljax.runtime.errors import RequestError

MODELS: dict[str, Callable[..., Model]] = {
    **{name: partial(resnet.resnet, name) for name in resnet.VARIANTS},
    **{name: partial(resnetv2.resnetv2, name) for name in resnetv2.DEPTHS},
    **{name: partial(bit.bit, name) for name in bit.VARIANTS},
    **{name: partial(inception.inception, name) for name in inception.VARIANTS},
    **{name: partial(xception.xception, name) for name in xception.VARIANTS},
    **{name: partial(efficientnet.efficientnet, name) for name in efficientnet.VARIANTS},
    **{name: partial(vgg.vgg, name) for name in vgg.DEPTHS},
    **{name: partial(mobilenet.mobilenet_v1, name) for name in mobilenet.V1_VARIANTS},
    **{name: partial(mobilenet.mobilenet_v2, name) for name in mobilenet.V2_VARIANTS},
    **{name: partial(mobilenet.mobilenet_v3, name) for name in mobilenet.V3_VARIANTS},
    **{name: partial(regnet.regnet, name) for name in regnet.VARIANTS},
    **{name: partial(convnext.convnext, name) for name in convnext.VARIANTS},
    **{name: partial(mobilenetv4.mobilenet_v4, name) for name in mobilenetv4.VARIANTS},
    **{name: partial(vit.vit, name) for name in vit.VARIANTS},
}
"""Builders of all architectures by name: ``MODELS["resnet50"](num_classes=1000) -> Model``."""


def build_model(name: str, num_classes: int = 1000) -> Model:
    """Build an architecture by its name in `MODELS`, without weights.

    Args:
        name: e.g. ``resnet50``.
        num_classes: number of classes of the head; 0 builds a backbone.

    Raises:
        RequestError: there is no such architecture; the message suggests the nearest name.
    """
    if name not in MODELS:
        matches = get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {matches[0]}?" if matches else f"known: {', '.join(MODELS)}"
        raise RequestError(f"no model is called '{name}'; {hint}")
    return MODELS[name](num_classes=num_classes)
