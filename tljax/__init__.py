"""Transfer learning in JAX: a network is a short list of named stages, every tool a pure function.

The names below are imported when they are first used, so that ``--help`` need not wait for JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tljax.data.decode import read_images as read_images
    from tljax.data.options import AugmentConfig as AugmentConfig
    from tljax.data.options import Loading as Loading
    from tljax.data.sources import open_images as open_images
    from tljax.data.sources import open_splits as open_splits
    from tljax.features.extract import compute_features as compute_features
    from tljax.features.probe import fit_probe as fit_probe
    from tljax.models import MODELS as MODELS
    from tljax.models import Model as Model
    from tljax.models import apply as apply
    from tljax.models import build_model as build_model
    from tljax.models import init as init
    from tljax.models import replace_head as replace_head
    from tljax.pretrained import CATALOG as CATALOG
    from tljax.pretrained import export as export
    from tljax.pretrained import load_pretrained as load_pretrained
    from tljax.pretrained import save as save
    from tljax.runtime.process import configure as configure
    from tljax.train.fit import fit as fit
    from tljax.train.options import FitConfig as FitConfig
    from tljax.train.options import OptimizerConfig as OptimizerConfig

_ROOMS = {
    "configure": "runtime.process",  # how JAX compiles; call it before JAX is imported
    "MODELS": "models",  # every architecture: name -> builder
    "Model": "models",  # an ordered list of stages, and the preprocessing of its weights
    "build_model": "models",  # an architecture by name
    "init": "models",  # random variables
    "apply": "models",  # run any contiguous part of a network
    "replace_head": "models",  # the same network for other classes
    "CATALOG": "pretrained",  # published weights by name
    "load_pretrained": "pretrained",  # a name, hub id, file or folder -> model, variables, card
    "save": "pretrained",  # to tljax's own format
    "export": "pretrained",  # to other programs' formats
    "open_splits": "data.sources",  # a folder of class folders -> train and val
    "open_images": "data.sources",  # files, folders and URLs without labels
    "read_images": "data.decode",  # a few files -> one uint8 array
    "compute_features": "features.extract",  # features or logits of a whole source
    "fit_probe": "features.probe",  # linear probe at its optimum, L2 chosen by itself
    "FitConfig": "train.options",  # what to train, and for how long
    "OptimizerConfig": "train.options",  # how the parameters move
    "AugmentConfig": "data.options",  # how training images vary
    "Loading": "data.options",  # how images are read and spread over devices
    "fit": "train.fit",  # train a head, and more as the recipe says
}

__all__ = list(_ROOMS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'tljax' has no attribute '{name}'")
    return getattr(import_module(f"tljax.{_ROOMS[name]}"), name)
