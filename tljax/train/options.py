"""What training can be asked, with defaults. Imports nothing heavy: --help reads this."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tljax.data.options import AugmentConfig
from tljax.runtime.ranges import Amount, Checked, Count, NotNegative, Range, Ratio, Share
from tljax.runtime.settings import Conditions, Dtype, settings

Recipe = Literal["probe", "lp-ft", "gradual", "finetune", "bit", "scratch"]


@dataclass(frozen=True)
class AdversaryConfig(Checked):
    """How training images are attacked before the network learns from them.

    Attributes:
        attack: fast takes one step from a random start (Wong et al. 2020), pgd several (Madry et
            al. 2018), and costs as many forward and backward passes more.
        epsilon: largest change of a pixel value, in units of 1/255.
        attack_steps: of pgd.
    """

    attack: Literal["none", "fast", "pgd"] = "none"
    epsilon: Annotated[float, Range(0, 255, without="low")] = 4.0
    attack_steps: Count = 7


@dataclass(frozen=True)
class OptimizerConfig(Checked):
    """How the trainable parameters move.

    Attributes:
        optimizer: sgd has Nesterov momentum; adamw decouples the weight decay (Loshchilov
            and Hutter 2019), adam does not; lamb is for large batches (You et al. 2020).
        learning_rate: at its peak; by default what the recipe says, or 1e-4.
        momentum: of sgd.
        weight_decay: of kernels; never of norms and biases.
        schedule: after the warm-up. one-cycle rises along a cosine for a quarter of the run
            instead (Smith 2018); step divides by ten after 30, 60 and 90% of the run;
            exponential falls to a hundredth.
        warmup: share of the steps over which the learning rate rises linearly.
        clip_norm: largest global norm of the trainable gradient; 0 clips nothing.
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
    """What to train and for how long.

    Attributes:
        recipe: probe fits a linear head on frozen features, to the optimum. lp-ft then
            fine-tunes the last stages from there, which distorts the features less (Kumar et al.
            2022, https://arxiv.org/abs/2202.10054). gradual unfreezes one stage after the other
            from the top (ULMFiT, https://arxiv.org/abs/1801.06146). finetune trains everything
            with a new head of zeros. bit is that by BiT's HyperRule
            (https://arxiv.org/abs/1912.11370). scratch starts from random weights: the baseline
            that shows what transfer is worth.
        freeze_to: the last stage that stays frozen. By default lp-ft freezes everything before
            the lowest resolution, and the others nothing.
        train: patterns or stages that train, instead of freeze_to.
        rates: PATTERN=RATE, multiples of the learning rate that win over all the others.
        layer_decay: a stage trains at this multiple of the rate of the stage after it.
        epochs: of training, all phases together; by default 10, for scratch 30, and for bit
            as many as make 500, 10,000 or 20,000 steps.
        batch_norm: on its running statistics, or on those of the batch in the stages that train; by
            default the former, for scratch the latter.
        head_after: the stage that the new head reads; those behind it are dropped. By default the
            one before the old head.
        dropout: rate before the head.
        label_smoothing: share of the target that is spread over all classes.
        class_weights: balanced weighs a class by the inverse of its share of the images.
        ema_decay: of an exponential moving average of the weights, a step, which is then what is
            validated and kept; 0 keeps none.
        patience: stop a phase after so many epochs without a better validation; 0 never does.
        accumulate: a batch goes through the network in so many parts, to save memory.
        frozen_dtype: in which the parameters that do not train are held meanwhile; bfloat16 takes
            half, and validation sees it. What is returned has them as they were.
        cache: where the activations that enter the first stage to train are kept: they are computed
            once and every epoch runs the rest alone. auto takes memory, then the disk, where
            they fit. TLJAX_FEATURE_CACHE_GIB, by default 50, is what all on the disk may take.
        cache_dtype: in which they are kept; bfloat16 takes half, and is approximate.
        cache_views: with augment, so many random views of every image are cached and taken in
            turn: approximate. 0 caches none and draws afresh in every epoch.
        augment: random crops and flips, and what else augmentation says.
        augmentation: see `AugmentConfig`.
        adversary: see `AdversaryConfig`. With one, epochs are compared by robust accuracy.
        optimizer: see `OptimizerConfig`.
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
    label_smoothing: Share = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    ema_decay: Share = 0.0
    patience: Amount = 0
    accumulate: Count = 1
    frozen_dtype: Dtype = "float32"
    cache: Literal["auto", "memory", "disk", "none"] = "auto"
    cache_dtype: Dtype = "float32"
    cache_views: Amount = 0
    augment: bool = False
    augmentation: AugmentConfig = field(default_factory=AugmentConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def attacker(self) -> AdversaryConfig | None:
        """The adversary, if there is one."""
        return None if self.adversary.attack == "none" else self.adversary


def _augments(s: Any) -> bool:
    return s.augment or s.recipe in ("bit", "scratch")


def _freezes(s: Any) -> bool:
    at_rest = (rate for rate in s.rates if rate.rpartition("=")[2].strip("0.") == "")
    return s.recipe in ("probe", "lp-ft", "gradual") or s.freeze_to or s.train or any(at_rest)


_AUGMENTATION = " ".join(settings(AugmentConfig()))
_STEPS = " ".join(settings(FitConfig()).keys() - {"recipe", "head_after", "cache", "cache_dtype"})

FIT_CONDITIONS: Conditions = (
    (_STEPS, lambda s: s.recipe != "probe", "with --recipe probe: it takes no steps"),
    ("augment", lambda s: s.augment == _augments(s), "with --recipe bit or scratch: they augment"),
    (f"cache_views {_AUGMENTATION}", _augments, "without --augment"),
    ("scale ratio", lambda s: s.crop, "with --no-crop"),
    ("randaugment_magnitude", lambda s: s.randaugment_layers, "without --randaugment-layers"),
    ("epsilon attack_steps", lambda s: s.attack != "none", "without --attack"),
    ("attack_steps", lambda s: s.attack == "pgd", "without --attack pgd"),
    ("momentum", lambda s: s.optimizer == "sgd" or s.recipe == "bit", "without --optimizer sgd"),
    ("warmup", lambda s: s.schedule != "one-cycle", "with --schedule one-cycle"),
    ("frozen_dtype cache_dtype cache_views", _freezes, "where nothing is frozen"),
    ("cache", lambda s: s.cache == "none" or _freezes(s), "where nothing is frozen"),
    ("cache_dtype cache_views", lambda s: s.cache != "none", "with --cache none"),
    ("cache_dtype", lambda s: s.attack == "none", "with --attack: nothing is cached"),
    ("cache_dtype", lambda s: s.cache_views or not _augments(s), "without --cache-views"),
)
"""Of a `FitConfig` in which a recipe has filled in the defaults."""

_HYPERRULE = "optimizer weight_decay schedule warmup clip_norm mixup"
ASKED_CONDITIONS: Conditions = (
    (_HYPERRULE, lambda s: s.recipe != "bit", "with --recipe bit: its HyperRule sets it"),
    *FIT_CONDITIONS,
)
"""Of a `FitConfig` as it was asked for."""
