"""Key table of Xception, timm's ``legacy_xception``."""

from tljax.models.xception import BLOCKS
from tljax.pretrained.rules import CONV, Config, Layout, Rule, Rules, conv_norm, dense


def _separable(conv: str, norm: str, path: str) -> Rules:
    depthwise = Rule(f"{conv}.conv1.weight", f"params/{path}/depthwise/kernel", CONV)
    return (depthwise, *conv_norm(f"{conv}.pointwise", norm, f"{path}/pointwise"))


def timm(name: str) -> Rules:  # noqa: ARG001 - the signature of all tables
    """Return the key table, with keys such as ``block2.rep.1.pointwise.weight``.

    Within a block ReLU, convolution and norm take numbers; the first block starts without ReLU.
    """
    rules = conv_norm("conv1", "bn1", "stem/conv1") + conv_norm("conv2", "bn2", "stem/conv2")
    for block, (features, stride) in BLOCKS.items():
        for i in range(len(features)):
            position = 3 * i + (block != "block1")
            conv, norm = f"{block}.rep.{position}", f"{block}.rep.{position + 1}"
            rules += _separable(conv, norm, f"{block}/conv{i + 1}")
        if stride > 1:
            rules += conv_norm(f"{block}.skip", f"{block}.skipbn", f"{block}/shortcut")
    rules += _separable("conv3", "bn3", "conv_head/conv1")
    rules += _separable("conv4", "bn4", "conv_head/conv2")
    return rules + dense("fc", "head")


def timm_config(_: str) -> Config:
    """Return timm's name; its ``xception`` is another network."""
    return {"architecture": "legacy_xception"}


LAYOUTS: dict[str, dict[str, Layout]] = {"xception": {"timm": Layout(timm, config=timm_config)}}
