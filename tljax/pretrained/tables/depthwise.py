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


def units(run: Run, *, expands: bool) -> tuple[str, ...]:
    """Return the names of the convolutions with batch norm in a block, in order."""
    if run.fused:
        return ("expand", "project") if expands else ("conv",)
    return ("expand", "depthwise", "project") if expands else ("depthwise", "project")


_TIMM_NAMES = {
    ("expand", "depthwise", "project"): ("conv_pw", "conv_dw", "conv_pwl"),
    ("depthwise", "project"): ("conv_dw", "conv_pw"),
    ("expand", "project"): ("conv_exp", "conv_pwl"),
    ("conv",): ("conv",),
}
"""Names of the convolutions of a block in timm; they shift in blocks without an expansion."""


def timm_body(runs: tuple[Run, ...]) -> Rules:
    """Return timm's rules of stem and blocks."""
    rules = conv_norm("conv_stem", "bn1", "stem/conv")
    for stage, block, expands in blocks(runs):
        key, path = f"blocks.{stage}.{block}", f"stage{stage + 1}/block{block}"
        names = units(runs[stage], expands=expands)
        for i, (unit, name) in enumerate(zip(names, _TIMM_NAMES[names], strict=True), start=1):
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


def torchvision_pair(key: str, path: str) -> Rules:
    """Return the rules of torchvision's ``Conv2dNormActivation``."""
    return conv_norm(f"{key}.0", f"{key}.1", path)


def torchvision_block(key: str, path: str, run: Run, *, expands: bool) -> Rules:
    """Return the rules of a block whose parts torchvision numbers: ``features.4.block.2.fc1``."""
    rules: Rules = ()
    position = 0
    for unit in units(run, expands=expands):
        if unit == "project" and run.squeeze:
            rules += conv(f"{key}.{position}.fc1", f"{path}/squeeze_excite/reduce")
            rules += conv(f"{key}.{position}.fc2", f"{path}/squeeze_excite/expand")
            position += 1
        rules += torchvision_pair(f"{key}.{position}", f"{path}/{unit}")
        position += 1
    return rules
