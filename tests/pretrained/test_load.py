"""Loading, saving and exporting of weights."""

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import linen as nn
from networks import (
    TorchLite,
    assert_same_variables,
    difference,
    random_images,
    random_pretrained,
    random_variables,
    run,
    to_torch,
    torch_resnet,
    torchvision_key,
)
from references import FAST
from transformers import AutoModelForImageClassification

from tljax.models import Model, Stage, apply, build_model, normalize, replace_head, with_head
from tljax.models import model as network
from tljax.models.layers import Mode
from tljax.pretrained import (
    Card,
    Pretrained,
    export,
    imagenet_classes,
    load_pretrained,
    save,
)
from tljax.pretrained.formats import read_tensors, write_safetensors
from tljax.pretrained.rules import invert_rules
from tljax.pretrained.tables.layouts import LAYOUTS, layout_rules
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import CAFFE_PREPROCESS, INCEPTION_PREPROCESS, Preprocess
from tljax.runtime.types import Variables


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """Return a folder for large files that is removed after the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def resnet18() -> Pretrained:
    return random_pretrained("resnet18")


QUICK = {("resnet18", "tljax"), *FAST}


def _has_classifier(name: str, layout: str) -> bool:
    """Return True unless transformers has only the backbone, or a head has no bias."""
    if layout == "open_clip":
        return False
    config = LAYOUTS[name][layout].config(name) if layout == "huggingface" else {}
    return "ForImageClassification" in str(config.get("architectures", "ForImageClassification"))


# --- export and load ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) in QUICK else pytest.mark.slow)
        for name in LAYOUTS
        for layout in (*LAYOUTS[name], "tljax")
    ],
)
def test_an_exported_network_is_loaded_unchanged(name: str, layout: str, scratch: Path) -> None:
    pretrained = random_pretrained(name, 3 if _has_classifier(name, layout) else 0)
    path = scratch / {"huggingface": "folder", "keras": "file.h5"}.get(layout, "file.safetensors")
    export(path, pretrained, layout)
    loaded = load_pretrained(path, model=name)
    usual = layout != "tljax" and LAYOUTS[name][layout].preprocess
    preprocess = usual or pretrained.model.preprocess
    assert loaded.model == replace(pretrained.model, preprocess=preprocess)
    assert_same_variables(loaded.variables, pretrained.variables)
    table = LAYOUTS[name].get(layout)
    first = next((key for key, other in LAYOUTS[name].items() if other is table), layout)
    assert loaded.card.layout == first


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "resnet50",
                "resnetv2_50x1_bit",
                "tf_mobilenetv1_025",
                "tf_mobilenetv2_035",
                "regnetx_002",
                "regnety_002",
                "convnext_tiny",
                "convnextv2_atto",
                "tf_efficientnet_b0",
            )
        ),
    ],
)
def test_transformers_reads_exported_networks(name: str, scratch: Path) -> None:
    model, variables, card = pretrained = random_pretrained(name)
    export(scratch, pretrained, "huggingface")
    network = AutoModelForImageClassification.from_pretrained(scratch).eval()
    assert network.config.id2label == dict(enumerate(card.classes))
    # transformers' EfficientNet pads images of an odd size in another way than TensorFlow
    images = random_images(2, 96 if "efficientnet" in name else 97, 64)
    with torch.no_grad():
        expected = network(to_torch(normalize(images, model.preprocess))).logits
    assert difference(run(model, variables, images).logits, expected) <= 1e-4
    assert load_pretrained(scratch).card.classes == card.classes


def test_an_exported_torch_file_equals_the_original(scratch: Path) -> None:
    """In every key and every bit, including num_batches_tracked."""
    resnet = {torchvision_key(key): t for key, t in torch_resnet("resnet18").state_dict().items()}
    lite = TorchLite("efficientnet_lite0").state_dict()
    for layout, original in [("torchvision", resnet), ("efficientnet_pytorch", lite)]:
        torch.save(original, scratch / "in.pth")
        export(scratch / "out.pth", load_pretrained(scratch / "in.pth"), layout)
        exported = torch.load(scratch / "out.pth", weights_only=True)
        assert exported.keys() == original.keys()
        assert sum(key.endswith("num_batches_tracked") for key in exported) > 19
        for key, tensor in original.items():
            assert exported[key].dtype == tensor.dtype
            assert torch.equal(exported[key], tensor), key


def test_unknown_suffixes_and_layouts_are_refused(resnet18: Pretrained, tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match=r"unknown format: .*net.h5; use the suffix .safetensors, .pth or .npz"
    ):
        export(tmp_path / "net.h5", resnet18, "torchvision")
    with pytest.raises(RequestError, match=r"no layout 'keras' for resnet18; known: torchvision"):
        export(tmp_path / "net.pth", resnet18, "keras")
    mobilenet = random_pretrained("keras_mobilenetv1_025")
    with pytest.raises(
        RequestError, match=r"Keras cannot read net.keras; use the suffix .weights.h5"
    ):
        export(tmp_path / "net.keras", mobilenet, "keras")
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_preprocessing_takes_the_given_normalization(
    resnet18: Pretrained, tmp_path: Path
) -> None:
    path = tmp_path / "bare.safetensors"
    export(path, resnet18, "torchvision")
    usual = load_pretrained(path).model.preprocess
    assert load_pretrained(path, normalization="torch").model.preprocess == usual
    for normalization, expected in (("caffe", CAFFE_PREPROCESS), ("tf", INCEPTION_PREPROCESS)):
        loaded = load_pretrained(path, normalization=normalization).model.preprocess
        assert loaded == replace(usual, **normalization_of(expected))
    with pytest.raises(
        RequestError, match="no normalization 'bgr'; choose from torch, tf, caffe, clip"
    ):
        load_pretrained(path, normalization="bgr")


def test_a_normalization_that_contradicts_the_file_is_refused(
    resnet18: Pretrained, tmp_path: Path
) -> None:
    save(tmp_path / "own.safetensors", resnet18)
    export(tmp_path / "hub", resnet18, "huggingface")
    for path in (tmp_path / "own.safetensors", tmp_path / "hub"):
        loaded = load_pretrained(path, normalization="torch")
        assert loaded.model.preprocess == resnet18.model.preprocess
        with pytest.raises(
            RequestError, match=r"RGB with mean 0.485 .*not the normalization 'caffe'"
        ):
            load_pretrained(path, normalization="caffe")


def normalization_of(preprocess: Preprocess) -> dict[str, Any]:
    return {name: getattr(preprocess, name) for name in ("mean", "std", "channel_order")}


def test_a_file_of_tljax_preserves_everything(resnet18: Pretrained, tmp_path: Path) -> None:
    uneven = (0.5, 0.25, 0.125)
    preprocess = Preprocess(160, 181, "bicubic", uneven, uneven, "bgr")
    model, variables = replace_head(resnet18.model, resnet18.variables, 7, dropout=0.25)
    model = replace(model, preprocess=preprocess, dtype="bfloat16")
    pretrained = resnet18._replace(model=model, variables=variables)
    save(tmp_path / "best" / "model.safetensors", pretrained)
    expected = Card(pretrained.card.classes, "somewhere", "MIT", "0" * 64, "tljax")
    # A run directory, and the file inside it.
    for path in (tmp_path, tmp_path / "best" / "model.safetensors"):
        loaded = load_pretrained(path)
        assert (loaded.model, loaded.card) == (pretrained.model, expected)
        assert hash(loaded.model) == hash(pretrained.model)
        assert_same_variables(loaded.variables, pretrained.variables)
    with pytest.raises(RequestError, match=r"model.safetensors holds resnet18, not resnet50"):
        load_pretrained(tmp_path, model="resnet50")


FIRST = Path(__file__).with_name("first_version.safetensors")
"""MobileNet v1 cut after its stem, written by tljax before the format had a version."""


def test_a_file_of_the_first_version_gives_the_same_logits() -> None:
    model, variables, card = load_pretrained(FIRST)
    whole = build_model("tf_mobilenetv1_025")
    expected = with_head(whole, 3, after="stem", dropout=0.25)
    assert model.stages == expected.stages
    assert model.preprocess == replace(whole.preprocess, size=32, resize=36, channel_order="bgr")
    assert card.classes == ("ant", "bee", "wasp")
    images = (np.arange(2 * 32 * 32 * 3) % 251).reshape(2, 32, 32, 3).astype(np.uint8)
    logits = [[-0.09608488, -0.11388412, -0.55093825], [-0.12130767, -0.10395706, -0.56144785]]
    np.testing.assert_allclose(apply(model, variables, images).logits, logits, rtol=1e-5)


def test_a_file_of_the_first_version_is_saved_in_the_current_one(tmp_path: Path) -> None:
    first = load_pretrained(FIRST)
    save(tmp_path / "again.safetensors", first)
    again = load_pretrained(tmp_path / "again.safetensors")
    assert (again.model, again.card) == (first.model, first.card)
    assert_same_variables(again.variables, first.variables)
    header = header_of(tmp_path / "again.safetensors")
    assert (header["version"], header["model"]["name"]) == (2, "tf_mobilenetv1_025")


def header_of(path: Path) -> dict[str, Any]:
    return json.loads(read_tensors(path).metadata["tljax"])


def with_header(path: Path, header: str, source: Path = FIRST) -> Path:
    """Write the tensors of a file with another header."""
    copies = {key: np.array(array) for key, array in read_tensors(source).arrays.items()}
    write_safetensors(path, copies, {"tljax": header})
    return path


def test_a_file_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = with_header(tmp_path / "x.safetensors", json.dumps(header_of(FIRST) | {"version": 4}))
    with pytest.raises(
        RequestError, match=r"x.safetensors is version 4 .* reads up to version 3: upgr"
    ):
        load_pretrained(path)


class Hidden(nn.Module):
    width: int
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        return nn.Dense(self.num_classes)(nn.relu(nn.Dense(self.width)(x)))


@pytest.fixture
def custom_head() -> Pretrained:
    """Return a network with a user-defined head, under another name than a linear one."""
    loaded = load_pretrained(FIRST)
    stage = Stage("answer", Hidden(5, 3), "vector")
    model = replace(loaded.model, stages=(*loaded.model.stages[:-1], stage))
    return loaded._replace(model=model, variables=random_variables(model))


def test_a_user_defined_head_is_saved_and_loaded(custom_head: Pretrained, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save(path, custom_head)
    loaded = load_pretrained(path, modules={"Hidden": Hidden}).require_classes()
    assert (loaded.model, loaded.card) == (custom_head.model, custom_head.card)
    assert_same_variables(loaded.variables, custom_head.variables)
    with pytest.raises(RequestError) as caught:
        load_pretrained(path)
    assert str(caught.value) == (
        f"{path}: it needs the module 'Hidden', which tljax does not have: supply its Flax class "
        "with --extension FILE.py, in Python with modules={...}"
    )


def test_a_head_with_unnamed_outputs_is_not_a_classifier(
    custom_head: Pretrained,
) -> None:
    card = replace(custom_head.card, classes=("ant", "bee"))
    with pytest.raises(
        RequestError, match="has 3 outputs but 2 class names: it is not a classifier"
    ):
        custom_head._replace(card=card).require_classes()


def test_one_output_of_a_user_defined_head_is_not_a_sigmoid(
    custom_head: Pretrained, tmp_path
) -> None:
    stages = (*custom_head.model.stages[:-1], Stage("answer", Hidden(5, 1), "vector"))
    model = replace(custom_head.model, stages=stages)
    card = replace(custom_head.card, classes=("degrees",))
    save(tmp_path / "x.safetensors", Pretrained(model, random_variables(model), card))
    loaded = load_pretrained(tmp_path / "x.safetensors", modules={"Hidden": Hidden})
    assert (loaded.model, loaded.card) == (model, card)


def test_networks_that_do_not_fit_a_layout_are_not_exported(
    custom_head: Pretrained, tmp_path: Path
) -> None:
    cut = load_pretrained(FIRST)
    renamed = custom_head._replace(model=replace(custom_head.model, name="custom"))
    for odd, message in (
        (custom_head, "requires a tf_mobilenetv1_025 with all its stages and a linear head; exp"),
        (cut, "requires a tf_mobilenetv1_025 with all its stages and a linear head; exp"),
        (renamed, "there is no layout 'huggingface' for custom; known: tljax"),
    ):
        with pytest.raises(RequestError, match=message):
            export(tmp_path, odd, "huggingface")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("after", ["layer2", "pool"])
def test_a_file_of_tljax_preserves_dropped_stages(
    resnet18: Pretrained, tmp_path: Path, after: str
) -> None:
    model, variables = replace_head(resnet18.model, resnet18.variables, 7, after=after)
    pretrained = resnet18._replace(model=model, variables=variables)
    save(tmp_path / "cut.safetensors", pretrained)
    loaded = load_pretrained(tmp_path / "cut.safetensors")
    assert loaded.model == model
    assert_same_variables(loaded.variables, variables)


def test_an_unknown_stage_in_a_header_of_the_first_version_is_refused(tmp_path: Path) -> None:
    path = with_header(
        tmp_path / "x.safetensors", json.dumps(header_of(FIRST) | {"head_after": []})
    )
    with pytest.raises(RequestError, match=r"tf_mobilenetv1_025 has no stage '\[\]'"):
        load_pretrained(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: "{",
        lambda header: "[]",
        lambda header: json.dumps({}),
        lambda header: json.dumps(header | {"card": {"classes": list("abcdefg")}}),
        lambda header: json.dumps(header | {"card": header["card"] | {"classes": 7}}),
        lambda header: json.dumps(header | {"preprocess": {"mean": 0.5, "std": 0.5}}),
        lambda header: json.dumps(header | {"preprocess": header["preprocess"] | {"colour": 1}}),
        lambda header: json.dumps(header | {"dtype": "float17"}),
        lambda header: json.dumps(header | {"version": "two"}),
        lambda header: json.dumps(header | {"version": [2]}),
        lambda header: json.dumps(header | {"dropout": "much"}),
        lambda header: json.dumps(header | {"dropout": 1.5}),
        lambda header: json.dumps(header | {"dtype": "int8"}),
        lambda header: json.dumps(header | {"head_after": "head" * 5000, "dtype": "x" * 5000}),
        lambda header: json.dumps(header | {"card": header["card"] | {"colour": "blue"}}),
        *(
            lambda header, wrong=wrong: json.dumps(
                header | {"preprocess": header["preprocess"] | wrong}
            )
            for wrong in (
                {"size": 200_000, "resize": 200_000},
                {"resize": 10_001},
                {"size": 0},
                {"size": -224},
                {"size": 224.0},
                {"size": True},
                {"size": "224"},
                {"size": 224, "resize": 223},
                {"interpolation": "lanczos"},
                {"interpolation": ["bicubic"]},
                {"channel_order": "gbr"},
                {"mean": [0.5, 0.5]},
                {"mean": "0.5"},
                {"mean": [0.5, 0.5, float("nan")]},
                {"std": [0.5, 0.5, 0]},
                {"std": [0.5, 0.5, -1]},
                {"std": [0.5, 0.5, float("inf")]},
                {"std": [0.5, 0.5, None]},
            )
        ),
    ],
)
def test_damaged_headers_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], str]
) -> None:
    path = with_header(tmp_path / "x.safetensors", change(header_of(FIRST)))
    with pytest.raises(
        RequestError, match=r"x.safetensors: its tljax header is damaged \("
    ) as caught:
        load_pretrained(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model", [None, [], {}, {"version": 1}, {"version": 9}, "resnet18", {"version": 1, "stages": 3}]
)
def test_damaged_model_descriptions_are_refused(tmp_path: Path, model: Any) -> None:
    header = header_of(FIRST) | {"version": 2, "model": model}
    path = with_header(tmp_path / "x.safetensors", json.dumps(header))
    with pytest.raises(
        RequestError, match=r"x.safetensors: its (description of a )?model "
    ) as caught:
        load_pretrained(path)
    assert "\n" not in str(caught.value)


def test_loading_traces_a_network_once(
    resnet18: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracing takes a second, and the keys of both torchvision and timm fit."""
    export(tmp_path / "x.safetensors", resnet18, "torchvision")
    traced = []

    def trace(model: Model, key: jax.Array) -> tuple[Variables, jax.Array]:
        traced.append(model)
        return build(model, key)

    build = network._build
    monkeypatch.setattr(network, "_build", trace)
    network._trace_cached.cache_clear()
    load_pretrained(tmp_path / "x.safetensors")
    assert len(traced) == 1


