"""Key tables of the networks in `keras.applications`.

A table lists the layers in the order of the Keras model, which is sorted by the distance from the
output. Weights are identified by this order (see `tljax.pretrained.formats.keras_file`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from tljax.models import (
    Model,
    convnext,
    efficientnet,
    inception,
    mobilenet,
    resnet,
    resnetv2,
    vgg,
    xception,
)
from tljax.models.depthwise import round_width
from tljax.pretrained.rules import Layout, Rule, Rules
from tljax.pretrained.tables import block_indices, depthwise
from tljax.runtime.preprocess import CAFFE_PREPROCESS, Preprocess


class Layer(NamedTuple):
    """A Keras layer with weights.

    Attributes:
        name: name in Keras; empty if Keras generates one. A layer of a model inside the network
            has the name of that model as a prefix: ``convnext_tiny_stem/convnext_tiny_stem_conv``.
        kind: class of the layer, a key of `tljax.pretrained.formats.keras_file.WEIGHTS`.
        rules: rules of the weights in Keras' order, with keys relative to the layer.
    """

    name: str
    kind: str
    rules: Rules


Layers = tuple[Layer, ...]


def _conv(name: str, path: str, *, bias: str | None = None) -> Layers:
    """Return a convolution; ``bias`` is the name of its bias in tljax, None for no bias."""
    rules = (Rule("kernel", f"params/{path}/kernel"),)
    if bias:
        rules += (Rule("bias", f"params/{path}/{bias}"),)
    return (Layer(name, "conv2d", rules),)


def _depthwise(name: str, path: str) -> Layers:
    """Return a depthwise convolution without bias; Keras' kernel is ``[k, k, channels, 1]``."""
    rule = Rule("kernel", f"params/{path}/kernel", _DEPTHWISE)
    return (Layer(name, "depthwise_conv2d", (rule,)),)


def _separable(name: str, path: str) -> Layers:
    """Return a separable convolution without bias."""
    rules = (
        Rule("depthwise_kernel", f"params/{path}/depthwise/kernel", _DEPTHWISE),
        Rule("pointwise_kernel", f"params/{path}/pointwise/kernel"),
    )
    return (Layer(name, "separable_conv2d", rules),)


def _norm(name: str, path: str, *, scale: bool = True) -> Layers:
    """Return a batch norm; ``scale`` tells whether it has a gamma."""
    rules = (
        Rule("gamma", f"params/{path}/scale"),
        Rule("beta", f"params/{path}/bias"),
        Rule("moving_mean", f"batch_stats/{path}/mean"),
        Rule("moving_variance", f"batch_stats/{path}/var"),
    )
    return (Layer(name, "batch_normalization", rules if scale else rules[1:]),)


def _layer_norm(name: str, path: str) -> Layers:
    """Return a layer norm."""
    rules = (Rule("gamma", f"params/{path}/scale"), Rule("beta", f"params/{path}/bias"))
    return (Layer(name, "layer_normalization", rules),)


def _conv_norm(conv: str, norm: str, path: str) -> Layers:
    """Return a convolution without bias and the batch norm that follows it."""
    return _conv(conv, path) + _norm(norm, path)


def _dense(name: str, path: str) -> Layers:
    """Return a fully connected layer."""
    rules = (Rule("kernel", f"params/{path}/kernel"), Rule("bias", f"params/{path}/bias"))
    return (Layer(name, "dense", rules),)


def _dense_as_conv(name: str, path: str, inputs: int) -> Layers:
    """Return a fully connected layer that Keras stores as a 1x1 convolution."""
    kernel = Rule("kernel", f"params/{path}/kernel", (), (1, 1, inputs, -1))
    return (Layer(name, "conv2d", (kernel, Rule("bias", f"params/{path}/bias"))),)


_DEPTHWISE = (0, 1, 3, 2)


def _vgg(model: str) -> Layers:
    layers: Layers = ()
    for block, i in block_indices(vgg.DEPTHS[model]):
        block_name, conv = f"block{block + 1}", f"conv{i + 1}"
        layers += _conv(f"{block_name}_{conv}", f"{block_name}/{conv}", bias="bias")
    hidden = _dense("fc1", "fc1/dense") + _dense("fc2", "fc2/dense")
    return layers + hidden + _dense("predictions", "head")


def _resnet(model: str) -> Layers:
    def unit(key: str, path: str) -> tuple[Layers, Layers]:
        return _conv(f"{key}_conv", path, bias="conv_bias"), _norm(f"{key}_bn", path)

    layers = sum(unit("conv1", "stem/conv1"), ())
    for stage, block in block_indices(resnet.VARIANTS[model].depths):
        key, path = f"conv{stage + 2}_block{block + 1}", f"layer{stage + 1}/block{block}"
        layers += sum(unit(f"{key}_1", f"{path}/conv1"), ())
        layers += sum(unit(f"{key}_2", f"{path}/conv2"), ())
        last_conv, last_norm = unit(f"{key}_3", f"{path}/conv3")
        shortcut = unit(f"{key}_0", f"{path}/shortcut") if block == 0 else ((), ())
        layers += shortcut[0] + last_conv + shortcut[1] + last_norm
    return layers + _dense("predictions", "head")


