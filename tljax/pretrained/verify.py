"""Is a port right? Layer by layer against the reference implementation, where one is installed.

torch and transformers (or torchvision), or keras, are needed for this and for nothing else.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tljax.models import Model, layer_outputs, normalize, replace_head
from tljax.pretrained import verify_keras
from tljax.pretrained.catalog import CATALOG
from tljax.pretrained.fetch import fetch
from tljax.pretrained.formats import read_tensors
from tljax.pretrained.keras_graph import Graph
from tljax.pretrained.load import Pretrained
from tljax.pretrained.rules import Rules, invert_rules
from tljax.pretrained.tables.layouts import LAYOUTS, bias_of_head, check, layout_rules, table
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Preprocess, Variables

TOLERANCE = 1e-4
"""Largest difference of a layer's output, relative to the largest value of the reference's."""

INPUTS = ((2, 224, 224, 3), (2, 225, 193, 3))
"""Shapes of the random images; odd and not square, since padding shows there first."""


class LayerDifference(NamedTuple):
    """How a layer differs from the reference's.

    Attributes:
        layer: its path, e.g. ``layer3/block0/conv2``.
        difference: largest absolute difference of the outputs over the largest absolute value of
            the reference's; infinite if the shapes differ.
        reason: what else is known: shapes, or tensors that differ in the file itself.
    """

    layer: str
    difference: float
    reason: str


def verify(pretrained: Pretrained, reference: str | None = None) -> list[LayerDifference]:
    """Compares every convolution (with its norm) and the head, in the order of the network.

    Args:
        pretrained: the port.
        reference: a folder or hub id that ``from_pretrained`` of transformers reads, or a file that
            ``load_weights`` of Keras reads; by default the one that the port was read from, or the
            torchvision network that its file fits.

    Raises:
        RequestError: no reference implementation is installed, or there is none for this network.
    """
    keras = pretrained.card.layout == "keras"
    if Path(reference).suffix in (".h5", ".keras") if reference else keras:
        compared = _with_keras(pretrained, reference)
    else:
        compared = _with_torch(pretrained, reference)
    worst: dict[str, LayerDifference] = {}
    for found in compared:
        if found.layer not in worst or found.difference > worst[found.layer].difference:
            worst[found.layer] = found
    return list(worst.values())


def _images(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def _with_torch(pretrained: Pretrained, reference: str | None) -> Iterator[LayerDifference]:
    network, layout = _reference(pretrained, reference)
    rules = table(pretrained.model, layout)
    tensors = {key: value.numpy() for key, value in network.state_dict().items()}
    model, variables = _with_outputs(pretrained, rules, tensors)
    wrong = _compare_tensors(rules, tensors, variables)
    for shape in INPUTS:
        images = _images(shape)
        theirs = _torch_outputs(network, rules, images, model.preprocess)
        for layer, value in layer_outputs(model, variables, images).items():
            yield _compare_layer(layer, np.asarray(value), theirs[layer], wrong.get(layer, ""))


def _with_keras(pretrained: Pretrained, reference: str | None) -> Iterator[LayerDifference]:
    model, _, card = pretrained
    if "keras" not in LAYOUTS[model.name]:
        raise RequestError(f"keras.applications has no {model.name}; leave --reference out")
    rules = table(model, "keras")
    for network, pixels, images in _keras_networks(model, _file(reference or card.source)):
        tensors = verify_keras.tensors(rules, network)
        model, variables = _with_outputs(pretrained, rules, tensors)
        wrong = _compare_tensors(rules, tensors, variables)
        theirs = verify_keras.outputs(rules, network, pixels)
        for layer, value in layer_outputs(model, variables, images).items():
            if layer in theirs:
                ours = np.asarray(theirs[layer].activation(value))
                expected = theirs[layer].output
                if expected.shape[1:3] == (1, 1):  # a vector, for Keras' MobileNets
                    ours, expected = ours.reshape(len(ours), -1), expected.reshape(len(ours), -1)
                yield _compare_layer(layer, ours, expected, wrong.get(layer, ""))


def _keras_networks(model: Model, weights: Path) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """A network, its input, and ours: of a whole model its own graph at its own size."""
    if graph := read_tensors(weights).metadata.get("keras"):
        network = verify_keras.whole(weights)
        images = _images((2, *(side or 97 for side in network.input_shape[1:3]), 3))
        scales = Graph(json.loads(graph), same=False).scaling != (1.0, 0.0)
        yield network, images.astype(np.float32) if scales else _pixels(model, images), images
        return
    # Only maps of 7x7 fit the hidden layers of Keras' VGG.
    shapes = ((2, 224, 224, 3), (2, 225, 253, 3)) if model.name.startswith("vgg") else INPUTS
    for images in map(_images, shapes):
        network = verify_keras.application(model, images.shape[1:3], weights)
        yield network, _pixels(model, images), images


def _pixels(model: Model, images: np.ndarray) -> np.ndarray:
    return np.asarray(normalize(images, model.preprocess))


def _with_outputs(
    pretrained: Pretrained, rules: Rules, theirs: Mapping[str, np.ndarray]
) -> tuple[Model, Variables]:
    """The port with a head of one output where the reference has one, of which we made two."""
    model, variables, _ = pretrained
    outputs = theirs[bias_of_head(rules)].size if model.num_classes else 0
    if outputs == model.num_classes or outputs != 1:
        return model, variables
    head = {k: x[..., 1:] - x[..., :1] for k, x in variables["params"]["head"].items()}
    model, _ = replace_head(model, variables, 1)
    return model, {**variables, "params": {**variables["params"], "head": head}}


def _file(source: str) -> Path:
    """What a port was read from."""
    return fetch(source) if source in CATALOG else Path(source)


def _layer(path: str) -> str:
    """``params/layer3/block0/conv2/scale`` is of ``layer3/block0/conv2``."""
    return path.partition("/")[2].rpartition("/")[0]


def _reference(pretrained: Pretrained, reference: str | None) -> tuple[Any, str]:
    """A torch module with the reference's own weights, and the layout of its keys."""
    model, _, card = pretrained
    known = "torchvision" in LAYOUTS[model.name]
    if reference is None and known and card.layout in ("torchvision", "timm"):
        return _torchvision(pretrained), "torchvision"
    if reference is None and card.layout != "huggingface":
        raise RequestError(
            f"there is no reference for {card.source} ({card.layout} keys): "
            "name one with --reference, a folder or hub id that transformers can load"
        )
    try:
        from transformers import AutoModelForImageClassification  # noqa: PLC0415 - see above
    except ImportError:
        raise RequestError(_MISSING) from None
    try:
        network = AutoModelForImageClassification.from_pretrained(reference or card.source)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RequestError(
            f"transformers cannot load {reference or card.source}: {reason}"
        ) from None
    keys = network.state_dict().keys()
    missing = [rule.key for rule in table(model, "huggingface") if rule.key not in keys]
    if missing:
        raise RequestError(
            f"the reference is not a {model.name}: it lacks {missing[0]} "
            f"and {len(missing) - 1} other tensors"
        )
    return network, "huggingface"


