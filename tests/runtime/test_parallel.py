"""Training is the same on one device, on eight, and in two processes with two devices each."""

import json
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
from together import start_together

from tljax.runtime.parallel import mesh_of

# With 25 images in batches of 10, no batch is divisible by the number of devices.
TRAIN = """
import json, os, sys
from pathlib import Path
import jax

folder, *sizes = sys.argv[1:]
if os.environ["JAX_NUM_PROCESSES"] != "1":
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
config = replace(config, augmentation=AugmentConfig(crop="center", mixup=0.2))
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


def start(program, folder, *arguments, processes=1, devices=1):
    command = [sys.executable, "-c", program, str(folder), *map(str, arguments)]
    return start_together(command, processes, devices)


def finish(processes):
    """Return the JSON lines of each process."""
    printed = [process.communicate(timeout=300) for process in processes]
    for process, (_, err) in zip(processes, printed, strict=True):
        assert process.returncode == 0, err[-3000:]
    lines = [out.splitlines() for out, _ in printed]
    return [[json.loads(line) for line in of if line.startswith("{")] for of in lines]


def assert_same(actual, expected):
    losses = [[row.get("train_loss", 0) for row in run["history"]] for run in (actual, expected)]
    assert len(losses[0]) == 8
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
    assert actual["scores"] == expected["scores"]
    assert actual["confusion"] == expected["confusion"]
    assert actual["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert actual["skipped"] == expected["skipped"] == [[4, 17], [2]]


def test_the_devices_of_a_mesh_are_in_the_order_of_their_processes():
    """As on a TPU, where devices of several hosts may alternate."""

    @dataclass(frozen=True)
    class Device:
        id: int
        process_index: int
        platform: str = "cpu"

    devices = [Device(number, number // 2 % 2) for number in range(8)]
    order = [device.id for device in mesh_of(devices).devices]
    assert order == [0, 1, 4, 5, 2, 3, 6, 7]


def test_training_on_eight_devices_equals_training_on_one(tmp_path):
    ((one, eight),) = finish(start(TRAIN, tmp_path, 1, 8, devices=8))
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
    ((one, *others),) = finish(start(RESTORE, tmp_path, devices=8))
    steps = sorted(map(int, one))
    assert 1 < steps[0] <= 4, "training resumes in the middle of the run"
    for losses in others:
        for step in steps[:3]:
            assert losses[str(step)] == pytest.approx(one[str(step)], abs=1e-5), step


FSDP_STEPS = """
import json, re
import jax
jax.config.update("jax_disable_most_optimizations", True)
import engine, tiny
from tljax.data.options import Loading
from tljax.models import init
from tljax.runtime.parallel import shard
from tljax.train.dry_run import dry_run
from tljax.train.setup import begin_phase, prepare

