"""Layer-by-layer comparison of a loaded network with its reference implementation.

Needs torch and transformers (or torchvision), or keras; nothing else in tljax does.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from tljax.models import Model, layer_outputs, normalize, replace_head
from tljax.pretrained import verify_keras
from tljax.pretrained.catalog import CATALOG, TORCHVISION_NAMES
from tljax.pretrained.fetch import fetch
from tljax.pretrained.formats import read_tensors
from tljax.pretrained.keras_graph import Graph
from tljax.pretrained.network import Pretrained
from tljax.pretrained.rules import Rules, invert_rules
from tljax.pretrained.tables.layouts import LAYOUTS, head_bias_key, layout_rules, table
from tljax.pretrained.unwrap import check
from tljax.pretrained.verify_keras import Layer, Pixels, load_errors
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array, Variables

TOLERANCE = 1e-4
"""Largest accepted difference of a layer's output, relative to the largest absolute reference."""

INPUTS = ((2, 224, 224, 3), (2, 225, 193, 3))
"""Shapes of the random images; one is odd and not square, to detect wrong padding."""


class LayerDifference(NamedTuple):
    """Difference of a layer from the reference.

    Attributes:
        layer: path of the layer, e.g. ``layer3/block0/conv2``.
        difference: largest absolute difference of the outputs, relative to the largest absolute
            output of the reference; infinite if the shapes differ.
        reason: output shapes, or the layer's tensors, if these differ; otherwise empty.
    """

    layer: str
    difference: float
    reason: str


def verify(pretrained: Pretrained, reference: str | None = None) -> list[LayerDifference]:
    """Compare the outputs of all layers with those of the reference, on random images.

    Args:
        pretrained: the loaded network.
        reference: folder or hub id for ``from_pretrained`` of transformers, or a file for
            ``load_weights`` of Keras. None means the source of the network, or torchvision's
            network for a file with torchvision's keys.

    Returns:
        The largest difference of every convolution (with its norm) and of the head, in the order of
        the network.

    Raises:
        RequestError: the reference implementation is not installed, or there is none for this
            network.
    """
    is_keras = pretrained.card.layout == "keras"
    if reference:
        is_keras = Path(reference).suffix in (".h5", ".keras")
    runs = _keras_runs(pretrained, reference) if is_keras else _torch_runs(pretrained, reference)
    largest: dict[str, LayerDifference] = {}
    for rules, tensors, images, expected in runs:
        model, variables = _match_outputs(pretrained, rules, tensors)
        reasons = _compare_tensors(rules, tensors, variables)
        for layer, output in layer_outputs(model, variables, images).items():
            if layer not in expected and is_keras:
                continue  # see `verify_keras.outputs`
            difference = _compare_layer(layer, output, expected[layer], reasons.get(layer, ""))
            if layer not in largest or difference.difference > largest[layer].difference:
                largest[layer] = difference
    return list(largest.values())


_Run = tuple[Rules, Mapping[str, np.ndarray], np.ndarray, Mapping[str, Layer]]
"""One pass through the reference: its key table, its tensors by key, the images before
preprocessing, and its layers by their paths in tljax."""


def _images(shape: tuple[int, ...]) -> UInt8[np.ndarray, "batch height width channels"]:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def _torch_runs(pretrained: Pretrained, reference: str | None) -> Iterator[_Run]:
    network, layout = _reference(pretrained, reference)
    rules = table(pretrained.model, layout)
    tensors = {key: value.numpy() for key, value in network.state_dict().items()}
    for shape in INPUTS:
        images = _images((*shape[:3], pretrained.model.preprocess.channels))
        outputs = _torch_outputs(network, rules, _pixels(pretrained.model, images))
        yield rules, tensors, images, outputs


def _keras_runs(pretrained: Pretrained, reference: str | None) -> Iterator[_Run]:
    model, _, card = pretrained
    if "keras" not in LAYOUTS[model.name]:
        raise RequestError(f"keras.applications has no {model.name}; leave --reference out")
    rules = table(model, "keras")
    for network, pixels, images in _keras_networks(model, _file(reference or card.source)):
        tensors = verify_keras.tensors(rules, network)
        yield rules, tensors, images, verify_keras.outputs(rules, network, pixels)


def _keras_networks(model: Model, weights: Path) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """Yield Keras networks, their inputs and tljax's; a whole model gets images of its own size."""
    if graph := read_tensors(weights).metadata.get("keras"):
        network = verify_keras.whole(weights)
        images = _images((2, *(side or 97 for side in network.input_shape[1:3]), 3))
        scales = Graph(json.loads(graph), same=False).scales_pixels
        yield network, images.astype(np.float32) if scales else _pixels(model, images), images
        return
    # The hidden layers of Keras' VGG require 7x7 feature maps.
    shapes = ((2, 224, 224, 3), (2, 225, 253, 3)) if model.name.startswith("vgg") else INPUTS
    for images in map(_images, shapes):
        network = verify_keras.application(model, images.shape[1:3], weights)
        scales = any(type(layer).__name__ == "Normalization" for layer in network.layers)
        yield network, images.astype(np.float32) if scales else _pixels(model, images), images


def _pixels(model: Model, images: UInt8[np.ndarray, "batch height width channels"]) -> Pixels:
    return np.asarray(normalize(images, model.preprocess))


def _match_outputs(
    pretrained: Pretrained, rules: Rules, tensors: Mapping[str, np.ndarray]
) -> tuple[Model, Variables]:
    """Return the network with the reference's single output if loading turned that into two."""
    model, variables, _ = pretrained
    outputs = tensors[head_bias_key(rules)].size if model.num_classes else 0
    if outputs == model.num_classes or outputs != 1:
        return model, variables
    head = {k: x[..., 1:] - x[..., :1] for k, x in variables["params"]["head"].items()}
    model, _ = replace_head(model, variables, 1)
    return model, {**variables, "params": {**variables["params"], "head": head}}


