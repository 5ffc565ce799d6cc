"""Rules shared by the key tables of MobileNets and EfficientNets."""

from tljax.models.depthwise import Run
from tljax.pretrained.rules import Rules, conv, conv_norm, dense


def blocks(runs: tuple[Run, ...]) -> list[tuple[int, int, bool]]:
    """Return (stage, block, has an expansion) of every block, with indices from 0."""
    return [
        (stage, block, expansion > 1)
        for stage, run in enumerate(runs)
        for block, expansion in enumerate(run.expansions)
    ]


def timm_body(runs: tuple[Run, ...]) -> Rules:
    """Return timm's rules of stem and blocks; names shift in blocks without an expansion."""
    rules = conv_norm("conv_stem", "bn1", "stem/conv")
    for stage, block, expands in blocks(runs):
        key, path = f"blocks.{stage}.{block}", f"stage{stage + 1}/block{block}"
        if expands:
            names = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
        else:
            names = {"depthwise": "conv_dw", "project": "conv_pw"}
        for i, (unit, name) in enumerate(names.items(), start=1):
            rules += conv_norm(f"{key}.{name}", f"{key}.bn{i}", f"{path}/{unit}")
        if runs[stage].squeeze:
            rules += conv(f"{key}.se.conv_reduce", f"{path}/squeeze_excite/reduce")
            rules += conv(f"{key}.se.conv_expand", f"{path}/squeeze_excite/expand")
    return rules


def timm(runs: tuple[Run, ...]) -> Rules:
    """Return timm's key table, with keys such as ``blocks.1.0.conv_pw.weight``."""
    return (
        *timm_body(runs),
        *conv_norm("conv_head", "bn2", "conv_head/conv"),
        *dense("classifier", "head"),
    )