loading = Loading(16)
for fsdp, remat in ((False, False), (True, False), (True, True)):
    config = engine.config(
        freeze_to="block1", cache="none", batch_norm="batch", ema_decay=0.9, accumulate=2,
        optimizer="sgd", rate=0.1, fsdp=fsdp, remat=remat,
    )
    variables = init(tiny.WIDE, jax.random.key(0))
    run, inputs = prepare(tiny.WIDE, variables, engine.splits(16, ()), config, loading)
    phase = run.plan.phases[0]
    state, frozen, step = begin_phase(run, inputs, phase, run.variables, run.schedule(phase))
    batch = shard(next(iter(inputs.batches(tiny.WIDE, 1))), run.mesh)
    keys = jax.random.key(0), jax.random.key(1)
    compiled = step.lower(state, frozen, batch, keys).compile()
    program = compiled.as_text()

    def on_one_device(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    shardings = [x.sharding for x in jax.tree.leaves(state)]
    losses = []
    for _ in range(3):
        state, metrics = step(state, frozen, batch, keys)
        losses.append(float(metrics["loss"][0]))
    kept = [x.sharding for x in jax.tree.leaves(state)]
    parts = {
        "parameters": (state.params, frozen["params"]),
        "optimizer state": state.opt_state,
        "moving average": state.ema["params"],
    }
    print(json.dumps({
        "losses": losses,
        "bytes": {name: on_one_device(tree) for name, tree in parts.items()},
        "arguments": compiled.memory_analysis().argument_size_in_bytes,
        "planned": re.findall("memory on .*", dry_run(tiny.WIDE, run.splits, config, loading)),
        "kept": all(a.is_equivalent_to(b.sharding, b.ndim)
                    for a, b in zip(shardings, jax.tree.leaves(state))),
        "gathers": program.count("all-gather("),
    }))
"""


@pytest.mark.slow
def test_fsdp_divides_parameters_and_optimizer_state_and_takes_the_same_steps(tmp_path):
    ((whole, divided, remat),) = finish(start(FSDP_STEPS, tmp_path, devices=8))
    assert whole["losses"][-1] < 0.9 * whole["losses"][0]
    assert whole["gathers"] == 0
    # Norms, and the kernels of the stem and the head, are small and stay on every device.
    kernels = {"parameters": 4, "optimizer state": 2, "moving average": 2}
    saved = 4 * 3 * 3 * 64 * 64 * 7 // 8
    for run in (divided, remat):
        np.testing.assert_allclose(run["losses"], whole["losses"], rtol=1e-5)
        assert run["kept"]
        for name, count in kernels.items():
            assert run["bytes"][name] == whole["bytes"][name] - count * saved
            assert f"{name} {run['bytes'][name] / 2**20:,.1f} MiB" in run["planned"][0]
        assert run["arguments"] == whole["arguments"] - 8 * saved
        assert run["arguments"] < whole["arguments"] / 6
    # 4 kernels forward, and the last one backward. The input of block2 needs no gradient, but with
    # remat its output before the activation is computed again.
    assert [run["gathers"] for run in (divided, remat)] == [5, 6]


HOLDINGS = """
import json
import jax
jax.config.update("jax_disable_most_optimizations", True)
import engine
import tljax.train.feed as feed

runs = {}
for where in ("host", "divided", "whole"):
    feed.holding = lambda *_, where=where: where
    result = engine.train(engine.config(freeze_to="layer1", epochs=4, optimizer="sgd", rate=0.1))
    losses = [entry["train_loss"] for entry in result.history[1:]]
    runs[where] = {"losses": losses, "logits": result.logits.values.tolist()}
print(json.dumps(runs))
"""


@pytest.mark.slow
def test_activations_that_devices_hold_give_the_steps_of_those_from_the_host(tmp_path):
    ((runs,),) = finish(start(HOLDINGS, tmp_path, devices=8))
    for where in ("divided", "whole"):
        np.testing.assert_allclose(runs[where]["losses"], runs["host"]["losses"], rtol=1e-6)
        np.testing.assert_allclose(runs[where]["logits"], runs["host"]["logits"], rtol=1e-5)


FSDP_RUNS = """
import json, os, sys
from dataclasses import replace
from pathlib import Path

folder, several = Path(sys.argv[1]), os.environ["JAX_NUM_PROCESSES"] != "1"
if several:
    from tljax.runtime.parallel import join
    join()
import jax
jax.config.update("jax_disable_most_optimizations", True)
import engine, tiny
from tljax.data.options import Loading
from tljax.models import init
from tljax.runtime.errors import StoppedError
from tljax.runtime.parallel import Preemption, is_main_process
from tljax.train.checkpoint import Checkpoints
from tljax.train.fit import fit

config = engine.config(
    freeze_to="block1", optimizer="sgd", rate=0.1, ema_decay=0.9, cache="none", epochs=3
)
preemption = Preemption()

def stop(step, metrics):
    preemption.requested = step == 2

def run(name, fsdp, **options):
    losses = {}
    checkpoints = Checkpoints(folder / name, "mine")
    options = {"on_step": lambda step, metrics: losses.update({step: metrics["loss"]}), **options}
    try:
        result = fit(
            tiny.WIDE, init(tiny.WIDE, jax.random.key(0)), engine.splits(),
            replace(config, fsdp=fsdp), loading=Loading(8), checkpoints=checkpoints, **options
        )
    finally:
        checkpoints.close()
    print(json.dumps({"losses": losses, "val_loss": result.evaluation.loss}))

if several:
    run("two", True)
else:
    run("whole", False)
    for fsdp in (False, True):
        try:
            run(f"{fsdp}", fsdp, on_step=stop, preemption=preemption, checkpoint_seconds=0)
        except StoppedError:
            preemption = Preemption()
        run(f"{fsdp}", not fsdp)
"""


@pytest.mark.slow
def test_a_run_continues_with_and_without_fsdp_and_in_two_processes(tmp_path):
    both = start(FSDP_RUNS, tmp_path, processes=2, devices=2)
    (first,), (second,) = finish(both)
    ((whole, *others),) = finish(start(FSDP_RUNS, tmp_path, devices=4))
    assert first == second
    assert len(others) == 2
    for run in (first, *others):
        assert run["val_loss"] == pytest.approx(whole["val_loss"], abs=1e-5)
        assert len(run["losses"]) > 1
        for step, loss in run["losses"].items():
            assert loss == pytest.approx(whole["losses"][step], abs=1e-5), step
    assert len(others[0]["losses"]) < len(whole["losses"]) == len(first["losses"])


LOOP = """
import json, sys
from pathlib import Path
from tljax.runtime.parallel import join

join()
from jax.experimental import multihost_utils
import engine
import tljax.train.fit as fit_module
from tljax.data.options import Loading
from tljax.runtime.parallel import Preemption

gathered, logged, gather = [], [], multihost_utils.process_allgather

def counting(*args, **options):
    gathered.append(steps[0])
    return gather(*args, **options)

train_epoch, steps = fit_module.train_epoch, [0]

def spied(*args):
    multihost_utils.process_allgather = counting
    try:
        return train_epoch(*args)
    finally:
        multihost_utils.process_allgather = gather

class Counting(Preemption):
    def reached(self):
        steps[0] += 1
        return super().reached()

fit_module.train_epoch = spied
config = engine.config(optimizer="sgd", cache="none", epochs=1)
engine.train(config, engine.splits(80, ()), folder=Path(sys.argv[1]), loading=Loading(4),
             on_step=lambda step, _: logged.append(step), log_every=5, preemption=Counting())
print(json.dumps({"gathered": gathered, "logged": logged}))
"""


@pytest.mark.slow
def test_processes_agree_on_nothing_between_two_logged_steps(tmp_path):
    every = [5, 10, 15, 20]
    for (record,) in finish(start(LOOP, tmp_path, processes=4)):
        assert record["logged"] == every
        assert sorted({*record["gathered"]}) == every


BROADCAST = """
import json
from tljax.runtime.parallel import broadcast_json, is_main_process, join

join()

def compute():
    assert is_main_process()
    return {"text": "caf\\u00e9", "numbers": [1, 2.5]}

print(json.dumps(broadcast_json(compute)))
"""


@pytest.mark.slow
def test_one_process_computes_a_value_for_all(tmp_path):
    both = start(BROADCAST, tmp_path, processes=2)
    assert finish(both) == [[{"text": "café", "numbers": [1, 2.5]}]] * 2


@pytest.mark.slow
def test_training_in_two_processes_equals_training_in_one(tmp_path):
    (first,), (second,) = finish(start(TRAIN, tmp_path, 4, processes=2, devices=2))
    ((one,),) = finish(start(TRAIN, tmp_path, 1))
    assert [first.pop("writer"), second.pop("writer")] == [True, False]
    assert first == second
    assert first["devices"] == 4
    assert_same(first, one)
    assert (tmp_path / "4/metrics.jsonl").read_text().count("\n") == 8


@pytest.mark.slow
def test_a_process_ends_well_while_it_asks_whether_another_has_failed(tmp_path):
    program = (
        "from tljax.runtime import parallel; parallel._POLL_SECONDS = 0; parallel.join();"
        "assert parallel.gather_json('here') == ['here'] * 2"
    )
    both = start(program, tmp_path, processes=2)
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["disk", "other"])
def test_if_one_process_fails_the_other_exits_too(tmp_path, fails):
    both = start(RUN, tmp_path, fails, processes=2)
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
def test_if_one_process_is_killed_the_first_says_so_and_asks_to_be_run_again(tmp_path):
    both = start(RUN, tmp_path, "nothing", processes=2)
    for _ in range(3):
        both[1].stdout.readline()
    both[1].kill()
    both[1].communicate()
    lines = both[0].communicate(timeout=120)[1].splitlines()
    assert both[0].returncode == 75
    (error,) = (line for line in lines if line.startswith("error"))
    assert error == (
        "error: another process has ended or does not answer; see its messages, and run the same "
        "command in all processes again"
    )
    assert not any("Traceback" in line for line in lines)


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    both = start(RUN, tmp_path, "nothing", processes=2)
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
