"""Key tables of RegNet in torchvision, timm and Hugging Face transformers."""

from tljax.models.regnet import VARIANTS
from tljax.pretrained.rules import Config, Layout, Rules, conv, conv_norm, dense
from tljax.pretrained.tables import block_indices, huggingface_conv_norm
from tljax.runtime.preprocess import Preprocess


def torchvision(name: str) -> Rules:
    """Return the key table, with keys such as ``trunk_output.block1.block1-0.f.a.0.weight``."""
    rules = conv_norm("stem.0", "stem.1", "stem/conv")
    for stage, block in block_indices(VARIANTS[name].depths):
        key = f"trunk_output.block{stage + 1}.block{stage + 1}-{block}"
        path = f"stage{stage + 1}/block{block}"
        for i, unit in enumerate("abc", start=1):
            rules += conv_norm(f"{key}.f.{unit}.0", f"{key}.f.{unit}.1", f"{path}/conv{i}")
        if VARIANTS[name].squeeze:
            rules += conv(f"{key}.f.se.fc1", f"{path}/squeeze_excite/reduce")
            rules += conv(f"{key}.f.se.fc2", f"{path}/squeeze_excite/expand")
        if block == 0:
            rules += conv_norm(f"{key}.proj.0", f"{key}.proj.1", f"{path}/shortcut")
    return rules + dense("fc", "head")


def timm(name: str) -> Rules:
    """Return the key table, with keys such as ``s1.b1.conv1.conv.weight``."""
    rules = conv_norm("stem.conv", "stem.bn", "stem/conv")
    for stage, block in block_indices(VARIANTS[name].depths):
        key, path = f"s{stage + 1}.b{block + 1}", f"stage{stage + 1}/block{block}"
        units = {"conv1": "conv1", "conv2": "conv2", "conv3": "conv3"}
        if block == 0:
            units["downsample"] = "shortcut"
        for theirs, ours in units.items():
            rules += conv_norm(f"{key}.{theirs}.conv", f"{key}.{theirs}.bn", f"{path}/{ours}")
        if VARIANTS[name].squeeze:
            rules += conv(f"{key}.se.fc1", f"{path}/squeeze_excite/reduce")
            rules += conv(f"{key}.se.fc2", f"{path}/squeeze_excite/expand")
    return rules + dense("head.fc", "head")


def huggingface(name: str) -> Rules:
    """Return the key table with ``regnet.encoder.stages.0.layers.0.layer.0.convolution.weight``."""
    unit, squeeze = huggingface_conv_norm, VARIANTS[name].squeeze
    rules = unit("regnet.embedder.embedder", "stem/conv")
    for stage, block in block_indices(VARIANTS[name].depths):
        key = f"regnet.encoder.stages.{stage}.layers.{block}"
        path = f"stage{stage + 1}/block{block}"
        rules += unit(f"{key}.layer.0", f"{path}/conv1") + unit(f"{key}.layer.1", f"{path}/conv2")
        if squeeze:
            rules += conv(f"{key}.layer.2.attention.0", f"{path}/squeeze_excite/reduce")
            rules += conv(f"{key}.layer.2.attention.2", f"{path}/squeeze_excite/expand")
        rules += unit(f"{key}.layer.{3 if squeeze else 2}", f"{path}/conv3")
        if block == 0:
            rules += unit(f"{key}.shortcut", f"{path}/shortcut")
    return rules + dense("classifier.1", "head")


def huggingface_config(name: str) -> Config:
    """Return the config.json of ``RegNetForImageClassification``."""
    depths, widths, group_width, squeeze, _ = VARIANTS[name]
    return {
        "architectures": ["RegNetForImageClassification"],
        "model_type": "regnet",
        "depths": list(depths),
        "hidden_sizes": list(widths),
        "groups_width": group_width,
        "layer_type": "y" if squeeze else "x",
        "downsample_in_first_stage": True,
        "embedding_size": 32,
        "hidden_act": "relu",
        "num_channels": 3,
    }


_TIMM = Layout(timm)
_HUGGINGFACE = Layout(huggingface, config=huggingface_config)
_TORCHVISION = Layout(torchvision, Preprocess(224, 232))  # that of its default weights
_TORCHVISION_SWAG = Layout(torchvision)

_IN_TORCHVISION = (
    *(f"regnetx_{size}" for size in ("004_tv", "008", "016", "032", "080", "160", "320")),
    *(f"regnety_{size}" for size in ("004", "008_tv", "016", "032", "080_tv", "160", "320")),
)


def _layouts(name: str) -> dict[str, Layout]:
    both = {"timm": _TIMM, "huggingface": _HUGGINGFACE}
    if name == "regnety_1280":
        return {"torchvision": _TORCHVISION_SWAG, **both}
    return {"torchvision": _TORCHVISION, **both} if name in _IN_TORCHVISION else both


LAYOUTS: dict[str, dict[str, Layout]] = {name: _layouts(name) for name in VARIANTS}
