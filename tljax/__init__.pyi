"""The public names, and where they are; each is imported when it is first used."""

from .attack import pgd as pgd  # projected gradient descent, and the other attacks: tljax.attack
from .data.augment import augment as augment  # random crops, flips and RandAugment, on the device
from .data.decode import read_images as read_images  # a few files -> one uint8 array
from .data.examples import Source as Source  # labelled examples in an order, with further arrays
from .data.examples import Splits as Splits  # what to train on, and what to validate on
from .data.examples import select as select  # some examples of a source
from .data.loader import load_batches as load_batches  # a source as batches of one shape
from .data.options import AugmentConfig as AugmentConfig  # how training images vary
from .data.options import Loading as Loading  # how images are read and spread over devices
from .data.sources import open_images as open_images  # files, folders and URLs without labels
from .data.sources import open_splits as open_splits  # a folder of class folders -> train and val
from .features.extract import (
    compute_features as compute_features,  # features or logits of a whole source
)
from .features.probe import (
    fit_probe as fit_probe,  # linear probe at its optimum, L2 chosen by itself
)
from .metrics.classification import (
    class_shares as class_shares,  # class indices, or mixed ones, as shares of classes
)
from .metrics.sums import Weighted as Weighted  # a value an example with its weight
from .models import MODELS as MODELS  # every architecture: name -> builder
from .models import (
    Model as Model,  # an ordered list of stages, and the preprocessing of its weights
)
from .models import Stage as Stage  # one named step of a network
from .models import apply as apply  # run any contiguous part of a network
from .models import build_model as build_model  # an architecture by name
from .models import init as init  # random variables
from .models import replace_head as replace_head  # the same network for other classes
from .models.layers import Mode as Mode  # the two switches of a stage: batch statistics and noise
from .pretrained import CATALOG as CATALOG  # published weights by name
from .pretrained import Pretrained as Pretrained  # a model, its variables and their card
from .pretrained import export as export  # to other programs' formats
from .pretrained import (
    load_pretrained as load_pretrained,  # a name, hub id, file or folder -> model, variables, card
)
from .pretrained import save as save  # to tljax's own format
from .runtime.process import (
    configure as configure,  # how JAX compiles; call it before JAX is imported
)
from .runtime.types import (
    Batch as Batch,  # inputs, targets, mask, indices and extra arrays of some examples
)
from .runtime.types import (
    Preprocess as Preprocess,  # how a photograph is cut and normalised for a network
)
from .runtime.types import (
    Variables as Variables,  # parameters and running statistics: nested dicts of arrays
)
from .train.fit import FitResult as FitResult  # the best network, how it did, and the way there
from .train.fit import fit as fit  # train a head, and more as the recipe says
from .train.freeze import freeze_table as freeze_table  # which parameters train, and at which rate
from .train.freeze import join as join  # both together again
from .train.freeze import label as label  # the rate of every parameter
from .train.freeze import split as split  # variables that change, and those that stay
from .train.objectives import (
    Objective as Objective,  # what a step minimises: the type of such a function
)
from .train.objectives import cross_entropy as cross_entropy  # the objective of a classification
from .train.options import FitConfig as FitConfig  # what to train, and for how long
from .train.options import OptimizerConfig as OptimizerConfig  # how the parameters move
from .train.step import Forward as Forward  # the network as an objective sees it
from .train.step import TrainState as TrainState  # all that a step changes
from .train.step import init_state as init_state  # the state before the first step
from .train.step import make_train_step as make_train_step  # a step of one's own loop
