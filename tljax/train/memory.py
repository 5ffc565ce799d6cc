"""How much memory there is, and what would fit when a training step does not."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import psutil

from tljax.runtime.errors import RequestError
from tljax.runtime.types import Batch, Variables
from tljax.train.step import Keys, TrainState, TrainStep

Arguments = tuple[TrainState, Variables, Batch, Keys]
"""What a `TrainStep` takes."""


@contextmanager
def within_memory(
    step: TrainStep, arguments: Arguments, multiple: int, accumulate: int
) -> Iterator[None]:
    """Turns a device's lack of memory for a step into one line that says what would fit.

    Args:
        step: the jitted step, which runs within.
        arguments: of the step.
        multiple: batch sizes are multiples of it.
        accumulate: the parts in which a batch goes through the network now.

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
            advice = "halve --batch-size, or take it in parts with --accumulate 2"
        elif fits:
            parts = accumulate * -(-size // fits)
            advice = f"--batch-size {fits} would fit, and so would --accumulate {parts}"
        else:
            advice = "no batch fits: --precision bfloat16, a smaller --image-size or --freeze-to"
        raise RequestError(f"out of device memory at --batch-size {size}: {advice}") from error


def device_memory() -> int | None:
    """Bytes that a program may use on one device; None where nobody knows, as on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return stats and stats.get("bytes_limit")


_CGROUPS = {
    "": ("memory.max", "memory.current"),  # version 2
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def free_memory(root: Path = Path("/")) -> int:
    """Measure how many bytes of memory the host has free, and the containers (cgroups) leave."""
    free = [psutil.virtual_memory().available]
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kind, group = line.split(":", 2)
        below = Path(group.lstrip("/"))
        for part in (below, *below.parents) if kind in _CGROUPS else ():
            folder = root / "sys/fs/cgroup" / kind / part
            # No limit reads "max"; within a container, the groups above it are not seen.
            with suppress(OSError, ValueError):
                most, used = (int((folder / name).read_text()) for name in _CGROUPS[kind])
                # Of what is used, Linux gives back copies of files.
                cached = (folder / "memory.stat").read_text().rpartition("inactive_file ")[2]
                free.append(most - used + int(cached.split()[0]))
    return max(0, min(free))


def fitting_batch_size(
    step: TrainStep, arguments: Arguments, multiple: int, limit: int | None
) -> int | None:
    """The batch, halved until XLA's own account of the step's memory is within the limit.

    Each attempt compiles the step, and runs nothing.

    Args:
        step: the jitted step.
        arguments: of the step, with the batch that does not fit. Shapes and shardings are enough,
            so the buffers of the state may be gone.
        multiple: batch sizes are multiples of it.
        limit: bytes of one device.

    Returns:
        A batch size; 0 if none fits, None if ``limit`` is not known.
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
            if _bytes(lowered.compile()) <= limit:
                return size
        except jax.errors.JaxRuntimeError as error:  # some backends refuse while they compile
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        size = size // 2 // multiple * multiple
    return 0


def _like(x: jax.Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)


def _bytes(compiled: jax.stages.Compiled) -> int:
    """Of one device, at the same time."""
    found = compiled.memory_analysis()
    assert found is not None
    return (
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )
