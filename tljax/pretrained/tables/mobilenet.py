"""Key tables of the MobileNets in torchvision, timm and Hugging Face transformers."""

from tljax.models.depthwise import Run
from tljax.models.mobilenet import V1, V1_VARIANTS, V2, V2_VARIANTS, V3_LARGE, V3_SMALL, V3_VARIANTS
from tljax.pretrained.rules import Arguments, Config, Layout, Rules, conv_norm, dense
from tljax.pretrained.tables import block_indices, dense_as_conv, depthwise, huggingface_conv_norm
from tljax.pretrained.tables.depthwise import torchvision_block, torchvision_pair
from tljax.runtime.preprocess import Preprocess

# --- version 1 -----------------------------------------------------------------------------------


def timm_v1(name: str) -> Rules:  # noqa: ARG001 - all widths have the same keys
    """Return timm's key table; it has no ``conv_head``."""
    rules = conv_norm("conv_stem", "bn1", "stem/conv")
    for stage, block in block_indices(depth for depth, *_ in V1):
        key, path = f"blocks.{stage}.{block}", f"stage{stage + 1}/block{block}"
        rules += conv_norm(f"{key}.conv_dw", f"{key}.bn1", f"{path}/depthwise")
        rules += conv_norm(f"{key}.conv_pw", f"{key}.bn2", f"{path}/pointwise")
    return rules + dense("classifier", "head")


def huggingface_v1(name: str) -> Rules:  # noqa: ARG001
    """Return the key table with ``mobilenet_v1.layer.0.convolution.weight``.

    Depthwise and 1x1 convolutions share one numbering.
    """
    unit = huggingface_conv_norm
    rules = unit("mobilenet_v1.conv_stem", "stem/conv")
    for i, (stage, block) in enumerate(block_indices(depth for depth, *_ in V1)):
        rules += unit(f"mobilenet_v1.layer.{2 * i}", f"stage{stage + 1}/block{block}/depthwise")
        rules += unit(f"mobilenet_v1.layer.{2 * i + 1}", f"stage{stage + 1}/block{block}/pointwise")
    return rules + dense("classifier", "head")


def huggingface_v1_config(name: str) -> Config:
    """Return the config.json of ``MobileNetV1ForImageClassification``."""
    return _huggingface_config("MobileNetV1ForImageClassification", "mobilenet_v1") | {
        "depth_multiplier": V1_VARIANTS[name].width
    }


def _huggingface_config(architecture: str, model_type: str) -> Config:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "min_depth": 8,
        "hidden_act": "relu6",
        "tf_padding": True,
        "layer_norm_eps": 0.001,
        "num_channels": 3,
    }


# --- version 2 -----------------------------------------------------------------------------------


def timm_v2(name: str) -> Rules:  # noqa: ARG001
    """Return timm's key table, with keys such as ``blocks.1.0.conv_pw.weight``."""
    return depthwise.timm(V2)


def torchvision_v2(name: str) -> Rules:  # noqa: ARG001
    """Return torchvision's key table, with keys such as ``features.2.conv.0.0.weight``."""
    rules = torchvision_pair("features.0", "stem/conv")
    rows = depthwise.blocks(V2)
    for i, (stage, block, expands) in enumerate(rows, start=1):
        key, path = f"features.{i}.conv", f"stage{stage + 1}/block{block}"
        if expands:
            rules += torchvision_pair(f"{key}.0", f"{path}/expand")
        position = 1 if expands else 0
        rules += torchvision_pair(f"{key}.{position}", f"{path}/depthwise")
        rules += conv_norm(f"{key}.{position + 1}", f"{key}.{position + 2}", f"{path}/project")
    return (
        *rules,
        *torchvision_pair(f"features.{len(rows) + 1}", "conv_head/conv"),
        *dense("classifier.1", "head"),
    )


