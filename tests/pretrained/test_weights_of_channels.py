"""Weights of other projects for images of other channels than RGB, read and written."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from networks import difference, random_pretrained, randomize_norms, run, to_torch
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification

from tljax.models import adapt_input, normalize
from tljax.pretrained import Pretrained, export, load_pretrained, save
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.trees import flatten

CHANNELS = (1, 2, 13)


def quick_for(channels: int) -> list:
    """Return the numbers of channels, all but one of them slow."""
    return [pytest.param(n, marks=[] if n == channels else pytest.mark.slow) for n in CHANNELS]


def of_channels(channels: int, dtype: str = "uint8") -> Pretrained:
    model, variables, card = random_pretrained("resnet18")
    mean, std = np.linspace(0.1, 0.6, channels), np.linspace(0.5, 0.2, channels)
    preprocess = Preprocess(48, 56, "bicubic", tuple(mean.tolist()), tuple(std.tolist()))
    model, variables = adapt_input(model, variables, replace(preprocess, dtype=dtype))
    return Pretrained(model, variables, card)


@pytest.mark.parametrize("channels", quick_for(1))
def test_a_file_of_timm_says_its_channels_by_its_first_kernel(channels: int, tmp_path: Path):
    network = oracles.load("timm").create_model("resnet18", num_classes=5, in_chans=channels)
    with torch.no_grad():
        randomize_norms(network, torch.Generator().manual_seed(0))
    folder = tmp_path / "saved"
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    alone = load_pretrained(folder / "model.safetensors")
    assert alone.model.preprocess.channels == channels
    np.testing.assert_allclose(alone.model.preprocess.mean, [np.mean(Preprocess().mean)] * channels)
    (note,) = (note for note in alone.card.notes if "input channels" in note)
    assert f"the mean and deviation of its {channels} input channels are not stored" in note
    with pytest.raises(RequestError, match=f"has {channels} input channels: a normalization is of"):
        load_pretrained(folder / "model.safetensors", normalization="tf")

    config = {
        "architecture": "resnet18",
        "num_classes": 5,
        "model_args": {"in_chans": channels},
        "pretrained_cfg": {
            "input_size": [3, 224, 224],
            "interpolation": "bicubic",
            "crop_pct": 0.95,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_pretrained(folder)
    assert loaded.model.preprocess == replace(
        alone.model.preprocess, resize=math.floor(224 / 0.95), interpolation="bicubic"
    )
    config["pretrained_cfg"] |= {"mean": [0.5] * channels, "std": [0.25] * channels}
    config["pretrained_cfg"]["input_size"] = [channels, 224, 224]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_pretrained(folder)
    assert loaded.model.preprocess.mean == (0.5,) * channels
    assert not loaded.card.notes

    images = np.random.default_rng(0).random((2, 75, 53, channels), np.float32)
    with torch.no_grad():
        expected = network.eval()(to_torch(normalize(images, loaded.model.preprocess))).numpy()
    assert difference(run(loaded.model, loaded.variables, images).logits, expected) < 1e-4


def test_a_configuration_of_other_channels_than_the_tensors_is_refused(tmp_path: Path):
    network = of_channels(4)
    export(tmp_path / "model.safetensors", network, "timm")
    cfg = {"input_size": [13, 48, 48], "interpolation": "bicubic", "crop_pct": 1}
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "resnet18", "pretrained_cfg": cfg})
    )
    with pytest.raises(RequestError, match=r"input_size is \[13, 48, 48\] and should be \[4, n, n"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("channels", [1, 13])
@pytest.mark.parametrize("layout", ["timm", "torchvision", "huggingface"])
def test_what_is_exported_is_read_back(channels: int, layout: str, tmp_path: Path):
    network = of_channels(channels)
    path = tmp_path if layout == "huggingface" else tmp_path / "model.safetensors"
    export(path, network, layout)
    loaded = load_pretrained(path)
    before, after = flatten(network.variables), flatten(loaded.variables)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    if layout == "huggingface":
        assert loaded.model.preprocess == network.model.preprocess
        assert loaded.card.classes == network.card.classes


@pytest.mark.parametrize("channels", quick_for(13))
def test_transformers_computes_the_same_logits_of_what_is_exported(channels: int, tmp_path: Path):
    network = of_channels(channels)
    export(tmp_path, network, "huggingface")
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.num_channels == channels
    images = np.random.default_rng(0).random((2, 65, 49, channels), np.float32)
    with torch.no_grad():
        expected = theirs(to_torch(normalize(images, network.model.preprocess))).logits.numpy()
    assert difference(run(network.model, network.variables, images).logits, expected) < 1e-4


@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint8"), (3, "float32"), (13, "float32")])
def test_a_saved_network_keeps_its_channels(channels: int, dtype: str, tmp_path: Path):
    network = of_channels(channels, dtype)
    save(tmp_path / "saved.safetensors", network)
    assert load_pretrained(tmp_path / "saved.safetensors").model == network.model
