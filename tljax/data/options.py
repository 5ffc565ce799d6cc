"""Options of how images are loaded and augmented. Imports nothing heavy: --help reads this."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from tljax.runtime.errors import RequestError
from tljax.runtime.ranges import Amount, Checked, Count, NotNegative, Range, Ratio, format_flag
from tljax.runtime.settings import Kind


@dataclass(frozen=True)
class Loading(Checked):
    """Options of how images are read and divided among devices.

    None of them changes the value of a feature.

    Attributes:
        batch_size: number of images per batch, over all devices and processes.
        workers: number of processes that decode images; 0 decodes in threads.
        devices: number of devices to use; by default all.
        on_bad_image: skip leaves out images that cannot be read and lists them; fail stops at the
            first one.
    """

    batch_size: Count = 32
    workers: Amount = 0
    devices: Count | None = None
    on_bad_image: Literal["skip", "fail"] = "skip"


@dataclass(frozen=True)
class LabelOptions(Checked):
    """Options of how labels are read, from a table above all.

    Attributes:
        root: Folder that the paths in a table are relative to; by default the folder of the table.
        target: Columns of a table with what is to be learned, separated by commas; of shards and of
            a tfds or hf data set one feature. By default the only column, or feature, that can be a
            label, or all columns that have only 0 and 1.
        task: Kind of label; by default it is inferred from the values. classification: one of
            several classes; multilabel: any number of labels; regression: numbers; ordinal: classes
            with an order, see --order.
        order: Names of ordered classes from the lowest to the highest, separated by commas; implies
            --task ordinal. By default ordered classes are sorted, as numbers if all names are.
        units: Units of the numbers of --task regression, separated by commas, for reports.
        group: Column of a table, or regular expression whose first group is searched for in every
            path relative to the data, such as '(.*)_[0-9]+'. Images of a group, such as a patient
            or a video, are never divided between training and validation. By default every image is
            a group of its own.
        path_column: Column with the paths of the images; by default the one in which most of 100
            rows name existing files.
        split_column: Column that says which part a row belongs to: train, or val, valid, validation
            or test. By default a column named split, if its values are such names.
        weight_column: Column with the weight of each row in the loss; by default all are 1.
    """

    root: Path | None = None
    target: str | None = None
    task: Kind | None = None
    order: str | None = None
    units: str | None = None
    group: str | None = None
    path_column: str | None = None
    split_column: str | None = None
    weight_column: str | None = None

    @property
    def kind(self) -> Kind | None:
        """The kind of labels that is asked for; None if it is to be inferred.

        Raises:
            RequestError: ``--order`` and another kind than ordinal are asked for.
        """
        if self.order is None:
            return self.task
        if self.task not in (None, "ordinal"):
            raise RequestError(f"--order {self.order} has no effect with --task {self.task}")
        return "ordinal"

    def refuse(self, names: str, where: str) -> None:
        """Refuse options that have no meaning for a data set.

        Args:
            names: the names of the options without a meaning, separated by spaces.
            where: the name of the data set in the error.

        Raises:
            RequestError: one of the options has a value.
        """
        for name in names.split():
            if (value := getattr(self, name)) is not None:
                flag = format_flag(name, value)
                raise RequestError(f"{flag} has no effect on {where}: leave it out")


CropRule = Literal["random-resized", "random", "center"]


@dataclass(frozen=True)
class AugmentConfig(Checked):
    """Options of `augment` and `mix`. Hashable, for use as a static argument of `jax.jit`.

    Attributes:
        crop: Rule by which a photograph is cropped. random-resized: a random box of the whole
            photograph, resized (Szegedy et al. 2014, arXiv:1409.4842); random: the photograph is
            squeezed into a square, of which a random square is cropped (BiT, Kolesnikov et al.
            2019, arXiv:1912.11370); center: the central crop, as in validation.
        scale: Smallest and largest share of the area of the photograph that the box covers.
            Training from scratch commonly uses 0.08 1.
        ratio: Smallest and largest width of the box over its height, drawn log-uniformly; the range
            must contain 1.
        flip: Flip images from left to right with probability 1/2.
        randaugment_layers: Number of RandAugment operations applied to an image (Cubuk et al. 2019,
            arXiv:1909.13719); 0 applies none.
        randaugment_magnitude: Magnitude of every RandAugment operation, from 0 to 30 on the scale
            of torchvision.
        mixup: Alpha of mixup (Zhang et al. 2017, arXiv:1710.09412); 0 does not mix.
        cutmix: Alpha of CutMix (Yun et al. 2019, arXiv:1905.04899); 0 does not mix. If --mixup is
            on too, each batch uses one of the two, with probability 1/2.

    Raises:
        RequestError: a value is out of its range.
    """

    crop: CropRule = "random-resized"
    scale: tuple[Ratio, Ratio] = (0.35, 1.0)
    ratio: tuple[Ratio, Annotated[float, Range(1, 3e38)]] = (3 / 4, 4 / 3)
    flip: bool = True
    randaugment_layers: Amount = 0
    randaugment_magnitude: Annotated[float, Range(0, 30)] = 9.0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop not in get_args(CropRule):
            raise RequestError(f"--crop {self.crop}: choose {', '.join(get_args(CropRule))}")
        if self.scale[0] > self.scale[1]:
            raise RequestError(
                f"{format_flag('scale', self.scale)}: the first number must not be above the second"
            )
