"""Memory of host and devices: what is free, the batch size that fits, and how to need less."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tljax.models.model import StageFunction
from tljax.runtime.compiled import read_memory
from tljax.runtime.errors import RequestError
from tljax.runtime.free_memory import device_memory
from tljax.runtime.parallel import fsdp_sharding
from tljax.runtime.types import Batch, Variables
from tljax.train.step import Keys, TrainState, TrainStep

Arguments = tuple[TrainState, Variables, Batch, Keys]
"""Arguments of a `TrainStep`."""


@contextmanager
def within_memory(
    step: TrainStep, arguments: Arguments, multiple: int, accumulate: int
) -> Iterator[None]:
    """Run a step in this context to turn a lack of device memory into advice on what would fit.

    Args:
        step: jitted training step.
        arguments: arguments of the step.
        multiple: number that batch sizes must be a multiple of.
        accumulate: number of parts of a batch, as for `make_train_step`.

    Raises:
        RequestError: the step ran out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size = len(arguments[2].mask)
        fits = fitting_batch_size(step, arguments, multiple, device_memory())
        if fits is None:
            advice = "halve --batch-size, or set --accumulate 2"
        elif fits:
            parts = accumulate * -(-size // fits)
            advice = f"--batch-size {fits} or --accumulate {parts} would fit"
        else:
            advice = "no batch fits: --precision bfloat16, a smaller --image-size or --freeze-to"
        raise RequestError(f"out of device memory at --batch-size {size}: {advice}") from error


def memory_options(mesh: Mesh, *, remat: bool, fsdp: bool) -> dict[str, Any]:
    """Return the arguments of `make_train_step` with which a step needs less memory.

    Args:
        mesh: the devices.
        remat: keep only the outputs of stages for the backward pass.
        fsdp: the variables are sharded by `shard_parameters`: gather those of a stage before it
            runs forward and again before it runs backward, and divide its gradients at once.
    """
    if not (remat or fsdp):
        return {}
    # For CPUs, XLA removes the barriers of `jax.checkpoint` early, and then merges what is computed
    # again with the first computation, which keeps everything.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"} if on_cpu else None
    if not fsdp:
        return {"around_stage": jax.checkpoint, "compiler_options": options}

    def gather(x: jax.Array) -> jax.Array:
        # Both matter backward: what is summed over the devices first is divided among them then.
        divided = jax.lax.with_sharding_constraint(x, fsdp_sharding(x.shape, mesh))
        return jax.lax.with_sharding_constraint(divided, NamedSharding(mesh, PartitionSpec()))

    def gathered(run: StageFunction) -> StageFunction:
        return jax.checkpoint(
            lambda variables, x: run(jax.tree.map(gather, variables), x),
            policy=None if remat else _all_but_gathered,
        )

    return {"around_stage": gathered, "compiler_options": options}


def _all_but_gathered(primitive: Primitive, *_: Any, **__: Any) -> bool:
    """Keep what the backward pass needs, but not gathered parameters and their bfloat16 copies."""
    return primitive.name not in ("sharding_constraint", "convert_element_type")


def fitting_batch_size(
    step: TrainStep, arguments: Arguments, multiple: int, limit: int | None
) -> int | None:
    """Halve the batch size until the step's memory, as XLA computes it, is within the limit.

    Each attempt compiles the step without running it.

    Args:
        step: jitted training step.
        arguments: arguments of the step, with the batch that does not fit. Only shapes and
            shardings are read, so donated buffers are accepted.
        multiple: number that batch sizes must be a multiple of.
        limit: bytes of memory of one device; None if unknown.

    Returns:
        A batch size; 0 if none fits, None if ``limit`` is None.
    """
    if limit is None:
        return None
    state, frozen, batch, keys = arguments
    size = len(batch.mask) // 2 // multiple * multiple
    while size:
        smaller = jax.tree.map(lambda x, n=size: _like(x, (n, *x.shape[1:])), batch)
        others = jax.tree.map(lambda x: _like(x, x.shape), (state, frozen))
        lowered = step.lower(*others, smaller, keys)  # pyright: ignore[reportFunctionMemberAccess]
        try:
            if read_memory(lowered.compile()).total <= limit:
                return size
        except jax.errors.JaxRuntimeError as error:  # some backends run out while compiling
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        size = size // 2 // multiple * multiple
    return 0


def _like(x: jax.Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)
