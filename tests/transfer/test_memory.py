import jax
import numpy as np
import optax
import pytest
from engine import LOADING, config, splits, train
from tiny import MODEL, random_variables

import tljax.transfer.setup as preparation
from tljax.errors import RequestError
from tljax.parallel import shard
from tljax.transfer import memory
from tljax.transfer.setup import divide, first_state, prepare

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(scope="module")
def arguments():
    """Of a step whose batch of 64 is what it takes memory for."""
    setup, inputs = prepare(
        MODEL, random_variables(), splits(12, ()), config(), LOADING, 0, None, None
    )
    state, frozen, step = first_state(
        setup, inputs, divide(setup, setup.labels[0]), setup.variables, optax.constant_schedule(0.1)
    )
    batch = next(iter(inputs.batches(MODEL, 1)))
    batch = jax.tree.map(lambda x: np.repeat(np.asarray(x), 16, axis=0), batch)
    keys = jax.random.key(0), jax.random.key(1)
    return step, (state, frozen, shard(batch, setup.mesh), keys)


def needed(arguments, size):
    step, (state, frozen, batch, keys) = arguments
    return memory._bytes(
        step.lower(state, frozen, jax.tree.map(lambda x: x[:size], batch), keys).compile()
    )


def test_the_largest_half_that_fits_is_found(arguments):
    at = {size: needed(arguments, size) for size in (64, 32, 16, 8)}
    assert at[64] > at[32] > at[16] > at[8]
    find = memory.fitting_batch_size
    assert find(*arguments, 1, at[32]) == 32
    assert find(*arguments, 1, at[32] - 1) == 16
    assert find(*arguments, 8, at[8]) == 8
    assert find(*arguments, 16, at[8]) == 0
    assert find(*arguments, 1, None) is None


@pytest.mark.parametrize(
    ("limit", "advice"),
    [
        (None, "halve --batch-size"),
        (1 << 40, "--batch-size 2 would fit, and so would --accumulate 2"),
        (1, "no batch fits"),
    ],
)
def test_a_run_out_of_memory_says_what_would_fit(monkeypatch, limit, advice):
    make = preparation.make_train_step

    class Exhausted:
        def __init__(self, step):
            self.lower = step.lower

        def __call__(self, *_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(preparation, "make_train_step", lambda *a, **k: Exhausted(make(*a, **k)))
    monkeypatch.setattr(memory, "device_memory", lambda: limit)
    with pytest.raises(RequestError, match=f"out of device memory at --batch-size 4: {advice}"):
        train(config())
