"""Small training runs: data, and everything that must be equal bit for bit."""

from pathlib import Path

import numpy as np
import tiny

from tljax.data.examples import Source, Splits
from tljax.data.options import Loading
from tljax.runtime.trees import flatten
from tljax.train.checkpoint import Checkpoints
from tljax.train.fit import FitResult, fit
from tljax.train.options import FitConfig, OptimizerConfig
from tljax.train.run_directory import MetricsFile

LOADING = Loading(batch_size=4)


def source(count, seed=0, broken=(), classes=3):
    """Return images of noise whose brightness increases with the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % classes
    images = rng.integers(0, 120, (count, 16, 16, 3)) + 60 * labels[:, None, None, None]
    examples = [b"broken" if i in broken else x.astype(np.uint8) for i, x in enumerate(images)]
    names = [f"image {i}" for i in range(count)]
    return Source(examples, labels, tuple("abc"[:classes]), names)


def splits(count=11, broken=(4,), val_broken=(2,)):
    """Return splits with unreadable images in both parts and an incomplete batch of 4."""
    return Splits(source(count, broken=broken), source(7, 1, val_broken), ())


def config(recipe="finetune", *, optimizer="adamw", rate=1e-2, clip_norm=1.0, **others):
    optimizer_config = OptimizerConfig(optimizer, rate, clip_norm=clip_norm)
    return FitConfig(recipe, optimizer=optimizer_config, **{"epochs": 2, **others})


def train(
    fit_config, data=None, *, folder=None, on_epoch=lambda _: None, loading=LOADING, **options
) -> FitResult:
    """Train the tiny network; with ``folder``, write metrics.jsonl and a checkpoint per step."""
    arguments = tiny.MODEL, tiny.random_variables(), data or splits(), fit_config
    if folder is None:
        return fit(*arguments, loading=loading, on_epoch=on_epoch, **options)

    metrics = MetricsFile(folder)

    def write_and_log(history):
        metrics.on_epoch(history)
        on_epoch(history)

    checkpoints = Checkpoints(folder / "checkpoints", repr(fit_config))
    options |= {"checkpoints": checkpoints, "checkpoint_seconds": 0}
    try:
        return fit(*arguments, loading=loading, on_epoch=write_and_log, **options)
    finally:
        checkpoints.close()  # after an error, too, so that this process finishes writing


def everything(result: FitResult, folder: Path | None = None):
    """Return everything in which two equal runs must agree."""
    return {
        "history": result.history,
        "variables": {k: np.asarray(v).tobytes() for k, v in flatten(result.variables).items()},
        "logits": result.logits.values.tobytes(),
        "skipped": [sorted(part) for part in result.skipped],
        "metrics": folder and (folder / "metrics.jsonl").read_bytes(),
    }
