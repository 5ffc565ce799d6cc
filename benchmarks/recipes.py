"""Measure the accuracy and duration of training recipes on a folder of images; print JSON.

python benchmarks/recipes.py FOLDER --recipes probe lp-ft finetune scratch --seeds 3
"""

import tljax

tljax.configure()

import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from tljax.data.options import Loading
from tljax.data.sources import open_splits
from tljax.pretrained import load_pretrained
from tljax.train.fit import fit
from tljax.train.options import FitConfig, Recipe
from tljax.train.run_directory import environment


@dataclass(frozen=True)
class Config:
    """Validation accuracy and seconds of training recipes, over several seeds."""

    data: Annotated[str, tyro.conf.Positional]
    """The data set, as in tljax train."""
    weights: str = "efficientnet_lite0.in1k"
    """Pretrained weights, as in tljax train."""
    recipes: tuple[Recipe, ...] = ("probe", "lp-ft", "finetune", "scratch")
    """The recipes to run."""
    seeds: int = 3
    """Number of runs per recipe, with seeds 0, 1, ...."""
    image_size: int | None = None
    """Side of the square images, in pixels; by default what the weights expect."""
    batch_size: int = 32
    """Images per step."""
    fit: tyro.conf.OmitArgPrefixes[FitConfig] = field(default_factory=FitConfig)


def main() -> None:
    """Run the benchmark and print its report as JSON."""
    config = tyro.cli(Config)
    pretrained = load_pretrained(config.weights).with_size(config.image_size)
    splits = open_splits(config.data)
    results: dict[str, Any] = {}
    for recipe in config.recipes:
        top1, seconds, processor, first, epochs = [], [], [], [], 0
        for seed in range(config.seeds):
            began, busy = time.perf_counter(), time.process_time()
            result = fit(
                pretrained.model,
                pretrained.variables,
                splits,
                replace(config.fit, recipe=recipe),
                loading=Loading(config.batch_size),
                seed=seed,
            )
            top1.append(result.evaluation.top1)
            seconds.append(time.perf_counter() - began)
            processor.append(time.process_time() - busy)
            first.append(result.history[0]["val_top1"])
            epochs = len(result.history) - 1
            print(f"{recipe} seed {seed}: {top1[-1]:.4f} in {seconds[-1]:.0f} s", file=sys.stderr)
        results[recipe] = {
            "val_top1": top1,
            "val_top1_mean": statistics.mean(top1),
            "val_top1_before_training": first,
            "epochs": epochs,
            "seconds_median": round(statistics.median(seconds), 1),
            # Unlike wall-clock time, it does not depend on other programs on the machine.
            "processor_seconds_median": round(statistics.median(processor), 1),
        }
    report = {
        "environment": environment(),
        "data": Path(config.data).name,
        "examples": [len(splits.train), len(splits.val)],
        "weights": Path(config.weights).name,
        "image_size": pretrained.model.preprocess.size,
        "recipes": results,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
