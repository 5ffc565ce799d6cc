"""A training goes on, by the same command, on another number of processes and devices."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from networks import random_pretrained
from PIL import Image

from tljax.pretrained import save

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a training command of 20 steps that writes a checkpoint at every one."""
    folder = tmp_path_factory.mktemp("elastic")
    save(folder / "net.safetensors", random_pretrained("mobilenetv2_050", 5))
    rng = np.random.default_rng(0)
    for i in range(40):
        path = folder / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    return [
        *(sys.executable, str(ROOT / "scripts" / "train.py"), "--data", str(folder / "data")),
        *("--weights", str(folder / "net.safetensors"), "--image-size", "32", "--epochs", "4"),
        *("--val-fraction", "0"),
        *(
            "--recipe",
            "finetune",
            "--train",
            "conv_head",
            "head",
            "--batch-size",
            "8",
            "--optimizer",
            "sgd",
        ),
        *("--checkpoint-minutes", "0", "--log-every", "1", "--platform", "cpu", "--workdir"),
    ]


def start(command: list[str], workdir: Path, processes: int) -> list[subprocess.Popen[str]]:
    """Start a command in some processes, with four devices in all or, in one process, one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "TLJAX_CACHE": str(workdir.parent / "cache"),
        "JAX_NUM_CPU_DEVICES": "1" if processes == 1 else str(4 // processes),
    }
    together = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
    }
    return [
        subprocess.Popen(
            [*command, str(workdir), *(["--distributed"] if processes > 1 else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, **(together if processes > 1 else {}), "JAX_PROCESS_ID": str(i)},
        )
        for i in range(processes)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> set[int]:
    errors = [process.communicate(timeout=SECONDS)[1] for process in processes]
    assert not any("Traceback" in error for error in errors), errors
    return {process.returncode for process in processes}


def losses(workdir: Path) -> list[float]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return [entry["loss"] for entry in entries if "step" in entry]


def stop_after(step: int, workdir: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Send SIGTERM to the last process when a step is logged; all must end with code 75."""
    until = time.monotonic() + SECONDS
    while len(losses(workdir)) < step and time.monotonic() < until:
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.02)
    processes[-1].send_signal(signal.SIGTERM)
    assert finish(processes) == {75}


@pytest.mark.parametrize("fsdp", [False, True])
def test_four_processes_then_two_then_one_have_the_losses_of_one(command, tmp_path, fsdp):
    assert finish(start(command, tmp_path / "whole", 1)) == {0}
    expected = losses(tmp_path / "whole")
    assert len(expected) == 20
    run = tmp_path / "run"
    flags = ["--fsdp"] if fsdp else []
    counts = []
    for step, count in ((2, 4), (6, 2)):
        stop_after(step, run, start([*command[:-1], *flags, "--workdir"], run, count))
        counts.append(len(losses(run)))
    assert counts[0] < counts[1] <= 12
    assert finish(start(command, run, 1)) == {0}
    np.testing.assert_allclose(losses(run), expected, rtol=0, atol=1e-5)
    assert (run / "best" / "model.safetensors").exists()
