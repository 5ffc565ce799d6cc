"""Configuration files beside the weights: read, written, or refused in one line."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from networks import (
    assert_same_variables,
    random_images,
    random_pretrained,
    run,
    to_torch,
    torch_resnet,
)
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import (
    EfficientNetImageProcessorPil,
)

from tljax.data.decode import decode
from tljax.models import normalize
from tljax.pretrained import Pretrained, export, imagenet_classes, load_pretrained
from tljax.pretrained.configs import read_architecture, read_configs, write_configs
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.task import Task


@pytest.fixture(scope="module")
def resnet18() -> Pretrained:
    return random_pretrained("resnet18")


@pytest.fixture(scope="module")
def exported(resnet18: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export(folder, resnet18, "huggingface")
    return folder


def read_description(folder: Path, pretrained: Pretrained) -> Any:
    return read_configs(folder, pretrained.model)


def error_of(folder: Path, pretrained: Pretrained) -> str:
    with pytest.raises(RequestError) as caught:
        read_configs(folder, pretrained.model)
    message = str(caught.value)
    assert message.startswith(f"{folder}/")
    assert "\n" not in message
    assert len(message) < len(str(folder)) + 350
    return message.removeprefix(f"{folder}/")


def write(path: Path, **values: object) -> Path:
    path.write_text(json.dumps(values))
    return path.parent


CONVNEXT = {
    "image_processor_type": "ConvNextImageProcessor",
    "size": {"shortest_edge": 224},
    "crop_pct": 0.875,
    "resample": 3,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}
BIT = CONVNEXT | {
    "image_processor_type": "BitImageProcessor",
    "crop_size": {"height": 200, "width": 200},
}
TIMM = {
    "input_size": [3, 288, 288],
    "crop_pct": 0.95,
    "interpolation": "bicubic",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
    "license": "apache-2.0",
}


# --- preprocessing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (CONVNEXT, (224, 256, "bicubic")),
        (CONVNEXT | {"size": 224, "resample": 2}, (224, 256, "bilinear")),
        (CONVNEXT | {"crop_pct": None, "resample": None}, (224, 256, "bicubic")),
        (CONVNEXT | {"image_processor_type": None}, (224, 256, "bicubic")),
        (CONVNEXT | {"crop_size": 100}, (224, 256, "bicubic")),
        (CONVNEXT | {"size": 383, "crop_pct": 1}, (383, 383, "bicubic")),
        (BIT, (200, 224, "bicubic")),
        (BIT | {"size": 512, "crop_size": 448}, (448, 512, "bicubic")),
        (BIT | {"image_processor_type": "CLIPImageProcessorFast"}, (200, 224, "bicubic")),
    ],
)
def test_preprocessing_is_read(
    resnet18: Pretrained, tmp_path: Path, processor: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert read_description(tmp_path, resnet18).preprocess is None
    write(tmp_path / "preprocessor_config.json", **processor)
    preprocess = Preprocess(*expected, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    assert read_description(tmp_path, resnet18).preprocess == preprocess


@pytest.mark.parametrize("shape", [(300, 375), (375, 300), (100, 150), (224, 224)])
@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize(
    ("processor", "values"),
    [
        (ConvNextImageProcessorPil, CONVNEXT),
        (ConvNextImageProcessorPil, CONVNEXT | {"size": 160, "crop_pct": 0.95}),
        (BitImageProcessorPil, BIT),
    ],
)
def test_pixels_are_those_of_transformers(
    resnet18: Pretrained,
    tmp_path: Path,
    processor: Any,
    values: dict[str, Any],
    resample: int,
    shape: tuple[int, int],
) -> None:
    """For crops that remove an even number of pixels; odd numbers are rounded differently."""
    values = values | {"resample": resample}
    preprocess = read_description(write(tmp_path / "preprocessor_config.json", **values), resnet18)[
        1
    ]
    image = random_images(*shape)
    outputs = processor.from_dict(values)(Image.fromarray(image), return_tensors="np")
    pixels = normalize(decode(image, preprocess)[None], preprocess)
    expected = outputs["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("include_top", [True, False])
def test_the_processor_of_efficientnet_squeezes_and_divides_twice(
    resnet18: Pretrained, tmp_path: Path, include_top: bool
) -> None:
    kind: Any = EfficientNetImageProcessorPil(
        size={"height": 160, "width": 160}, resample=3, include_top=include_top
    )
    kind.save_pretrained(tmp_path)
    _, preprocess, _, notes, *_ = read_description(tmp_path, resnet18)
    assert "squeezes images into a square" in notes[0]
    image = random_images(200, 200)  # where that is no difference
    expected = kind(Image.fromarray(image), return_tensors="np")["pixel_values"]
    pixels = normalize(decode(image, preprocess)[None], preprocess)
    np.testing.assert_allclose(pixels, expected.transpose(0, 2, 3, 1), rtol=0, atol=1e-5)
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    write(tmp_path / "preprocessor_config.json", **values | {"resample": 0})
    assert read_description(tmp_path, resnet18).preprocess == preprocess
    assert "tljax resizes bicubically" in read_description(tmp_path, resnet18).notes[1]
    write(tmp_path / "preprocessor_config.json", **values | {"rescale_offset": True})
    assert "rescale_offset is True and should be false" in error_of(tmp_path, resnet18)


def test_a_squashed_crop_of_timm_gives_a_note(resnet18: Pretrained, tmp_path: Path) -> None:
    write(tmp_path / "config.json", pretrained_cfg=TIMM | {"crop_mode": "squash", "crop_pct": 1})
    _, preprocess, _, notes, *_ = read_description(tmp_path, resnet18)
    assert (preprocess.size, preprocess.resize) == (288, 288)
    assert "crop_mode 'squash' squeezes images into a square" in notes[0]


def test_sizes_at_which_transformers_changes_the_aspect_ratio_are_refused(
    resnet18: Pretrained, tmp_path: Path
) -> None:
    values = CONVNEXT | {
        "size": {"shortest_edge": 384},
        "image_mean": [0] * 3,
        "image_std": [1] * 3,
    }
    image = Image.fromarray(random_images(300, 500))
    kind: Any = ConvNextImageProcessorPil
    outputs = kind.from_dict(values)(image, return_tensors="np")
    squashed = np.asarray(image.resize((384, 384), Image.Resampling.BICUBIC)) / 255
    pixels = outputs["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(pixels, squashed, rtol=0, atol=1e-5)
    folder = write(tmp_path / "preprocessor_config.json", **values)
    assert error_of(folder, resnet18) == (
        "preprocessor_config.json: from 384 px on this image processor ignores the aspect ratio, "
        "which tljax does not support; choose a smaller size, or load the weight file alone, with "
        "the default preprocessing of its architecture"
    )


@hypothesis.given(
    st.integers(16, 600),
    st.floats(1, 2),
    st.sampled_from(["bilinear", "bicubic"]),
    st.sampled_from(["uint8", "float32"]),
)
def test_exported_preprocessing_is_read_back(
    resnet18: Pretrained,
    tmp_path_factory: pytest.TempPathFactory,
    size: int,
    ratio: float,
    interpolation: Any,
    dtype: Any,
) -> None:
    preprocess = Preprocess(
        size, round(size * ratio), interpolation, (0.1, 0.2, 0.3), (1, 2, 3), dtype=dtype
    )
    model = replace(resnet18.model, preprocess=preprocess)
    folder = tmp_path_factory.mktemp("written")
    write_configs(folder, model, resnet18.card.classes)
    assert read_configs(folder, model).preprocess == preprocess


@pytest.mark.parametrize("preprocess", [Preprocess(), Preprocess(400, 448, "bicubic")])
def test_transformers_applies_exported_preprocessing(
    resnet18: Pretrained, tmp_path: Path, preprocess: Preprocess
) -> None:
    write_configs(tmp_path, replace(resnet18.model, preprocess=preprocess), resnet18.card.classes)
    image = random_images(300, 375)
    processor = BitImageProcessorPil.from_pretrained(tmp_path)
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"]
    pixels = normalize(decode(image, preprocess)[None], preprocess)
    np.testing.assert_allclose(pixels, expected.transpose(0, 2, 3, 1), rtol=0, atol=1e-5)


def test_a_folder_of_timm_is_loaded(resnet18: Pretrained, tmp_path: Path) -> None:
    export(tmp_path / "model.safetensors", resnet18, "timm")
    names = [f"kind {i}" for i in range(7)]
    write(tmp_path / "config.json", architecture="resnet18", pretrained_cfg=TIMM, label_names=names)
    model, variables, card = load_pretrained(tmp_path)
    assert model.preprocess == Preprocess(288, 303, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert (card.licence, card.classes) == ("apache-2.0", tuple(names))
    assert_same_variables(variables, resnet18.variables)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_folder_of_googles_mobilenet_is_loaded(version: str, tmp_path: Path) -> None:
    """It has 1,001 classes, the first for the background, and transformers' former names."""
    name = {"v1": "tf_mobilenetv1_025", "v2": "tf_mobilenetv2_035"}[version]
    pretrained = random_pretrained(name, 1001)
    export(tmp_path, pretrained, "huggingface")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == f"mobilenet_{version}"
    del config["id2label"], config["label2id"]
    write(tmp_path / "config.json", **config)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    crop = {"crop_size": {"height": 192, "width": 192}, "size": {"shortest_edge": 220}}
    kind = f"MobileNet{version.upper()}FeatureExtractor"
    for processor in ({"feature_extractor_type": kind, "resample": 2}, {}):
        write(tmp_path / "preprocessor_config.json", **half, **crop, **processor)
        loaded = load_pretrained(tmp_path)
        expected = Preprocess(192, 220, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        assert (loaded.model.name, loaded.model.preprocess) == (name, expected)
        assert loaded.card.classes == ("background", *imagenet_classes())


def test_timm_configs_distinguish_networks_with_the_same_tensors(tmp_path: Path) -> None:
    name = "tf_mobilenetv3_small_075"
    pretrained = random_pretrained(name)
    path = tmp_path / "model.safetensors"
    export(path, pretrained, "timm")
    with pytest.raises(RequestError) as caught:
        load_pretrained(path)
    assert str(caught.value) == (
        f"{path} fits mobilenetv3_small_075 and {name}, which have the same tensors; choose one: "
        f"--model mobilenetv3_small_075 or --model {name} (model= in Python)"
    )
    for either in ("mobilenetv3_small_075", name):
        loaded = load_pretrained(path, model=either)
        assert (loaded.model.name, loaded.card.notes) == (either, ())
    write(tmp_path / "config.json", architecture=name)
    assert load_pretrained(tmp_path).model.name == name
    with pytest.raises(RequestError, match=f"architecture is '{name}'; tljax supports only"):
        load_pretrained(tmp_path, model="mobilenetv3_small_075")


def test_timm_configs_avoid_the_note_on_networks_with_the_same_tensors(tmp_path: Path) -> None:
    """A file alone may hold the network that pads like torch."""
    name = "tf_efficientnetv2_s"
    export(tmp_path / "model.safetensors", random_pretrained(name), "timm")
    assert "fit timm's efficientnetv2_s" in load_pretrained(tmp_path).card.notes[0]
    write(tmp_path / "config.json", architecture=name)
    assert load_pretrained(tmp_path).card.notes == ()


def test_both_networks_that_timm_calls_efficientnet_lite0_are_loaded(tmp_path: Path) -> None:
    """The plain name is timm's own network there; tljax's plain name is TensorFlow's."""
    path = tmp_path / "model.safetensors"
    export(path, random_pretrained("efficientnet_lite0"), "timm")
    both = "fits efficientnet_lite0 and timm_efficientnet_lite0, which have the same tensors"
    with pytest.raises(RequestError, match=both):
        load_pretrained(path)
    for name, ours in (
        ("efficientnet_lite0", "timm_efficientnet_lite0"),
        ("tf_efficientnet_lite0", "efficientnet_lite0"),
    ):
        write(tmp_path / "config.json", architecture=name)
        assert load_pretrained(tmp_path).model.name == ours
        assert load_pretrained(path, model=ours).model.name == ours


def test_early_configs_of_timm_are_read(resnet18: Pretrained, tmp_path: Path) -> None:
    folder = write(tmp_path / "config.json", architecture="resnet18", **TIMM)
    description = read_description(folder, resnet18)
    assert description.preprocess == Preprocess(
        288, 303, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    )
    assert description.licence == "apache-2.0"


# --- classes -------------------------------------------------------------------------------------


def test_class_names_are_read(resnet18: Pretrained, exported: Path, tmp_path: Path) -> None:
    assert load_pretrained(exported).card.classes == resnet18.card.classes
    names = [f"species {i}" for i in range(7)]
    by_index = {str(i): name for i, name in enumerate(names)}
    for config in ({"id2label": by_index}, {"label_names": names}):
        folder = write(tmp_path / "config.json", **config)
        assert read_description(folder, resnet18).classes == tuple(names)
    for config, count in (
        ({}, 0),
        ({"id2label": {"0": "one"}}, 1),
        ({"label_names": names[:2]}, 2),
    ):
        description = read_description(write(tmp_path / "config.json", **config), resnet18)
        assert description.classes == tuple(f"class {i}" for i in range(7))
        note = f"it names {count} classes, but the head has 7 outputs"
        assert description.notes == ((f"{tmp_path / 'config.json'}: {note}",) if count else ())


def test_a_note_mentions_class_names_that_do_not_match_the_head(
    resnet18: Pretrained, exported: Path, tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["id2label"]["3"]
    card = load_pretrained(write(tmp_path / "config.json", **config)).card
    assert card.classes[3] == "class 3"
    assert [note.partition(": ")[2] for note in card.notes] == [
        "it names 6 classes, but the head has 7 outputs"
    ]


# --- invalid and unsupported files ---------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read as JSON (Expecting value"),
        (b'{"size": 224', "cannot be read as JSON (Expecting"),
        (b"<html>", "cannot be read as JSON (Expecting value"),
        (b'{"a": "\xff"}', "cannot be read as JSON ('utf-8' codec"),
        (b'{"a":' + b"[" * 100_000, "cannot be read as JSON (maximum recursion depth"),
        (b'{"a": ' + b"1" * 5000 + b"}", "cannot be read as JSON (Exceeds the limit"),
        (b"[1, 2]", "is JSON, but not an object"),
        (b"null", "is JSON, but not an object"),
    ],
)
def test_files_that_are_not_json_are_refused(
    resnet18: Pretrained, tmp_path: Path, file: str, data: bytes, message: str
) -> None:
    (tmp_path / file).write_bytes(data)
    assert error_of(tmp_path, resnet18).startswith(f"{file}: {message}")


