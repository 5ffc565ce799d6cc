"""Public names of tljax and the modules that define them."""

from .attack import pgd as pgd  # projected gradient descent; other attacks are in tljax.attack
from .data.augment import augment as augment  # flips, RandAugment and crops on the device
from .data.boxes import Crops as Crops  # random crops of an epoch, for load_batches
from .data.examples import Source as Source  # labeled examples by index, with extra arrays
from .data.examples import Splits as Splits  # a training and a validation source
from .data.examples import select as select  # a subset of a source
from .data.folders import open_images as open_images  # unlabeled files, folders and URLs
from .data.loader import load_batches as load_batches  # batches of a fixed shape from a source
from .data.options import AugmentConfig as AugmentConfig  # options of data augmentation
from .data.options import LabelOptions as LabelOptions  # options of how labels are read
from .data.options import Loading as Loading  # options of how images are read
from .data.pictures import read_images as read_images  # image files -> one uint8 array
from .data.sources import open_splits as open_splits  # class folders -> train and val
from .features.extract import (
    compute_features as compute_features,  # features or logits of every image of a source
)
from .features.probe import (
    fit_probe as fit_probe,  # linear probe with its L2 penalty chosen by cross-validation
)
from .metrics.classification import (
    class_shares as class_shares,  # class indices or mixed labels as class probabilities
)
from .metrics.sums import Weighted as Weighted  # per-example values with weights
from .models import MODELS as MODELS  # architectures: name -> builder
from .models import (
    Model as Model,  # named stages and the preprocessing of the input
)
from .models import Stage as Stage  # one named part of a network
from .models import apply as apply  # run any contiguous range of stages
from .models import build_model as build_model  # build an architecture by name
from .models import init as init  # initialize variables randomly
from .models import replace_head as replace_head  # replace the classifier by one for other classes
from .models.layers import Mode as Mode  # batch statistics or running ones; noise on or off
from .pretrained import CATALOG as CATALOG  # published weights: name -> entry
from .pretrained import Adapted as Adapted  # a network with its adapter kept apart
from .pretrained import Pretrained as Pretrained  # a model, its variables and its card
from .pretrained import export as export  # write the formats of other libraries
from .pretrained import load_adapter as load_adapter  # an adapter, apart from its base
from .pretrained import (
    load_pretrained as load_pretrained,  # name, hub id, file or folder -> model, variables, card
)
from .pretrained import save as save  # write tljax's own format
from .pretrained import save_adapter as save_adapter  # write what training changed
from .runtime.preprocess import (
    Preprocess as Preprocess,  # resize, crop and normalization of images
)
from .runtime.process import (
    configure as configure,  # settings of JAX; call it before JAX is imported
)
from .runtime.task import Task as Task  # the meaning of a network's outputs
from .runtime.types import (
    Batch as Batch,  # inputs, targets, mask, indices and extra arrays
)
from .runtime.types import (
    Variables as Variables,  # parameters and batch statistics: nested dicts of arrays
)
from .train.fit import FitResult as FitResult  # the best network, its evaluation and the history
from .train.fit import fit as fit  # train a head, and further stages by recipe
from .train.freeze import freeze_table as freeze_table  # patterns and learning rates
from .train.freeze import join as join  # merge trainable and frozen variables
from .train.freeze import label as label  # the learning rate multiple of every parameter
from .train.freeze import split as split  # split variables into trainable and frozen
from .train.objectives import (
    Objective as Objective,  # the type of a loss function
)
from .train.objectives import cross_entropy as cross_entropy  # the loss of classification
from .train.options import AdapterConfig as AdapterConfig  # options of LoRA, BitFit and norms
from .train.options import FitConfig as FitConfig  # options of training
from .train.options import OptimizerConfig as OptimizerConfig  # options of the optimizer
from .train.step import Forward as Forward  # the forward function that an objective gets
from .train.step import TrainState as TrainState  # the state that a step updates
from .train.step import init_state as init_state  # the initial state
from .train.step import make_train_step as make_train_step  # a training step for your own loop
