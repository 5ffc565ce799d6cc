from dataclasses import replace

import jax
import numpy as np
import optax
import psutil
import pytest
from engine import LOADING, config, splits, train
from flax import linen as nn
from tiny import MODEL, Unit, random_variables

import tljax.train.setup as train_setup
from tljax.data.options import Loading
from tljax.models import Stage, init
from tljax.runtime.compiled import read_memory
from tljax.runtime.errors import RequestError
from tljax.runtime.free_memory import free_memory
from tljax.runtime.parallel import shard
from tljax.train import memory
from tljax.train.options import AdversaryConfig
from tljax.train.setup import begin_phase, prepare

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(scope="module")
def arguments():
    """Return arguments of a step whose memory is mostly that of its batch of 32."""
    run, inputs = prepare(MODEL, random_variables(), splits(12, ()), config(), LOADING)
    state, frozen, step = begin_phase(
        run, inputs, run.plan.phases[0], run.variables, optax.constant_schedule(0.1)
    )
    batch = next(iter(inputs.batches(MODEL, 1)))
    batch = jax.tree.map(lambda x: np.repeat(np.asarray(x), 8, axis=0), batch)
    keys = jax.random.key(0), jax.random.key(1)
    return step, (state, frozen, shard(batch, run.mesh), keys)


def needed(arguments, size):
    step, (state, frozen, batch, keys) = arguments
    smaller = jax.tree.map(lambda x: x[:size], batch)
    return read_memory(step.lower(state, frozen, smaller, keys).compile()).total


@pytest.mark.slow
def test_the_batch_size_is_halved_until_it_fits(arguments):
    at = {size: needed(arguments, size) for size in (32, 16, 8)}
    assert at[32] > at[16] > at[8]
    find = memory.fitting_batch_size
    assert find(*arguments, 1, at[16]) == 16
    assert find(*arguments, 1, at[16] - 1) == 8
    assert find(*arguments, 8, at[8]) == 8
    assert find(*arguments, 16, at[8]) == 0
    assert find(*arguments, 1, None) is None


@pytest.mark.parametrize(
    ("limit", "advice"),
    [
        (None, "halve --batch-size"),
        (1 << 40, "--batch-size 2 or --accumulate 2 would fit"),
        (1, "no batch fits"),
    ],
)
def test_a_step_without_enough_memory_is_reported_with_advice(monkeypatch, limit, advice):
    make = train_setup.make_train_step

    class Exhausted:
        def __init__(self, step):
            self.lower = step.lower

        def __call__(self, *_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(train_setup, "make_train_step", lambda *a, **k: Exhausted(make(*a, **k)))
    monkeypatch.setattr(memory, "device_memory", lambda: limit)
    with pytest.raises(RequestError, match=f"out of device memory at --batch-size 4: {advice}"):
        train(config())


class Block(nn.Module):
    """A stage with several times as many activations within as at its end."""

    @nn.compact
    def __call__(self, x, mode):
        for i in range(2):
            x = Unit(8, name=f"unit{i}")(x, mode)
        return nn.Dropout(0.1, deterministic=not mode.noise)(x)


BLOCKS = tuple(Stage(f"block{i}", Block()) for i in range(4))
DEEP = replace(MODEL, name="deep", stages=(MODEL.stages[0], *BLOCKS, *MODEL.stages[2:]))


def deep_step(**options):
    """Return a compiled step of a deep network, and its arguments."""
    variables = init(DEEP, jax.random.key(0))
    fit_config = config(batch_norm="batch", optimizer="sgd", **options)
    run, inputs = prepare(DEEP, variables, splits(32, ()), fit_config, Loading(batch_size=32))
    phase = run.plan.phases[0]
    state, frozen, step = begin_phase(run, inputs, phase, run.variables, run.schedule(phase))
    batch = shard(next(iter(inputs.batches(DEEP, 1))), run.mesh)
    arguments = state, frozen, batch, (jax.random.key(0), jax.random.key(1))
    return step.lower(*arguments).compile(), arguments


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"adversary": AdversaryConfig("fast"), "accumulate": 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_remat_takes_less_memory_for_the_same_step(options):
    results, temporary = [], []
    for remat in (False, True):
        step, arguments = deep_step(remat=remat, **options)
        temporary.append(step.memory_analysis().temp_size_in_bytes)
        results.append(step(*arguments))
    assert temporary[1] < 0.5 * temporary[0]
    (before, expected), (after, metrics) = results
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name][0], value[0], rtol=1e-5, err_msg=name)
    for (path, a), b in zip(
        jax.tree.leaves_with_path((before.params, before.batch_stats)),
        jax.tree.leaves((after.params, after.batch_stats)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=str(path))


def files(root, texts):
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


V1, V2 = "sys/fs/cgroup/memory/", "sys/fs/cgroup/"
GROUPS = {
    "none": ({}, 5000),
    "unlimited": (
        {
            "proc/self/cgroup": "0::/\n",
            V2 + "memory.max": "max\n",
            V2 + "memory.current": "700\n",
            V2 + "memory.stat": "anon 600\ninactive_file 100\n",
        },
        5000,
    ),
    "version 2, of a group above": (
        {
            "proc/self/cgroup": "0::/user/job\n",
            V2 + "user/memory.max": "1000\n",
            V2 + "user/memory.current": "700\n",
            V2 + "user/memory.stat": "anon 600\ninactive_file 100\n",
            V2 + "user/job/memory.max": "max\n",
            V2 + "user/job/memory.current": "500\n",
            V2 + "user/job/memory.stat": "anon 400\ninactive_file 100\n",
        },
        400,
    ),
    "version 1, in a container": (
        {
            "proc/self/cgroup": "9:name=systemd:/\n4:memory:/docker/1f\n0::/\n",
            V1 + "memory.limit_in_bytes": "2000\n",
            V1 + "memory.usage_in_bytes": "1500\n",
            V1 + "memory.stat": "inactive_file 150\ntotal_inactive_file 200\ntotal_unevictable 0\n",
        },
        700,
    ),
    "over its limit": (
        {
            "proc/self/cgroup": "0::/\n",
            V2 + "memory.max": "1000\n",
            V2 + "memory.current": "1200\n",
            V2 + "memory.stat": "anon 1200\ninactive_file 0\n",
        },
        0,
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_free_memory_respects_the_limits_of_containers(name, tmp_path, monkeypatch):
    texts, expected = GROUPS[name]
    files(tmp_path, texts)
    machine = type("Machine", (), {"available": 5000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert free_memory(tmp_path) == expected


def test_free_memory_of_this_machine_is_positive():
    assert 2**20 < free_memory() <= psutil.virtual_memory().total