@pytest.mark.parametrize("layout", ["torchvision", "tljax"])
def test_one_output_is_read_as_a_sigmoid(tmp_path: Path, layout: str) -> None:
    model, variables, _ = one = random_pretrained("resnet18", 1)
    export(tmp_path / "one.safetensors", one, layout)
    loaded = load_pretrained(tmp_path / "one.safetensors", model="resnet18")
    images = random_images(3, 64, 64)
    probabilities = jax.nn.softmax(run(loaded.model, loaded.variables, images).logits)
    logit = run(model, variables, images).logits[:, 0]
    expected = np.stack([jax.nn.sigmoid(-logit), jax.nn.sigmoid(logit)], 1)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-5)
    names = {"tljax": ("not kind 0", "kind 0"), "torchvision": ("class 0", "class 1")}[layout]
    assert loaded.card.classes == names
    [note] = loaded.card.notes
    assert f"its single output is read as the sigmoid logit of '{names[1]}'" in note
    save(tmp_path / "two.safetensors", loaded)  # saved with two outputs
    assert load_pretrained(tmp_path / "two.safetensors").card.notes == ()


def test_a_note_names_the_tensors_that_are_left_out(resnet18: Pretrained, tmp_path: Path) -> None:
    """The file is a checkpoint of a compiled network with the settings of its training."""
    arrays = invert_rules(layout_rules("resnet18", "torchvision"), resnet18.variables)
    state_dict = {f"_orig_mod.{key}": torch.from_numpy(array) for key, array in arrays.items()}
    path = tmp_path / "checkpoint.pth.tar"
    args = argparse.Namespace(model="resnet18", data=tmp_path)
    for others, notes in (
        ({}, ()),
        (
            {"criterion.weight": torch.ones(7)},
            (f"{path}: ignored tensors that resnet18 does not use: criterion.weight",),
        ),
    ):
        torch.save({"state_dict": {**state_dict, **others}, "args": args, "epoch": 3}, path)
        model, variables, card = load_pretrained(path)
        assert (model.name, card.layout, card.notes) == ("resnet18", "torchvision", notes)
        assert_same_variables(variables, resnet18.variables)


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "hint"),
    [
        ("resnet50.tv_in1", "did you mean resnet50.tv_in1k?"),
        ("efficientnet_lite0", "did you mean efficientnet_lite0.in1k?"),
        ("keras:VGG6", "known names: keras:VGG16, keras:VGG19, "),
        ("Keras:DenseNet121", "known names: keras:VGG16, keras:VGG19, "),
        ("missing/net.pth", "`tljax weights list` prints the known names"),
    ],
)
def test_misspelled_weights_suggest_the_nearest_name(weights: str, hint: str) -> None:
    message = f"no weights are called '{weights}' and no such file exists; {hint}"
    with pytest.raises(RequestError, match=re.escape(message)):
        load_pretrained(weights)


