"""Networks without a head."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest
from networks import assert_same_variables, difference, random_images, random_pretrained, run
from references import REFERENCES
from references.keras import APPLICATIONS, randomize
from transformers import AutoModel

from tljax.models import normalize, replace_head
from tljax.pretrained import Pretrained, export, load_pretrained, save
from tljax.pretrained.deploy import export_stablehlo
from tljax.pretrained.formats import read_tensors, write_safetensors
from tljax.pretrained.tables.layouts import layout_rules
from tljax.pretrained.verify import TOLERANCE, verify
from tljax.runtime.errors import RequestError
from tljax.studies.pictures import ideal_pictures

layers = keras.layers


def without(path: Path, name: str, layout: str, stages: tuple[str, ...], target: Path) -> Path:
    """Copy a file without the tensors of some stages."""
    dropped = {r.key for r in layout_rules(name, layout) if r.path.split("/")[1] in stages}
    arrays = read_tensors(path).arrays
    assert dropped <= arrays.keys()
    write_safetensors(target, {k: a for k, a in arrays.items() if k not in dropped}, {})
    return target


QUICK = [("resnet18", "torchvision", ("head",), "pool")]
SLOW = [
    ("mobilenetv3_small_050", "timm", ("hidden", "head"), "pool"),
    ("mobilenetv2_050", "timm", ("head",), "pool"),
    ("mobilenetv3_small_050", "timm", ("head",), "hidden"),
    ("tf_mobilenetv2_035", "huggingface", ("head",), "pool"),
    ("resnet50", "huggingface", ("head",), "pool"),
    ("resnet50d", "timm", ("head",), "pool"),
    ("efficientnet_lite0", "efficientnet_pytorch", ("head",), "pool"),
    ("tf_efficientnet_b0", "huggingface", ("head",), "pool"),
    ("mobilenetv4_conv_small", "timm", ("hidden", "head"), "pool"),
    ("resnetv2_50x1_bit", "timm", ("head",), "pool"),
    ("resnetv2_50x1_bit", "huggingface", ("head",), "pool"),
    ("inception_v3", "torchvision", ("head",), "pool"),
    ("xception", "timm", ("head",), "pool"),
    ("mobilenetv1_100", "timm", ("head",), "pool"),
    ("convnext_atto", "timm", ("head",), "norm"),
    ("convnext_atto", "timm", ("norm", "head"), "stage4"),
    ("convnextv2_atto", "huggingface", ("head",), "norm"),
    ("vgg11", "torchvision", ("head",), "fc2"),
    ("vgg11", "timm", ("fc2", "head"), "fc1"),
    ("vgg11_bn", "torchvision", ("fc1", "fc2", "head"), "block5"),
]


@pytest.mark.parametrize(
    ("name", "layout", "dropped", "last"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_a_file_without_a_head_gives_the_features_of_the_reference(
    tmp_path: Path, name: str, layout: str, dropped: tuple[str, ...], last: str
) -> None:
    reference = REFERENCES[name, layout](tmp_path / "whole")
    weights = reference.weights
    whole = weights / "model.safetensors" if weights.is_dir() else weights
    file = without(whole, name, layout, dropped, tmp_path / "x.safetensors")
    loaded = load_pretrained(file, model=name)
    assert (loaded.model.name, loaded.model.num_classes, loaded.card.classes) == (name, 0, ())
    for size in reference.sizes:
        images = random_images(2, *size)
        outputs = reference.stages(np.asarray(normalize(images, loaded.model.preprocess)))
        expected = outputs[last].mean((1, 2)) if outputs[last].ndim == 4 else outputs[last]
        features = run(loaded.model, loaded.variables, images, stop="head").value
        assert difference(features, expected) <= TOLERANCE
        assert difference(run(loaded.model, loaded.variables, images).value, features) == 0


@pytest.mark.parametrize(
    ("name", "prefix", "last"),
    [
        ("resnet18", "resnet.", "pool"),
        pytest.param("convnextv2_atto", "convnextv2.", "norm", marks=pytest.mark.slow),
    ],
)
def test_backbones_of_transformers_without_a_key_prefix_are_loaded(
    tmp_path: Path, name: str, prefix: str, last: str
) -> None:
    reference = REFERENCES[name, "huggingface"](tmp_path / "whole")
    network = AutoModel.from_pretrained(reference.weights)
    network.save_pretrained(tmp_path / "backbone")
    keys = read_tensors(tmp_path / "backbone" / "model.safetensors").arrays
    assert not any(key.startswith(prefix) for key in keys)
    loaded = load_pretrained(tmp_path / "backbone")
    assert loaded.model.stage_names[-2] == last
    images = random_images(2, 97, 65)
    expected = reference.stages(np.asarray(normalize(images, loaded.model.preprocess)))[last]
    assert difference(run(loaded.model, loaded.variables, images).value, expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pooling", "size"),
    [
        pytest.param("tf_mobilenetv3_small_075", None, (97, 65), marks=pytest.mark.slow),
        ("tf_mobilenetv2_035", "avg", (97, 65)),
        pytest.param("keras_resnet50v2", None, (97, 65), marks=pytest.mark.slow),
        pytest.param("keras_inception_v3", "avg", (139, 97), marks=pytest.mark.slow),
        pytest.param("keras_xception", None, (97, 129), marks=pytest.mark.slow),
        pytest.param("keras_mobilenetv1_025", "avg", (97, 65), marks=pytest.mark.slow),
        pytest.param("convnext_tiny", "avg", (97, 65), marks=pytest.mark.slow),
        pytest.param("vgg16", "avg", (64, 97), marks=pytest.mark.slow),
        pytest.param("vgg16", None, (64, 97), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("form", ["keras", "weights.h5"])
def test_a_keras_network_without_top_gives_its_averaged_feature_map(
    tmp_path: Path, name: str, pooling: str | None, size: tuple[int, int], form: str
) -> None:
    build, *_, weak, _, options = APPLICATIONS[name]
    network = build(
        input_shape=(*size, 3), weights=None, include_top=False, pooling=pooling, **options
    )
    randomize(network, weak)
    path = tmp_path / f"x.{form}"
    network.save(path) if form == "keras" else network.save_weights(path)
    loaded = load_pretrained(path)
    assert (loaded.model.name, loaded.model.num_classes) == (name, 0)
    images = random_images(2, *size)
    output = network.predict(np.asarray(normalize(images, loaded.model.preprocess)), verbose=0)
    expected = output if pooling else output.mean((1, 2))
    assert difference(run(loaded.model, loaded.variables, images).value, expected) <= TOLERANCE
    if form == "keras":
        assert max(layer.difference for layer in verify(loaded)) <= TOLERANCE


# --- export, verification and errors ------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet18() -> Pretrained:
    whole = random_pretrained("resnet18")
    model, variables = replace_head(whole.model, whole.variables, 0)
    return Pretrained(model, variables, replace(whole.card, classes=()))


@pytest.mark.usefixtures("one_small_input")
@pytest.mark.parametrize("layout", ["torchvision", "huggingface", "tljax"])
def test_an_exported_backbone_is_loaded_unchanged(
    resnet18: Pretrained, tmp_path: Path, layout: str
) -> None:
    path = tmp_path / ("folder" if layout == "huggingface" else "x.safetensors")
    export(path, resnet18, layout)
    loaded = load_pretrained(path)
    assert loaded.model == resnet18.model
    assert loaded.card.classes == ()
    assert_same_variables(loaded.variables, resnet18.variables)
    if layout == "huggingface":
        assert type(AutoModel.from_pretrained(path)).__name__ == "ResNetModel"
        assert max(layer.difference for layer in verify(loaded)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("after", ["block5", "fc1"])
def test_a_network_cut_after_a_stage_is_loaded_unchanged(tmp_path: Path, after: str) -> None:
    whole = random_pretrained("vgg11")
    model, variables = replace_head(whole.model, whole.variables, 0, after=after)
    cut = Pretrained(model, variables, replace(whole.card, classes=()))
    for layout in ("torchvision", "tljax"):
        export(tmp_path / "x.safetensors", cut, layout)
        assert load_pretrained(tmp_path / "x.safetensors").model == model


def test_a_head_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    export(tmp_path / "x.safetensors", random_pretrained("resnet18"), "torchvision")
    arrays = dict(read_tensors(tmp_path / "x.safetensors").arrays)
    for lost in ("fc.bias", "fc.weight"):
        write_safetensors(
            tmp_path / "y.safetensors", {k: a for k, a in arrays.items() if k != lost}, {}
        )
        with pytest.raises(RequestError, match=f"1 missing: {lost}"):
            load_pretrained(tmp_path / "y.safetensors")


def test_a_configuration_with_classes_for_a_backbone_is_refused(
    resnet18: Pretrained, tmp_path: Path
) -> None:
    export(tmp_path / "model.safetensors", resnet18, "timm")
    config = {"architecture": "resnet18", "num_classes": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="num_classes is 5, but there is no head"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_classes": 0}))
    assert load_pretrained(tmp_path).model.num_classes == 0


def test_functions_that_need_classes_refuse_a_backbone(resnet18: Pretrained) -> None:
    with pytest.raises(RequestError, match="is a backbone without a head, so it has no classes"):
        resnet18.require_classes()
    with pytest.raises(RequestError, match="is a backbone without a head, so it has no classes"):
        ideal_pictures(resnet18, ["zebra"])


@pytest.mark.slow
def test_a_stablehlo_folder_of_a_backbone_returns_features(
    resnet18: Pretrained, tmp_path: Path
) -> None:
    network = resnet18.with_size(32)
    export_stablehlo(tmp_path, network, batch=2, platforms=["cpu"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.stablehlo"]
    loaded = jax.export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
    images = random_images(2, 32, 32)
    expected = run(network.model, network.variables, images, stop="head").value
    assert difference(loaded.call(images), expected) <= 1e-5


# --- Keras models that contain their backbone as a layer ------------------------------------------


def with_new_head(
    head: Callable[[Any], Any], name: str = "tf_mobilenetv2_035", **base_options: Any
) -> Any:
    """Build a half-frozen base model between augmentation and a head."""
    build, *_, weak, _, options = APPLICATIONS[name]
    base = build(
        input_shape=(64, 64, 3), weights=None, include_top=False, **options, **base_options
    )
    randomize(base, weak)
    for layer in base.layers[: len(base.layers) // 2]:
        layer.trainable = False
    image = keras.Input((64, 64, 3))
    augmentation = keras.Sequential([layers.RandomFlip(), layers.RandomRotation(0.1)])
    x = layers.Rescaling(1 / 127.5, offset=-1)(augmentation(image))
    return keras.Model(image, head(base(x, training=False)))


def averaged(*head: Any) -> Callable[[Any], Any]:
    return keras.Sequential([layers.GlobalAveragePooling2D(), layers.Dropout(0.2), *head])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["keras", "h5"])
@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("tf_mobilenetv2_035", True),
        ("tf_mobilenetv2_035", False),
        pytest.param("tf_mobilenetv3_small_075", True, marks=pytest.mark.slow),
        pytest.param("vgg16", True, marks=pytest.mark.slow),
        pytest.param("keras_resnet50v2", True, marks=pytest.mark.slow),
        pytest.param("keras_mobilenetv1_025", True, marks=pytest.mark.slow),
    ],
)
def test_a_base_model_inside_a_model_is_loaded(
    tmp_path: Path, name: str, bias: bool, form: str
) -> None:
    network = with_new_head(averaged(layers.Dense(5, use_bias=bias)), name)
    network.save(tmp_path / f"x.{form}")
    loaded = load_pretrained(tmp_path / f"x.{form}")
    assert (loaded.model.name, loaded.model.preprocess.size) == (name, 64)
    images = random_images(2, 64, 64)
    expected = network.predict(images.astype(np.float32), verbose=0)
    assert difference(run(loaded.model, loaded.variables, images).logits, expected) <= TOLERANCE
    save(tmp_path / "again.safetensors", loaded)
    again = load_pretrained(tmp_path / "again.safetensors")
    assert again.model == loaded.model
    with pytest.raises(RequestError, match=r"contains the model .*: verify|keras cannot load"):
        verify(loaded)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["keras", "h5"])
@pytest.mark.parametrize(
    ("head", "message"),
    [
        (averaged(layers.Dense(16, "relu"), layers.Dense(5)), "is relu, but .* ends before it"),
        (averaged(layers.BatchNormalization(), layers.Dense(5)), "is BatchNormalization.*, but"),
        (keras.Sequential([layers.Flatten(), layers.Dense(5)]), "is Dense, but"),
    ],
    ids=["two layers", "a norm", "flat"],
)
def test_a_head_that_is_not_linear_is_refused(
    tmp_path: Path, head: Callable[[Any], Any], message: str, form: str
) -> None:
    with_new_head(head).save(tmp_path / f"x.{form}")
    with pytest.raises(RequestError, match=message) as caught:
        load_pretrained(tmp_path / f"x.{form}")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_base_model_in_training_mode_is_refused(tmp_path: Path) -> None:
    base = keras.applications.MobileNetV2(
        input_shape=(64, 64, 3),
        weights=None,  # pyright: ignore[reportArgumentType]
        include_top=False,
        alpha=0.35,
    )
    image = keras.Input((64, 64, 3))
    keras.Model(image, averaged(layers.Dense(5))(base(image, training=True))).save(
        tmp_path / "x.keras"
    )
    with pytest.raises(RequestError, match="training=True"):
        load_pretrained(tmp_path / "x.keras")
