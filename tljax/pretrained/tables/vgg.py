"""Key tables of VGG in torchvision, and in timm, which stores hidden layers as convolutions."""

from tljax.models.vgg import DEPTHS
from tljax.pretrained.rules import CONV, Layout, Rule, Rules, conv, conv_norm, dense
from tljax.pretrained.tables import dense_as_conv

_MAP = (4096, 512, 7, 7)
"""Shape of the first hidden layer's kernel: torch flattens channel, height, width."""


def _features(name: str) -> Rules:
    """Return the rules of ``features.0.weight`` etc.; activations and poolings take numbers too."""
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
    """Return torchvision's key table; ``classifier.0.weight`` is ``[4096, 25088]``."""
    return (
        *_features(name),
        Rule("classifier.0.weight", "params/fc1/dense/kernel", CONV, (4096, 25088), _MAP),
        Rule("classifier.0.bias", "params/fc1/dense/bias"),
        *dense("classifier.3", "fc2/dense"),
        *dense("classifier.6", "head"),
    )


def timm(name: str) -> Rules:
    """Return timm's key table; ``pre_logits.fc1.weight`` is ``[4096, 512, 7, 7]``.

    On feature maps larger than 7x7 timm applies these convolutions and averages the results; tljax
    pools the map to 7x7 first.
    """
    return (
        *_features(name),
        Rule("pre_logits.fc1.weight", "params/fc1/dense/kernel", CONV, _MAP),
        Rule("pre_logits.fc1.bias", "params/fc1/dense/bias"),
        *dense_as_conv("pre_logits.fc2", "fc2/dense", 4096, 4096),
        *dense("head.fc", "head"),
    )


LAYOUTS: dict[str, dict[str, Layout]] = {
    name: {"torchvision": Layout(torchvision), "timm": Layout(timm)} for name in DEPTHS
}