def _file(source: str) -> Path:
    """Return the file of a catalog name or path."""
    return fetch(source) if source in CATALOG else Path(source)


def _layer(path: str) -> str:
    """Return the layer of a variable: ``layer3/block0/conv2`` of ``params/.../conv2/scale``."""
    return path.partition("/")[2].rpartition("/")[0]


def _reference(pretrained: Pretrained, reference: str | None) -> tuple[Any, str]:
    """Return a torch module with its own weights, and the layout of its keys."""
    model, _, card = pretrained
    # A layer of torchvision's transformers has no output of its own to compare with.
    has_tokens = any(stage.output == "tokens" for stage in model.stages)
    layouts = {} if has_tokens else LAYOUTS[model.name]
    torchvision = layouts.get("torchvision")
    own = layouts.get(card.layout)
    if reference is None and torchvision and own and own.table is torchvision.table:
        return _torchvision(pretrained), "torchvision"
    if reference is None and card.layout != "huggingface":
        raise RequestError(
            f"there is no reference for {card.source} ({card.layout} keys): "
            "pass --reference, a folder or hub id that transformers can load"
        )
    try:
        from transformers import AutoModelForImageClassification  # noqa: PLC0415 - see above
    except ImportError:
        raise RequestError(
            "verifying needs a reference implementation: pip install torch transformers"
        ) from None
    with load_errors("transformers", reference or card.source):
        network = AutoModelForImageClassification.from_pretrained(reference or card.source)
    keys = network.state_dict().keys()
    missing = [rule.key for rule in table(model, "huggingface") if rule.key not in keys]
    if missing:
        raise RequestError(
            f"the reference is not a {model.name}: it lacks {missing[0]} "
            f"and {len(missing) - 1} other tensors; pass another --reference"
        )
    return network, "huggingface"


def _torchvision(pretrained: Pretrained) -> Any:
    model, _, card = pretrained
    try:
        import torch  # noqa: PLC0415
        import torchvision  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError):  # RuntimeError: built for another version of torch
        raise RequestError(
            f"{card.source} has torchvision's keys, but torchvision cannot be imported; "
            "pass another --reference, a folder or hub id that transformers can load"
        ) from None
    arrays = check(read_tensors(_file(card.source)).arrays, card.source, model.name).arrays
    head = arrays.get(head_bias_key(layout_rules(model.name, "torchvision")))
    names = {ours: theirs for theirs, ours in TORCHVISION_NAMES.items()}
    build = getattr(torchvision.models, names.get(model.name, model.name))
    network = build(num_classes=1 if head is None else head.size)
    tensors = {key: torch.from_numpy(np.array(a)) for key, a in arrays.items()}
    network.load_state_dict(tensors, strict=head is not None)
    return network


def _compare_layer(layer: str, output: Array, reference: Layer, reason: str) -> LayerDifference:
    expected, actual = reference.output, np.asarray(reference.activation(output))
    if expected.shape[1:3] == (1, 1):  # Keras' MobileNets keep a vector as a 1x1 map
        expected, actual = (x.reshape(len(x), -1) for x in (expected, actual))
    if actual.shape != expected.shape:
        shapes = f"output is {list(actual.shape)}, the reference's {list(expected.shape)}"
        return LayerDifference(layer, float("inf"), f"{shapes}: another stride?")
    difference = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-12)
    return LayerDifference(layer, float(difference), reason)


def _compare_tensors(
    rules: Rules, expected: Mapping[str, np.ndarray], variables: Variables
) -> dict[str, str]:
    """Return a text that names the variables that differ from the reference's, by layer."""
    actual = invert_rules(rules, variables)
    different: dict[str, list[str]] = {}
    for key, path, *_ in rules:
        if not np.array_equal(actual[key], expected[key]):
            different.setdefault(_layer(path), []).append(path.rpartition("/")[2])
    return {layer: f"{' and '.join(names)} differ" for layer, names in different.items()}


def _torch_outputs(network: Any, rules: Rules, pixels: Pixels) -> dict[str, Layer]:
    """Compute the outputs of a torch module, NHWC, by the paths of the layers in tljax."""
    import torch  # noqa: PLC0415 - optional

    modules, outputs = dict(network.named_modules()), {}

    def store_output(layer: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if isinstance(module, torch.nn.GroupNorm):
                # BiT's norm applies its activation as well, which is a separate layer in tljax.
                output = torch.nn.GroupNorm.forward(module, *inputs)
            value = output.numpy().copy()  # shortcuts are added in place
            if value.ndim == 4 and not _is_channels_last(module):
                value = value.transpose(0, 2, 3, 1)
            outputs[layer] = Layer(value, lambda x: x)

        return hook

    # A table lists a convolution before its norm: the last key of a path is the layer's output.
    ends = {
        _layer(path): key.rpartition(".")[0]
        for key, path, *_ in rules
        if path.endswith(("/kernel", "/scale"))
    }
    hooks = [modules[key].register_forward_hook(store_output(layer)) for layer, key in ends.items()]
    with torch.no_grad():
        network.eval()(torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))))
    for hook in hooks:
        hook.remove()
    return outputs


def _is_channels_last(module: Any) -> bool:
    """Return True for a torch module whose outputs are NHWC: ConvNeXt has some."""
    import torch  # noqa: PLC0415 - optional

    if not isinstance(module, torch.nn.LayerNorm):
        return isinstance(module, torch.nn.Linear)
    is_first = getattr(module, "data_format", "") == "channels_first"
    return not is_first and type(module).__name__ != "LayerNorm2d"
