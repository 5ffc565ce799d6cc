"""The networks of keras.applications, in Keras' own files."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import keras
import numpy as np

from references.contract import Build, Reference
from tljax.models import efficientnet, inception, mobilenet, resnet, resnetv2, xception
from tljax.runtime.preprocess import NORMALIZATIONS

# Statistics of the layers with which EfficientNet B0 to B7 begin.
MEAN, STD = np.asarray((NORMALIZATIONS["torch"].mean, NORMALIZATIONS["torch"].std), np.float32)

RNG = np.random.default_rng(0)


def _draw(_: keras.initializers.VarianceScaling, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Draw Glorot's uniform weights by NumPy; by JAX, each shape is a program to compile."""
    limit = np.sqrt(6 / (np.prod(shape[:-2]) * sum(shape[-2:])))

    def draw() -> np.ndarray:
        return RNG.uniform(-limit, limit, shape).astype(dtype)

    return jax.pure_callback(draw, jax.ShapeDtypeStruct(shape, dtype))  # traced, it draws nothing


keras.initializers.VarianceScaling.__call__ = _draw  # pyright: ignore[reportAttributeAccessIssue]


class Application(NamedTuple):
    """A network of keras.applications.

    Attributes:
        build: the function there.
        stages: the layers whose outputs those of our stages are; ours by name, in order. One with
            an automatic name is given by its class and its place among those: ``Add:-1``; the one
            before a layer by ``<`` and that layer.
        weak: how the names of the layers end that close a residual branch.
        sizes: see `Reference`.
        options: of the variant.
    """

    build: Callable[..., Any]
    stages: dict[str, str]
    weak: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ((128, 128), (129, 97))
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


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


def _inception(_: str) -> Application:
    mixed = {stage: f"mixed{i}" for i, stage in enumerate(inception.BLOCKS)}
    stages = {"stem": "MaxPooling2D:1"} | mixed | {"pool": "avg_pool", "head": "predictions"}
    return Application(keras.applications.InceptionV3, stages)


def _xception(_: str) -> Application:
    blocks = {stage: f"Add:{i}" for i, stage in enumerate(xception.BLOCKS)}
    ends = {"conv_head": "block14_sepconv2_act", "pool": "avg_pool", "head": "predictions"}
    stages = {"stem": "block1_conv2_act"} | blocks | ends
    return Application(keras.applications.Xception, stages, ("_sepconv2_bn", "_sepconv3_bn"))


def _mobilenet_v1(name: str) -> Application:
    last = (1, 3, 5, 11, 13)
    stages = {f"stage{i}": f"conv_pw_{n}_relu" for i, n in enumerate(last, start=1)}
    ends = {"pool": "GlobalAveragePooling2D:0", "head": "predictions"}
    options = {"alpha": mobilenet.V1_VARIANTS[name].width}
    return Application(
        keras.applications.MobileNet, {"stem": "conv1_relu"} | stages | ends, options=options
    )


def _mobilenet_v2(name: str) -> Application:
    ends = ("expanded_conv_project_BN", *(f"block_{i}_add" for i in (2, 5, 9, 12, 15)))
    stages = {f"stage{i}": end for i, end in enumerate((*ends, "block_16_project_BN"), start=1)}
    head = {"conv_head": "out_relu", "pool": "GlobalAveragePooling2D:0", "head": "predictions"}
    options = {"alpha": mobilenet.V2_VARIANTS[name].width}
    return Application(
        keras.applications.MobileNetV2,
        {"stem": "Conv1_relu"} | stages | head,
        ("_project_BN",),
        options=options,
    )


def _mobilenet_v3(name: str) -> Application:
    if large := "large" in name:
        ends = ["_add", "_2_add", "_5_add", "_9_add", "_11_add", "_14_add"]
    else:
        ends = ["_project_bn", "_2_add", "_5_add", "_7_add", "_10_add"]
    stages = {f"stage{i}": f"expanded_conv{end}" for i, end in enumerate(ends, start=1)}
    head = {"conv_head": "Activation:-3", "pool": "GlobalAveragePooling2D:-1"}
    head |= {"hidden": "Activation:-2", "head": "predictions"}
    return Application(
        keras.applications.MobileNetV3Large if large else keras.applications.MobileNetV3Small,
        {"stem": "Activation:0"} | stages | head,
        ("_project_bn",),
        options={
            "alpha": mobilenet.V3_VARIANTS[name].width,
            "include_preprocessing": False,
        },
    )


