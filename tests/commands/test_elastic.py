"""A training goes on, by the same command, on another number of processes and devices."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from networks import random_pretrained
from PIL import Image
from together import start_together

from tljax.pretrained import save

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a training command of 40 steps that writes a checkpoint at every one."""
    folder = tmp_path_factory.mktemp("elastic")
    save(folder / "net.safetensors", random_pretrained("mobilenetv2_050", 5))
    rng = np.random.default_rng(0)
    for i in range(40):
        path = folder / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    return [
        *(sys.executable, str(ROOT / "scripts" / "train.py"), "--data", str(folder / "data")),
        *("--weights", str(folder / "net.safetensors"), "--image-size", "32", "--epochs", "8"),
        *("--val-fraction", "0"),
        *("--recipe", "finetune", "--train", "conv_head", "head"),
        *("--batch-size", "8", "--optimizer", "sgd"),
        *("--checkpoint-minutes", "0", "--log-every", "1", "--platform", "cpu", "--workdir"),
    ]


def start(command: list[str], workdir: Path, processes: int) -> list[subprocess.Popen[str]]:
    """Start a command in some processes, with four devices in all or, in one process, one."""
    distributed = ["--distributed"] if processes > 1 else []
    devices = 4 // processes if processes > 1 else 1
    cache = str(workdir.parent / "cache")
    return start_together(
        [*command, str(workdir), *distributed], processes, devices, TLJAX_CACHE=cache
    )


def finish(processes: list[subprocess.Popen[str]]) -> set[int]:
    errors = [process.communicate(timeout=SECONDS)[1] for process in processes]
    assert not any("Traceback" in error for error in errors), errors
    return {process.returncode for process in processes}


def losses(workdir: Path) -> list[float]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return [entry["loss"] for entry in entries if "step" in entry]


def stop(workdir: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Send SIGTERM to the last process when two more steps are logged; all end with code 75."""
    until, before = time.monotonic() + SECONDS, len(losses(workdir))
    while len(losses(workdir)) < before + 2 and time.monotonic() < until:
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.02)
    processes[-1].send_signal(signal.SIGTERM)
    assert finish(processes) == {75}


@pytest.mark.parametrize("fsdp", [False, True])
def test_four_processes_then_two_then_one_have_the_losses_of_one(command, tmp_path, fsdp):
    assert finish(start(command, tmp_path / "whole", 1)) == {0}
    expected = losses(tmp_path / "whole")
    assert len(expected) == 40
    run = tmp_path / "run"
    flags = ["--fsdp"] if fsdp else []
    counts = []
    for count in (4, 2):
        stop(run, start([*command[:-1], *flags, "--workdir"], run, count))
        counts.append(len(losses(run)))
    assert counts[0] < counts[1] < len(expected)
    assert finish(start(command, run, 1)) == {0}
    np.testing.assert_allclose(losses(run), expected, rtol=0, atol=1e-5)
    assert (run / "best" / "model.safetensors").exists()
