"""Key tables of the networks in `keras.applications`.

A table lists the layers in the order in which a Keras model does, sorted by their distance from the
output: by that order their weights are found (see `keras_file`).
"""

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from tljax.models import resnet, resnetv2, vgg
from tljax.pretrained.rules import Layout, Rule, Rules
from tljax.types import CAFFE


class Layer(NamedTuple):
    """A layer of Keras that has weights.

    Attributes:
        name: what Keras calls it; empty where it gets an automatic name.
        kind: its class, one of `keras_file.WEIGHTS`.
        rules: of its weights, in order; without the layer in their keys.
    """

    name: str
    kind: str
    rules: Rules


Layers = tuple[Layer, ...]


def conv(name: str, path: str, *, bias: str | None = "bias") -> Layers:
    """A convolution. ``bias`` is what ours calls its bias: in a `ConvNorm`, ``conv_bias``."""
    rules = (Rule("kernel", f"params/{path}/kernel"),)
    if bias:
        rules += (Rule("bias", f"params/{path}/{bias}"),)
    return (Layer(name, "conv2d", rules),)


def norm(name: str, path: str) -> Layers:
    """A batch norm, of a `ConvNorm` or by itself."""
    rules = (
        Rule("gamma", f"params/{path}/scale"),
        Rule("beta", f"params/{path}/bias"),
        Rule("moving_mean", f"batch_stats/{path}/mean"),
        Rule("moving_variance", f"batch_stats/{path}/var"),
    )
    return (Layer(name, "batch_normalization", rules),)


def dense(name: str, path: str) -> Layers:
    """A fully connected layer."""
    rules = (Rule("kernel", f"params/{path}/kernel"), Rule("bias", f"params/{path}/bias"))
    return (Layer(name, "dense", rules),)


def _vgg(model: str) -> Layers:
    layers: Layers = ()
    for block, depth in enumerate(vgg.DEPTHS[model], start=1):
        for i in range(1, depth + 1):
            layers += conv(f"block{block}_conv{i}", f"block{block}/conv{i}")
    hidden = dense("fc1", "fc1/dense") + dense("fc2", "fc2/dense")
    return layers + hidden + dense("predictions", "head")


def _resnet(model: str) -> Layers:
    def unit(key: str, path: str) -> tuple[Layers, Layers]:
        return conv(f"{key}_conv", path, bias="conv_bias"), norm(f"{key}_bn", path)

    layers = sum(unit("conv1", "stem/conv1"), ())
    for stage, depth in enumerate(resnet.VARIANTS[model].depths, start=1):
        for block in range(depth):
            key, path = f"conv{stage + 1}_block{block + 1}", f"layer{stage}/block{block}"
            layers += sum(unit(f"{key}_1", f"{path}/conv1"), ())
            layers += sum(unit(f"{key}_2", f"{path}/conv2"), ())
            last_conv, last_norm = unit(f"{key}_3", f"{path}/conv3")
            if block == 0:
                shortcut_conv, shortcut_norm = unit(f"{key}_0", f"{path}/shortcut")
                layers += shortcut_conv + last_conv + shortcut_norm + last_norm
            else:
                layers += last_conv + last_norm
    return layers + dense("predictions", "head")


def _resnetv2(model: str) -> Layers:
    layers = conv("conv1_conv", "stem/conv1")
    for stage, depth in enumerate(resnetv2.DEPTHS[model], start=1):
        for block in range(depth):
            key, path = f"conv{stage + 1}_block{block + 1}", f"layer{stage}/block{block}"
            layers += norm(f"{key}_preact_bn", f"{path}/preact")
            for i in (1, 2):
                layers += conv(f"{key}_{i}_conv", f"{path}/conv{i}", bias=None)
                layers += norm(f"{key}_{i}_bn", f"{path}/conv{i}")
            if block == 0:
                layers += conv(f"{key}_0_conv", f"{path}/shortcut")
            layers += conv(f"{key}_3_conv", f"{path}/conv3")
    return layers + norm("post_bn", "norm/norm") + dense("predictions", "head")


_LAYERS: dict[str, Callable[[str], Layers]] = {
    **dict.fromkeys(("vgg16", "vgg19"), _vgg),
    **dict.fromkeys((name for name in resnet.VARIANTS if name.startswith("keras_")), _resnet),
    **dict.fromkeys(resnetv2.DEPTHS, _resnetv2),
}


@cache
def _by_key(model: str) -> dict[str, Layer]:
    """The layers by what their keys begin with: their class, counted from 0."""
    counts: Counter[str] = Counter()
    layers: dict[str, Layer] = {}
    for layer in _LAYERS[model](model):
        number = counts[layer.kind]
        counts[layer.kind] += 1
        key = f"{layer.kind}_{number}" if number else layer.kind
        layers[key] = layer._replace(name=layer.name or key)
    return layers


def layer_names(model: str) -> dict[str, str]:
    """What Keras calls each layer, by its key: ``{"conv2d_3": "block2_conv2"}``."""
    return {key: layer.name for key, layer in _by_key(model).items()}


def keras(model: str) -> Rules:
    """``conv2d_3/kernel``, ``batch_normalization/gamma``, ``dense/bias``."""
    return tuple(
        rule._replace(key=f"{key}/{rule.key}")
        for key, layer in _by_key(model).items()
        for rule in layer.rules
    )


_PREPROCESS = {"vgg16": CAFFE, "vgg19": CAFFE}
"""Where other layouts of the same network expect something else."""

LAYOUTS: dict[str, dict[str, Layout]] = {
    model: {"keras": Layout(keras, _PREPROCESS.get(model))} for model in _LAYERS
}
