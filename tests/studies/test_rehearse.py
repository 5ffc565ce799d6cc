"""Rehearsals: what the search for the largest batch tries, and one of a small network."""

import json
import subprocess
import sys
from importlib.util import find_spec

import jax
import pytest

from tljax.report.rehearsal import rehearsal_lines
from tljax.runtime.machines import parse_machine
from tljax.studies import rehearse as module
from tljax.studies.rehearse import Program, Rehearsal, largest_batch, roofline

GIB = 2**30


class Lowered:
    """A program of a size, whose memory is a line."""

    def __init__(self, size):
        self.size = size

    def lower(self):
        return self


@pytest.fixture
def compiler(monkeypatch):
    """Replace the compiler: a program takes a GiB, and 32 MiB for each example of a chip."""
    tried = []

    def compile_program(lowered, **_):
        tried.append(lowered.size)
        total = GIB + lowered.size // 8 * 2**25
        if total > 15.75 * GIB:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        memory = type("Memory", (), {"total": total})
        return type("Compiled", (), {"memory": memory})

    monkeypatch.setattr(module, "compile_program", compile_program)
    return tried


@pytest.mark.parametrize("batch", [8, 256, 3584])
def test_the_largest_batch_is_found_in_few_compilations(compiler, batch):
    machine = parse_machine("v5e-8")
    program = Program("step", Lowered, batch, 8)
    largest = largest_batch(program, machine, GIB + batch // 8 * 2**25)
    assert len(compiler) <= 3
    assert 0.85 * 472 * 8 < largest <= 472 * 8
    assert largest % 8 == 0


def test_a_batch_that_does_not_fit_leads_to_one_that_does(compiler):
    machine = parse_machine("v5e-8")
    largest = largest_batch(Program("step", Lowered, 8192, 8), machine, None)
    assert len(compiler) <= 3
    assert 2048 <= largest <= 472 * 8


def test_a_roofline_has_the_peak_of_the_dtype():
    rehearsal = Rehearsal("step", 8, flops=989e12, bytes_accessed=3_352_000_000_000)
    machine = parse_machine("h100-1")
    assert roofline(rehearsal, machine, "bfloat16") == pytest.approx({"operations": 1, "memory": 1})
    assert roofline(rehearsal, machine, "float32")["operations"] == pytest.approx(2)


def test_a_rehearsal_says_what_fits_and_what_bounds():
    record = Rehearsal(
        "step", 64, fits=True, largest_batch=512, seconds=0.5, bound="memory", loading=30.0,
        memory={"arguments": 1, "outputs": 0, "temporaries": GIB, "code": 0, "total": GIB},
        collectives={"all-reduce": {"times": 2, "bytes": 2**21, "dtypes": {"bf16": 2**21}}},
    ).as_json()  # fmt: skip
    text = "\n".join(rehearsal_lines(json.loads(json.dumps(record)), parse_machine("h100-8")))
    assert "step  (64 examples, 8 a chip)" in text
    assert "yes: 1.00 of 59.32 GiB a chip; 512 examples do, 64 a chip" in text
    assert "2 all-reduces of 2.0 MiB (2.0 bf16)" in text
    assert "at best 500.0 ms, 128 examples/s (roofline, bound by memory" in text
    assert "must deliver 128 images/s on each host; this computer delivers 30" in text


def test_a_program_that_aborts_the_compiler_is_one_line():
    record = {"name": "step", "error": "the compiler ended the process by SIGABRT: Check failed"}
    assert rehearsal_lines(record, parse_machine("v5e-8")) == [
        "step",
        "  fits           no: the compiler ended the process by SIGABRT: Check failed",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "collectives"),
    [("", {"all-reduce"}), ("--fsdp", {"all-reduce", "all-gather"})],
)
def test_a_small_network_is_rehearsed_for_eight_tpus(tmp_path, flags, collectives):
    if find_spec("libtpu") is None:
        pytest.skip("needs the compiler of the package libtpu")
    command = "rehearse train --on v5e-8 --effort low --json --image-size 32 --batch-size 64"
    command += f" --recipe finetune --no-largest-batch {flags}"
    done = subprocess.run(
        [sys.executable, "-m", "tljax", *command.split()],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    report = json.loads(done.stdout.splitlines()[-1])
    step, validation = report["programs"]
    assert (report["chips"], report["hosts"], report["problems"]) == (8, 1, [])
    assert step["fits"]
    assert set(step["collectives"]) == collectives
    assert step["cycles"] is None  # at low effort they mean nothing
    assert validation["collectives"] == {}
    assert not list(tmp_path.iterdir())
