"""The command ``tljax probe``: measure frozen features on your images."""

import time
from dataclasses import dataclass, field
from typing import Any

from tljax.commands import cli
from tljax.data.options import LabelOptions
from tljax.runtime.ranges import Count, Share


@dataclass(frozen=True)
class Config(cli.Common, cli.Channels, cli.Distributed):
    """Measure the frozen features of a network by a linear probe and by nearest neighbors.

    Attributes:
        data: Labeled images: a table (.csv, .tsv, .parquet or .jsonl) with a column of paths, a
            folder of class folders (with or without train/ and val/), shards (.tar, .tfrecord,
            .array_record), the URL of a bucket, digits, tfds:NAME, hf:NAME or packed:FOLDER.
        stage: Stage whose input is probed; the default probes the pooled features. Feature maps are
            averaged over all positions.
        neighbors: Number of neighbors that vote in the nearest-neighbor classifier of classes.
        val_fraction: Share of the images, from 0 to below 1, that are held out for validation if
            the data has no validation part. With 0, accuracies are measured on the training images.
    """

    data: str = "digits"
    stage: str = "head"
    neighbors: Count = 20
    labels: cli.Labels = field(default_factory=LabelOptions)
    val_fraction: Share = 0.2

    conditions = (*cli.SPLIT_CONDITIONS, *cli.CHANNEL_CONDITIONS)


def run(config: Config) -> dict[str, Any]:
    """Print the validation accuracy of a linear probe and of nearest neighbors."""
    from tljax.data.sources import open_splits
    from tljax.features.evaluate import METRICS, choose_thresholds, evaluate
    from tljax.features.extract import split_features
    from tljax.features.knn import knn_predict
    from tljax.features.source_probe import fit_source_probe, probe_outputs
    from tljax.runtime.parallel import data_mesh
    from tljax.train.run_directory import skipped_lines
    from tljax.train.setup import fitted_task

    began = time.perf_counter()
    pretrained = config.load()
    splits = open_splits(config.data, val_fraction=config.val_fraction, labels=config.labels)
    model, variables, _ = config.adapt(pretrained, splits.train)
    for note in splits.notes:
        print(note)
    train, val = split_features(model, variables, splits, config.loading, stop=config.stage)
    task = fitted_task(splits.train)
    mesh = data_mesh(config.loading.devices)
    probe = fit_source_probe(train, splits.train, task, seed=config.seed, mesh=mesh)
    linear = choose_thresholds(evaluate(probe_outputs(probe, val), task))
    metric, nearest = linear.main_metric, None
    name = METRICS[task.kind][metric]
    if task.kind == "classification":
        neighbors = knn_predict(
            train.share, train.labels, val.share,
            num_classes=len(splits.train.classes), k=config.neighbors, mesh=mesh,
        )  # fmt: skip
        nearest = float((neighbors.argmax(1) == val.labels).mean())
    seconds = time.perf_counter() - began
    title = "" if metric == "top1" else f"{name.title} "
    print(f"linear probe         {title}{name.format(linear.metric(metric))}  (l2 {probe.l2:.2g})")
    if nearest is not None:
        print(f"nearest neighbors    {nearest:.1%}  (k {config.neighbors})")
    print(f"{len(train.labels)} training and {len(val.labels)} validation images, {seconds:.0f} s")
    for source, features in ((splits.train, train), (splits.val, val)):
        for line in skipped_lines(source, features.skipped):
            print(line)
    return {
        "task": task.kind,
        f"val_{metric}": linear.metric(metric),
        f"probe_{metric}": linear.metric(metric),
        "knn_top1": nearest,
        "l2": probe.l2,
        "recipe": "probe",
        "workdir": None,
        "skipped": len(train.skipped) + len(val.skipped),
        "seconds": round(seconds, 1),
    }
