"""Layer outputs of `keras.applications` as a reference for `tljax.pretrained.verify`."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tljax.models import Model
from tljax.pretrained.rules import Rules
from tljax.pretrained.tables.keras import normalization_weights
from tljax.runtime.errors import RequestError

Pixels = Float[np.ndarray, "batch height width 3"]
"""Preprocessed images."""

_CONVNEXTS = ("tiny", "small", "base", "large", "xlarge")

# Functions of keras.applications by the names of the models without their widths.
_APPLICATIONS = {
    "vgg16": "VGG16",
    "vgg19": "VGG19",
    "keras_inception_v3": "InceptionV3",
    "keras_xception": "Xception",
    "keras_mobilenetv1": "MobileNet",
    "tf_mobilenetv2": "MobileNetV2",
    "tf_mobilenetv3_large": "MobileNetV3Large",
    "tf_mobilenetv3_small": "MobileNetV3Small",
    **{f"convnext_{size}": f"ConvNeXt{size.title()}" for size in _CONVNEXTS},
    **{f"tf_efficientnet_b{i}": f"EfficientNetB{i}" for i in range(8)},
    **{f"tf_efficientnetv2_b{i}": f"EfficientNetV2B{i}" for i in range(4)},
    **{f"tf_efficientnetv2_{size}": f"EfficientNetV2{size.upper()}" for size in ("s", "m", "l")},
    **{f"keras_resnet{depth}": f"ResNet{depth}" for depth in (50, 101, 152)},
    **{f"keras_resnet{depth}v2": f"ResNet{depth}V2" for depth in (50, 101, 152)},
}


class Layer(NamedTuple):
    """A layer of a reference.

    Attributes:
        output: its output ``[batch, ...]``.
        activation: the activation that is part of the output, but a separate layer in tljax.
    """

    output: np.ndarray
    activation: Callable[[Any], Any]


@contextmanager
def load_errors(library: str, source: str | Path | None) -> Iterator[None]:
    """Turn the errors of a library that loads a network into a `RequestError` of one line."""
    try:
        yield
    except (OSError, ValueError, TypeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RequestError(f"{library} cannot load {source}: {reason}") from None


def application(model: Model, size: tuple[int, int], weights: Path | None) -> Any:
    """Build the model of `keras.applications` that returns logits, with the weights of a file.

    Args:
        model: the network in tljax.
        size: height and width of the images in pixels.
        weights: file for ``load_weights``; None for random weights.

    Raises:
        RequestError: keras is not installed, or cannot load the file.
    """
    keras = _keras()
    name, options = model.name, {}
    if match := re.fullmatch(r"(.*)_(\d{3})", model.name):
        name, options = match[1], {"alpha": int(match[2]) / 100}
    if any(part in name for part in ("mobilenetv3", "convnext", "efficientnetv2")):
        options["include_preprocessing"] = False
    with load_errors("keras", weights):
        network = getattr(keras.applications, _APPLICATIONS[name])(
            input_shape=(*size, 3),
            weights=weights,
            include_top=model.num_classes > 0,
            classes=model.num_classes,
            classifier_activation=None,
            **options,
        )
    for layer in network.layers:
        if type(layer).__name__ == "Normalization":  # see `tables.keras.with_normalization`
            layer.set_weights(list(normalization_weights(model).values()))
            layer.finalize_state()
    return network


def whole(path: Path) -> Any:
    """Load a whole Keras model from a file, without a final softmax or sigmoid.

    Raises:
        RequestError: keras is not installed, or cannot load the file.
    """
    keras = _keras()
    with load_errors("keras", path):
        network = keras.models.load_model(path, compile=False)
    # A softmax would hide differences of the logits.
    _weighted_layers(network)[-1].activation = keras.activations.linear
    return network


def _keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "jax")  # keras reads it when imported
    try:
        import keras  # noqa: PLC0415
    except ImportError:
        raise RequestError(
            "verifying needs a reference implementation: pip install keras"
        ) from None
    return keras


def _weighted_layers(network: Any) -> list[Any]:
    """Return the layers with weights, except for the preprocessing, in the table's order.

    Those of a `keras.Sequential` inside the network take its place.
    """
    return [
        inner
        for layer in network.layers
        for inner in (layer.layers if type(layer).__name__ == "Sequential" else (layer,))
        if inner.weights and type(inner).__name__ != "Normalization"
    ]


def tensors(rules: Rules, network: Any) -> dict[str, np.ndarray]:
    """Return the weights of a Keras model by the keys of a table.

    Raises:
        RequestError: the model has other weights than the table.
    """
    weights = [weight for layer in _weighted_layers(network) for weight in layer.get_weights()]
    nested = [layer.name for layer in _weighted_layers(network) if hasattr(layer, "layers")]
    if nested or len(weights) != len(rules):
        reason = f"contains the model '{nested[0]}'" if nested else "has another head"
        raise RequestError(
            f"only networks of keras.applications can be verified, but this one {reason}: verify "
            "the file of its base model"
        )
    return {rule.key: np.asarray(weight) for rule, weight in zip(rules, weights, strict=True)}


def outputs(rules: Rules, network: Any, pixels: Pixels) -> dict[str, Layer]:
    """Compute the outputs of all layers that have weights.

    Args:
        rules: key table of the network.
        network: Keras model.
        pixels: preprocessed images ``[batch, height, width, 3]``.

    Returns:
        The layers by their paths in tljax; the layer of a `ConvNorm` is its norm. Separable
        convolutions are left out, because Keras does not return the output between their halves,
        and so are the layers of models inside the network.
    """
    names = dict.fromkeys(rule.key.partition("/")[0] for rule in rules)
    layers = dict(zip(names, _weighted_layers(network), strict=True))
    by_path = {
        path.partition("/")[2].rpartition("/")[0]: layers[key.partition("/")[0]]
        for key, path, *_ in rules
    }
    by_path = {
        path: layer
        for path, layer in by_path.items()
        if type(layer).__name__ != "SeparableConv2D" and layer in network.layers
    }
    intermediate = _keras().Model(network.input, [layer.output for layer in by_path.values()])
    values = intermediate.predict(pixels, verbose=0)
    return {
        path: Layer(np.asarray(value), getattr(layer, "activation", lambda x: x))
        for (path, layer), value in zip(by_path.items(), values, strict=True)
    }
