"""Networks as lists of named stages. The only room that knows Flax."""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from tljax.models import bit, efficientnet, inception, mobilenet, resnet, resnetv2, vgg, xception
from tljax.models.model import Model as Model
from tljax.models.model import Output as Output
from tljax.models.model import Stage as Stage
from tljax.models.model import abstract_variables as abstract_variables
from tljax.models.model import apply as apply
from tljax.models.model import init as init
from tljax.models.model import layer_outputs as layer_outputs
from tljax.models.model import normalize as normalize
from tljax.models.model import replace_head as replace_head
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
}
"""Every architecture by name: ``MODELS["resnet50"](num_classes=1000) -> Model``."""


def build_model(name: str, num_classes: int = 1000) -> Model:
    """The architecture of that name.

    Raises:
        RequestError: there is none; the message names the nearest.
    """
    if name not in MODELS:
        near = get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(MODELS)}"
        raise RequestError(f"no model is called '{name}'; {hint}")
    return MODELS[name](num_classes=num_classes)