def test_a_class_is_found_by_its_name_or_index(resnet18: Pretrained) -> None:
    card = replace(resnet18.card, classes=("crane", "Siamese cat", "zebra", "crane", "7"))
    numbered = replace(card, classes=("1", "2", "3", "cat", "Cat"))
    assert [numbered.index_of(name) for name in ("1", "2", "3", "0", "4")] == [0, 1, 2, 0, 4]
    assert [numbered.index_of(name) for name in ("cat", "Cat")] == [3, 4]
    with pytest.raises(RequestError, match="2 classes are called 'CAT'; use 3 or 4"):
        numbered.index_of("CAT")
    assert card.index_of("siamese CAT") == 1
    assert card.index_of("2") == 2
    stars = replace(card, classes=tuple("12345"))
    assert stars.index_of("2") == 1
    with pytest.raises(RequestError, match="no class is called '0' among 5"):
        stars.index_of("0")
    assert card.index_of("7") == 4
    herons = replace(card, classes=("lynx", "h\u00e9ron"))  # in both Unicode normal forms
    assert herons.index_of("he\u0301ron") == herons.index_of("H\u00e9ron") == 1
    with pytest.raises(RequestError, match="2 classes are called 'crane'; use 0 or 3"):
        card.index_of("crane")
    with pytest.raises(RequestError, match="'zebre' among 5; did you mean zebra"):
        card.index_of("zebre")
    with pytest.raises(RequestError, match="no class is called '5' among 5"):
        card.index_of("5")
    with pytest.raises(RequestError, match="no class is called '-1'"):
        card.index_of("-1")


