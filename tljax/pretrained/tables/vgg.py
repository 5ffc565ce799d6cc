"""Key tables of VGG: torchvision, and timm, which keeps the hidden layers as convolutions."""

from tljax.models.vgg import DEPTHS
from tljax.pretrained.rules import CONV, DENSE, Layout, Rule, Rules, conv, conv_norm, dense

_MAP = (4096, 512, 7, 7)
"""What the first hidden layer reads: torch flattens channel, height, width."""


def _features(name: str) -> Rules:
    """``features.0.weight``: convolutions, norms, activations and poolings in one row."""
    rules: Rules = ()
    norm, position = name.endswith("_bn"), 0
    for block, depth in enumerate(DEPTHS[name], start=1):
        for i in range(1, depth + 1):
            key, path = f"features.{position}", f"block{block}/conv{i}"
            if norm:
                rules += conv_norm(key, f"features.{position + 1}", path)
                rules += (Rule(f"{key}.bias", f"params/{path}/conv_bias"),)
            else:
                rules += conv(key, path)
            position += 3 if norm else 2
        position += 1
    return rules


def torchvision(name: str) -> Rules:
    """``classifier.0.weight`` is ``[4096, 25088]``."""
    return (
        *_features(name),
        Rule("classifier.0.weight", "params/fc1/dense/kernel", CONV, (4096, 25088), _MAP),
        Rule("classifier.0.bias", "params/fc1/dense/bias"),
        *dense("classifier.3", "fc2/dense"),
        *dense("classifier.6", "head"),
    )


def timm(name: str) -> Rules:
    """``pre_logits.fc1.weight`` is ``[4096, 512, 7, 7]``, ``pre_logits.fc2.weight`` 1x1.

    timm slides them over maps of more than 7x7 and averages what comes out; we pool to 7x7 before.
    """
    square = (4096, 4096)
    return (
        *_features(name),
        Rule("pre_logits.fc1.weight", "params/fc1/dense/kernel", CONV, _MAP),
        Rule("pre_logits.fc1.bias", "params/fc1/dense/bias"),
        Rule("pre_logits.fc2.weight", "params/fc2/dense/kernel", DENSE, (*square, 1, 1), square),
        Rule("pre_logits.fc2.bias", "params/fc2/dense/bias"),
        *dense("head.fc", "head"),
    )


LAYOUTS: dict[str, dict[str, Layout]] = {
    name: {"torchvision": Layout(torchvision), "timm": Layout(timm)} for name in DEPTHS
}
