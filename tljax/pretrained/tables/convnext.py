"""Key tables of ConvNeXt in timm, torchvision and transformers, those of DINOv3 among them.

Keras' table is in `tljax.pretrained.tables.keras`.
"""

from collections.abc import Callable
from typing import NamedTuple

from tljax.models.convnext import VARIANTS
from tljax.pretrained.rules import Config, Layout, Rule, Rules, conv, dense
from tljax.pretrained.tables import block_indices, dense_as_conv
from tljax.runtime.preprocess import Preprocess


class _Keys(NamedTuple):
    """Prefixes of the keys in a layout; stages and blocks are counted from 0.

    Attributes:
        stem: keys of the convolution and the norm.
        downsample: function from the number of a stage to the prefix of its downsampling.
        block: function from the numbers of a stage and a block to the prefix of the block.
        layers: keys in a block of the depthwise convolution, the norm, and the first and second
            fully connected layer.
        response_norm: key of the response norm in a block.
        layer_scale: key of the layer scale in a block.
        norm: key of the last norm.
        head: key of the head.
    """

    stem: tuple[str, str]
    downsample: Callable[[int], str]
    block: Callable[[int, int], str]
    layers: tuple[str, str, str, str]
    response_norm: str
    layer_scale: str
    norm: str
    head: str


_TIMM = _Keys(
    stem=("stem.0", "stem.1"),
    downsample="stages.{}.downsample".format,
    block="stages.{}.blocks.{}".format,
    layers=("conv_dw", "norm", "mlp.fc1", "mlp.fc2"),
    response_norm="mlp.grn",
    layer_scale="gamma",
    norm="head.norm",
    head="head.fc",
)

_TORCHVISION = _Keys(
    stem=("features.0.0", "features.0.1"),
    downsample=lambda stage: f"features.{2 * stage}",
    block=lambda stage, block: f"features.{2 * stage + 1}.{block}",
    layers=("block.0", "block.2", "block.3", "block.5"),
    response_norm="",
    layer_scale="layer_scale",
    norm="classifier.0",
    head="classifier.2",
)

_HUGGINGFACE = _Keys(
    stem=("embeddings.patch_embeddings", "embeddings.layernorm"),
    downsample="encoder.stages.{}.downsampling_layer".format,
    block="encoder.stages.{}.layers.{}".format,
    layers=("dwconv", "layernorm", "pwconv1", "pwconv2"),
    response_norm="grn",
    layer_scale="layer_scale_parameter",
    norm="layernorm",
    head="classifier",
)

_DINOV3 = _Keys(
    stem=("stages.0.downsample_layers.0", "stages.0.downsample_layers.1"),
    downsample="stages.{}.downsample_layers".format,
    block="stages.{}.layers.{}".format,
    layers=("depthwise_conv", "layer_norm", "pointwise_conv1", "pointwise_conv2"),
    response_norm="",
    layer_scale="gamma",
    norm="layer_norm",
    head="classifier",  # the network has none; of one that was added this is the usual key
)


def _norm(key: str, path: str) -> Rules:
    return Rule(f"{key}.weight", f"params/{path}/scale"), Rule(f"{key}.bias", f"params/{path}/bias")


def _rules(
    name: str,
    keys: _Keys,
    *,
    prefix: str = "",
    convolutions: bool = False,
    scale_shape: tuple[int, ...] = (),
    response_shape: tuple[int, ...] = (),
) -> Rules:
    """Return a key table.

    Args:
        name: name of the network.
        keys: keys of the layout.
        prefix: prefix of all keys but the head's.
        convolutions: the fully connected layers of a block are stored as 1x1 convolutions.
        scale_shape: shape of a layer scale, if it is not a vector; -1 is the number of channels.
        response_shape: shape of scale and bias of a response norm; as above.
    """
    variant = VARIANTS[name]
    stem_conv, stem_norm = keys.stem
    rules = conv(prefix + stem_conv, "stem/conv") + _norm(prefix + stem_norm, "stem/norm")
    depthwise, norm, *linear = keys.layers
    for stage, block in block_indices(variant.depths):
        if block == 0 < stage:
            key, path = prefix + keys.downsample(stage), f"stage{stage + 1}/downsample"
            rules += _norm(f"{key}.0", f"{path}/norm") + conv(f"{key}.1", f"{path}/conv")
        key, path = prefix + keys.block(stage, block), f"stage{stage + 1}/block{block}"
        rules += conv(f"{key}.{depthwise}", f"{path}/depthwise")
        rules += _norm(f"{key}.{norm}", f"{path}/norm")
        width = variant.width << stage
        for i, (layer, inputs) in enumerate(zip(linear, (width, 4 * width), strict=True), start=1):
            if convolutions:
                outputs = 5 * width - inputs
                rules += dense_as_conv(f"{key}.{layer}", f"{path}/fc{i}", inputs, outputs)
            else:
                rules += dense(f"{key}.{layer}", f"{path}/fc{i}")
        if variant.response_norm:
            pair = _norm(f"{key}.{keys.response_norm}", f"{path}/grn")
            rules += tuple(rule._replace(shape=response_shape) for rule in pair)
        else:
            scale = f"params/{path}/layer_scale/scale"
            rules += (Rule(f"{key}.{keys.layer_scale}", scale, (), scale_shape),)
    return rules + _norm(prefix + keys.norm, "norm/norm") + dense(keys.head, "head")


