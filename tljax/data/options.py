"""How images are read and how they vary. Imports nothing heavy: --help reads this."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tljax.runtime.errors import RequestError
from tljax.runtime.ranges import Amount, Checked, Count, NotNegative, Range, Ratio, spelled


@dataclass(frozen=True)
class Loading(Checked):
    """How images are read and spread over devices. No feature depends on it.

    Attributes:
        batch_size: images a step.
        workers: number of processes that decode; 0 decodes in threads.
        devices: number of devices; by default all.
        on_bad_image: skip leaves unreadable images out and lists them; fail stops.
    """

    batch_size: Count = 32
    workers: Amount = 0
    devices: Count | None = None
    on_bad_image: Literal["skip", "fail"] = "skip"


@dataclass(frozen=True)
class AugmentConfig(Checked):
    """What `augment` and `mix` do. Hashable: a static argument of `jax.jit`.

    Attributes:
        crop: cut a random box and resize it (Szegedy et al. 2014, "Going deeper with
            convolutions"), instead of the central crop.
        scale: the box's share of the area of the image. Training from scratch takes (0.08, 1).
        ratio: the box's width over its height, log-uniform; holds 1.
        flip: mirror left and right, every other time.
        randaugment_layers: the number of operations, one after the other, of RandAugment (Cubuk et
            al. 2019, arXiv:1909.13719); 0 is off.
        randaugment_magnitude: of every operation, 0 to 30; torchvision's scale.
        mixup: the alpha of mixup (Zhang et al. 2017, arXiv:1710.09412); 0 is off.
        cutmix: the alpha of CutMix (Yun et al. 2019, arXiv:1905.04899); 0 is off. With both on, a
            batch gets one or the other, at even odds.

    Raises:
        RequestError: a value is out of its range.
    """

    crop: bool = True
    scale: tuple[Ratio, Ratio] = (0.35, 1.0)
    ratio: tuple[Ratio, Annotated[float, Range(1, 3e38)]] = (3 / 4, 4 / 3)
    flip: bool = True
    randaugment_layers: Amount = 0
    randaugment_magnitude: Annotated[float, Range(0, 30)] = 9.0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale[0] > self.scale[1]:
            raise RequestError(f"{spelled('scale', self.scale)}: the first number is the lower one")