def _convnext(name: str) -> Application:
    stem = {"stem": f"<{name}_stage_0_block_0_depthwise_conv"}
    blocks = {f"stage{i}": f"<{name}_downsampling_block_{i - 1}" for i in (1, 2, 3)}
    head = {"stage4": f"<{name}_head_gap", "pool": f"{name}_head_gap"}
    head |= {"norm": f"{name}_head_layernorm", "head": f"{name}_head_dense"}
    return Application(
        getattr(keras.applications, f"ConvNeXt{name.partition('_')[2].title()}"),
        stem | blocks | head,
        ("_layer_scale",),
        sizes=((128, 128), (151, 109)),  # odd maps before each downsampling
        options={"include_preprocessing": False},
    )


def _efficientnet(name: str) -> Application:
    v2 = "v2" in name
    runs = efficientnet.runs(name)
    stages = {}
    for i, run in enumerate(runs, start=1):
        last = len(run.expansions) - 1
        end = "add" if last else "project_activation" if run.fused else "project_bn"
        stages[f"stage{i}"] = f"block{i}{chr(ord('a') + last)}_{end}"
    ends = {"conv_head": "top_activation", "pool": "avg_pool", "head": "predictions"}
    size = name.rpartition("_")[2].upper()
    return Application(
        getattr(keras.applications, f"EfficientNetV2{size}" if v2 else f"EfficientNet{size}"),
        {"stem": "stem_activation"} | stages | ends,
        ("project_bn",),
        options={"include_preprocessing": False} if v2 else {},
    )


def _of_keras(names: Iterable[str], prefix: str = "keras_") -> Iterator[str]:
    return (name for name in names if name.startswith(prefix))


APPLICATIONS = {
    **{name: _vgg(name) for name in ("vgg16", "vgg19")},
    **{name: _resnet(name) for name in _of_keras(resnet.VARIANTS)},
    **{name: _resnet(name) for name in resnetv2.DEPTHS},
    **{name: _inception(name) for name in _of_keras(inception.VARIANTS)},
    **{name: _xception(name) for name in _of_keras(xception.VARIANTS)},
    **{name: _mobilenet_v1(name) for name in _of_keras(mobilenet.V1_VARIANTS)},
    **{name: _mobilenet_v2(name) for name in _of_keras(mobilenet.V2_VARIANTS, "tf_")},
    **{name: _mobilenet_v3(name) for name in _of_keras(mobilenet.V3_VARIANTS, "tf_")},
    **{name: _convnext(name) for name in ("convnext_tiny", "convnext_small", "convnext_base")},
    **{name: _efficientnet(name) for name in _of_keras(efficientnet.VARIANTS, "tf_")},
}


def network(name: str, size: tuple[int, int] = (224, 224), weights: Path | None = None) -> Any:
    """Build the Keras model for images of one size, with 7 classes, up to the logits."""
    build, *_, options = APPLICATIONS[name]
    return build(
        input_shape=(*size, 3), weights=weights, classes=7, classifier_activation=None, **options
    )


def _output(model: Any, name: str) -> Any:
    """Return the output of a layer, given as in `Application`."""
    kind, _, place = name.partition(":")
    if place:
        return [layer for layer in model.layers if type(layer).__name__ == kind][int(place)].output
    if name.startswith("<"):  # `input` is not that in the network if the layer is a model
        return model.get_layer(name[1:])._inbound_nodes[-1].input_tensors[0]
    return model.get_layer(name).output


def randomize(model: Any, weak: tuple[str, ...]) -> None:
    """Random weights that keep activations of order 1; those in residual branches are small."""
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization) and layer.weights:
            layer.set_weights([MEAN, STD**2, np.zeros((), np.int32)])
            continue
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


def inputs(model: Any, pixels: np.ndarray) -> np.ndarray:
    """Undo the normalization of pixels, for networks that begin with it."""
    if any(isinstance(layer, keras.layers.Normalization) for layer in model.layers):
        return (pixels * STD + MEAN) * 255
    return pixels


def _stages(name: str, weights: Path, pixels: np.ndarray) -> dict[str, np.ndarray]:
    model = network(name, pixels.shape[1:3], weights)
    stages = APPLICATIONS[name].stages
    outputs = [_output(model, layer) for layer in stages.values()]
    values = keras.Model(model.input, outputs).predict(inputs(model, pixels), verbose=0)
    arrays = dict(zip(stages, map(np.asarray, values), strict=True))
    # MobileNet keeps its vectors as maps of one pixel.
    vectors = {"pool": arrays["pool"], "hidden": arrays.get("hidden", arrays["pool"])}
    vectors = {stage: v.reshape(len(v), -1) for stage, v in vectors.items() if stage in arrays}
    return arrays | vectors


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