def huggingface_v2(name: str) -> Rules:  # noqa: ARG001
    """Return the key table with ``mobilenet_v2.layer.0.expand_1x1.convolution.weight``.

    The first block belongs to the stem.
    """
    unit, prefix = huggingface_conv_norm, "mobilenet_v2"
    rules = unit(f"{prefix}.conv_stem.first_conv", "stem/conv")
    for i, (stage, block, expands) in enumerate(depthwise.blocks(V2)):
        key = f"{prefix}.layer.{i - 1}" if i else f"{prefix}.conv_stem"
        path = f"stage{stage + 1}/block{block}"
        if expands:
            rules += unit(f"{key}.expand_1x1", f"{path}/expand")
        rules += unit(f"{key}.conv_3x3", f"{path}/depthwise")
        rules += unit(f"{key}.reduce_1x1", f"{path}/project")
    return rules + unit(f"{prefix}.conv_1x1", "conv_head/conv") + dense("classifier", "head")


def huggingface_v2_config(name: str) -> Config:
    """Return the config.json of ``MobileNetV2ForImageClassification``."""
    return _huggingface_config("MobileNetV2ForImageClassification", "mobilenet_v2") | {
        "depth_multiplier": V2_VARIANTS[name].width,
        "depth_divisible_by": 8,
        "expand_ratio": 6.0,
        "output_stride": 32,
        "first_layer_is_expansion": True,
        "finegrained_output": True,
    }


# --- version 3 -----------------------------------------------------------------------------------


def _runs(name: str) -> tuple[Run, ...]:
    return V3_LARGE if "large" in name else V3_SMALL


def timm_v3(name: str) -> Rules:
    """Return timm's key table; ``conv_head`` is the hidden layer, a 1x1 convolution."""
    runs = _runs(name)
    last, hidden = f"blocks.{len(runs)}.0", 1280 if "large" in name else 1024
    return (
        *depthwise.timm_body(runs),
        *conv_norm(f"{last}.conv", f"{last}.bn1", "conv_head/conv"),
        *dense_as_conv("conv_head", "hidden/dense", -1, hidden),
        *dense("classifier", "head"),
    )


def torchvision_v3(name: str) -> Rules:
    """Return torchvision's key table, with keys such as ``features.4.block.2.fc1.weight``."""
    runs = _runs(name)
    rules, rows = torchvision_pair("features.0", "stem/conv"), depthwise.blocks(runs)
    for i, (stage, block, expands) in enumerate(rows, start=1):
        path = f"stage{stage + 1}/block{block}"
        rules += torchvision_block(f"features.{i}.block", path, runs[stage], expands=expands)
    return (
        *rules,
        *torchvision_pair(f"features.{len(rows) + 1}", "conv_head/conv"),
        *dense("classifier.0", "hidden/dense"),
        *dense("classifier.3", "head"),
    )


def _layouts(name: str) -> dict[str, Layout]:
    if name in V1_VARIANTS:
        if name.startswith("tf_"):
            return {"huggingface": Layout(huggingface_v1, config=huggingface_v1_config)}
        return {"timm": Layout(timm_v1, arguments=_relu6)}
    if name in V2_VARIANTS:
        if name.startswith("tf_"):
            return {"huggingface": Layout(huggingface_v2, config=huggingface_v2_config)}
        torchvision = Layout(torchvision_v2, Preprocess())
        return {"timm": Layout(timm_v2, arguments=_relu6), "torchvision": torchvision}
    if name.startswith("tv_"):
        return {"torchvision": Layout(torchvision_v3)}
    return {"timm": Layout(timm_v3, twins=_twins_v3, arguments=_hard_swish)}


def _relu6(_: str) -> Arguments:
    return {"act_layer": ("relu6",)}


def _hard_swish(_: str) -> Arguments:
    return {"act_layer": ("hard_swish",)}


def _twins_v3(name: str) -> tuple[str, ...]:
    """Return the network with the same tensors and the padding of TensorFlow, or of torch."""
    twin = name.removeprefix("tf_") if name.startswith("tf_") else f"tf_{name}"
    return (twin,) if twin in V3_VARIANTS else ()


LAYOUTS: dict[str, dict[str, Layout]] = {
    # keras.py has the tables of Keras
    name: _layouts(name)
    for name in (*V1_VARIANTS, *V2_VARIANTS, *V3_VARIANTS)
    if not name.startswith("keras_")
}
