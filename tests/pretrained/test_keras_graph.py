"""Graphs of whole Keras models: loaded with the same outputs, or refused with the layer's name."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import keras
import numpy as np
import pytest
from networks import difference, random_images, run
from references.keras import APPLICATIONS, network, randomize

from tljax.models import build_model
from tljax.pretrained import load_pretrained
from tljax.pretrained.keras_graph import Graph, _graphs, read_graph
from tljax.pretrained.verify import TOLERANCE, verify
from tljax.runtime.errors import RequestError
from tljax.runtime.settings import Kind

layers = keras.layers
IMAGES = random_images(3, 32, 32)
NAME = "tf_mobilenetv2_035"


def build(
    head: Callable[[Any], Any], before: Callable[[Any], Any] = lambda image: image, **options: Any
) -> Any:
    """Build MobileNet v2 of width 0.35 with a head, without nested models."""
    image = keras.Input((32, 32, 3))
    base = keras.applications.MobileNetV2(
        weights=None,  # pyright: ignore[reportArgumentType]
        include_top=False,
        alpha=0.35,
        input_tensor=before(image),
        **options,
    )
    model = keras.Model(base.input, head(base.output))
    randomize(model, ("_project_BN",))
    return model


def pooled(head: Any) -> Callable[[Any], Any]:
    return lambda x: head(layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(x)))


def preprocessed(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / 127.5 - 1


# --- supported graphs ----------------------------------------------------------------------------


def inverted(image: Any) -> Any:
    return layers.Normalization(mean=1.0, variance=2.0, invert=True)(image)


def augmented(image: Any) -> Any:
    """Augment and scale images, with two layers that scale."""
    image = layers.Rescaling(1 / 255, offset=0.1)(layers.RandomFlip()(image))
    return keras.applications.mobilenet_v2.preprocess_input(image * 255)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("make", "pixels", "form"),
    [
        pytest.param(
            lambda: build(pooled(layers.Dense(5))), preprocessed(IMAGES), "keras",
            id="linear", marks=SLOW,
        ),
        pytest.param(
            lambda: build(pooled(layers.Dense(5)), augmented), IMAGES.astype(np.float32), "keras",
            id="scaled",
        ),
        pytest.param(
            lambda: build(pooled(layers.Dense(1, "sigmoid"))), preprocessed(IMAGES), "h5",
            id="one output", marks=SLOW,
        ),
        pytest.param(
            lambda: build(lambda x: layers.Softmax()(pooled(layers.Dense(5))(x))),
            preprocessed(IMAGES), "keras",
            id="softmax as a layer", marks=SLOW,
        ),
    ],
)  # fmt: skip
def test_probabilities_are_those_of_keras(
    tmp_path: Path, make: Callable[[], Any], pixels: np.ndarray, form: str
) -> None:
    model = make()
    model.save(tmp_path / f"x.{form}")
    loaded = load_pretrained(tmp_path / f"x.{form}")
    assert (loaded.model.name, loaded.model.preprocess.size) == (NAME, 32)
    logits = run(loaded.model, loaded.variables, IMAGES).logits
    expected = model.predict(pixels, verbose=0)
    if expected.shape[1] == 1:
        expected, logits = np.concatenate([1 - expected, expected], 1), jax.nn.softmax(logits)
        assert loaded.card.classes == ("class 0", "class 1")
        assert "sigmoid logit of 'class 1'" in loaded.card.notes[0]
    elif model.layers[-1].name.startswith("softmax"):
        logits = jax.nn.softmax(logits)
    assert difference(logits, expected) <= 1e-4
    compared = verify(loaded)
    assert len(compared) == 53
    assert max(layer.difference for layer in compared) <= TOLERANCE


def test_a_normalization_of_the_image_becomes_the_preprocessing() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    layer = layers.Normalization(
        mean=[255 * x for x in mean], variance=[(255 * x) ** 2 for x in std]
    )
    text = build(pooled(layers.Dense(5)), layer).to_json()
    model, scales, _ = read_graph(text, "x.keras", build_model(NAME, 5))
    assert scales
    np.testing.assert_allclose((model.preprocess.mean, model.preprocess.std), (mean, std))


def test_pixel_scaling_in_the_graph_becomes_the_preprocessing(tmp_path: Path) -> None:
    build(pooled(layers.Dense(5)), layers.Rescaling(1 / 255)).save(tmp_path / "x.keras")
    preprocess = load_pretrained(tmp_path / "x.keras").model.preprocess
    np.testing.assert_allclose((preprocess.mean, preprocess.std), ((0, 0, 0), (1, 1, 1)))
    layer = layers.Normalization(mean=(0.5, 0.4, 0.3), variance=(0.25, 0.16, 0.09))
    build(pooled(layers.Dense(5)), lambda x: layer(layers.Rescaling(1 / 255)(x))).save(
        tmp_path / "y.keras"
    )
    preprocess = load_pretrained(tmp_path / "y.keras").model.preprocess
    expected = (0.5, 0.4, 0.3), (0.5, 0.4, 0.3)
    np.testing.assert_allclose((preprocess.mean, preprocess.std), expected, rtol=1e-6)
    with pytest.raises(
        RequestError, match="with mean 0 0 0 and std 1 1 1, not the normalization 'tf'"
    ):
        load_pretrained(tmp_path / "x.keras", normalization="tf")


# --- unsupported graphs --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads(build(pooled(layers.Dense(5, "softmax"))).to_json())


def error_of(config: object, classes: int = 5) -> str:
    text = config if isinstance(config, str) else json.dumps(config)
    with pytest.raises(RequestError) as caught:
        read_graph(text, "x.keras", build_model(NAME, classes))
    message = str(caught.value)
    assert message.startswith("x.keras: ")
    assert "; tljax does not support that; a file of weights alone (Keras' save_weights)" in message
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize(
    ("layer", "changes", "message"),
    [
        ("Conv1_relu", {"max_value": 8.0}, "is ReLU(max_value=8), but NAME has relu6"),
        ("Conv1_relu", {"max_value": None}, "is relu, but"),
        ("block_3_expand_relu", {"negative_slope": 0.1}, "ReLU(max_value=6, negative_slope=0.1)"),
        ("bn_Conv1", {"epsilon": 0.01}, "is BatchNormalization(epsilon=0.01), but"),
        ("bn_Conv1", {"axis": 1}, "BatchNormalization(axis=1, epsilon=0.001)"),
        ("bn_Conv1", {"center": False}, "BatchNormalization(center=False, epsilon=0.001)"),
        ("block_2_depthwise", {"padding": "valid"}, "is DepthwiseConv2D, but"),
        ("block_2_depthwise", {"dilation_rate": [2, 2]}, "dilation_rate=2"),
        ("block_1_pad", {"padding": [[1, 1], [1, 1]]}, "is ZeroPadding2D(padding=1), but"),
        ("block_1_depthwise", {"strides": [1, 1]}, "is ZeroPadding2D(padding=(0, 1)), but"),
        ("Conv1", {"strides": [1, 1]}, "is Conv2D(padding='same'), but"),
        ("Conv1", {"data_format": "channels_first"}, "data_format='channels_first'"),
        ("Conv_1", {"activation": "gelu"}, "is gelu, but NAME has BatchNormalization"),
        ("predictions", {"activation": "hard_sigmoid"}, "is hard_sigmoid, but NAME ends before it"),
        ("predictions", {"activation": "relu"}, "is relu, but NAME ends before it"),
        ("Conv1", {"something": "new"}, "something='new'"),
    ],
)
def test_a_layer_with_other_settings_is_named(
    config: dict[str, Any], layer: str, changes: dict[str, Any], message: str
) -> None:
    changed = copy.deepcopy(config)
    name = changed["config"]["layers"][-1]["name"] if layer == "predictions" else layer
    [selected] = [each for each in changed["config"]["layers"] if each["name"] == name]
    selected["config"] |= changes
    error = error_of(changed)
    assert message.replace("NAME", NAME) in error
    assert layer in error or layer in ("predictions", "block_1_depthwise")


@pytest.mark.parametrize(
    ("model", "classes", "message"),
    [
        (lambda: build(layers.Dense(5), pooling="max"), 5, "is GlobalMaxPooling2D, but"),
        (lambda: build(lambda x: layers.Dense(5)(layers.Flatten()(x))), 5, "is Dense, but"),
        (lambda: build(pooled(layers.Dense(1, "softmax"))), 1, "a softmax, which is always 1"),
        (lambda: build(pooled(layers.Dense(5)), layers.Resizing(32, 32)), 5, "is Resizing("),
        (
            lambda: build(pooled(layers.Dense(5)), inverted),
            5,
            "is Norm",
        ),
        (lambda: build(lambda x: pooled(layers.Dense(5))(layers.ReLU()(x))), 5, "is relu, but"),
    ],
    ids=["max pooling", "flatten", "softmax of one", "resizing", "normalization", "one more ReLU"],
)
def test_another_graph_is_refused(model: Callable[[], Any], classes: int, message: str) -> None:
    assert message in error_of(model().to_json(), classes)


def test_other_activations_and_connections_are_refused(config: dict[str, Any]) -> None:
    leaky, rewired = copy.deepcopy(config), copy.deepcopy(config)
    [layer] = [each for each in leaky["config"]["layers"] if each["name"] == "Conv1_relu"]
    layer |= {"class_name": "LeakyReLU", "config": {"name": "Conv1_relu", "negative_slope": 0.3}}
    assert "'Conv1_relu' is LeakyReLU(negative_slope=0.3), but" in error_of(leaky)
    text = json.dumps(rewired)
    # Without a shortcut: the first addition gets the same input twice.
    assert text.count('"block_2_add"') > 1
    [layer] = [each for each in rewired["config"]["layers"] if each["name"] == "block_2_add"]
    tensors = layer["inbound_nodes"][0]["args"][0]
    tensors[0] = tensors[1]
    assert "'block_2_add' has other inputs than in" in error_of(rewired)


def test_damaged_configurations_are_refused(config: dict[str, Any]) -> None:
    cyclic = copy.deepcopy(config)
    first, second = cyclic["config"]["layers"][1:3]
    first["inbound_nodes"][0]["args"][0]["config"]["keras_history"][0] = second["name"]
    twice = copy.deepcopy(config)
    twice["config"]["output_layers"] = [["Conv1", 0, 0], ["bn_Conv1", 0, 0]]
    for wrong in ("", "{", "[]", "[" * 100_000, {}, {"class_name": "Functional"}, cyclic, twice):
        assert "its graph cannot be parsed (" in error_of(wrong)


# --- the table -----------------------------------------------------------------------------------

QUICK = ("keras_mobilenetv1_025", NAME)


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in APPLICATIONS],
)
def test_the_table_holds_the_graphs_of_keras_applications(name: str) -> None:
    """At an odd size too where possible: the padding of some layers depends on it."""
    size = (224, 224) if name.startswith("vgg") else (128, 97)
    same, statistics = name.startswith("tf_"), ((0.0,) * 3, (1.0,) * 3)
    graph = Graph(json.loads(network(name, size).to_json()), same=same, statistics=statistics)
    steps = [(step.operation, step.inputs) for step in graph.steps]
    table = _graphs()[re.sub(r"_\d{3}$", "", name)]
    assert steps == [(step.operation, step.inputs) for step in table]
    assert graph.size == size


def test_a_graph_for_images_of_any_size_is_accepted() -> None:
    base = keras.applications.MobileNetV2(
        weights=None,  # pyright: ignore[reportArgumentType]
        include_top=False,
        alpha=0.35,
    )
    model = keras.Model(base.input, pooled(layers.Dense(5))(base.output))
    built = build_model(NAME, 5)
    assert read_graph(model.to_json(), "x.keras", built) == (built, False, get_args(Kind))
