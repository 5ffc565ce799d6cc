"""How long is it from the start of Python to a trained batch, and what memory does it take?

Prints one JSON object. Each side is a process of its own that imports what it needs, loads the same
network, looks at a batch, and trains everything on it once and once more. Ours comes twice: with
nothing compiled, and with the programs that the first time left in the cache.

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
    """Seconds since the start of the process, and its memory, in tljax and in torch."""

    weights: str = "microsoft/resnet-18"
    """A network that transformers has, as for tljax train."""
    image_size: int = 224
    """As for tljax train."""
    batch_size: int = 16
    """Images at once."""
    rounds: int = 3
    """How often each side is started."""
    alone: Side | None = None
    """For the processes that this one starts."""
    began: float = 0
    """Likewise."""
    folder: Path = Path()
    """Likewise."""


class Marks:
    """When what was done, and how much memory had been taken by then."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.found: dict[str, dict[str, float]] = {}

    def __call__(self, what: str) -> None:
        """Notes that it has been done."""
        # Not getrusage, which counts the parent's memory too.
        status = Path("/proc/self/status").read_text("utf-8").split()
        peak = int(status[status.index("VmHWM:") + 1])
        self.found[what] = {
            "seconds": round(time.time() - self.began, 2),
            "peak_gib": round(peak / 2**20, 2),
        }


def in_tljax(config: Config, mark: Marks) -> None:
    """What every command of ours does."""
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
    """Eager, channels last."""
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
    """What a process of each side says of itself."""
    arguments = [__file__, *sys.argv[1:], "--folder", network]
    with tempfile.TemporaryDirectory() as compiled:
        found = {
            side: python(
                *(*arguments, "--alone", side, "--began", time.time()),
                JAX_COMPILATION_CACHE_DIR=compiled,
            )
            for side in get_args(Side)
        }
    print(found, file=sys.stderr, flush=True)
    return found


def main() -> None:
    config = tyro.cli(Config)
    if config.alone:
        mark = Marks(config.began)
        work: Callable[[Config, Marks], None] = in_torch if config.alone == "torch" else in_tljax
        work(config, mark)
        print(json.dumps(mark.found))
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
