"""Verification names the layer of errors that only a comparison of outputs can detect."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import oracles
import pytest
import safetensors.torch
from networks import random_pretrained, save_resnet, torch_resnet, torchvision_key
from references import REFERENCES
from references.bit import torch_bit

from tljax.pretrained import Pretrained, export, load_pretrained, save
from tljax.pretrained.verify import TOLERANCE, LayerDifference, verify
from tljax.runtime.errors import RequestError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save ResNet-18 with transformers. Its head is square, so that it can be transposed."""
    return save_resnet(tmp_path_factory.mktemp("resnet18"), "resnet18", num_classes=512)


def wrong_layers(pretrained: Pretrained, reference: Path) -> list[LayerDifference]:
    layers = verify(pretrained, str(reference))
    return [layer for layer in layers if not layer.difference <= TOLERANCE or layer.reason]


def with_swapped_statistics(pretrained: Pretrained) -> Pretrained:
    """Swap mean and variance of one layer; both are positive, so the tensors look valid."""
    variables = jax.tree.map(np.array, pretrained.variables)
    layer = variables["batch_stats"]["layer2"]["block1"]["conv1"]
    layer["mean"], layer["var"] = layer["var"], np.abs(layer["mean"]) + 0.01
    return pretrained._replace(variables=variables)


@pytest.mark.slow
def test_the_same_network_in_another_file_passes(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "native.safetensors", load_pretrained(folder))
    assert wrong_layers(load_pretrained(tmp_path / "native.safetensors"), folder) == []
    state = torch_resnet("resnet18", 512).state_dict()
    renamed = {torchvision_key(key): value for key, value in state.items()}
    safetensors.torch.save_file(renamed, tmp_path / "torchvision.safetensors")
    pretrained = load_pretrained(tmp_path / "torchvision.safetensors")
    assert pretrained.card.layout == "torchvision"
    assert wrong_layers(pretrained, folder) == []


@pytest.mark.slow
def test_a_network_with_another_name_in_torchvision_passes(tmp_path: Path) -> None:
    oracles.load("torchvision")
    weights = REFERENCES["regnety_004", "torchvision"](tmp_path / "reference").weights
    layers = verify(load_pretrained(weights))
    assert len(layers) == 1 + 5 * 16 + 4 + 1  # with 16 blocks, of which 4 have a shortcut
    assert max(layer.difference for layer in layers) <= TOLERANCE
    state = REFERENCES["regnety_004", "timm"](tmp_path / "timm").weights
    with pytest.raises(RequestError, match=r"there is no reference for .*timm keys"):
        verify(load_pretrained(state))


@pytest.mark.slow
def test_layers_without_batch_norm_pass(tmp_path: Path) -> None:
    torch_bit("resnetv2_50x1_bit").save_pretrained(tmp_path)
    layers = verify(load_pretrained(tmp_path))
    assert {"stem/conv", "layer2/block0/shortcut", "layer4/block2/norm3", "norm/norm"} < {
        layer.layer for layer in layers
    }
    assert max(layer.difference for layer in layers) <= TOLERANCE


@pytest.mark.usefixtures("one_small_input")
def test_swapped_mean_and_variance_are_detected(folder: Path) -> None:
    first = wrong_layers(with_swapped_statistics(load_pretrained(folder)), folder)[0]
    assert (first.layer, first.reason) == ("layer2/block1/conv1", "mean and var differ")
    assert first.difference > 0.01


@pytest.mark.usefixtures("one_small_input")
def test_a_transposed_square_head_is_detected(folder: Path) -> None:
    pretrained = load_pretrained(folder)
    variables = jax.tree.map(np.array, pretrained.variables)
    variables["params"]["head"]["kernel"] = variables["params"]["head"]["kernel"].T
    [worst] = wrong_layers(pretrained._replace(variables=variables), folder)
    assert (worst.layer, worst.reason) == ("head", "kernel differ")
    assert worst.difference > 0.1


@pytest.mark.slow
def test_a_stride_on_the_wrong_convolution_is_detected(tmp_path: Path) -> None:
    """Versions 1 and 1.5 of ResNet have the same tensors, so a file alone does not tell which."""
    network = torch_resnet("resnet50", downsample_in_bottleneck=True)
    network.save_pretrained(tmp_path / "v1")
    safetensors.torch.save_file(network.state_dict(), tmp_path / "bare.safetensors")
    first = wrong_layers(load_pretrained(tmp_path / "bare.safetensors"), tmp_path / "v1")[0]
    assert (first.layer, first.difference) == ("layer2/block0/conv1", np.inf)
    actual, expected = [2, 56, 56, 128], [2, 28, 28, 128]
    assert first.reason == f"output is {actual}, the reference's {expected}: another stride?"


def test_a_reference_of_another_network_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"the reference is not a resnet34: it lacks resnet"):
        verify(random_pretrained("resnet34"), str(folder))
    tmp_path.joinpath("config.json").write_text("{}")
    with pytest.raises(RequestError, match=f"transformers cannot load {tmp_path}: "):
        verify(random_pretrained("resnet18"), str(tmp_path))


def test_a_missing_reference_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = r"there is no reference for somewhere .*: pass --reference"
    pretrained = random_pretrained("efficientnet_lite0")
    with pytest.raises(RequestError, match=expected):
        verify(pretrained)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(RequestError, match=r"torchvision cannot be imported; pass another"):
        verify(random_pretrained("resnet18"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_small_input")
def test_files_of_keras_are_compared_with_keras(tmp_path: Path) -> None:
    """MobileNet v1 has depthwise kernels, and a convolution as its head."""
    pretrained = random_pretrained("keras_mobilenetv1_025")
    export(tmp_path / "x.weights.h5", pretrained, "keras")
    pretrained = load_pretrained(tmp_path / "x.weights.h5")
    layers = verify(pretrained)
    assert all(layer.difference <= TOLERANCE and not layer.reason for layer in layers)
    assert len(layers) == 1 + 2 * 13 + 1
    variables = jax.tree.map(np.array, pretrained.variables)
    variables["params"]["stage3"]["block1"]["depthwise"]["kernel"] *= 1.1
    export(tmp_path / "y.h5", pretrained, "keras")
    worst = wrong_layers(pretrained._replace(variables=variables), tmp_path / "y.h5")[0]
    assert (worst.layer, worst.reason) == ("stage3/block1/depthwise", "kernel differ")
    with pytest.raises(RequestError, match=r"keras.applications has no resnet18"):
        verify(random_pretrained("resnet18"), "x.h5")


@pytest.mark.slow
def test_the_script_names_the_layer_in_one_line(folder: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    save(wrong, with_swapped_statistics(load_pretrained(folder)))
    command = [sys.executable, "-m", "tljax", "weights", "verify", wrong, "--reference", folder]
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: layer2/block1/conv1 is the first of ")
    assert line.endswith(": mean and var differ")
    assert "Traceback" not in done.stderr
    assert "every layer agrees" not in done.stdout