def timm(name: str) -> Rules:
    """Return timm's key table, with keys such as ``stages.0.blocks.0.conv_dw.weight``.

    The fully connected layers of the small networks are stored as convolutions.
    """
    return _rules(name, _TIMM, convolutions=name.endswith(("_atto", "_femto", "_pico", "_nano")))


def torchvision(name: str) -> Rules:
    """Return torchvision's key table, with keys such as ``features.1.0.block.0.weight``."""
    return _rules(name, _TORCHVISION, scale_shape=(-1, 1, 1))


def huggingface(name: str) -> Rules:
    """Return the key table with ``convnext.encoder.stages.0.layers.0.dwconv.weight``."""
    module = "convnextv2." if VARIANTS[name].response_norm else "convnext."
    return _rules(name, _HUGGINGFACE, prefix=module, response_shape=(1, 1, 1, -1))


def huggingface_config(name: str) -> Config:
    """Return the config.json of ``ConvNextForImageClassification`` or its version 2.

    ``layer_norm_eps`` is the epsilon of the last norm alone: published files say 1e-12, and the
    authors' network has 1e-6 everywhere. The difference is that of rounding errors.
    """
    version = "V2" if VARIANTS[name].response_norm else ""
    return {
        "architectures": [f"ConvNext{version}ForImageClassification"],
        "model_type": f"convnext{version.lower()}",
        "layer_norm_eps": (1e-6, 1e-12),
        **_sizes(name),
    }


def _sizes(name: str) -> Config:
    variant = VARIANTS[name]
    return {
        "depths": list(variant.depths),
        "hidden_sizes": [variant.width << stage for stage in range(4)],
        "hidden_act": "gelu",
        "num_channels": 3,
    }


def dinov3(name: str) -> Rules:
    """Return the key table of DINOv3 in transformers: ``stages.0.layers.0.depthwise_conv.weight``.

    That network has no head. A head that was added to it is named as in other networks.
    """
    return _rules(name, _DINOV3)


def dinov3_config(name: str) -> Config:
    """Return the config.json of ``DINOv3ConvNextModel``."""
    return {
        "architectures": ["DINOv3ConvNextModel"],
        "model_type": "dinov3_convnext",
        "layer_norm_eps": 1e-6,
        **_sizes(name),
    }


_ARGUMENTS = {
    "act_layer": ("gelu",),
    "norm_layer": ("layernorm", "layernorm2d"),
    "norm_eps": (1e-6, None),
    "stem_type": ("patch",),
}
_RESIZE = {
    "convnext_tiny": 236,
    "convnext_small": 230,
    "convnext_base": 232,
    "convnext_large": 232,
}
"""Networks of torchvision: length of the short side before the crop of 224 pixels.

DINOv3 has the same.
"""


def _layouts(name: str) -> dict[str, Layout]:
    layouts = {
        "timm": Layout(timm, arguments=lambda _: _ARGUMENTS),
        "huggingface": Layout(huggingface, config=huggingface_config),
    }
    if name in _RESIZE:
        layouts["torchvision"] = Layout(torchvision, Preprocess(224, _RESIZE[name]))
        cropped = Preprocess(224, 224, "bicubic")
        layouts["dinov3"] = Layout(dinov3, cropped, config=dinov3_config)
    return layouts


LAYOUTS: dict[str, dict[str, Layout]] = {name: _layouts(name) for name in VARIANTS}
