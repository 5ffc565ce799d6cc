"""Read what a compiled program needs and does: memory, collectives, estimated cycles, operations."""

import re
from collections import Counter
from collections.abc import Iterator
from math import prod
from time import perf_counter
from typing import Any, NamedTuple

import jax

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
"""Operations that move data between chips."""


class Collective(NamedTuple):
    """All operations of one kind in a program that move data between chips.

    Attributes:
        count: how often one is executed.
        bytes: bytes of their results on one chip, all together.
        dtypes: bytes of the results by dtype.
    """

    count: int
    bytes: int
    dtypes: dict[str, int]


class Memory(NamedTuple):
    """Bytes of memory of one chip that a program needs.

    Attributes:
        arguments: its arguments.
        outputs: its results, without those in the memory of donated arguments.
        temporaries: what it computes in between.
        code: the program itself; 0 on GPUs.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return sum(self)


class Compiled(NamedTuple):
    """What a compiled program needs and does, on one chip.

    Attributes:
        memory: bytes by kind.
        collectives: data that is moved between chips, by kind of operation.
        cycles: cycles that the TPU compiler estimates. Collectives, gathers and waiting for copies
            have no estimate. None for other compilers.
        bytes_accessed: bytes read and written, as the compiler counts them.
        instructions: number of instructions of the program's text by operation.
        seconds: how long the compilation took.
    """

    memory: Memory
    collectives: dict[str, Collective]
    cycles: int | None
    bytes_accessed: float
    instructions: dict[str, int]
    seconds: float


def compile_program(lowered: jax.stages.Lowered, **options: Any) -> Compiled:
    """Compile a lowered program, and read what the compiler says of it.

    Args:
        lowered: a jitted function, lowered for the devices of a `Machine`.
        options: options of the compiler, such as ``exec_time_optimization_effort=-1.0``.

    Raises:
        jax.errors.JaxRuntimeError: the compiler refuses the program; ``RESOURCE_EXHAUSTED`` if it
            needs more memory than a TPU has. Some faults abort the process.
    """
    began = perf_counter()
    compiled = lowered.compile(compiler_options=options or None)
    seconds = perf_counter() - began
    found: Any = compiled.memory_analysis()
    memory = Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes - found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )
    costs: Any = compiled.cost_analysis() or {}
    text = compiled.as_text() or ""
    return Compiled(
        memory,
        read_collectives(text),
        estimated_cycles(text),
        float(costs.get("bytes accessed", 0.0)),
        dict(count_instructions(text)),
        seconds,
    )


_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r" = (?P<shape>.*?) (?P<name>[a-z][a-z\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\]")


class _Text:
    """The computations of a program's text, which call each other."""

    def __init__(self, text: str) -> None:
        self.lines: dict[str, list[str]] = {}
        self.entry, name = "", ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                name = header[2]
                self.lines[name] = []
                self.entry = name if header[1] else self.entry
            elif name:
                self.lines[name].append(line)

    def executed(self, *, fused: bool) -> Iterator[tuple[str, int]]:
        """Yield each line that runs, and how often.

        Args:
            fused: also yield the lines of computations that are called, such as fusions. Those of
                loops always are.
        """
        pending = [(self.entry, 1)]
        while pending:
            name, times = pending.pop()
            for line in self.lines.get(name, ()):
                yield line, times
                if " while(" in line:
                    trips = re.search(r'known_trip_count\D*(\d+)', line)
                    body = re.search(r"body=%?([\w.\-]+)", line)
                    if body:
                        pending.append((body[1], times * int(trips[1] if trips else 1)))
                elif fused:
                    pending += [(called, times) for called in _CALLED.findall(line)]


def read_collectives(text: str) -> dict[str, Collective]:
    """Sum the collectives in the text of a compiled program, by kind.

    Those in a loop count as often as it runs; once if the compiler does not know how often.
    """
    counts, sizes = Counter[str](), dict[str, Counter[str]]()
    for line, times in _Text(text).executed(fused=True):
        operation = _OPERATION.search(line)
        if not operation:
            continue
        # Of a pair, the second one has the shape of the result.
        kind = operation["name"].removesuffix("-done")
        if kind in COLLECTIVES:
            counts[kind] += times
            of_kind = sizes.setdefault(kind, Counter())
            for dtype, dims in _SHAPE.findall(operation["shape"]):
                of_kind[dtype] += times * _bytes(dtype, dims)
    return {
        kind: Collective(count, sum(sizes[kind].values()), dict(sizes[kind]))
        for kind, count in counts.items()
    }


def estimated_cycles(text: str) -> int | None:
    """Sum the TPU compiler's estimates of cycles; None if its text has none."""
    total = sum(
        times * int(cycles)
        for line, times in _Text(text).executed(fused=False)
        for cycles in re.findall(r'"estimated_cycles":"?(\d+)', line)
    )
    return total or None


def count_instructions(text: str) -> Counter[str]:
    """Count the instructions in the text of a compiled program, by operation."""
    return Counter(match["name"] for match in map(_OPERATION.search, text.splitlines()) if match)


def _bytes(dtype: str, dims: str) -> int:
    """Return the bytes of an array."""
    bits = re.search(r"\d+", dtype)
    width = int(bits[0]) if bits else 8 if dtype == "pred" else 0
    return width * prod(map(int, filter(None, dims.split(",")))) // 8


def count_flops(traced: jax.stages.Traced) -> float:
    """Count the operations of matrix products and convolutions, two for each multiply-add.

    Args:
        traced: a jitted function, traced for its arguments.

    Returns:
        Their number over all devices. Loops count as often as they run; those whose number of
        iterations depends on the data count once.
    """
    return _flops(traced.jaxpr.jaxpr)


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            length = prod(shape[axis] for axis in contracted)
            total += 2 * length * equation.outvars[0].aval.size
        elif name == "conv_general_dilated":
            numbers, kernel = params["dimension_numbers"], equation.invars[1].aval
            taps = kernel.size // kernel.shape[numbers.rhs_spec[0]]
            # Of a dilated input, only every so many values are not zero.
            total += 2 * taps * equation.outvars[0].aval.size / prod(params["lhs_dilation"])
        elif name == "cond":
            total += max(map(_flops, (branch.jaxpr for branch in params["branches"])))
        else:
            times = params.get("length", 1) if name == "scan" else 1
            total += times * sum(map(_flops, _inner(params)))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Yield the programs that an operation runs."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(part, "jaxpr", part)  # closed or open
            if hasattr(inner, "eqns"):
                yield inner
