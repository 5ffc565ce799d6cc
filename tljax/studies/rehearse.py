"""Rehearse a command: compile its programs for a machine that need not be at hand, and read them.

`rehearse` compiles a `Program` and says whether it fits, the largest batch that does, and how long
it takes by the compiler's estimate. The programs of a command are in `tljax.studies.programs`.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax

from tljax.models.flops import count_flops
from tljax.runtime.compiled import Compiled, compile_program
from tljax.runtime.errors import first_line
from tljax.runtime.machines import Machine
from tljax.runtime.settings import Dtype
from tljax.runtime.types import Batch
from tljax.train.throughput import loading_rate

LOW_EFFORT = {"exec_time_optimization_effort": -1.0}
"""Options with which the TPU compiler takes a fifth to a tenth of the time. Memory and collectives
are about the same, but its estimates of cycles mean nothing."""

WITHOUT_TRITON = {"xla_gpu_enable_triton_gemm": False}
"""Options with which products of matrices are calls of cuBLAS. On the card, XLA times Triton's
tilings and others; without it, it takes one that some products do not have, and fails."""

_ATTEMPTS = 3  # compilations in search of the largest batch
_MOST = 4096  # examples a chip; beyond, nothing is searched for


@dataclass(frozen=True)
class Program:
    """A program of a command.

    Attributes:
        name: what it computes.
        trace: returns it for a number of examples over all chips.
        batch: number of examples of the command, over all chips.
        multiple: number that batches are a multiple of.
        dtype: dtype of its products and convolutions.
        loader: returns batches of images that feed it, on the host; None if it is fed otherwise.
        varies: whether another number of examples could be chosen.
        note: what else is to know about it; "" if nothing.
    """

    name: str
    trace: Callable[[int], jax.stages.Traced]
    batch: int
    multiple: int
    dtype: Dtype = "float32"
    loader: Callable[[], Iterator[Batch]] | None = None
    varies: bool = True
    note: str = ""


@dataclass(frozen=True)
class Rehearsal:
    """What compiling a program says about running it. Memory and traffic are those of one chip.

    Attributes:
        name: name of the program.
        batch: number of examples over all chips.
        fits: whether it fits the memory.
        largest_batch: the largest number of examples that was found to fit; None if it was not
            searched for.
        memory: bytes by kind, and their ``total``; {} if the compiler refused the program.
        collectives: ``times``, ``bytes`` and ``dtypes`` of each kind of collective.
        flops: operations of products and convolutions.
        bytes_accessed: bytes read and written.
        cycles: the TPU compiler's estimate; None for GPUs and at low effort.
        seconds: estimated duration: by the cycles on a TPU, by the roofline on a GPU; None without.
        bound: what bounds the roofline: ``operations`` or ``memory``; None for a TPU.
        compile_seconds: how long the compilation took on this computer.
        loading: images per second that this computer loads; None if it is not fed by images.
        note: what else is to know about it.
        error: why the program cannot be compiled, in one line; None if it can.
    """

    name: str
    batch: int
    fits: bool = False
    largest_batch: int | None = None
    memory: dict[str, int] = field(default_factory=dict)
    collectives: dict[str, Any] = field(default_factory=dict)
    flops: float = 0.0
    bytes_accessed: int = 0
    cycles: int | None = None
    seconds: float | None = None
    bound: str | None = None
    compile_seconds: float = 0.0
    loading: float | None = None
    note: str = ""
    error: str | None = None

    @property
    def examples_per_second(self) -> float | None:
        """Return the estimated number of examples per second on all chips."""
        return self.batch / self.seconds if self.seconds else None

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON-serializable values."""
        return {**asdict(self), "examples_per_second": self.examples_per_second}


