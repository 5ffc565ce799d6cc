"""Commands in two processes of four devices and in four of two do what one of eight does."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import random_pretrained
from PIL import Image
from safetensors.numpy import load_file
from together import start_together

from tljax.pretrained import save

pytestmark = pytest.mark.slow
SECONDS = 300
TOGETHER = ((1, 8), (2, 4), (4, 2))
"""Processes, and devices of each."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a network of three classes, and 41 images of which two are broken."""
    folder = tmp_path_factory.mktemp("hosts")
    save(folder / "net.safetensors", random_pretrained("mobilenetv2_050", 3))
    rng = np.random.default_rng(0)
    for i in range(41):
        path = folder / "data" / f"kind {i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40 + i % 3, 39 + i % 5, 3))
        Image.fromarray((pixels // 4 + 60 * (i % 3)).astype(np.uint8)).save(path)
    for i in (7, 30):
        (folder / "data" / f"kind {i % 3}" / f"{i}.png").write_bytes(b"\x89PNG of nothing")
    return folder


def command(inputs: Path, name: str, *flags: str) -> list[str]:
    """Return a command that runs the network of the inputs on small images."""
    network = "--image-size", "32", "--weights", str(inputs / "net.safetensors")
    return [sys.executable, "-m", "tljax", name, "--platform", "cpu", *network, *flags]


def run_together(inputs: Path, out: Path, name: str, *flags: str) -> list[dict[str, Any]]:
    """Run a command in the ways of `TOGETHER`, each with a folder; return what they print."""
    results = []
    for processes, devices in TOGETHER:
        own = [flag.replace("OUT", str(out / f"{processes}")) for flag in (*flags, "--json")]
        own += ["--distributed"] if processes > 1 else []
        (out / f"{processes}").mkdir(parents=True)
        cache = str(out / f"cache{processes}")
        started = start_together(command(inputs, name, *own), processes, devices, TLJAX_CACHE=cache)
        printed = [one.communicate(timeout=SECONDS) for one in started]
        assert {one.returncode for one in started} == {0}, printed
        (first, errors), *others = printed
        assert f"cpu: {devices * processes} devices, " in errors
        # They print nothing but lines of Gloo, which are not Python's.
        assert not [line for output, _ in others for line in output.splitlines() if "{" in line]
        results.append(json.loads(first.splitlines()[-1]))
    return results


def rounded(value: Any) -> Any:
    """Round all numbers of JSON to five digits."""
    return json.loads(json.dumps(value), parse_float=lambda text: f"{float(text):.5g}")


def test_extract(inputs, tmp_path):
    flags = str(inputs / "data"), "--out", "OUT/features.npz", "--batch-size", "16"
    one, *others = run_together(inputs, tmp_path, "extract", *flags)
    assert len(one["skipped"]) == 2
    arrays = [dict(np.load(tmp_path / f"{n}/features.npz")) for n, _ in TOGETHER]
    assert arrays[0]["embeddings"].shape[0] == 39
    for result, found in zip(others, arrays[1:], strict=True):
        assert {**result, "out": ""} == {**one, "out": ""}
        assert list(result["skipped"]) == list(one["skipped"])
        for name in ("names", "labels"):
            assert found[name].tobytes() == arrays[0][name].tobytes()
        np.testing.assert_allclose(found["embeddings"], arrays[0]["embeddings"], atol=1e-5)


def test_probe(inputs, tmp_path):
    one, *others = run_together(inputs, tmp_path, "probe", "--data", str(inputs / "data"))
    assert one["val_top1"] > 0.5
    assert one["skipped"] == 2
    for result in others:
        assert {**result, "seconds": 0} == {**one, "seconds": 0}


def test_evaluate(inputs, tmp_path):
    one, *others = run_together(inputs, tmp_path, "evaluate", "--data", str(inputs / "data"))
    assert one["examples"] == 39
    for result in others:
        for name in one.keys() - {"images_per_second"}:
            assert rounded(result[name]) == rounded(one[name]), name


def test_attack(inputs, tmp_path):
    flags = "--data", str(inputs / "data"), "--out", "OUT", "--batch-size", "16", "--pictures", "2"
    flags += "--attacks", "pgd", "apgd-ce", "--steps", "3", "--epsilons", "1", "8", "--seed", "3"
    one, *others = run_together(inputs, tmp_path, "attack", *flags)
    assert one["examples"] == 39
    assert one["clean"] > one["robust"]["pgd"]["8"]
    for result in others:
        assert {**result, "pictures": 0, "images": 0} == {**one, "pictures": 0, "images": 0}
    grids = [Path(one["pictures"][1]).name for one in (one, *others)]
    assert len({(tmp_path / f"{n}" / grids[0]).read_bytes() for n, _ in TOGETHER}) == 1


def test_train(inputs, tmp_path):
    flags = "--data", str(inputs / "data"), "--recipe", "finetune", "--train", "conv_head", "head"
    flags += "--epochs", "10", "--batch-size", "16", "--optimizer", "sgd", "--log-every", "1"
    flags += "--augment", "--mixup", "0.2", "--workdir", "OUT"
    run_together(inputs, tmp_path, "train", *flags)
    runs = [tmp_path / f"{n}" for n, _ in TOGETHER]
    lines = [map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) for run in runs]
    losses = [[line["loss"] for line in of if "step" in line] for of in lines]
    assert len(losses[0]) == 20
    for run, other in zip(runs[1:], losses[1:], strict=True):
        np.testing.assert_allclose(other, losses[0], rtol=0, atol=1e-5)
        for name in ("split.csv", "skipped.csv"):
            assert (run / name).read_bytes() == (runs[0] / name).read_bytes()
        found, expected = (load_file(one / "best/model.safetensors") for one in (run, runs[0]))
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5, err_msg=name)


def test_a_process_that_cannot_read_an_image_ends_all_of_them(inputs, tmp_path):
    """Only the process whose share it is has decoded it."""
    flags = "--distributed", "--data", str(inputs / "data"), "--on-bad-image", "fail"
    train = command(inputs, "train", *flags, "--workdir", str(tmp_path / "run"))
    both = start_together(train, 2, TLJAX_CACHE=str(tmp_path / "cache"))
    errors = [one.communicate(timeout=SECONDS)[1].splitlines() for one in both]
    assert [one.returncode for one in both] == [2, 2]
    ends = [[line for line in lines if line.startswith("error: ")] for lines in errors]
    assert [len(lines) for lines in ends] == [1, 1], errors
    assert all(".png" in lines[0] for lines in ends)


def test_sigterm_to_one_process_ends_all_of_them(inputs, tmp_path):
    """JAX takes the signal for its preemption service, which only a training asks."""
    flags = "--distributed", "--data", str(inputs / "data"), "--attacks", "pgd"
    attack = command(inputs, "attack", *flags, "--steps", "100000")
    both = start_together(attack, 2, TLJAX_CACHE=str(tmp_path / "cache"))
    for line in both[1].stderr:
        if line.startswith("clean "):
            break
    both[1].send_signal(signal.SIGTERM)
    errors = [one.communicate(timeout=SECONDS)[1] for one in both]
    assert [one.returncode for one in both] == [75, 75], errors
    assert "error: stopped by SIGTERM" in errors[1]
    assert "error: process 1: stopped by SIGTERM" in errors[0]


def test_one_process_alone_says_that_the_others_are_missing(inputs):
    done = subprocess.run(
        command(inputs, "extract", str(inputs / "data"), "--out", "x.npz", "--distributed"),
        capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 2
    assert "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID" in done.stderr
