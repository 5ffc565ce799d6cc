"""What `keras.applications` makes of a port's file, layer by layer. Needs keras."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tljax.models import Model
from tljax.pretrained.rules import Rules
from tljax.runtime.errors import RequestError

_APPLICATIONS = {
    "vgg16": "VGG16",
    "vgg19": "VGG19",
    "keras_inception_v3": "InceptionV3",
    "keras_xception": "Xception",
    "keras_mobilenetv1": "MobileNet",
    "tf_mobilenetv2": "MobileNetV2",
    "tf_mobilenetv3_large": "MobileNetV3Large",
    "tf_mobilenetv3_small": "MobileNetV3Small",
    **{f"keras_resnet{depth}": f"ResNet{depth}" for depth in (50, 101, 152)},
    **{f"keras_resnet{depth}v2": f"ResNet{depth}V2" for depth in (50, 101, 152)},
}


class Layer(NamedTuple):
    """The output of a layer of Keras, and what stands behind the layer of ours to get there."""

    output: np.ndarray
    activation: Callable[[Any], Any]


def application(model: Model, size: tuple[int, int], weights: Path | None) -> Any:
    """The Keras model for images of one size, up to the logits.

    Raises:
        RequestError: keras is not installed, or cannot load the file.
    """
    keras = _keras()
    name, width = model.name, {}
    if found := re.fullmatch(r"(.*)_(\d{3})", model.name):
        name, width = found[1], {"alpha": int(found[2]) / 100}
    if "mobilenetv3" in name:
        width["include_preprocessing"] = False
    try:
        return getattr(keras.applications, _APPLICATIONS[name])(
            input_shape=(*size, 3),
            weights=weights,
            include_top=model.num_classes > 0,
            classes=model.num_classes,
            classifier_activation=None,
            **width,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RequestError(f"keras cannot load {weights}: {reason}") from None


def whole(path: Path) -> Any:
    """The Keras model that a file holds, graph and all, up to the logits.

    Raises:
        RequestError: keras is not installed, or cannot load the file.
    """
    try:
        network = _keras().models.load_model(path, compile=False)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RequestError(f"keras cannot load {path}: {reason}") from None
    _weighted(network)[-1].activation = _keras().activations.linear  # a softmax hides differences
    return network


def _keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "jax")  # it is read when keras is imported
    try:
        import keras  # noqa: PLC0415
    except ImportError:
        raise RequestError(
            "verifying needs a reference implementation: pip install keras"
        ) from None
    return keras


def _weighted(network: Any) -> list[Any]:
    """The layers in the order of our table."""
    return [layer for layer in network.layers if layer.weights]


def tensors(rules: Rules, network: Any) -> dict[str, np.ndarray]:
    """The weights in Keras' memory, by our keys.

    Raises:
        RequestError: they are not one for one those of the table.
    """
    weights = network.get_weights()
    nested = next((layer.name for layer in _weighted(network) if hasattr(layer, "layers")), None)
    if nested or len(weights) != len(rules):
        what = f"'{nested}' is a model within it" if nested else "its head is another one"
        raise RequestError(
            f"only a network as keras.applications builds it can be verified, and {what}: verify "
            "the file of its base model"
        )
    return {rule.key: np.asarray(weight) for rule, weight in zip(rules, weights, strict=True)}


def outputs(rules: Rules, network: Any, pixels: np.ndarray) -> dict[str, Layer]:
    """The output of every layer that has weights, by our path; of a `ConvNorm`, its norm's."""
    names = dict.fromkeys(rule.key.partition("/")[0] for rule in rules)
    layers = dict(zip(names, _weighted(network), strict=True))
    of_path = {
        path.partition("/")[2].rpartition("/")[0]: layers[key.partition("/")[0]]
        for key, path, *_ in rules
    }
    # A separable convolution gives no output between its halves.
    of_path = {
        path: layer for path, layer in of_path.items() if type(layer).__name__ != "SeparableConv2D"
    }
    intermediate = _keras().Model(network.input, [layer.output for layer in of_path.values()])
    values = intermediate.predict(pixels, verbose=0)
    return {
        path: Layer(np.asarray(value), getattr(layer, "activation", lambda x: x))
        for (path, layer), value in zip(of_path.items(), values, strict=True)
    }