def _resnetv2(model: str) -> Layers:
    layers = _conv("conv1_conv", "stem/conv1", bias="bias")
    for stage, block in block_indices(resnetv2.DEPTHS[model]):
        key, path = f"conv{stage + 2}_block{block + 1}", f"layer{stage + 1}/block{block}"
        layers += _norm(f"{key}_preact_bn", f"{path}/preact")
        for i in (1, 2):
            layers += _conv_norm(f"{key}_{i}_conv", f"{key}_{i}_bn", f"{path}/conv{i}")
        if block == 0:
            layers += _conv(f"{key}_0_conv", f"{path}/shortcut", bias="bias")
        layers += _conv(f"{key}_3_conv", f"{path}/conv3", bias="bias")
    return layers + _norm("post_bn", "norm/norm") + _dense("predictions", "head")


def _inception(_: str) -> Layers:
    """Return the layers of Inception v3, whose names are all generated.

    Layers at the same distance from the output are in the order of the branches.
    """

    def unit(path: str) -> tuple[Layers, Layers]:
        return _conv("", path), _norm("", path, scale=False)

    layers: Layers = ()
    for name in ("conv1a", "conv2a", "conv2b", "conv3b", "conv4a"):
        layers += sum(unit(f"stem/{name}"), ())
    for stage, block in inception.BLOCKS.items():
        by_distance: list[tuple[int, Layers]] = []
        for branch in (*block.branches, (block.pool,)):
            distance = 0
            for step in reversed(branch):
                distance += len(step) > 1  # for the concatenation
                for convolution in step:
                    conv, norm = unit(f"{stage}/{convolution.name}")
                    # distance + 1 is the activation after the norm
                    by_distance += [(distance + 3, conv), (distance + 2, norm)]
                distance += 3
        for pair in sorted(by_distance, key=lambda pair: -pair[0]):
            layers += pair[1]
    return layers + _dense("predictions", "head")


def _xception(_: str) -> Layers:
    layers: Layers = ()
    for i in (1, 2):
        layers += _conv_norm(f"block1_conv{i}", f"block1_conv{i}_bn", f"stem/conv{i}")
    for number, (stage, (features, stride)) in enumerate(xception.BLOCKS.items(), start=2):
        for i in range(1, len(features) + 1):
            key, path = f"block{number}_sepconv{i}", f"{stage}/conv{i}"
            layers += _separable(key, path) + _norm(f"{key}_bn", f"{path}/pointwise")
        if stride > 1:
            layers += _conv_norm("", "", f"{stage}/shortcut")
    for i in (1, 2):
        key, path = f"block14_sepconv{i}", f"conv_head/conv{i}"
        layers += _separable(key, path) + _norm(f"{key}_bn", f"{path}/pointwise")
    return layers + _dense("predictions", "head")


def _mobilenet_v1(model: str) -> Layers:
    layers = _conv_norm("conv1", "conv1_bn", "stem/conv")
    blocks = block_indices(depth for depth, *_ in mobilenet.V1)
    for i, (stage, block) in enumerate(blocks, start=1):
        path = f"stage{stage + 1}/block{block}"
        layers += _depthwise(f"conv_dw_{i}", f"{path}/depthwise")
        layers += _norm(f"conv_dw_{i}_bn", f"{path}/depthwise")
        layers += _conv_norm(f"conv_pw_{i}", f"conv_pw_{i}_bn", f"{path}/pointwise")
    width = mobilenet.V1_VARIANTS[model].width
    return layers + _dense_as_conv("conv_preds", "head", int(1024 * width))


def _inverted_residuals(
    runs: tuple[mobilenet.Run, ...], name: Callable[[int], str], norm: str
) -> Layers:
    """Return the blocks of MobileNet v2 and v3.

    Args:
        runs: the stages.
        name: returns the prefix of the layer names, given the number of the block.
        norm: suffix of the names of norms.
    """
    layers: Layers = ()
    for i, (stage, block, expands) in enumerate(depthwise.blocks(runs)):
        key, path = name(i), f"stage{stage + 1}/block{block}"
        if expands:
            layers += _conv_norm(f"{key}_expand", f"{key}_expand{norm}", f"{path}/expand")
        layers += _depthwise(f"{key}_depthwise", f"{path}/depthwise")
        layers += _norm(f"{key}_depthwise{norm}", f"{path}/depthwise")
        if runs[stage].squeeze:
            inside, excite = f"{path}/squeeze_excite", f"{key}_squeeze_excite_conv"
            layers += _conv(excite, f"{inside}/reduce", bias="bias")
            layers += _conv(f"{excite}_1", f"{inside}/expand", bias="bias")
        layers += _conv_norm(f"{key}_project", f"{key}_project{norm}", f"{path}/project")
    return layers