_MISSING = "verifying needs a reference implementation: pip install torch transformers"


def _torchvision(pretrained: Pretrained) -> Any:
    model, _, card = pretrained
    try:
        import torch  # noqa: PLC0415
        import torchvision  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError):  # torchvision beside a torch it was not built for
        raise RequestError(
            f"{card.source} has torchvision's keys and torchvision does not import here; "
            "name another --reference, a folder or hub id that transformers can load"
        ) from None
    arrays = check(read_tensors(_file(card.source)).arrays, card.source, model.name).arrays
    head = arrays.get(bias_of_head(layout_rules(model.name, "torchvision")))
    network = getattr(torchvision.models, model.name)(num_classes=1 if head is None else head.size)
    tensors = {key: torch.from_numpy(np.array(a)) for key, a in arrays.items()}
    network.load_state_dict(tensors, strict=head is not None)
    return network


def _compare_layer(layer: str, ours: np.ndarray, theirs: np.ndarray, wrong: str) -> LayerDifference:
    if ours.shape != theirs.shape:
        reason = f"output is {list(ours.shape)}, the reference's {list(theirs.shape)}: its stride?"
        return LayerDifference(layer, float("inf"), reason)
    difference = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-12)
    return LayerDifference(layer, float(difference), wrong)


def _compare_tensors(
    rules: Rules, theirs: Mapping[str, np.ndarray], variables: Variables
) -> dict[str, str]:
    """The parameters and statistics that are not the reference's own, by layer."""
    ours = invert_rules(rules, variables)
    wrong: dict[str, list[str]] = {}
    for key, path, *_ in rules:
        if ours[key].shape != theirs[key].shape or not np.array_equal(ours[key], theirs[key]):
            wrong.setdefault(_layer(path), []).append(path.rpartition("/")[2])
    return {layer: f"{' and '.join(names)} differ" for layer, names in wrong.items()}


def _torch_outputs(
    network: Any, rules: Rules, images: np.ndarray, preprocess: Preprocess
) -> dict[str, np.ndarray]:
    """The output of the torch module behind every layer of ours, NHWC, by our path."""
    import torch  # noqa: PLC0415 - a reference implementation, needed here alone

    modules, outputs = dict(network.named_modules()), {}

    def keep(layer: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if isinstance(module, torch.nn.GroupNorm):
                # BiT's holds its activation as well, which is not part of our layer.
                output = torch.nn.GroupNorm.forward(module, *inputs)
            value = output.numpy().copy()  # the reference adds its shortcuts in place
            outputs[layer] = value.transpose(0, 2, 3, 1) if value.ndim == 4 else value

        return hook

    # A table lists a convolution before its norm, so the last one is the end of a layer.
    ends = {
        _layer(path): key.rpartition(".")[0]
        for key, path, *_ in rules
        if path.endswith(("/kernel", "/scale"))
    }
    hooks = [modules[key].register_forward_hook(keep(layer)) for layer, key in ends.items()]
    pixels = np.asarray(normalize(images, preprocess)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        network.eval()(torch.from_numpy(np.ascontiguousarray(pixels)))
    for hook in hooks:
        hook.remove()
    return outputs