def rehearse(
    program: Program, machine: Machine, *, low_effort: bool = False, search: bool = True
) -> Rehearsal:
    """Compile a program for a machine, and say what it needs.

    Args:
        program: the program, made for the devices of the machine.
        machine: the machine.
        low_effort: compile with `LOW_EFFORT` on a TPU, without estimating a duration.
        search: search for the largest batch that fits, by up to three more compilations.
    """
    low_effort = low_effort and machine.chip.kind == "tpu"
    options = LOW_EFFORT if low_effort else {}
    traced = program.trace(program.batch)
    described = Rehearsal(
        program.name,
        program.batch,
        flops=count_flops(traced) / machine.chips,
        loading=loading_rate(program.loader()) if program.loader else None,
        note=program.note,
    )
    found: Compiled | None = None
    try:
        found = _compile(traced.lower(), options)
    except jax.errors.JaxRuntimeError as error:
        described = replace(described, error=first_line(error))
        if "RESOURCE_EXHAUSTED" not in str(error):
            return described
    if search and program.varies:
        largest = largest_batch(program, machine, found and found.memory.total)
        described = replace(described, largest_batch=largest)
    if found is None:
        return described
    described = replace(
        described,
        fits=found.memory.total <= machine.usable_memory,
        memory={**found.memory._asdict(), "total": found.memory.total},
        collectives={kind: one._asdict() for kind, one in found.collectives.items()},
        bytes_accessed=found.bytes_accessed,
        compile_seconds=found.seconds,
    )
    if machine.chip.kind == "gpu":
        times = roofline(described, machine, program.dtype)
        bound = max(times, key=lambda name: times[name])
        return replace(described, seconds=times[bound], bound=bound)
    if low_effort or found.cycles is None:
        return described
    return replace(described, cycles=found.cycles, seconds=found.cycles / machine.chip.clock)


def _compile(lowered: jax.stages.Lowered, options: dict[str, Any]) -> Compiled:
    """Compile a program; `WITHOUT_TRITON` if it fails for want of a tiling."""
    try:
        return compile_program(lowered, **options)
    except jax.errors.JaxRuntimeError as error:
        if "output tile sizes" not in str(error):
            raise
        return compile_program(lowered, **options, **WITHOUT_TRITON)


def roofline(rehearsal: Rehearsal, machine: Machine, dtype: Dtype) -> dict[str, float]:
    """Return the seconds that operations and memory traffic take at least, at the chip's peaks."""
    chip = machine.chip
    peak = chip.flops if dtype == "bfloat16" else chip.flops_float32
    return {
        "operations": rehearsal.flops / peak,
        "memory": rehearsal.bytes_accessed / chip.bandwidth,
    }


def largest_batch(program: Program, machine: Machine, needed: int | None) -> int:
    """Search for the largest number of examples that fits, compiling with `LOW_EFFORT`.

    Memory is almost linear in the number of examples, so that a line through the last two sizes
    soon leads to the limit.

    Args:
        program: the program.
        machine: the machine.
        needed: bytes that ``program.batch`` examples need on a chip; None if they do not fit.

    Returns:
        A number of examples over all chips; 0 if none was found to fit.
    """
    limit, most = machine.usable_memory, _MOST * machine.chips
    options = LOW_EFFORT if machine.chip.kind == "tpu" else {}
    needs, size = {0: 0}, program.batch
    best, refused = 0, None
    for attempt in range(_ATTEMPTS + 1):
        if attempt:
            needed = _needed(program, size, options)
        if needed is not None:
            needs[size] = needed
        if needed is not None and needed <= limit:
            best = size
        else:
            refused = size
        size = _next_size(needs, limit, best, refused)
        # Beyond some size, multiples of eight on a chip are precise enough.
        size = min(size, most)
        size -= size % (program.multiple * (8 if size >= 16 * program.multiple else 1))
        if size <= best:
            break
    return best


def _needed(program: Program, size: int, options: dict[str, Any]) -> int | None:
    """Return the bytes that a number of examples needs on a chip; None if the compiler refuses."""
    try:
        return _compile(program.trace(size).lower(), options).memory.total
    except jax.errors.JaxRuntimeError:
        return None


def _next_size(needs: dict[int, int], limit: int, best: int, refused: int | None) -> int:
    """Return where a line through the two largest sizes that were compiled meets the limit.

    If that is known not to fit, it is the middle of what fits and what does not.
    """
    (small, low), (large, high) = sorted([(-1, 0), *needs.items()])[-2:]
    size = int(small + (limit - low) * (large - small) / max(high - low, 1))
    return size if refused is None or size < refused else (best + refused) // 2
