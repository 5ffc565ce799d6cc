"""Outputs of every stage, compared with the reference implementation on the same weights."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from networks import (
    LITE,
    TorchLite,
    assert_same_variables,
    difference,
    from_torch,
    random_images,
    run,
    save_resnet,
    timm_state,
    to_torch,
)
from transformers import ResNetForImageClassification

from tljax.data.decode import decode
from tljax.data.examples import Source, match_classes
from tljax.data.folders import open_folder
from tljax.data.options import Loading
from tljax.features.evaluate import evaluate
from tljax.features.extract import compute_features
from tljax.models import normalize
from tljax.pretrained import export, load_pretrained
from tljax.pretrained.catalog import match_class_names
from tljax.pretrained.tables.layouts import layout_rules
from tljax.pretrained.verify import INPUTS, verify
from tljax.runtime.preprocess import Preprocess

TOLERANCE = 1e-4
SIZES = [(224, 224), (225, 193)]
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        pytest.param("resnet18", 21, marks=slow),  # test_zoo.py compares its stages
        pytest.param("resnet34", 37, marks=slow),
        pytest.param("resnet50", 54, marks=slow),
        pytest.param("resnet101", 105, marks=slow),
        pytest.param("resnet152", 156, marks=slow),
    ],
)
def test_resnet_agrees_with_transformers(name: str, layers: int, tmp_path: Path) -> None:
    folder = save_resnet(tmp_path, name)
    model, variables, card = pretrained = load_pretrained(folder)
    assert (model.name, card.layout, model.num_classes) == (name, "huggingface", 7)
    network = ResNetForImageClassification.from_pretrained(folder).eval()

    assert [shape[1:3] for shape in INPUTS] == SIZES
    by_layer = verify(pretrained)
    assert len(by_layer) == layers
    kernels = [rule.path for rule in layout_rules(name, "huggingface") if "kernel" in rule.path]
    assert [f"params/{layer.layer}/kernel" for layer in by_layer] == kernels  # in this order
    assert [layer for layer in by_layer if layer.reason] == []
    worst = max(by_layer, key=lambda layer: layer.difference)
    assert worst.difference <= TOLERANCE, worst

    for size in SIZES:
        images = random_images(2, *size)
        captured = run(model, variables, images, capture=model.stage_names).captured
        pixels = to_torch(normalize(images, model.preprocess))
        with torch.no_grad():
            output = network(pixels, output_hidden_states=True)
            pooled = network.resnet(pixels).pooler_output.flatten(1)
        stages = ("stem", "layer1", "layer2", "layer3", "layer4")
        expected = dict(zip(stages, output.hidden_states, strict=True))
        expected |= {"pool": pooled, "head": output.logits}
        stage_differences = {
            stage: difference(captured[stage], from_torch(expected[stage]))
            for stage in model.stage_names
        }
        assert max(stage_differences.values()) <= TOLERANCE, stage_differences


@pytest.mark.parametrize(
    "name", [*list(LITE)[:1], *(pytest.param(name, marks=slow) for name in list(LITE)[1:])]
)
def test_efficientnet_lite_is_equal_from_every_file_format(name: str, tmp_path: Path) -> None:
    network = TorchLite(name)
    torch.save(network.state_dict(), tmp_path / "zip.pth")
    torch.save(network.state_dict(), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(dict(timm_state(network)), tmp_path / "timm.safetensors")
    expected = load_pretrained(tmp_path / "zip.pth")
    for file, layout in [("legacy.pth", "efficientnet_pytorch"), ("timm.safetensors", "timm")]:
        loaded = load_pretrained(tmp_path / file, model=name)
        assert (loaded.model, loaded.card.layout) == (expected.model, layout)
        assert_same_variables(loaded.variables, expected.variables)


@slow
def test_a_real_resnet18_is_as_accurate_as_in_torch(
    shared_weights: Path, shared_data: Path, tmp_path: Path
) -> None:
    pretrained = load_pretrained(shared_weights / "resnet18.ktb_in1k.safetensors")
    model, variables, card = pretrained
    assert model.preprocess == Preprocess(224, 256, "bilinear")
    source = open_folder(shared_data / "imagenet_samples")
    source, notes = match_classes(source, match_class_names(card.classes, source.classes))
    assert notes == ()
    logits = compute_features(model, variables, source, Loading(), stop=None)
    evaluation = evaluate(logits)
    assert evaluation.examples == 1000
    assert abs(round(1000 * evaluation.top1) - 736) <= 2
    assert abs(round(1000 * evaluation.top5) - 918) <= 2

    export(tmp_path, pretrained, "huggingface")
    network = ResNetForImageClassification.from_pretrained(tmp_path).eval()
    expected = compute_torch_logits(network, source, model.preprocess)[logits.indices]
    same = int((expected.argmax(1) == logits.values.argmax(1)).sum())
    assert same >= 998
    assert difference(logits.values, expected) <= TOLERANCE


def compute_torch_logits(
    network: ResNetForImageClassification, source: Source, preprocess: Preprocess
) -> np.ndarray:
    logits = []
    for start in range(0, len(source), 50):
        images = np.stack([decode(source.read(i), preprocess) for i in range(start, start + 50)])
        with torch.no_grad():
            logits.append(network(to_torch(normalize(images, preprocess))).logits.numpy())
    return np.concatenate(logits)
