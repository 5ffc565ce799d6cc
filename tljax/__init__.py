"""Transfer learning in JAX: a network is a short list of named stages, every tool a pure function.

The names below are imported when they are first used, so that ``--help`` need not wait for JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tljax.attack import pgd as pgd
    from tljax.data.augment import augment as augment
    from tljax.data.decode import read_images as read_images
    from tljax.data.examples import Source as Source
    from tljax.data.examples import Splits as Splits
    from tljax.data.examples import select as select
    from tljax.data.loader import load_batches as load_batches
    from tljax.data.options import AugmentConfig as AugmentConfig
    from tljax.data.options import Loading as Loading
    from tljax.data.sources import open_images as open_images
    from tljax.data.sources import open_splits as open_splits
    from tljax.features.extract import compute_features as compute_features
    from tljax.features.probe import fit_probe as fit_probe
    from tljax.metrics.classification import class_shares as class_shares
    from tljax.metrics.sums import Weighted as Weighted
    from tljax.models import MODELS as MODELS
    from tljax.models import Model as Model
    from tljax.models import Stage as Stage
    from tljax.models import apply as apply
    from tljax.models import build_model as build_model
    from tljax.models import init as init
    from tljax.models import replace_head as replace_head
    from tljax.models.layers import Mode as Mode
    from tljax.pretrained import CATALOG as CATALOG
    from tljax.pretrained import Pretrained as Pretrained
    from tljax.pretrained import export as export
    from tljax.pretrained import load_pretrained as load_pretrained
    from tljax.pretrained import save as save
    from tljax.runtime.process import configure as configure
    from tljax.runtime.types import Batch as Batch
    from tljax.runtime.types import Preprocess as Preprocess
    from tljax.runtime.types import Variables as Variables
    from tljax.train.fit import FitResult as FitResult
    from tljax.train.fit import fit as fit
    from tljax.train.freeze import freeze_table as freeze_table
    from tljax.train.freeze import join as join
    from tljax.train.freeze import label as label
    from tljax.train.freeze import split as split
    from tljax.train.objectives import Objective as Objective
    from tljax.train.objectives import cross_entropy as cross_entropy
    from tljax.train.options import FitConfig as FitConfig
    from tljax.train.options import OptimizerConfig as OptimizerConfig
    from tljax.train.step import Forward as Forward
    from tljax.train.step import TrainState as TrainState
    from tljax.train.step import init_state as init_state
    from tljax.train.step import make_train_step as make_train_step

_ROOMS = {
    "configure": "runtime.process",  # how JAX compiles; call it before JAX is imported
    "MODELS": "models",  # every architecture: name -> builder
    "Model": "models",  # an ordered list of stages, and the preprocessing of its weights
    "build_model": "models",  # an architecture by name
    "init": "models",  # random variables
    "apply": "models",  # run any contiguous part of a network
    "replace_head": "models",  # the same network for other classes
    "CATALOG": "pretrained",  # published weights by name
    "Pretrained": "pretrained",  # a model, its variables and their card
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
    "FitResult": "train.fit",  # the best network, how it did, and the way there
    "Stage": "models",  # one named step of a network
    "Source": "data.examples",  # labelled examples in an order, with further arrays
    "Splits": "data.examples",  # what to train on, and what to validate on
    "select": "data.examples",  # some examples of a source
    "load_batches": "data.loader",  # a source as batches of one shape
    "Batch": "runtime.types",  # inputs, targets, mask, indices and extra arrays of some examples
    "Preprocess": "runtime.types",  # how a photograph is cut and normalised for a network
    "Variables": "runtime.types",  # parameters and running statistics: nested dicts of arrays
    "Mode": "models.layers",  # the two switches of a stage: batch statistics and noise
    "augment": "data.augment",  # random crops, flips and RandAugment, on the device
    "pgd": "attack",  # projected gradient descent, and the other attacks: tljax.attack
    "Weighted": "metrics.sums",  # a value an example with its weight
    "class_shares": "metrics.classification",  # class indices, or mixed ones, as shares of classes
    "cross_entropy": "train.objectives",  # the objective of a classification
    "Objective": "train.objectives",  # what a step minimises: the type of such a function
    "Forward": "train.step",  # the network as an objective sees it
    "TrainState": "train.step",  # all that a step changes
    "init_state": "train.step",  # the state before the first step
    "make_train_step": "train.step",  # a step of one's own loop
    "freeze_table": "train.freeze",  # which parameters train, and at which rate
    "label": "train.freeze",  # the rate of every parameter
    "split": "train.freeze",  # variables that change, and those that stay
    "join": "train.freeze",  # both together again
}

__all__ = list(_ROOMS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'tljax' has no attribute '{name}'")
    return getattr(import_module(f"tljax.{_ROOMS[name]}"), name)
