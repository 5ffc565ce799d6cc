"""Feed the devices: with batches one by one, or with row numbers of activations that they hold.

A step that takes less time than starting it leaves the devices idle. Where cached activations fit
on the devices, a loop there takes several steps in one dispatch, and selects the rows of each batch
itself. Every device holds all activations if they fit, and otherwise a part of them.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int32, Shaped

from tljax.features.extract import Outputs
from tljax.runtime.free_memory import free_device_memory
from tljax.runtime.parallel import (
    gather_json,
    pad_rows,
    replicate,
    round_up_to_devices,
    shard,
)
from tljax.runtime.types import Batch, Variables
from tljax.train.inputs import Inputs
from tljax.train.setup import Run
from tljax.train.step import Keys, StepMetrics, TrainState, TrainStep

_HEAD_STEPS, _SUFFIX_STEPS = 32, 8  # in one dispatch
_FEW = (
    8  # devices; each of them computes with the rows of all batches where activations are divided
)

Holding = Literal["whole", "divided", "host"]
"""Whether every device holds all activations or a part of them, or the host does."""


class Fed(NamedTuple):
    """What one dispatch is fed with.

    Attributes:
        steps: number of training steps.
        examples: number of examples of this process, without padding.
        batch: third argument of the step, on the devices.
    """

    steps: int
    examples: int
    batch: Any


class Rows(NamedTuple):
    """Several batches of activations that lie on the devices.

    Attributes:
        values: ``[rows, ...]`` activations of all training images, whole or divided.
        batches: leaves ``[steps, batch, ...]``; the inputs are row numbers of ``values``.
        num_steps: number of steps to take, at most ``steps``.
    """

    values: Shaped[jax.Array, "rows ..."]
    batches: Batch
    num_steps: Int32[jax.Array, ""]


class Feed:
    """The batches of a phase on the devices, and the step that takes them.

    Attributes:
        steps: largest number of steps in one dispatch, alike in all processes.
        step: ``step(state, frozen, batch, keys) -> (state, metrics)``, whose metrics are
            ``[steps]`` if ``steps`` is more than 1.
    """

    def __init__(self, run: Run, inputs: Inputs, step: TrainStep) -> None:
        """Choose the number of steps.

        It is more than 1 for cached activations that the devices hold, see `holding`. On a CPU,
        only the steps of a head are so short that it matters.

        Args:
            run: everything that is constant during the run.
            inputs: inputs of the trained stages.
            step: jitted training step.
        """
        self._run, self._inputs = run, inputs
        self._values: tuple[Outputs, jax.Array] | None = None
        self.steps, where = _plan_dispatch(run, inputs)
        self.step = step if where == "host" else repeated(step, self.steps, run.mesh, where)
        self._holding: Holding = where

    def batches(self, epoch: int, first: int) -> Iterator[Fed]:
        """Yield the batches of an epoch.

        Args:
            epoch: number of the epoch over all phases, from 1.
            first: index of the first batch, to resume.
        """
        mesh = self._run.mesh
        if self.steps == 1:
            for batch in self._inputs.batches(self._run.model, epoch, first):
                yield Fed(1, batch.num_examples, shard(batch, mesh))
            return
        view, rows = self._inputs.rows(epoch)
        if self._values is None or self._values[0] is not view:
            self._values = view, _place(view.values, mesh, self._holding)
        for start in range(first, len(rows), self.steps):
            part = rows[start : start + self.steps]
            batches = self._inputs.row_batches(view, part, self.steps)
            num_steps = replicate(jnp.int32(len(part)), mesh)
            fed = Rows(self._values[1], shard(batches, mesh, axis=1), num_steps)
            yield Fed(len(part), batches.num_examples, fed)


def _plan_dispatch(run: Run, inputs: Inputs) -> tuple[int, Holding]:
    """Return the number of steps in one dispatch, alike in all processes, and what they read."""
    steps = steps_at_most(run, inputs.start)
    if steps == 1:
        return 1, "host"
    free = min(gather_json(free_device_memory()))
    where = holding(inputs.train[0].values.nbytes, run.mesh.size, free)
    return (1 if where == "host" else steps), where


def holding(size: int, devices: int, free: float) -> Holding:
    """Choose where activations are, which may take half of the free memory of the devices.

    Args:
        size: bytes of the activations of all training images.
        devices: number of devices.
        free: bytes of free memory of a device.
    """
    if size <= free / 2:
        return "whole"
    return "divided" if devices <= _FEW and size / devices <= free / 2 else "host"


def steps_at_most(run: Run, start: str | None) -> int:
    """Return the number of steps of one dispatch, if the devices hold the activations.

    Args:
        run: everything that is constant during the run.
        start: stage that cached activations enter; None for images.
    """
    if start is None or run.config.remat or run.config.fsdp:
        return 1
    head_only = start == run.model.stage_names[-1]
    on_cpu = run.mesh.devices.flat[0].platform == "cpu"
    if on_cpu and (not head_only or jax.process_count() > 1):
        return 1
    return _HEAD_STEPS if head_only else _SUFFIX_STEPS


def _place(values: Shaped[np.ndarray, "rows ..."], mesh: Mesh, where: Holding) -> jax.Array:
    """Place rows on each device, or divide them, padded to a multiple of the number of devices."""
    if where == "whole":
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
    shape = round_up_to_devices(len(values), mesh), *values.shape[1:]

    def part(index: Any) -> np.ndarray:
        rows = values[index[0]]
        return pad_rows(rows, len(range(*index[0].indices(shape[0]))))

    return jax.make_array_from_callback(shape, NamedSharding(mesh, PartitionSpec("data")), part)


def _select_divided(
    values: Shaped[jax.Array, "rows ..."], rows: Int32[jax.Array, " batch"], mesh: Mesh
) -> Shaped[jax.Array, "batch ..."]:
    """Select rows by their numbers; each device gets its part of the batch."""

    def select(values: jax.Array, rows: jax.Array) -> jax.Array:
        rows -= jax.lax.axis_index("data") * len(values)
        here = (rows >= 0) & (rows < len(values))
        selected = values[jnp.where(here, rows, 0)]
        selected = jnp.where(jnp.expand_dims(here, range(1, selected.ndim)), selected, 0)
        return jax.lax.psum_scatter(selected, "data", tiled=True)

    divided = PartitionSpec("data")
    specs = {"in_specs": (divided, PartitionSpec()), "out_specs": divided}
    return jax.shard_map(select, mesh=mesh, **specs)(values, rows)


def repeated(step: TrainStep, steps: int, mesh: Mesh, where: Holding) -> TrainStep:
    """Return a jitted step that takes `Rows` for a batch, and so up to ``steps`` steps."""

    def run(
        state: TrainState, frozen: Variables, rows: Rows, keys: Keys
    ) -> tuple[TrainState, StepMetrics]:
        def once(i: Any, state: TrainState) -> tuple[TrainState, StepMetrics]:
            batch: Any = jax.tree.map(lambda x: x[i], rows.batches)
            if where == "divided":
                inputs = _select_divided(rows.values, batch.inputs, mesh)
            else:
                inputs = rows.values[batch.inputs]
            return step(state, frozen, batch._replace(inputs=inputs), keys)

        def body(i: Any, carry: tuple[TrainState, StepMetrics]) -> tuple[TrainState, StepMetrics]:
            state, log = carry
            state, metrics = once(i, state)
            return state, jax.tree.map(lambda whole, x: whole.at[i].set(x), log, metrics)

        shapes = jax.eval_shape(once, 0, state)[1]
        log = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), shapes)
        return jax.lax.fori_loop(0, rows.num_steps, body, (state, log))

    return jax.jit(run, donate_argnums=0)
