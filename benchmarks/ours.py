"""Our training step on a batch that stays where it is, for the benchmarks that time one."""

from collections.abc import Callable

import jax
import numpy as np
import optax

from tljax.models import Model, apply
from tljax.runtime.parallel import data_mesh, replicate, shard
from tljax.runtime.types import Batch, Variables
from tljax.train.freeze import label, split
from tljax.train.step import init_state, make_train_step

EVERYTHING = (("*", 1.0),)


def random_batch(model: Model, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[count, size, size, 3]`` in [0, 1] and labels ``[count]``."""
    rng, size = np.random.default_rng(0), model.preprocess.size
    images = rng.random((count, size, size, 3), np.float32)
    return images, rng.integers(0, model.num_classes, count).astype(np.int32)


def repeated_step(
    model: Model,
    variables: Variables,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    table: tuple[tuple[str, float], ...] = EVERYTHING,
    training: frozenset[str] = frozenset(),
    start: str | None = None,
    devices: int = 1,
) -> Callable[[], jax.Array]:
    """SGD with momentum, as everyone has it; the state goes from step to step.

    Args:
        model: the network.
        variables: its variables.
        images: as of `random_batch`.
        labels: likewise.
        table: what trains; see `label`.
        training: the stages whose batch norms see the batch.
        start: the stage from which on there is anything to do; what enters it is computed once.
        devices: over how many the batch is divided.
    """
    mesh = data_mesh(devices)
    optimizer = optax.sgd(1e-6, momentum=0.9)
    changing, staying = split(variables, label(variables["params"], table), training)
    state = replicate(init_state(changing["params"], changing["batch_stats"], optimizer), mesh)
    staying = replicate(staying, mesh)
    step = make_train_step(model, optimizer, start=start, batch_statistics=training)
    if start is not None:
        before = jax.jit(lambda v, x: apply(model, v, x, stop=start).value)
        images = np.asarray(before(variables, images))
    rows = np.arange(len(labels), dtype=np.int32)
    batch = shard(Batch(images, labels, np.ones(len(labels), bool), rows), mesh)
    keys = jax.random.key(0), jax.random.key(1)

    def call() -> jax.Array:
        nonlocal state
        state, _ = step(state, staying, batch, keys)
        return state.step

    return call
