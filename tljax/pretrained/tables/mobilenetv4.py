"""Key table of MobileNetV4 in timm."""

from tljax.models.mobilenetv4 import VARIANTS, Conv, Fused, Universal
from tljax.pretrained.rules import Layout, Rules, conv_norm, dense


def timm(name: str) -> Rules:
    """Return timm's key table, with keys such as ``blocks.2.0.dw_start.conv.weight``."""
    rules, stages = conv_norm("conv_stem", "bn1", "stem/conv"), VARIANTS[name].stages
    for stage, blocks in enumerate(stages):
        for i, block in enumerate(blocks):
            key, path = f"blocks.{stage}.{i}", f"stage{stage + 1}/block{i}"
            if isinstance(block, Conv):
                rules += conv_norm(f"{key}.conv", f"{key}.bn1", f"{path}/conv")
            elif isinstance(block, Fused):
                rules += conv_norm(f"{key}.conv_exp", f"{key}.bn1", f"{path}/expand")
                rules += conv_norm(f"{key}.conv_pwl", f"{key}.bn2", f"{path}/project")
            else:
                rules += _universal(key, path, block)
    last = f"blocks.{len(stages)}.0"
    return (
        *rules,
        *conv_norm(f"{last}.conv", f"{last}.bn1", "conv_head/conv"),
        *conv_norm("conv_head", "norm_head", "hidden/conv"),
        *dense("classifier", "head"),
    )


def _universal(key: str, path: str, block: Universal) -> Rules:
    """Return the rules of a universal inverted bottleneck."""
    names = {"start": "dw_start", "expand": "pw_exp", "middle": "dw_mid", "project": "pw_proj"}
    absent = {unit for unit in ("start", "middle") if not getattr(block, unit)}
    rules: Rules = ()
    for unit, name in names.items():
        if unit not in absent:
            rules += conv_norm(f"{key}.{name}.conv", f"{key}.{name}.bn", f"{path}/{unit}")
    return rules


LAYOUTS: dict[str, dict[str, Layout]] = {name: {"timm": Layout(timm)} for name in VARIANTS}
