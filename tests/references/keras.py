"""The networks of keras.applications, in Keras' own files."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from references.contract import Build, Reference
from tljax.models import resnet, resnetv2, vgg

FAST = ("keras_resnet50", "keras_resnet50v2")


class Application(NamedTuple):
    """A network of keras.applications.

    Attributes:
        build: the function there, with the options of the variant.
        stages: the layers whose outputs those of our stages are; ours by name, in order.
        weak: how the names of the layers end that close a residual branch.
        sizes: see `Reference`.
    """

    build: Callable[..., Any]
    stages: dict[str, str]
    weak: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ((128, 128), (129, 97))


def _vgg(name: str) -> Application:
    blocks = {f"block{i}": f"block{i}_pool" for i in range(1, 6)}
    hidden = {"pool": "flatten", "fc1": "fc1", "fc2": "fc2", "head": "predictions"}
    build = getattr(keras.applications, name.upper())
    # Only maps of 7x7 fit the hidden layers.
    return Application(build, blocks | hidden, sizes=((224, 224), (225, 253)))


def _resnet(name: str) -> Application:
    v2 = name.endswith("v2")
    depths = resnetv2.DEPTHS[name] if v2 else resnet.VARIANTS[name].depths
    layers = {f"layer{i}": f"conv{i + 1}_block{n}_out" for i, n in enumerate(depths, start=1)}
    norm = {"norm": "post_relu"} if v2 else {}
    build = getattr(keras.applications, name.replace("keras_resnet", "ResNet").replace("v2", "V2"))
    ends = {"pool": "avg_pool", "head": "predictions"}
    return Application(build, {"stem": "pool1_pool"} | layers | norm | ends, ("_3_conv", "_3_bn"))


APPLICATIONS = {
    **{name: _vgg(name) for name in vgg.DEPTHS if name in ("vgg16", "vgg19")},
    **{name: _resnet(name) for name in resnet.VARIANTS if name.startswith("keras_")},
    **{name: _resnet(name) for name in resnetv2.DEPTHS},
}


def network(name: str, size: tuple[int, int] = (224, 224), weights: Path | None = None) -> Any:
    """The Keras model for images of one size, with 7 classes, up to the logits."""
    return APPLICATIONS[name].build(
        input_shape=(*size, 3), weights=weights, classes=7, classifier_activation=None
    )


def randomize(model: Any, weak: tuple[str, ...]) -> None:
    """Random weights that keep activations of order 1; those in residual branches are small."""
    rng = np.random.default_rng(0)
    for layer in model.layers:
        scale = 0.2 if weak and layer.name.endswith(weak) else 1.0
        for weight in layer.weights:
            shape = weight.shape
            match weight.name:
                case "gamma":
                    value = scale * rng.uniform(0.5, 1.5, shape)
                case "moving_variance":
                    value = rng.uniform(0.5, 2, shape)
                case "beta" | "moving_mean" | "bias":
                    value = rng.normal(0, 0.2, shape)
                case _:
                    inputs = np.prod(shape[:-2] if shape[-1] == 1 else shape[:-1])
                    value = scale * rng.standard_normal(shape) * np.sqrt(2 / inputs)
            weight.assign(value.astype(np.float32))


def _stages(name: str, weights: Path, pixels: np.ndarray) -> dict[str, np.ndarray]:
    model = network(name, pixels.shape[1:3], weights)
    stages = APPLICATIONS[name].stages
    outputs = [model.get_layer(layer).output for layer in stages.values()]
    values = keras.Model(model.input, outputs)(pixels, training=False)
    return dict(zip(stages, map(np.asarray, values), strict=True))


def build(name: str, folder: Path) -> Reference:
    folder.mkdir(parents=True)
    application = APPLICATIONS[name]
    model = network(name, application.sizes[0])
    randomize(model, application.weak)
    model.save_weights(folder / "net.weights.h5")
    return Reference(
        folder / "net.weights.h5",
        partial(_stages, name, folder / "net.weights.h5"),
        application.sizes,
    )


REFERENCES: dict[tuple[str, str], Build] = {
    (name, "keras"): partial(build, name) for name in APPLICATIONS
}