def changed(values: dict[str, Any], **changes: object) -> dict[str, Any]:
    return values | changes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(CONVNEXT, size=None), "size is missing and should be n or {'shortest_edge': n}"),
        (changed(CONVNEXT, size="224"), "size is '224' and should be n or"),
        (changed(CONVNEXT, size=0), "size is 0 and"),
        (changed(CONVNEXT, size=True), "size is True and"),
        (changed(CONVNEXT, size=224.0), "size is 224.0 and"),
        (changed(CONVNEXT, size=10**400), "size is 1000"),
        (changed(CONVNEXT, size={"height": 224, "width": 224}), "size is {'height': 224,"),
        (changed(CONVNEXT, size={"shortest_edge": [224]}), "size is {'shortest_edge': [224]}"),
        (changed(CONVNEXT, crop_pct=0), "crop_pct is 0 and should be a number above 0"),
        (changed(CONVNEXT, crop_pct=1e-320), "crop_pct is 1e-320 and"),
        (changed(CONVNEXT, crop_pct=1.5), "crop_pct is 1.5 and"),
        (changed(CONVNEXT, crop_pct="0.9"), "crop_pct is '0.9' and"),
        (changed(CONVNEXT, crop_pct=float("nan")), "crop_pct is nan and"),
        (changed(CONVNEXT, do_center_crop=True), "do_center_crop is True and should be false"),
        (changed(CONVNEXT, do_resize=False), "do_resize is False and should be true"),
        (changed(CONVNEXT, do_normalize=False), "do_normalize is False and should be true"),
        (changed(CONVNEXT, do_rescale=False), "do_rescale is False and should be true"),
        (changed(CONVNEXT, rescale_factor=1), "rescale_factor is 1 and should be 1/255"),
        (changed(CONVNEXT, resample=0), "resample is 0 and should be 2 or 3"),
        (changed(CONVNEXT, resample=[3]), "resample is [3] and"),
        (changed(CONVNEXT, image_mean=None), "image_mean is missing and should be 3 numbers"),
        (changed(CONVNEXT, image_mean=0.5), "image_mean is 0.5 and"),
        (changed(CONVNEXT, image_mean=[0.5, 0.5]), "image_mean is [0.5, 0.5] and"),
        (changed(CONVNEXT, image_mean=[0.5, 0.5, "x"]), "image_mean is [0.5, 0.5, 'x'] and"),
        (changed(CONVNEXT, image_std=[1, 1, 0]), "image_std is [1, 1, 0] and should be 3 numbers"),
        (changed(CONVNEXT, image_std=[1, 1, float("inf")]), "image_std is [1, 1, inf] and"),
        (
            changed(CONVNEXT, image_processor_type="SamImageProcessor"),
            "image_processor_type is 'SamImageProcessor' and should be that of ConvNext, Bit",
        ),
        (
            changed(CONVNEXT, image_processor_type=None, feature_extractor_type="x\ny" * 100),
            "feature_extractor_type is 'x\\nyx\\nyx",
        ),
        (changed(BIT, do_center_crop=False), "do_center_crop is False and should be true"),
        (changed(BIT, crop_size=None), "crop_size is missing and should be n or {'height': n,"),
        (changed(BIT, crop_size={"height": 9, "width": 8}), "crop_size is {'height': 9, 'width'"),
        (changed(BIT, crop_size=225), "crop_size 225 is more than size 224"),
    ],
)
def test_invalid_preprocessor_configs_are_refused(
    resnet18: Pretrained, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "preprocessor_config.json", **values)
    error = error_of(folder, resnet18)
    assert error.startswith(f"preprocessor_config.json: {message}")
    assert "or load the weight file alone" in error


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"id2label": ["a"] * 7}, "id2label is ['a', 'a', 'a', 'a', 'a', 'a', ...] and should be"),
        ({"id2label": dict.fromkeys("abcdefg", "x")}, "the name of class 0 is None"),
        ({"id2label": {str(i): i for i in range(7)}}, "the name of class 0 is 0"),
        ({"id2label": {str(i): ["x"] for i in range(7)}}, "the name of class 0 is ['x']"),
        ({"label_names": "abcdefg"}, "label_names is 'abcdefg' and should be a list"),
        ({"label_names": [None] * 7}, "the name of class 0 is None"),
        ({"num_classes": 5}, "num_classes is 5, but the head has 7 outputs"),
        ({"num_labels": 1}, "num_labels is 1, but the head has 7 outputs"),
        ({"model_args": {"num_classes": 5}}, "model_args: num_classes is 5, but the head has"),
        (
            {"problem_type": "ranking"},
            (
                "problem_type is 'ranking' with 7 outputs; tljax expects "
                "single_label_classification or multi_label_classification or regression; correct"
            ),
        ),
        ({"problem_type": ["regression"]}, "problem_type is ['regression'] with 7 outputs"),
        *(
            (
                {"problem_type": "multi_label_classification", "tljax_thresholds": thresholds},
                "tljax_thresholds is ",
            )
            for thresholds in (
                0.5,
                [0.5],
                [0.5] * 6 + [1.5],
                [0.5] * 6 + [-0.1],
                [0.5] * 6 + [float("nan")],
                [0.5] * 6 + ["0.5"],
                [0.5] * 6 + [True],
                [0.5] * 6 + [10**400],
                [0.5] * 6 + [[]],
            )
        ),
        *(
            ({"problem_type": "regression", "tljax_units": units}, "tljax_units is ")
            for units in ("degrees", ["m"], ["m"] * 6 + [None])
        ),
        ({"license": ["mit"]}, "license is ['mit'] and should be a string"),
        ({"pretrained_cfg": "x"}, "pretrained_cfg is 'x' and should be an object"),
        *(
            ({"pretrained_cfg": TIMM | changes}, f"pretrained_cfg: {message}")
            for changes, message in [
                ({"input_size": None}, "input_size is missing and should be [3, n, n]"),
                ({"input_size": 288}, "input_size is 288 and"),
                ({"input_size": [3, 288]}, "input_size is [3, 288] and"),
                ({"input_size": [1, 288, 288]}, "input_size is [1, 288, 288] and"),
                ({"input_size": [3, 288, 320]}, "input_size is [3, 288, 320] and"),
                ({"input_size": [3, "288", "288"]}, "input_size is [3, '288', '288'] and"),
                ({"crop_pct": 0}, "crop_pct is 0 and"),
                ({"crop_mode": "border"}, "crop_mode is 'border' and should be center or squash"),
                ({"interpolation": "lanczos"}, "interpolation is 'lanczos' and should be bilinear"),
                ({"interpolation": ["bicubic"]}, "interpolation is ['bicubic'] and"),
                ({"mean": [0.5]}, "mean is [0.5] and should be 3 numbers"),
                ({"std": [1, 1, -1]}, "std is [1, 1, -1] and should be 3 numbers above 0"),
                ({"license": 7}, "license is 7 and should be a string"),
            ]
        ),
    ],
)
def test_invalid_configs_are_refused(
    resnet18: Pretrained, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    error = error_of(write(tmp_path / "config.json", **values), resnet18)
    assert error.startswith(f"config.json: {message}")
    assert "or load the weight file alone" in error


@pytest.mark.parametrize(
    ("name", "key", "supported", "other"),
    [
        ("resnet18", "downsample_in_bottleneck", False, True),
        ("resnet18", "downsample_in_first_stage", False, True),
        ("resnet18", "hidden_act", "relu", "gelu"),
        ("resnet18", "architecture", "resnet18", "resnetblur18"),
        ("efficientnet_lite0", "architecture", "tf_efficientnet_lite0", "efficientnet_lite0"),
        ("resnet18", "model_type", "resnet", "regnet"),
        ("tf_mobilenetv1_025", "tf_padding", True, False),
        ("tf_mobilenetv1_025", "depth_multiplier", 0.25, 1.0),
        ("tf_mobilenetv2_035", "layer_norm_eps", 0.001, 1e-5),
        ("tf_mobilenetv2_035", "output_stride", 32, 16),
        ("xception", "architecture", "legacy_xception", "xception41"),
        ("resnetv2_50x1_bit", "layer_type", "preactivation", "bottleneck"),
        ("resnetv2_50x1_bit", "global_padding", None, "SAME"),
        ("resnetv2_50x1_bit", "num_groups", 32, 16),
        ("resnetv2_50x1_bit", "width_factor", 1, 2),
        ("tf_mobilenetv2_035", "hidden_act", "relu6", None),
        ("tf_mobilenetv2_035", "finegrained_output", True, False),
        ("tf_efficientnet_b0", "depthwise_padding", [], [5]),
        ("tf_efficientnet_b0", "width_coefficient", 1.0, 1.1),
        ("tf_efficientnet_b0", "pooling_type", "mean", "max"),
        ("resnet18", "auto_map", None, "custom.Network"),
        ("regnety_002", "downsample_in_first_stage", True, False),
        ("regnetx_002", "groups_width", 8, 16),
        ("regnetx_002", "architecture", "regnetx_002", "regnetz_005"),
    ],
)
def test_other_networks_with_the_same_tensors_are_refused(
    tmp_path: Path, name: str, key: str, supported: object, other: object
) -> None:
    pretrained = random_pretrained(name)
    read_description(write(tmp_path / "config.json", **{key: supported}), pretrained)
    error = error_of(write(tmp_path / "config.json", **{key: other}), pretrained)
    assert error == (
        f"config.json: the tensors are those of {name}, but {key} is {other!r}; "
        f"tljax supports only {supported!r}"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_args": {"act_layer": "silu"}}, "model_args: act_layer is 'silu'; tljax supports"),
        ({"model_args": {"act_layer": None}}, "model_args: act_layer is None; tljax supports"),
        ({"model_args": {"output_stride": 16}}, "output_stride is 16; tljax supports only 32; "),
        ({"model_args": {"aa_layer": "blur"}}, "aa_layer is 'blur'; "),
        ({"model_args": {"norm_layer": "groupnorm"}}, "norm_layer is 'groupnorm'; "),
        ({"model_args": {"stem_type": "deep"}}, "tljax supports only networks built without it"),
        ({"model_args": {"block_args": {"attn_layer": "se"}}}, "block_args is {'attn_layer': "),
        ({"model_args": {"global_pool": "catavgmax"}}, "model_args: global_pool is 'catavgmax'; "),
        ({"global_pool": "max"}, "config.json: global_pool is 'max'; "),
        ({"pretrained_cfg": {"global_pool": "avgmax"}}, "pretrained_cfg: global_pool is 'avgmax'"),
        ({"model_args": ["x"]}, "model_args is ['x'] and should be an object"),
    ],
)  # fmt: skip
def test_unsupported_arguments_of_timm_are_refused(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    """The check comes before the tensors are read."""
    write(tmp_path / "config.json", **values)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(RequestError, match=re.escape(message)):
        load_pretrained(tmp_path)


def test_arguments_of_timm_without_effect_are_accepted(
    resnet18: Pretrained, tmp_path: Path
) -> None:
    export(tmp_path / "model.safetensors", resnet18, "timm")
    usual = {"drop_rate": 0.3, "drop_path_rate": 0.1, "num_classes": 7, "in_chans": 3}
    usual |= {"global_pool": "avg", "aa_layer": None, "output_stride": 32, "act_layer": "relu"}
    usual |= {"norm_layer": "batchnorm2d", "img_size": 224, "features_only": False}
    write(tmp_path / "config.json", architecture="resnet18", global_pool="avg", model_args=usual)
    assert_same_variables(load_pretrained(tmp_path).variables, resnet18.variables)


@pytest.mark.parametrize(
    ("architecture", "supported", "other"),
    [
        ("mobilenetv2_050", {"act_layer": "relu6", "bn_eps": 1e-5, "pad_type": ""}, "silu"),
        ("mobilenetv3_small_075", {"act_layer": "hard_swish", "fix_stem_head": False}, "relu6"),
        ("tf_efficientnet_lite0", {"act_layer": "relu6", "bn_eps": 1e-3, "pad_type": "same"}, ""),
        ("efficientnet_b0", {"act_layer": "silu", "bn_eps": 1e-5, "pad_type": ""}, "relu"),
        ("tf_efficientnet_b0", {"act_layer": "swish", "bn_eps": 1e-3, "pad_type": "same"}, "relu"),
        ("mobilenetv4_conv_small", {"act_layer": "relu", "bn_eps": 1e-5, "pad_type": ""}, "silu"),
        ("resnet18", {"act_layer": "relu", "global_pool": None}, "relu6"),
    ],
)
def test_default_arguments_of_timm_are_accepted(
    tmp_path: Path, architecture: str, supported: dict[str, Any], other: str
) -> None:
    config = {"architecture": architecture, "global_pool": None}
    assert read_architecture(write(tmp_path / "config.json", **config, model_args=supported))
    different = {"act_layer": other, "bn_eps": 1e-2, "pad_type": "valid", "fix_stem_head": True}
    for key, value in different.items():
        write(tmp_path / "config.json", **config, model_args={**supported, key: value})
        with pytest.raises(RequestError, match=f"model_args: {key} is "):
            read_architecture(tmp_path)


@pytest.fixture(scope="module")
def one_output() -> Any:
    """Return a network of transformers with one output, called cat."""
    network = torch_resnet("resnet18", num_classes=1).eval()
    network.config.id2label = {0: "cat"}
    return network


def test_one_output_of_several_labels_becomes_two_classes(one_output: Any, tmp_path: Path) -> None:
    one_output.config.problem_type = "multi_label_classification"
    one_output.save_pretrained(tmp_path)
    model, variables, card = load_pretrained(tmp_path)
    images = random_images(2, 65, 64)
    with torch.no_grad():
        logit = one_output(to_torch(normalize(images, model.preprocess))).logits.numpy()
    np.testing.assert_allclose(
        run(model, variables, images).logits, np.insert(logit, 0, 0, axis=1), rtol=0, atol=1e-4
    )
    assert card.classes == ("not cat", "cat")
    assert card.notes == (f"{tmp_path}: its single output is read as the sigmoid logit of 'cat'",)
    label = load_pretrained(tmp_path, task="multilabel").card
    assert (label.task, label.classes, label.notes) == (Task("multilabel"), ("cat",), ())


def test_one_output_is_a_number_by_default_as_in_transformers(
    one_output: Any, tmp_path: Path
) -> None:
    one_output.config.problem_type = "regression"
    one_output.save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).card.notes == ()
    with pytest.raises(RequestError, match="predicts numbers, so its task is not classification"):
        load_pretrained(tmp_path, task="classification")
    one_output.config.problem_type = None
    one_output.save_pretrained(tmp_path)
    card = load_pretrained(tmp_path).card
    assert (card.task, card.classes) == (Task("regression"), ("cat",))
    [note] = card.notes
    assert note == (
        f"{tmp_path}/config.json: there is no problem_type for its single output, which "
        "transformers reads as a number; `tljax weights import --task` chooses another"
    )
    assert load_pretrained(tmp_path, task="classification").card.classes == ("not cat", "cat")
    # What transformers does: its loss for one output is the squared error.
    one_output(torch.zeros(2, 3, 64, 64), labels=torch.zeros(2))
    assert one_output.config.problem_type == "regression"


def test_one_output_of_exclusive_classes_is_refused(one_output: Any, tmp_path: Path) -> None:
    one_output.config.problem_type = "single_label_classification"
    one_output.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=r"problem_type is '\w+' with 1 outputs; .* expects mul"):
        load_pretrained(tmp_path)


def test_a_folder_with_a_file_of_tljax_needs_no_config(
    resnet18: Pretrained, tmp_path: Path
) -> None:
    export(tmp_path / "model.safetensors", resnet18, "tljax")
    assert load_pretrained(tmp_path).card == replace(resnet18.card, layout="tljax")
