"""One device, eight, or two processes of two: the same training."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parent

# 25 images in batches of 10: neither the batch nor the ragged tail divides by the devices.
TRAIN = """
import json, sys
from pathlib import Path
import jax

folder, number, *sizes = sys.argv[1:]
if number != "-":
    from tljax.parallel import join
    join()
jax.config.update("jax_disable_most_optimizations", True)
import engine
from dataclasses import replace
from tljax.config import AugmentConfig, Loading
from tljax.parallel import is_writer
from tljax.transfer.fit import fit

data = engine.splits(25, broken=(4, 17), val_broken=(2,))
# Not Adam: of a gradient that is 0 but for rounding it makes a whole step.
what = engine.config(
    freeze_to="stem", cache="none", batch_norm="batch", epochs=7, accumulate=2, augment=True,
    optimizer="sgd", rate=0.1,
)
what = replace(what, augmentation=AugmentConfig(crop=False, mixup=0.2))
for size in map(int, sizes):
    at = Path(folder) / f"{size}"
    result = engine.train(what, data, folder=at, loading=Loading(10, devices=size))
    scores = result.evaluation
    found = {
        "history": result.history,
        "confusion": scores.confusion.tolist(),
        "scores": [scores.top1, scores.top5, scores.examples],
        "loss": scores.loss,
        "skipped": [sorted(part) for part in result.skipped],
        "writer": is_writer(),
        "devices": jax.device_count(),
    }
    print(json.dumps(found))
"""


def start(folder, sizes, *, devices, number=None, port=0):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    if number is not None:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(number),
        }
    arguments = [str(folder), "-" if number is None else str(number), *map(str, sizes)]
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def assert_same(found, expected):
    steps = [[entry.get("train_loss", 0) for entry in run["history"]] for run in (found, expected)]
    assert len(steps[0]) == 8
    np.testing.assert_allclose(*steps, rtol=0, atol=1e-5)
    assert found["scores"] == expected["scores"]
    assert found["confusion"] == expected["confusion"]
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert found["skipped"] == expected["skipped"] == [[4, 17], [2]]


def test_eight_devices_train_as_one_does(tmp_path):
    one, eight = finish(start(tmp_path, (1, 8), devices=8))
    assert eight["devices"] == 8
    assert_same(eight, one)
    # It is not for want of learning that they agree.
    losses = [entry["train_loss"] for entry in one["history"][1:]]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [start(tmp_path, (4,), devices=2, number=i, port=port) for i in (0, 1)]
    (one,) = finish(start(tmp_path, (1,), devices=1))
    (first,), (second,) = (finish(process) for process in both)
    assert [first.pop("writer"), second.pop("writer")] == [True, False]
    assert first == second
    assert first["devices"] == 4
    assert_same(first, one)
    assert (tmp_path / "4/metrics.jsonl").read_text().count("\n") == 8
