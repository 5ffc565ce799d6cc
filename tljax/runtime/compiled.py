"""Read what a compiled program needs and does: memory, collectives and estimated cycles."""

import re
from collections import Counter
from collections.abc import Iterator
from math import prod
from time import perf_counter
from typing import Any, NamedTuple

import jax

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast", "inter-slice transfer"),
)
"""Operations that move data between chips. The last is no name of XLA: the TPU compiler splits a
collective over several slices into collectives in each and sends of a share of every chip."""


class Collective(NamedTuple):
    """All operations of one kind in a program that move data between chips.

    Attributes:
        times: how often one is executed.
        bytes: bytes of their results on one chip, all together.
        dtypes: bytes of the results by dtype.
    """

    times: int
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
        bytes_accessed: bytes that instructions read and write, a fusion its inputs and outputs.
        instructions: number of instructions of the program's text by operation.
        seconds: how long the compilation took.
    """

    memory: Memory
    collectives: dict[str, Collective]
    cycles: int | None
    bytes_accessed: int
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
    text = compiled.as_text() or ""
    return Compiled(
        read_memory(compiled),
        read_collectives(text),
        estimated_cycles(text),
        count_bytes(text),
        dict(count_instructions(text)),
        seconds,
    )


def read_memory(compiled: jax.stages.Compiled) -> Memory:
    """Return the memory of one chip that a compiled program needs, as its compiler computes it."""
    found: Any = compiled.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes - found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )


_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r" = (?P<shape>.*?) (?P<name>[a-z][a-z\-]*)\(")
_RESULT = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) [a-z][a-z\-]*\(")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\]")


class _Text:
    """The computations of a program's text, which call each other."""

    def __init__(self, text: str) -> None:
        self.lines: dict[str, list[str]] = {}
        self.sizes: dict[str, int] = {}  # bytes of the result of each instruction
        self.entry, name = "", ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                name = header[2]
                self.lines[name] = []
                self.entry = name if header[1] else self.entry
            elif name:
                self.lines[name].append(line)
                if result := _RESULT.match(line):
                    self.sizes[result[1]] = _size(result[2])

    def executed(self, *, fused: bool) -> Iterator[tuple[str, int]]:
        """Yield each line that runs, and how often.

        Args:
            fused: also yield the lines within fusions and the like.
        """
        pending = [(self.entry, 1)]
        while pending:
            name, times = pending.pop()
            for line in self.lines.get(name, ()):
                yield line, times
                if " while(" in line:
                    trips = re.search(r"known_trip_count\D*(\d+)", line)
                    body = re.search(r"body=%?([\w.\-]+)", line)
                    if body:
                        pending.append((body[1], times * int(trips[1] if trips else 1)))
                elif fused or " call(" in line:
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
        if operation["name"] == "recv-done" and "xla_megascale_runtime" in line:
            kind = "inter-slice transfer"
        if kind in COLLECTIVES:
            counts[kind] += times
            of_kind = sizes.setdefault(kind, Counter())
            for dtype, dims in _SHAPE.findall(operation["shape"]):
                if size := times * _bytes(dtype, dims):
                    of_kind[dtype] += size
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


_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"),
    *("after-all", "partition-id", "replica-id", "conditional"),
}
"""Operations that move no data themselves."""


def count_bytes(text: str) -> int:
    """Sum the bytes of the operands and results of all instructions that a program executes.

    A fusion reads its operands and writes its results once. Those that read or write a part of an
    array in place count as a whole.
    """
    program, total = _Text(text), 0
    for line, times in program.executed(fused=False):
        operation = _OPERATION.search(line)
        # Of a pair, the second one waits only.
        if operation and operation["name"] not in _FREE and not operation["name"].endswith("-done"):
            operands = line[operation.end() :].partition(")")[0]
            names = re.findall(r"%([\w.\-]+)", operands)
            read = sum(program.sizes.get(name, 0) for name in names)
            total += times * (read + _size(operation["shape"]))
    return total


def count_instructions(text: str) -> Counter[str]:
    """Count the instructions in the text of a compiled program, by operation."""
    return Counter(match["name"] for match in map(_OPERATION.search, text.splitlines()) if match)


def _size(shape: str) -> int:
    """Return the bytes of an array, or of all arrays of a tuple."""
    return sum(_bytes(dtype, dims) for dtype, dims in _SHAPE.findall(shape))


def _bytes(dtype: str, dims: str) -> int:
    """Return the bytes of an array."""
    bits = re.search(r"\d+", dtype)
    width = int(bits[0]) if bits else 8 if dtype == "pred" else 0
    return width * prod(map(int, filter(None, dims.split(",")))) // 8
