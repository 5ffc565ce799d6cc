"""Training is the same on one device, on eight, and in two processes with two devices each."""

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

TESTS = Path(__file__).parent

# With 25 images in batches of 10, no batch is divisible by the number of devices.
TRAIN = """
import json, sys
from pathlib import Path
import jax

folder, number, *sizes = sys.argv[1:]
if number != "-":
    from tljax.runtime.parallel import join
    join()
jax.config.update("jax_disable_most_optimizations", True)
import engine
from dataclasses import replace
from tljax.data.options import AugmentConfig, Loading
from tljax.runtime.parallel import is_main_process
from tljax.train.fit import fit

data = engine.splits(25, broken=(4, 17), val_broken=(2,))
# Not Adam, which turns rounding errors of a zero gradient into full steps.
config = engine.config(
    freeze_to="stem", cache="none", batch_norm="batch", epochs=7, accumulate=2, augment=True,
    optimizer="sgd", rate=0.1,
)
config = replace(config, augmentation=AugmentConfig(crop=False, mixup=0.2))
for size in map(int, sizes):
    run = Path(folder) / f"{size}"
    result = engine.train(config, data, folder=run, loading=Loading(10, devices=size))
    scores = result.evaluation
    record = {
        "history": result.history,
        "confusion": scores.confusion.tolist(),
        "scores": [scores.top1, scores.top5, scores.examples],
        "loss": scores.loss,
        "skipped": [sorted(part) for part in result.skipped],
        "writer": is_main_process(),
        "devices": jax.device_count(),
    }
    print(json.dumps(record))
"""


# A command in which, from epoch 3 on, process 0 cannot write files or process 1 raises an error.
RUN = """
import resource, signal, sys
from dataclasses import dataclass
from pathlib import Path
from tljax.commands import cli

folder, fails = Path(sys.argv.pop(1)), sys.argv.pop(1)

@dataclass(frozen=True)
class Config(cli.Common):
    distributed: bool = True

def run(config):
    from tljax.runtime.errors import RequestError
    from tljax.runtime.parallel import Preemption, is_main_process, join
    join()
    import jax
    jax.config.update("jax_disable_most_optimizations", True)
    import engine

    def log(history):
        print(len(history), flush=True)
        if is_main_process() and fails == "disk" and len(history) == 3:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        if not is_main_process() and fails == "other" and len(history) == 3:
            raise RequestError("simulated failure")

    options = engine.config(epochs=4000, rate=1e-6)
    with Preemption() as preemption:
        engine.train(options, engine.splits(8), folder=folder, on_epoch=log, preemption=preemption)

cli.main(Config, run)
"""


def start(folder, sizes, *, devices, number=None, port=0, program=TRAIN):
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
    if program is RUN:
        arguments = [str(folder), *sizes]
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def assert_same(actual, expected):
    losses = [[row.get("train_loss", 0) for row in run["history"]] for run in (actual, expected)]
    assert len(losses[0]) == 8
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
    assert actual["scores"] == expected["scores"]
    assert actual["confusion"] == expected["confusion"]
    assert actual["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert actual["skipped"] == expected["skipped"] == [[4, 17], [2]]


def test_training_on_eight_devices_equals_training_on_one(tmp_path):
    one, eight = finish(start(tmp_path, (1, 8), devices=8))
    assert eight["devices"] == 8
    assert_same(eight, one)
    # The loss decreases, so the runs are not equal for lack of training.
    losses = [entry["train_loss"] for entry in one["history"][1:]]
    assert losses[-1] < 0.9 * losses[0]


RESTORE = """
import json, shutil, sys
from pathlib import Path
from engine import config, train
from tljax.data.options import Loading
from tljax.runtime.errors import StoppedError
from tljax.runtime.parallel import Preemption

folder = Path(sys.argv[1])
fit_config = config(optimizer="sgd", ema_decay=0.9, cache="none", epochs=3)
preemption = Preemption()

def stop(step, metrics):
    preemption.requested = step == 2

try:
    train(fit_config, folder=folder / "first", loading=Loading(8, devices=1), on_step=stop,
          preemption=preemption)
except StoppedError:
    pass
for devices in (1, 4, 8):
    run, losses = folder / str(devices), {}
    shutil.copytree(folder / "first", run)

    def record(step, metrics):
        losses[step] = metrics["loss"]

    train(fit_config, folder=run, loading=Loading(8, devices=devices), on_step=record)
    print(json.dumps(losses))
"""


@pytest.mark.slow
def test_a_checkpoint_is_resumed_equally_on_any_number_of_devices(tmp_path):
    one, *others = finish(start(tmp_path, (), program=RESTORE, devices=8))
    steps = sorted(map(int, one))
    assert 1 < steps[0] <= 4, "training resumes in the middle of the run"
    for losses in others:
        for step in steps[:3]:
            assert losses[str(step)] == pytest.approx(one[str(step)], abs=1e-5), step


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_training_in_two_processes_equals_training_in_one(tmp_path):
    port = free_port()
    both = [start(tmp_path, (4,), devices=2, number=i, port=port) for i in (0, 1)]
    (one,) = finish(start(tmp_path, (1,), devices=1))
    (first,), (second,) = (finish(process) for process in both)
    assert [first.pop("writer"), second.pop("writer")] == [True, False]
    assert first == second
    assert first["devices"] == 4
    assert_same(first, one)
    assert (tmp_path / "4/metrics.jsonl").read_text().count("\n") == 8


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["disk", "other"])
def test_if_one_process_fails_the_other_exits_too(tmp_path, fails):
    port = free_port()
    both = [start(tmp_path, (fails,), devices=1, number=i, port=port, program=RUN) for i in (0, 1)]
    stderr = [process.communicate(timeout=120)[1].splitlines() for process in both]
    assert [process.returncode for process in both] == [2, 2]
    errors = [[line for line in lines if line.startswith("error")] for lines in stderr]
    assert [len(lines) for lines in errors] == [1, 1], stderr
    failed = 1 if fails == "other" else 0
    reason = {"disk": "cannot be written (File too large)", "other": "simulated failure"}[fails]
    assert reason in errors[failed][0]
    assert errors[1 - failed][0].startswith(f"error: process {failed}: ")
    assert reason in errors[1 - failed][0]
    assert not any("Traceback" in line for lines in stderr for line in lines)


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    port = free_port()
    both = [
        start(tmp_path, ("nothing",), devices=1, number=i, port=port, program=RUN) for i in (0, 1)
    ]
    for _ in range(3):
        both[1].stdout.readline()
    both[1].send_signal(signal.SIGTERM)
    start_time = time.monotonic()
    stderr = [process.communicate(timeout=120)[1].splitlines() for process in both]
    assert time.monotonic() - start_time < 60
    assert [process.returncode for process in both] == [75, 75]
    for lines in stderr:
        assert lines[-1] == "error: stopped by SIGTERM"
    assert any((tmp_path / "checkpoints").iterdir())