def _mobilenet_v2(_: str) -> Layers:
    blocks = _inverted_residuals(
        mobilenet.V2, lambda i: f"block_{i}" if i else "expanded_conv", "_BN"
    )
    return (
        *_conv_norm("Conv1", "bn_Conv1", "stem/conv"),
        *blocks,
        *_conv_norm("Conv_1", "Conv_1_bn", "conv_head/conv"),
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
        *_conv_norm("conv", "conv_bn", "stem/conv"),
        *blocks,
        *_conv_norm("conv_1", "conv_1_bn", "conv_head/conv"),
        *_dense_as_conv("conv_2", "hidden/dense", last),
        *_dense_as_conv("logits", "head", hidden),
    )


def _convnext(model: str) -> Layers:
    """Return the layers of ConvNeXt; stem and downsampling are models of their own."""
    stem = f"{model}_stem/{model}_stem"
    layers = _conv(f"{stem}_conv", "stem/conv", bias="bias")
    layers += _layer_norm(f"{stem}_layernorm", "stem/norm")
    for stage, block in block_indices(convnext.VARIANTS[model].depths):
        if block == 0 < stage:
            number, path = stage - 1, f"stage{stage + 1}/downsample"
            inside = f"{model}_downsampling_block_{number}/{model}_downsampling"
            layers += _layer_norm(f"{inside}_layernorm_{number}", f"{path}/norm")
            layers += _conv(f"{inside}_conv_{number}", f"{path}/conv", bias="bias")
        key, path = f"{model}_stage_{stage}_block_{block}", f"stage{stage + 1}/block{block}"
        layers += _conv(f"{key}_depthwise_conv", f"{path}/depthwise", bias="bias")
        layers += _layer_norm(f"{key}_layernorm", f"{path}/norm")
        layers += _dense(f"{key}_pointwise_conv_1", f"{path}/fc1")
        layers += _dense(f"{key}_pointwise_conv_2", f"{path}/fc2")
        gamma = Rule("gamma", f"params/{path}/layer_scale/scale")
        layers += (Layer(f"{key}_layer_scale", "layer_scale", (gamma,)),)
    layers += _layer_norm(f"{model}_head_layernorm", "norm/norm")
    return layers + _dense(f"{model}_head_dense", "head")


def _efficientnet(model: str) -> Layers:
    """Return the layers of EfficientNet and EfficientNetV2: block 2, 1 is ``block2a``."""
    runs = efficientnet.runs(model)
    depthwise_name = "dwconv2" if "v2" in model else "dwconv"
    layers = _conv_norm("stem_conv", "stem_bn", "stem/conv")
    for stage, block, expands in depthwise.blocks(runs):
        key, path = f"block{stage + 1}{chr(ord('a') + block)}", f"stage{stage + 1}/block{block}"
        for unit in depthwise.units(runs[stage], expands=expands):
            if unit == "project" and runs[stage].squeeze:
                inside = f"{path}/squeeze_excite"
                layers += _conv(f"{key}_se_reduce", f"{inside}/reduce", bias="bias")
                layers += _conv(f"{key}_se_expand", f"{inside}/expand", bias="bias")
            if unit == "depthwise":
                layers += _depthwise(f"{key}_{depthwise_name}", f"{path}/depthwise")
                layers += _norm(f"{key}_bn", f"{path}/depthwise")
            else:
                name = "project" if unit == "conv" else unit
                layers += _conv_norm(f"{key}_{name}_conv", f"{key}_{name}_bn", f"{path}/{unit}")
    return (
        *layers,
        *_conv_norm("top_conv", "top_bn", "conv_head/conv"),
        *_dense("predictions", "head"),
    )


def _with_prefix(prefix: str, names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if name.startswith(prefix))


_LAYERS: dict[str, Callable[[str], Layers]] = {
    **dict.fromkeys(("vgg16", "vgg19"), _vgg),
    **dict.fromkeys(_with_prefix("keras_", resnet.VARIANTS), _resnet),
    **dict.fromkeys(resnetv2.DEPTHS, _resnetv2),
    **dict.fromkeys(_with_prefix("keras_", inception.VARIANTS), _inception),
    **dict.fromkeys(_with_prefix("keras_", xception.VARIANTS), _xception),
    **dict.fromkeys(_with_prefix("keras_", mobilenet.V1_VARIANTS), _mobilenet_v1),
    **dict.fromkeys(_with_prefix("tf_", mobilenet.V2_VARIANTS), _mobilenet_v2),
    **dict.fromkeys(_with_prefix("tf_", mobilenet.V3_VARIANTS), _mobilenet_v3),
    **dict.fromkeys(
        [f"convnext_{size}" for size in ("tiny", "small", "base", "large", "xlarge")], _convnext
    ),
    **dict.fromkeys(_with_prefix("tf_", efficientnet.VARIANTS), _efficientnet),
}


