"""Key tables of the networks in `keras.applications`.

A table lists the layers in the order in which a Keras model does, sorted by their distance from the
output: by that order their weights are found (see `keras_file`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import NamedTuple

from tljax.models import inception, mobilenet, resnet, resnetv2, vgg, xception
from tljax.models.depthwise import round_width
from tljax.pretrained.rules import Layout, Rule, Rules
from tljax.runtime.types import CAFFE


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


def _conv(name: str, path: str, *, bias: str | None = None) -> Layers:
    """A convolution. ``bias`` is what ours calls its bias: in a `ConvNorm`, ``conv_bias``."""
    rules = (Rule("kernel", f"params/{path}/kernel"),)
    if bias:
        rules += (Rule("bias", f"params/{path}/{bias}"),)
    return (Layer(name, "conv2d", rules),)


def _depthwise(name: str, path: str) -> Layers:
    """A depthwise convolution, without bias; Keras' kernel is ``[k, k, channels, 1]``."""
    rule = Rule("kernel", f"params/{path}/kernel", _DEPTHWISE)
    return (Layer(name, "depthwise_conv2d", (rule,)),)


def _separable(name: str, path: str) -> Layers:
    """A depthwise and a 1x1 convolution, without bias."""
    depthwise = Rule("depthwise_kernel", f"params/{path}/depthwise/kernel", _DEPTHWISE)
    pointwise = Rule("pointwise_kernel", f"params/{path}/pointwise/kernel")
    return (Layer(name, "separable_conv2d", (depthwise, pointwise)),)


def _norm(name: str, path: str, *, scale: bool = True) -> Layers:
    """A batch norm, of a `ConvNorm` or by itself."""
    rules = (
        Rule("gamma", f"params/{path}/scale"),
        Rule("beta", f"params/{path}/bias"),
        Rule("moving_mean", f"batch_stats/{path}/mean"),
        Rule("moving_variance", f"batch_stats/{path}/var"),
    )
    return (Layer(name, "batch_normalization", rules if scale else rules[1:]),)


def _dense(name: str, path: str) -> Layers:
    """A fully connected layer."""
    rules = (Rule("kernel", f"params/{path}/kernel"), Rule("bias", f"params/{path}/bias"))
    return (Layer(name, "dense", rules),)


def _dense_as_conv(name: str, path: str, inputs: int) -> Layers:
    """A fully connected layer that Keras keeps as a 1x1 convolution."""
    shape = (1, 1, inputs, -1)
    kernel = Rule("kernel", f"params/{path}/kernel", (), shape)
    return (Layer(name, "conv2d", (kernel, Rule("bias", f"params/{path}/bias"))),)


_DEPTHWISE = (0, 1, 3, 2)


def _vgg(model: str) -> Layers:
    layers: Layers = ()
    for block, depth in enumerate(vgg.DEPTHS[model], start=1):
        for i in range(1, depth + 1):
            layers += _conv(f"block{block}_conv{i}", f"block{block}/conv{i}", bias="bias")
    hidden = _dense("fc1", "fc1/dense") + _dense("fc2", "fc2/dense")
    return layers + hidden + _dense("predictions", "head")


def _resnet(model: str) -> Layers:
    def unit(key: str, path: str) -> tuple[Layers, Layers]:
        return _conv(f"{key}_conv", path, bias="conv_bias"), _norm(f"{key}_bn", path)

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
    return layers + _dense("predictions", "head")


def _resnetv2(model: str) -> Layers:
    layers = _conv("conv1_conv", "stem/conv1", bias="bias")
    for stage, depth in enumerate(resnetv2.DEPTHS[model], start=1):
        for block in range(depth):
            key, path = f"conv{stage + 1}_block{block + 1}", f"layer{stage}/block{block}"
            layers += _norm(f"{key}_preact_bn", f"{path}/preact")
            for i in (1, 2):
                layers += _conv(f"{key}_{i}_conv", f"{path}/conv{i}")
                layers += _norm(f"{key}_{i}_bn", f"{path}/conv{i}")
            if block == 0:
                layers += _conv(f"{key}_0_conv", f"{path}/shortcut", bias="bias")
            layers += _conv(f"{key}_3_conv", f"{path}/conv3", bias="bias")
    return layers + _norm("post_bn", "norm/norm") + _dense("predictions", "head")


def _inception(_: str) -> Layers:
    """Every name is automatic. What is as far from the output stands in the order of branches."""

    def unit(path: str) -> tuple[Layers, Layers]:
        return _conv("", path), _norm("", path, scale=False)

    layers: Layers = ()
    for name in ("conv1a", "conv2a", "conv2b", "conv3b", "conv4a"):
        layers += sum(unit(f"stem/{name}"), ())
    for stage, block in inception.BLOCKS.items():
        found: list[tuple[int, Layers]] = []
        for branch in (*block.branches, (block.pool,)):
            distance = 0
            for step in reversed(branch):
                distance += len(step) > 1  # concatenated
                for convolution in step:
                    conv, norm = unit(f"{stage}/{convolution.name}")
                    # an activation stands behind the norm
                    found += [(distance + 3, conv), (distance + 2, norm)]
                distance += 3
        for pair in sorted(found, key=lambda pair: -pair[0]):
            layers += pair[1]
    return layers + _dense("predictions", "head")


