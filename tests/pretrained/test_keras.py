"""Key tables of keras.applications, compared with Keras."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from networks import assert_same_variables, difference, random_images, run
from references import REFERENCES
from references.keras import APPLICATIONS, MEAN, STD, inputs, network, randomize

from tljax.models import build_model, normalize
from tljax.pretrained import CATALOG, export, load_pretrained
from tljax.pretrained.keras_graph import read_graph
from tljax.pretrained.tables.keras import layer_names, with_normalization
from tljax.pretrained.tables.layouts import LAYOUTS
from tljax.pretrained.verify import TOLERANCE, verify
from tljax.runtime.preprocess import Preprocess


def layers_with_weights(model: Any) -> list[Any]:
    """Return the layers in the order of the key table, those of models inside too."""
    return [
        inner
        for layer in model.layers
        for inner in (layer.layers if isinstance(layer, keras.Sequential) else (layer,))
        if inner.weights
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
def test_keras_loads_exported_files(name: str, tmp_path: Path) -> None:
    """Keras loads by order, and in legacy files by name as well."""
    reference = REFERENCES[name, "keras"](tmp_path / "reference")
    pretrained = load_pretrained(reference.weights)
    size = reference.sizes[-1]
    original = network(name, size, reference.weights)
    for file in ("exported.h5", "exported.weights.h5"):
        export(tmp_path / file, pretrained, "keras")
        loaded = network(name, size, tmp_path / file)
        for actual, expected in zip(loaded.get_weights(), original.get_weights(), strict=True):
            np.testing.assert_array_equal(actual, expected)
        assert_same_variables(load_pretrained(tmp_path / file).variables, pretrained.variables)
    images = random_images(2, *size)
    pixels = np.asarray(normalize(images, pretrained.model.preprocess))
    expected = loaded.predict(inputs(loaded, pixels), verbose=0)
    actual = run(pretrained.model, pretrained.variables, images).logits
    assert difference(actual, expected) <= 1e-4
    generated = ("conv2d", "batch_normalization", "normalization")
    layers = layers_with_weights(original)
    for layer_name, layer in zip(layer_names(name).values(), layers, strict=True):
        assert layer_name.rpartition("/")[2] == layer.name or (
            layer_name.startswith(generated) and layer.name.startswith(generated)
        )


@pytest.mark.parametrize("form", [pytest.param("x.keras", marks=pytest.mark.slow), "x.h5"])
def test_whole_models_are_read(form: str, tmp_path: Path) -> None:
    """Generated names depend on the models built before in the process."""
    network("keras_mobilenetv1_025")
    model = network("keras_mobilenetv1_025")
    model.save_weights(tmp_path / "y.weights.h5")
    model.save(tmp_path / form)
    expected = load_pretrained(tmp_path / "y.weights.h5").variables
    assert_same_variables(load_pretrained(tmp_path / form).variables, expected)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("vgg16", "vgg16"),
        ("vgg19", "vgg19"),
        ("keras_resnet50", "resnet"),
        ("keras_resnet50v2", "resnet_v2"),
        ("keras_inception_v3", "inception_v3"),
        ("keras_xception", "xception"),
        ("keras_mobilenetv1_100", "mobilenet"),
        ("tf_mobilenetv2_100", "mobilenet_v2"),
    ],
)
def test_preprocessing_matches_preprocess_input(name: str, module: str) -> None:
    images = random_images(1, 16, 16)
    preprocess = LAYOUTS[name]["keras"].preprocess or build_model(name).preprocess
    expected = getattr(keras.applications, module).preprocess_input(images.astype(np.float32))
    np.testing.assert_allclose(normalize(images, preprocess), expected, rtol=0, atol=1e-4)
    assert preprocess.size == (299 if module in ("inception_v3", "xception") else 224)


@pytest.mark.parametrize(
    ("mean", "variance", "expected"),
    [
        (MEAN, STD, Preprocess()),  # Keras' own files
        (MEAN, STD**2, Preprocess()),
        (np.zeros(3), np.ones(3), Preprocess(mean=(0, 0, 0), std=(1, 1, 1))),  # not pretrained
        (np.full(3, 0.5), np.full(3, 0.25), Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))),
    ],
)
def test_the_normalization_layer_of_a_weight_file_becomes_the_preprocessing(
    mean: np.ndarray, variance: np.ndarray, expected: Preprocess
) -> None:
    arrays = {"normalization/mean": mean, "normalization/variance": variance}
    assert with_normalization(Preprocess(), arrays) == expected
    assert with_normalization(expected, {}) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tf_efficientnetv2_b0", "tf_efficientnetv2_s"])
def test_the_preprocessing_of_efficientnet_v2_is_that_in_its_graph(name: str) -> None:
    size = name.rpartition("_")[2].upper()
    build = getattr(keras.applications, f"EfficientNetV2{size}")
    whole = build(weights=None, classes=5, classifier_activation=None)
    read, scales, _ = read_graph(whole.to_json(), "x.keras", build_model(name, 5))
    usual = LAYOUTS[name]["keras"].preprocess
    assert scales
    assert usual
    assert read.preprocess.size == usual.size
    np.testing.assert_allclose(read.preprocess.mean, usual.mean, atol=1e-6)
    np.testing.assert_allclose(read.preprocess.std, usual.std, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["x.keras", "x.h5"])
def test_a_whole_efficientnet_gives_the_outputs_of_keras(form: str, tmp_path: Path) -> None:
    whole = network("tf_efficientnet_b0", (64, 64))
    randomize(whole, ("project_bn",))
    whole.save(tmp_path / form)
    loaded = load_pretrained(tmp_path / form)
    images = random_images(2, 64, 64)
    expected = whole.predict(images.astype(np.float32), verbose=0)
    assert difference(run(loaded.model, loaded.variables, images).logits, expected) <= 1e-4
    compared = verify(loaded)
    assert max(layer.difference for layer in compared) <= TOLERANCE


def test_the_catalog_agrees_with_the_layouts() -> None:
    for name, entry in CATALOG.items():
        if name.startswith("keras:"):
            layout = LAYOUTS[entry.model]["keras"]
            assert entry.preprocess == (layout.preprocess or build_model(entry.model).preprocess)
            if name in ("keras:MobileNet", "keras:MobileNetV2"):
                assert not entry.digest
            else:
                assert entry.digest.startswith("md5:")
                assert len(entry.digest) == 36
