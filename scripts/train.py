"""Makes a pretrained network a classifier of your own images.

No argument runs the embedded default: EfficientNet-Lite0 on scikit-learn's digits, offline.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tljax import cli


@dataclass(frozen=True)
class Config(cli.Common):
    """Train a classifier of your own images on top of a pretrained network."""

    data: str = "digits"
    """A folder of class folders (with or without train/ and val/), or digits."""
    workdir: Path | None = None
    """The run directory to make; by default a new one under runs/."""
    recipe: Literal["probe", "lp-ft"] = "lp-ft"
    """probe: a linear head on frozen features. lp-ft: that, then fine-tune the last stages."""
    freeze_to: str | None = None
    """The last stage that stays frozen; by default the last before the lowest resolution."""
    epochs: int = 10
    """Of fine-tuning."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """Of fine-tuning."""
    learning_rate: float = 1e-4
    """Of the head, at its peak."""
    backbone_scale: float = 1.0
    """The rest of the network learns at this multiple of the learning rate."""
    weight_decay: float = 1e-4
    """Of kernels; never of norms and biases."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    val_fraction: float = 0.2
    """Share of the images kept for validation where the data has no validation part."""
    on_bad_image: Literal["skip", "fail"] = "skip"
    """Leave unreadable images out and list them in skipped.csv, or stop."""


def run(config: Config) -> dict[str, Any]:
    """Data in, run directory out."""
    from tljax.data.sources import open_splits
    from tljax.pretrained import load_pretrained, save
    from tljax.report.runs import percent, write_training_report
    from tljax.transfer import rundir
    from tljax.transfer.fit import FitConfig, fit
    from tljax.transfer.optimizer import OptimizerConfig

    began = time.perf_counter()
    fit_config = FitConfig(
        config.recipe,
        config.freeze_to,
        config.epochs,
        config.label_smoothing,
        OptimizerConfig(
            config.optimizer,
            config.learning_rate,
            config.backbone_scale,
            weight_decay=config.weight_decay,
        ),
        config.seed,
        replace(config.loading, on_bad_image=config.on_bad_image),
    )
    pretrained = load_pretrained(config.weights, model=config.model).with_size(config.image_size)
    splits = open_splits(config.data, val_fraction=config.val_fraction)
    workdir = config.workdir or Path("runs", time.strftime("%Y%m%d-%H%M%S"))
    rundir.create_run(workdir, asdict(config), splits)
    for note in splits.notes:
        print(note)

    result = fit(
        pretrained.model,
        pretrained.variables,
        splits,
        fit_config,
        log=lambda entry: rundir.log_metrics(workdir, entry),
    )
    card = replace(pretrained.card, classes=splits.train.classes)
    save(
        workdir / rundir.BEST,
        pretrained._replace(model=result.model, variables=result.variables, card=card),
    )
    seconds = time.perf_counter() - began
    write_training_report(workdir, result, splits, asdict(config), card, seconds)

    print(f"probe accuracy       {percent(result.probe_evaluation.top1)}")
    if config.recipe != "probe":
        print(f"fine-tuned accuracy  {percent(result.evaluation.top1)}")
    print(f"report               {workdir / 'report.html'}  ({seconds:.0f} s in all)")
    print("your own images      python scripts/train.py --data FOLDER  (one subfolder a class)")
    return {
        "val_top1": result.evaluation.top1,
        "probe_top1": result.probe_evaluation.top1,
        "recipe": config.recipe,
        "workdir": str(workdir),
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    cli.main(Config, run)
