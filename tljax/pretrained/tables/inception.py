"""Key table of Inception v3 in torchvision and timm, whose keys are the same."""

from tljax.models.inception import BLOCKS
from tljax.pretrained.rules import Layout, Rules, conv_norm, dense


def torchvision(name: str) -> Rules:  # noqa: ARG001 - the signature of all tables
    """Return the key table, with keys such as ``Mixed_5b.branch1x1.conv.weight``."""

    def unit(key: str, path: str) -> Rules:
        return conv_norm(f"{key}.conv", f"{key}.bn", path)

    rules: Rules = ()
    for key in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3"):
        rules += unit(f"Conv2d_{key}", f"stem/conv{key[:2]}")
    for stage, block in BLOCKS.items():
        for convolution, *_ in block.units:
            key = f"{stage.replace('mixed', 'Mixed_')}.{convolution}"
            rules += unit(key, f"{stage}/{convolution}")
    return rules + dense("fc", "head")


# Torchvision's published files contain the auxiliary head; timm's may or may not.
_TORCHVISION = Layout(torchvision, ignore=("AuxLogits.",))

LAYOUTS: dict[str, dict[str, Layout]] = {
    "inception_v3": {"torchvision": _TORCHVISION, "timm": _TORCHVISION}
}
