"""Measure an epoch by the last frozen stage, with and without cached activations; print JSON.

For each stage: the FLOPs of a step relative to a step that trains all parameters, and the median
seconds of an epoch, including the decoding of the images. The runs are interleaved.

    python benchmarks/epochs.py FOLDER --weights timm/resnet50.tv_in1k --images 32
"""

import tljax

tljax.configure()

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from tljax.data.augment import epoch_key
from tljax.data.examples import Source, Splits, select
from tljax.data.options import Loading
from tljax.data.sources import open_splits
from tljax.models import Model
from tljax.pretrained import load_pretrained
from tljax.runtime.parallel import shard
from tljax.runtime.types import Variables
from tljax.train.dry_run import step_flops
from tljax.train.options import FitConfig
from tljax.train.run_directory import environment
from tljax.train.setup import begin_phase, prepare


@dataclass(frozen=True)
class Config:
    """Seconds of an epoch for every --freeze-to, with and without cached activations."""

    data: Annotated[str, tyro.conf.Positional]
    """The data set, as in tljax train."""
    weights: str = "efficientnet_lite0.in1k"
    """Pretrained weights, as in tljax train."""
    images: int = 32
    """Number of training images."""
    batch_size: int = 16
    """Images per step."""
    image_size: int | None = None
    """Side of the square images, in pixels; by default what the weights expect."""
    repeats: int = 3
    """Number of timed epochs per configuration."""


class Runner:
    """A run that is ready for its first step and trains one epoch per call."""

    def __init__(
        self,
        model: Model,
        variables: Variables,
        splits: Splits,
        config: FitConfig,
        loading: Loading,
    ) -> None:
        self.run, self.inputs = prepare(model, variables, splits, config, loading)
        self.phase = self.run.plan.phases[0]
        self.state, self.frozen, self.step = begin_phase(
            self.run, self.inputs, self.phase, self.run.variables, lambda _: 1e-5
        )

    def epoch(self) -> tuple[float, float]:
        """Train one epoch and return its wall-clock and processor seconds."""
        began, busy = time.perf_counter(), time.process_time()
        keys = epoch_key(0, 1), jax.random.key(0)
        for batch in self.inputs.batches(self.run.model, 1):
            placed = shard(batch, self.run.mesh)
            self.state, _ = self.step(self.state, self.frozen, placed, keys)
        jax.block_until_ready(self.state)
        return time.perf_counter() - began, time.process_time() - busy

    def flops(self, batch_size: int, *, everything: bool = False) -> float:
        """Return the FLOPs of one step, as XLA counts them before optimization."""
        labels = self.phase.rates
        if everything:
            labels = jax.tree.map(lambda _: 1.0, labels)
        start = None if everything else self.inputs.start
        model, variables = self.run.model, self.run.variables
        return step_flops(model, variables, labels, self.run.config, batch_size, start)


def first(source: Source, count: int) -> Source:
    """Images of all classes in turn."""
    return select(source, sorted(range(len(source)), key=lambda i: i * 7919 % len(source))[:count])


def main() -> None:
    config = tyro.cli(Config)
    model, variables, _ = load_pretrained(config.weights).with_size(config.image_size)
    splits = open_splits(config.data)
    splits = splits._replace(train=first(splits.train, config.images), val=first(splits.val, 2))
    loading = Loading(config.batch_size)
    with_params = [name for name in model.stage_names if name in variables["params"]]
    runners = {}
    for frozen in (None, *with_params[:-1]):
        for cache in ("memory", "none"):
            if frozen is None and cache == "memory":
                continue  # there is nothing frozen whose activations could be cached
            fit = FitConfig("finetune", freeze_to=frozen, cache=cache)
            runners[frozen, cache] = Runner(model, variables, splits, fit, loading)
            runners[frozen, cache].epoch()  # compiles
    seconds: dict[Any, list[tuple[float, float]]] = {name: [] for name in runners}
    for _ in range(config.repeats):
        for name, runner in runners.items():
            seconds[name].append(runner.epoch())
            print(name, seconds[name][-1], file=sys.stderr)
    full = next(iter(runners.values())).flops(config.batch_size, everything=True)
    rows = []
    for (frozen, cache), times in seconds.items():
        wall, processor = (statistics.median(column) for column in zip(*times, strict=True))
        flops = runners[frozen, cache].flops(config.batch_size)
        rows.append(
            {
                "freeze_to": frozen,
                "cache": cache,
                "flops_of_full": round(flops / full, 4),
                "seconds": round(wall, 3),
                "processor_seconds": round(processor, 3),
            }
        )
    report = {
        "environment": environment(),
        "weights": Path(config.weights).name,
        "image_size": model.preprocess.size,
        "images": config.images,
        "batch_size": config.batch_size,
        "gflops_of_a_full_step": round(full / 1e9, 1),
        "epochs": rows,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
