"""Regression end to end: the real ResNet-18 tells by how many degrees a photograph is turned."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIDE = 160


def turned(photograph: Path, angle: float) -> Image.Image:
    """Turn the central square of a photograph."""
    image = Image.open(photograph).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.rotate(angle, Image.Resampling.BICUBIC).resize((SIDE, SIDE))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """Write turned photographs and a table of their angles, in degrees."""
    folder, rng = tmp_path_factory.mktemp("turned"), np.random.default_rng(0)
    rows = []
    for part in ("train", "val"):
        for number, photograph in enumerate(
            sorted((shared_data / "cats_dogs" / part).rglob("*.jpg"))
        ):
            angle = round(float(rng.uniform(-45, 45)), 1)
            name = f"{part}{number:04d}.jpg"
            turned(photograph, angle).save(folder / name, quality=92)
            rows.append((name, part, angle))
    with (folder / "angles.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "split", "angle"), *rows])
    return folder / "angles.csv"


def train(table: Path, weights: Path, recipe: str, *options: object) -> dict:
    command = [
        *(sys.executable, "-m", "tljax", "train", "--data", table, "--weights", weights),
        *("--target", "angle", "--units", "degrees", "--image-size", 128, "--recipe", recipe),
        *("--workdir", table.parent / recipe, "--json", *options),
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_fine_tuning_tells_the_angle_and_a_probe_is_worse(table: Path, shared_weights: Path):
    weights = shared_weights / "resnet18.ktb_in1k.safetensors"
    probe = train(table, weights, "probe")
    tuned = train(
        table, weights, "finetune", "--epochs", 5, "--learning-rate", 3e-4, "--batch-norm", "batch"
    )
    print(
        f"mean absolute error: probe {probe['val_mae']:.2f}, tuned {tuned['val_mae']:.2f} degrees"
    )
    assert (probe["task"], tuned["task"]) == ("regression", "regression")
    assert tuned["val_mae"] < 10
    assert tuned["val_mae"] < probe["val_mae"]