def _xception(_: str) -> Layers:
    layers: Layers = ()
    for i in (1, 2):
        layers += _conv(f"block1_conv{i}", f"stem/conv{i}")
        layers += _norm(f"block1_conv{i}_bn", f"stem/conv{i}")
    for number, (stage, (features, stride)) in enumerate(xception.BLOCKS.items(), start=2):
        for i in range(1, len(features) + 1):
            key, path = f"block{number}_sepconv{i}", f"{stage}/conv{i}"
            layers += _separable(key, path) + _norm(f"{key}_bn", f"{path}/pointwise")
        if stride > 1:
            layers += _conv("", f"{stage}/shortcut") + _norm("", f"{stage}/shortcut")
    for i in (1, 2):
        key, path = f"block14_sepconv{i}", f"conv_head/conv{i}"
        layers += _separable(key, path) + _norm(f"{key}_bn", f"{path}/pointwise")
    return layers + _dense("predictions", "head")


def _mobilenet_v1(model: str) -> Layers:
    layers = _conv("conv1", "stem/conv") + _norm("conv1_bn", "stem/conv")
    blocks = (
        f"stage{stage}/block{block}"
        for stage, (depth, *_) in enumerate(mobilenet.V1, start=1)
        for block in range(depth)
    )
    for i, path in enumerate(blocks, start=1):
        layers += _depthwise(f"conv_dw_{i}", f"{path}/depthwise")
        layers += _norm(f"conv_dw_{i}_bn", f"{path}/depthwise")
        layers += _conv(f"conv_pw_{i}", f"{path}/pointwise")
        layers += _norm(f"conv_pw_{i}_bn", f"{path}/pointwise")
    width = mobilenet.V1_VARIANTS[model].width
    return layers + _dense_as_conv("conv_preds", "head", int(1024 * width))


def _inverted_residuals(
    runs: tuple[mobilenet.Run, ...], name: Callable[[int], str], norm: str
) -> Layers:
    """The blocks of MobileNet v2 and v3.

    Args:
        runs: the stages.
        name: what the names of a block's layers begin with.
        norm: what those of its norms end with.
    """
    layers: Layers = ()
    blocks = (
        (f"stage{stage}/block{block}", run.squeeze, expansion)
        for stage, run in enumerate(runs, start=1)
        for block, expansion in enumerate(run.expansions)
    )
    for i, (path, squeeze, expansion) in enumerate(blocks):
        key = name(i)
        if expansion > 1:
            layers += _conv(f"{key}_expand", f"{path}/expand")
            layers += _norm(f"{key}_expand{norm}", f"{path}/expand")
        layers += _depthwise(f"{key}_depthwise", f"{path}/depthwise")
        layers += _norm(f"{key}_depthwise{norm}", f"{path}/depthwise")
        if squeeze:
            inside, excite = f"{path}/squeeze_excite", f"{key}_squeeze_excite_conv"
            layers += _conv(excite, f"{inside}/reduce", bias="bias")
            layers += _conv(f"{excite}_1", f"{inside}/expand", bias="bias")
        layers += _conv(f"{key}_project", f"{path}/project")
        layers += _norm(f"{key}_project{norm}", f"{path}/project")
    return layers


def _mobilenet_v2(_: str) -> Layers:
    blocks = _inverted_residuals(
        mobilenet.V2, lambda i: f"block_{i}" if i else "expanded_conv", "_BN"
    )
    return (
        *_conv("Conv1", "stem/conv"),
        *_norm("bn_Conv1", "stem/conv"),
        *blocks,
        *_conv("Conv_1", "conv_head/conv"),
        *_norm("Conv_1_bn", "conv_head/conv"),
        *_dense("predictions", "head"),
    )


def _mobilenet_v3(model: str) -> Layers:
    runs = mobilenet.V3_LARGE if "large" in model else mobilenet.V3_SMALL
    blocks = _inverted_residuals(
        runs, lambda i: f"expanded_conv_{i}" if i else "expanded_conv", "_bn"
    )
    width = mobilenet.V3_VARIANTS[model].width
    last = round_width(6 * round_width(runs[-1].features * width))
    hidden = 1280 if "large" in model else 1024
    return (
        *_conv("conv", "stem/conv"),
        *_norm("conv_bn", "stem/conv"),
        *blocks,
        *_conv("conv_1", "conv_head/conv"),
        *_norm("conv_1_bn", "conv_head/conv"),
        *_dense_as_conv("conv_2", "hidden/dense", last),
        *_dense_as_conv("logits", "head", hidden),
    )


def _of_keras(names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if name.startswith("keras_"))


_LAYERS: dict[str, Callable[[str], Layers]] = {
    **dict.fromkeys(("vgg16", "vgg19"), _vgg),
    **dict.fromkeys(_of_keras(resnet.VARIANTS), _resnet),
    **dict.fromkeys(resnetv2.DEPTHS, _resnetv2),
    **dict.fromkeys(_of_keras(inception.VARIANTS), _inception),
    **dict.fromkeys(_of_keras(xception.VARIANTS), _xception),
    **dict.fromkeys(_of_keras(mobilenet.V1_VARIANTS), _mobilenet_v1),
    **{name: _mobilenet_v2 for name in mobilenet.V2_VARIANTS if name.startswith("tf_")},
    **{name: _mobilenet_v3 for name in mobilenet.V3_VARIANTS if name.startswith("tf_")},
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
