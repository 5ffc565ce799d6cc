"""The command ``tljax probe``: measure frozen features on your images."""

import time
from dataclasses import dataclass
from typing import Any

from tljax.commands import cli
from tljax.runtime.ranges import Count, Share


@dataclass(frozen=True)
class Config(cli.Common):
    """Measure the frozen features of a network by a linear probe and by nearest neighbors.

    Attributes:
        data: Labeled images: a folder of class folders (with or without train/ and val/), digits,
            tfds:NAME or hf:NAME.
        stage: Stage whose input is probed; the default probes the pooled features. Feature maps are
            averaged over all positions.
        neighbors: Number of neighbors that vote in the nearest-neighbor classifier.
        val_fraction: Share of the images, from 0 to below 1, that are held out for validation if
            the data has no validation part. With 0, accuracies are measured on the training images.
    """

    data: str = "digits"
    stage: str = "head"
    neighbors: Count = 20
    val_fraction: Share = 0.2

    conditions = cli.SPLIT_CONDITIONS


def run(config: Config) -> dict[str, Any]:
    """Print the validation accuracy of a linear probe and of nearest neighbors."""
    from tljax.data.sources import open_splits
    from tljax.features.extract import split_features
    from tljax.features.probe import fit_probe, knn_predict, predict_logits
    from tljax.train.run_directory import skipped_lines

    began = time.perf_counter()
    model, variables, _ = config.load()
    splits = open_splits(config.data, val_fraction=config.val_fraction)
    for note in splits.notes:
        print(note)
    train, val = split_features(model, variables, splits, config.loading, stop=config.stage)
    classes = len(splits.train.classes)
    probe = fit_probe(train.values, train.labels, num_classes=classes, seed=config.seed)
    linear = (predict_logits(probe, val.values).argmax(1) == val.labels).mean()
    neighbors = knn_predict(
        train.values, train.labels, val.values, num_classes=classes, k=config.neighbors
    )
    nearest = (neighbors.argmax(1) == val.labels).mean()
    seconds = time.perf_counter() - began
    print(f"linear probe         {float(linear):.1%}  (l2 {probe.l2:.2g})")
    print(f"nearest neighbors    {float(nearest):.1%}  (k {config.neighbors})")
    print(f"{len(train.labels)} training and {len(val.labels)} validation images, {seconds:.0f} s")
    for source, features in ((splits.train, train), (splits.val, val)):
        for line in skipped_lines(source, features.skipped):
            print(line)
    return {
        "val_top1": float(linear),
        "probe_top1": float(linear),
        "knn_top1": float(nearest),
        "l2": probe.l2,
        "recipe": "probe",
        "workdir": None,
        "skipped": len(train.skipped) + len(val.skipped),
        "seconds": round(seconds, 1),
    }