def test_a_misspelled_model_is_refused_before_any_download() -> None:
    with pytest.raises(RequestError, match=r"did you mean resnet50?"):
        load_pretrained("nobody/nothing", model="resnet5O")


def test_a_catalog_entry_of_another_model_is_refused() -> None:
    with pytest.raises(RequestError, match=r"resnet18.tv_in1k holds resnet18, not resnet50"):
        load_pretrained("resnet18.tv_in1k", model="resnet50")


# --- real weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_real_weights_are_loaded(name: str, shared_weights: Path) -> None:
    path = shared_weights / f"{name}.ktb_in1k.safetensors"
    model, variables, card = load_pretrained(path)
    assert (model.name, card.layout, card.classes) == (name, "torchvision", imagenet_classes())
    packed = Path(__file__).resolve().parents[3] / "shared" / "weights" / f"{path.name}.xz"
    assert_same_variables(load_pretrained(packed).variables, variables)
    stored = read_tensors(path).arrays["layer1.0.conv1.weight"]
    kernel = variables["params"]["layer1"]["block0"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, stored.transpose(2, 3, 1, 0).astype(np.float32))


@pytest.mark.parametrize("name", ["./run", "../run", "runs/20260101-000000", "~/run"])
def test_a_mistyped_folder_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tljax.pretrained.load.fetch_hub", lambda _: pytest.fail("hub contacted"))
    with pytest.raises(RequestError, match=rf"^{name} does not exist$"):
        load_pretrained(name)


def test_nan_in_a_file_of_tljax_is_named(tmp_path, resnet18):
    head = {**resnet18.variables["params"]["head"]}
    head["bias"] = np.full_like(head["bias"], np.nan)
    params = {**resnet18.variables["params"], "head": head}
    path = tmp_path / "net.safetensors"
    save(path, resnet18._replace(variables={**resnet18.variables, "params": params}))
    with pytest.raises(RequestError, match=rf"^{path}: params/head/bias holds NaN or infinity"):
        load_pretrained(path)
