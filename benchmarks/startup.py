"""Measure time and memory from the start of Python to a training step; print JSON.

Each side is a process of its own that imports what it needs, loads the same network, runs a forward
pass, and takes two steps that train all parameters. tljax runs twice: with an empty compilation
cache, and with the cache that the first run filled.

    python benchmarks/startup.py --weights microsoft/resnet-50
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import tyro
from processes import python

Side = Literal["tljax", "tljax again", "torch"]


@dataclass(frozen=True)
class Config:
    """Seconds since the start of the process, and its peak memory, in tljax and torch."""

    weights: str = "microsoft/resnet-18"
    """Pretrained weights, as in tljax train, of a network that transformers has."""
    image_size: int = 224
    """Side of the square images, in pixels; by default what the weights expect."""
    batch_size: int = 16
    """Images per batch."""
    rounds: int = 3
    """Number of starts per side."""
    alone: Side | None = None
    """Run only this side, in this process; set by the benchmark itself."""
    began: float = 0
    """Start of the process, in seconds since the epoch; set by the benchmark itself."""
    folder: Path = Path()
    """The weights as transformers reads them; set by the benchmark itself."""


class Marks:
    """Seconds and peak memory at each event of a process."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.events: dict[str, dict[str, float]] = {}

    def __call__(self, event: str) -> None:
        """Record the time and the peak memory."""
        # Not getrusage, which also counts the memory of the parent process.
        status = Path("/proc/self/status").read_text("utf-8").split()
        peak = int(status[status.index("VmHWM:") + 1])
        self.events[event] = {
            "seconds": round(time.time() - self.began, 2),
            "peak_gib": round(peak / 2**20, 2),
        }


def in_tljax(config: Config, mark: Marks) -> None:
    """Run a forward pass and two steps in tljax."""
    import tljax

    tljax.configure()

    import jax
    from ours import random_batch, repeated_step

    from tljax.models import apply
    from tljax.pretrained import load_pretrained

    mark("imported")
    model, variables, _ = load_pretrained(config.weights).with_size(config.image_size)
    mark("loaded")
    images, labels = random_batch(model, config.batch_size)
    jax.block_until_ready(jax.jit(lambda v, x: apply(model, v, x).logits)(variables, images))
    mark("first forward")
    step = repeated_step(model, variables, images, labels)
    jax.block_until_ready(step())
    mark("first step")
    jax.block_until_ready(step())
    mark("second step")


def in_torch(config: Config, mark: Marks) -> None:
    """Run them in torch, eager and channels last."""
    import torch
    from transformers import AutoModelForImageClassification

    mark("imported")
    network = AutoModelForImageClassification.from_pretrained(config.folder).eval()
    network.to(memory_format=torch.channels_last)
    mark("loaded")
    pixels = torch.rand(config.batch_size, 3, config.image_size, config.image_size)
    pixels = pixels.to(memory_format=torch.channels_last)
    labels = torch.zeros(config.batch_size, dtype=torch.long)
    with torch.inference_mode():
        network(pixels)
    mark("first forward")
    optimizer = torch.optim.SGD(network.parameters(), 1e-6, momentum=0.9)
    for which in ("first", "second"):
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(network(pixels).logits, labels).backward()
        optimizer.step()
        mark(f"{which} step")


def turn(network: str) -> dict[Side, Any]:
    """Start a process of each side and return its events."""
    arguments = [__file__, *sys.argv[1:], "--folder", network]
    with tempfile.TemporaryDirectory() as compiled:
        events = {
            side: python(
                *(*arguments, "--alone", side, "--began", time.time()),
                JAX_COMPILATION_CACHE_DIR=compiled,
            )
            for side in get_args(Side)
        }
    print(events, file=sys.stderr, flush=True)
    return events


def main() -> None:
    config = tyro.cli(Config)
    if config.alone:
        mark = Marks(config.began)
        work: Callable[[Config, Marks], None] = in_torch if config.alone == "torch" else in_tljax
        work(config, mark)
        print(json.dumps(mark.events))
        return
    from peers import environment

    from tljax.pretrained import export, load_pretrained

    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder), load_pretrained(config.weights), "huggingface")
        turns = [turn(folder) for _ in range(config.rounds)]

    sides = {
        side: {
            mark: {unit: statistics.median(t[side][mark][unit] for t in turns) for unit in values}
            for mark, values in marks.items()
        }
        for side, marks in turns[0].items()
    }
    report = {
        "environment": environment(),
        "weights": Path(config.weights).name,
        "image_size": config.image_size,
        "batch_size": config.batch_size,
        "sides": sides,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
