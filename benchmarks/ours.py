"""A training step of tljax on a fixed batch, for the benchmarks that time it."""

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
    """Draw images ``[count, size, size, 3]`` in [0, 1] and labels ``[count]``."""
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
    """Return a function that takes a step of SGD with momentum, from its last state.

    Args:
        model: the network.
        variables: its variables.
        images: ``[batch, size, size, 3]`` in [0, 1].
        labels: ``[batch]`` class indices.
        table: the learning rate of each pattern of parameters; see `label`.
        training: the stages whose batch norms use the statistics of the batch.
        start: the first stage to run; the activations that enter it are computed once.
        devices: number of devices over which the batch is divided.
    """
    mesh = data_mesh(devices)
    optimizer = optax.sgd(1e-6, momentum=0.9)
    trainable, frozen = split(variables, label(variables["params"], table), training)
    state = replicate(init_state(trainable["params"], trainable["batch_stats"], optimizer), mesh)
    frozen = replicate(frozen, mesh)
    step = make_train_step(model, optimizer, start=start, batch_statistics=training)
    if start is not None:
        prefix = jax.jit(lambda v, x: apply(model, v, x, stop=start).value)
        images = np.asarray(prefix(variables, images))
    rows = np.arange(len(labels), dtype=np.int32)
    batch = shard(Batch(images, labels, np.ones(len(labels), bool), rows), mesh)
    keys = jax.random.key(0), jax.random.key(1)

    def call() -> jax.Array:
        nonlocal state
        state, _ = step(state, frozen, batch, keys)
        return state.step

    return call