@cache
def _by_key(model: str) -> dict[str, Layer]:
    """Return the layers by the prefix of their keys: the class, numbered from 0.

    As in Keras' files, the layers of models inside the network have the first numbers.
    """
    layers, keys = _LAYERS[model](model), dict[int, str]()
    counts: Counter[str] = Counter()
    for i, layer in sorted(enumerate(layers), key=lambda item: "/" not in item[1].name):
        number = counts[layer.kind]
        counts[layer.kind] += 1
        keys[i] = f"{layer.kind}_{number}" if number else layer.kind
    return {keys[i]: layer._replace(name=layer.name or keys[i]) for i, layer in enumerate(layers)}


def layer_names(model: str) -> dict[str, str]:
    """Return the name of each layer in Keras by its key: ``{"conv2d_3": "block2_conv2"}``."""
    first = {_NORMALIZATION: _NORMALIZATION} if _is_normalized(model) else {}
    return first | {key: layer.name for key, layer in _by_key(model).items()}


def keras(model: str) -> Rules:
    """Return the key table of a model, with keys such as ``conv2d_3/kernel``."""
    return tuple(
        rule._replace(key=f"{key}/{rule.key}")
        for key, layer in _by_key(model).items()
        for rule in layer.rules
    )


_V2_SIZES = {"b0": 224, "b1": 240, "b2": 260, "b3": 300, "s": 384, "m": 480, "l": 480}
"""Image sizes of EfficientNetV2 in Keras, in pixels."""


def _efficientnet_v2_preprocess(model: str) -> Preprocess:
    """Return the preprocessing of EfficientNetV2, which scales [0, 255] by 1/128 in S, M and L."""
    size = model.rpartition("_")[2]
    own = efficientnet.VARIANTS[model].preprocess.with_size(_V2_SIZES[size])
    if size.startswith("b"):
        return own.with_normalization("torch")
    return replace(own, mean=(128 / 255,) * 3, std=(128 / 255,) * 3)


_PREPROCESS = {
    "vgg16": CAFFE_PREPROCESS,
    "vgg19": CAFFE_PREPROCESS,
    **{
        name: _efficientnet_v2_preprocess(name)
        for name in _with_prefix("tf_efficientnetv2", efficientnet.VARIANTS)
    },
}
"""Preprocessing of Keras' weights, where it differs from that of the model."""

_NORMALIZATION = "normalization"
"""The layer with which EfficientNet B0 to B7 begin; `Model.preprocess` holds its statistics."""


def _is_normalized(model: str) -> bool:
    return model.startswith("tf_efficientnet_b")


def read_normalization(
    arrays: Mapping[str, np.ndarray],
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and variance of the normalization layer in a file; None if there is none."""
    mean, variance = (arrays.get(f"{_NORMALIZATION}/{key}") for key in ("mean", "variance"))
    if mean is None or variance is None:
        return None
    return tuple(map(float, mean.ravel())), tuple(map(float, variance.ravel()))


def with_normalization(preprocess: Preprocess, arrays: Mapping[str, np.ndarray]) -> Preprocess:
    """Return the preprocessing with the statistics of the normalization layer in a weight file.

    In Keras' own files the variance is the standard deviation: the network for them divides by its
    root once more, in a layer without weights.
    """
    if (statistics := read_normalization(arrays)) is None:
        return preprocess
    mean, variance = map(np.asarray, statistics)
    std = variance if np.allclose(variance, Preprocess().std, atol=1e-6) else np.sqrt(variance)
    if np.allclose((mean, std), (preprocess.mean, preprocess.std), atol=1e-6):
        return preprocess
    return replace(preprocess, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def normalization_weights(model: Model) -> dict[str, np.ndarray]:
    """Return the weights of the normalization layer by key; none if a network begins without it."""
    if not _is_normalized(model.name):
        return {}
    mean, std = np.asarray((model.preprocess.mean, model.preprocess.std), np.float32)
    weights = {"mean": mean, "variance": std**2, "count": np.zeros((), np.int32)}
    return {f"{_NORMALIZATION}/{key}": array for key, array in weights.items()}


LAYOUTS: dict[str, dict[str, Layout]] = {
    model: {
        "keras": Layout(
            keras,
            _PREPROCESS.get(model),
            ignore=(f"{_NORMALIZATION}/",) if _is_normalized(model) else (),
        )
    }
    for model in _LAYERS
}
