"""Options of training, with their defaults. Imports nothing heavy: ``--help`` reads this."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tljax.data.options import AugmentConfig
from tljax.runtime.ranges import Amount, Checked, Count, NotNegative, Range, Ratio, Share
from tljax.runtime.settings import Conditions, Dtype, settings

Recipe = Literal["probe", "lp-ft", "gradual", "finetune", "bit", "scratch"]

Loss = Literal["cross-entropy", "focal", "asymmetric", "squared-error", "huber"]

ChooseBy = Literal[
    "loss", "top1", "balanced_accuracy", "macro_f1", "auroc", "map", "kappa", "mae", "rmse", "r2"
]


@dataclass(frozen=True)
class AdversaryConfig(Checked):
    """Options of adversarial training.

    Attributes:
        attack: Attack on the training images: fast takes one gradient step from a random
            start (Wong et al. 2020, arXiv:2001.03994), pgd several (Madry et al. 2018,
            arXiv:1706.06083); every step costs one more forward and backward pass.
        epsilon: Largest change of a pixel value, in units of 1/255.
        attack_steps: Number of gradient steps of pgd.
    """

    attack: Literal["none", "fast", "pgd"] = "none"
    epsilon: Annotated[float, Range(0, 255, without="low")] = 4.0
    attack_steps: Count = 7


@dataclass(frozen=True)
class AdapterConfig(Checked):
    """Options of adapters, which train few parameters beside the head and freeze all others.

    Attributes:
        adapter: Parameters to train: lora adds the product of two thin matrices to kernels (Hu et
            al. 2021, arXiv:2106.09685), bitfit trains all biases (Ben Zaken et al. 2021,
            arXiv:2106.10199), norm the scales and biases of all norms. The run saves what has
            changed, with the hash of the weights that it belongs to.
        rank: Rank of the change of each kernel.
        alpha: Factor of the change, times the rank: the change is alpha / rank times the product.
            By default the rank.
        adapter_dropout: Dropout rate of the channels that enter the product, each for a whole batch
            at once; 0 is no dropout.
        adapter_targets: Stages, or patterns of kernels, to adapt. By default all kernels after the
            first stage that have at least twice the parameters of their product.
    """

    adapter: Literal["none", "lora", "bitfit", "norm"] = "none"
    rank: Count = 8
    alpha: NotNegative | None = None
    adapter_dropout: Share = 0.0
    adapter_targets: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """Return the factor of the product of LoRA's matrices."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class OptimizerConfig(Checked):
    """Options of the optimizer.

    Attributes:
        optimizer: Update rule. sgd uses Nesterov momentum; adamw decouples the weight decay from
            the gradient (Loshchilov and Hutter 2019, arXiv:1711.05101), adam does not; lamb suits
            large batches (You et al. 2020, arXiv:1904.00962).
        learning_rate: Peak learning rate; by default that of the recipe, or 1e-4 if it has none,
            with an adapter 1e-3.
        momentum: Momentum of sgd.
        weight_decay: Weight decay of kernels; norms and biases have none.
        schedule: Learning rate schedule after the warm-up. one-cycle replaces the warm-up by a rise
            along a cosine over the first quarter of the run (Smith 2018, arXiv:1803.09820); step
            divides by ten after 30, 60 and 90% of the run; exponential decays to a hundredth.
        warmup: Share of the steps over which the learning rate rises linearly from 0.
        clip_norm: Largest global norm of the trainable gradient; 0 does not clip.
    """

    optimizer: Literal["sgd", "adam", "adamw", "lamb"] = "adamw"
    learning_rate: NotNegative | None = None
    momentum: Share = 0.9
    weight_decay: NotNegative = 1e-4
    schedule: Literal["cosine", "constant", "one-cycle", "step", "exponential"] = "cosine"
    warmup: Share = 0.1
    clip_norm: NotNegative = 1.0


@dataclass(frozen=True)
class FitConfig(Checked):
    """Options of training.

    Attributes:
        recipe: Method of transfer. probe fits a linear head on frozen features to its optimum.
            lp-ft starts from that probe and fine-tunes the last stages, which distorts the features
            less (Kumar et al. 2022, arXiv:2202.10054). gradual starts from the probe and unfreezes
            one stage after another from the top (ULMFiT, arXiv:1801.06146). finetune trains all
            stages with a head initialized to zeros. bit is finetune with the hyperparameters of
            BiT (arXiv:1912.11370). scratch trains from random weights, as a baseline.
        freeze_to: Last frozen stage. By default lp-ft freezes all stages before the lowest
            resolution, and other recipes none; with an adapter none does.
        train: Stages, or patterns of parameters, that train; all others are frozen.
            Replaces --freeze-to.
        rates: Multiples of the learning rate as PATTERN=RATE; 0 freezes. They take precedence over
            all other options.
        layer_decay: Factor between the learning rates of a stage and of the stage after it; 1 is no
            decay.
        epochs: Number of epochs, all phases together; by default 10, for scratch 30, and for bit
            enough for 500 steps (10,000 from 20,000 images on, 20,000 from 500,000 on).
        batch_norm: Statistics that batch norm uses in trainable stages: the running ones, or those
            of the batch. By default running, for scratch batch.
        head_after: Stage whose output the new head reads; later stages are dropped. By default the
            stage before the old head.
        dropout: Dropout rate before the head; 0 is no dropout.
        drop_path: Rate of stochastic depth in the last block, which decreases to 0 in the first one
            (Huang et al. 2016, arXiv:1603.09382): the share of residual branches that are dropped.
        loss: Loss to minimize; by default cross-entropy, for numbers squared-error. focal has less
            loss for examples that are classified well (Lin et al. 2017, arXiv:1708.02002);
            asymmetric suits several labels that are rare (Ridnik et al. 2021, arXiv:2009.14119);
            huber is less influenced by outliers.
        focal_gamma: Exponent of the focal loss; 0 is cross-entropy.
        label_smoothing: Share of the target probability that is spread evenly over all classes.
        class_weights: Weights of the classes in the loss; balanced uses the inverse of their share
            of the images.
        balance: Draw the images of every epoch with replacement, such that all classes, or labels,
            are about equally frequent. The probe weights images alike.
        choose_by: Metric on the validation images by which the best epoch is chosen, then by the
            loss. By default top1 for classes, map for several labels, kappa for ordered classes and
            loss for numbers.
        ema_decay: Decay of an exponential moving average of the weights, which is then validated
            and saved; 0 keeps no average.
        patience: Number of epochs without improvement on the validation images after which a phase
            stops; 0 never stops early.
        accumulate: Number of parts of a batch that go through the network one after another, to
            save memory.
        remat: Keep only the outputs of stages for the backward pass and compute the activations
            within each stage again, to save memory. A step computes up to a third more.
        fsdp: Divide parameters, gradients and optimizer state among all devices, for networks that
            do not fit one (fully sharded data parallelism); a stage's parameters are gathered when
            it runs. Validation needs the memory of all parameters on each device.
        frozen_dtype: Dtype of the frozen parameters during training; bfloat16 halves their memory
            and affects validation. The network that is saved has its original parameters.
        cache: Place for the activations that enter the first trainable stage, which are computed
            once instead of in every epoch. auto uses memory, or else the disk, if they fit.
            TLJAX_FEATURE_CACHE_GIB limits all files on the disk, by default to 50 GiB.
        cache_dtype: Dtype of cached activations; bfloat16 halves their size and is approximate,
            unless they are computed in it, with --precision bfloat16, and so are cached in it.
        cache_views: Number of random views of each image that are cached and used one after
            another, with --augment; approximate. 0 caches none and draws a new view in every epoch.
        augment: Augment training images by random crops and flips, and by the augmentation options.
        augmentation: Options of data augmentation.
        adaptation: Options of adapters.
        adversary: Options of adversarial training. With an attack, the best epoch is the one with
            the highest robust accuracy.
        optimizer: Options of the optimizer.
    """

    recipe: Recipe = "lp-ft"
    freeze_to: str | None = None
    train: tuple[str, ...] = ()
    rates: tuple[str, ...] = ()
    layer_decay: Ratio = 1.0
    epochs: Count | None = None
    batch_norm: Literal["running", "batch"] | None = None
    head_after: str | None = None
    dropout: Share = 0.0
    drop_path: Share = 0.0
    loss: Loss | None = None
    focal_gamma: NotNegative = 2.0
    label_smoothing: Share = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    balance: bool = False
    choose_by: ChooseBy | None = None
    ema_decay: Share = 0.0
    patience: Amount = 0
    accumulate: Count = 1
    remat: bool = False
    fsdp: bool = False
    frozen_dtype: Dtype = "float32"
    cache: Literal["auto", "memory", "disk", "none"] = "auto"
    cache_dtype: Dtype = "float32"
    cache_views: Amount = 0
    augment: bool = False
    augmentation: AugmentConfig = field(default_factory=AugmentConfig)
    adaptation: AdapterConfig = field(default_factory=AdapterConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def attacker(self) -> AdversaryConfig | None:
        """Return the adversary, or None without an attack."""
        return None if self.adversary.attack == "none" else self.adversary


def _augments(s: Any) -> bool:
    return s.augment or s.recipe in ("bit", "scratch")


def _freezes(s: Any) -> bool:
    zero = (rate for rate in s.rates if rate.rpartition("=")[2].strip("0.") == "")
    some = s.freeze_to or s.train or s.adapter != "none"
    return s.recipe in ("probe", "lp-ft", "gradual") or some or any(zero)


def _uses_lora(s: Any) -> bool:
    return s.adapter == "lora"


_AUGMENTATION = " ".join(settings(AugmentConfig()))
_STEPS = " ".join(
    settings(FitConfig()).keys() - {"recipe", "head_after", "cache", "cache_dtype", "balance"}
)

FIT_CONDITIONS: Conditions = (
    (_STEPS, lambda s: s.recipe != "probe", "with --recipe probe: it takes no steps"),
    ("augment", lambda s: s.augment == _augments(s), "with --recipe bit or scratch: they augment"),
    (f"cache_views {_AUGMENTATION}", _augments, "without --augment"),
    ("focal_gamma", lambda s: s.loss == "focal", "without --loss focal"),
    ("scale ratio", lambda s: s.crop == "random-resized", "without --crop random-resized"),
    ("randaugment_magnitude", lambda s: s.randaugment_layers, "without --randaugment-layers"),
    ("rank alpha adapter_dropout adapter_targets", _uses_lora, "without --adapter lora"),
    ("epsilon attack_steps", lambda s: s.attack != "none", "without --attack"),
    ("attack_steps", lambda s: s.attack == "pgd", "without --attack pgd"),
    ("choose_by", lambda s: s.attack == "none", "with --attack: robust accuracy is compared"),
    ("momentum", lambda s: s.optimizer == "sgd" or s.recipe == "bit", "without --optimizer sgd"),
    ("warmup", lambda s: s.schedule != "one-cycle", "with --schedule one-cycle"),
    ("frozen_dtype cache_dtype cache_views", _freezes, "where nothing is frozen"),
    ("cache", lambda s: s.cache == "none" or _freezes(s), "where nothing is frozen"),
    ("cache_dtype cache_views", lambda s: s.cache != "none", "with --cache none"),
    ("cache_dtype", lambda s: s.attack == "none", "with --attack: nothing is cached"),
    ("cache_dtype", lambda s: s.cache_views or not _augments(s), "without --cache-views"),
)
"""Conditions under which options have an effect, once a recipe has filled in the defaults."""

_SET_BY_BIT = "optimizer weight_decay schedule warmup clip_norm mixup crop scale ratio"
REQUEST_CONDITIONS: Conditions = (
    (_SET_BY_BIT, lambda s: s.recipe != "bit", "with --recipe bit: its HyperRule sets it"),
    *FIT_CONDITIONS,
)
"""Conditions under which options have an effect, before a recipe fills in the defaults."""
