"""The command ``tljax compare``: measure the features of several networks on one data set."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from tljax.commands import cli
from tljax.data.options import LabelOptions
from tljax.runtime.ranges import Pixels, Seed, Share


@dataclass(frozen=True, kw_only=True)
class Config(cli.Extended, cli.Batches, cli.Channels):
    """Compare pretrained networks on a data set by a linear probe of their frozen features.

    Attributes:
        weights: Networks to compare: catalog names, hub ids, files, saved folders or run
            directories.
        data: Labeled images: a table (.csv, .tsv, .parquet or .jsonl) with a column of paths, a
            folder of class folders (with or without train/ and val/), shards (.tar, .tfrecord,
            .array_record), the URL of a bucket, digits, tfds:NAME, hf:NAME or packed:FOLDER.
        image_size: Side of the square input of all networks, in pixels; by default the size that
            each network's weights expect.
        val_fraction: Share of the images, from 0 to below 1, that are held out for validation if
            the data has no validation part. With 0, accuracies are measured on the training images.
        seed: Seed of the random number generator that assigns images to the folds of the probe.
        out: PNG file for a plot of accuracy against speed; by default none is drawn.
    """

    weights: Annotated[tuple[str, ...], tyro.conf.Positional] = ("efficientnet_lite0.in1k",)
    data: str = "digits"
    image_size: Pixels | None = None
    labels: cli.Labels = field(default_factory=LabelOptions)
    val_fraction: Share = 0.2
    seed: Seed = 0
    out: Path | None = None

    conditions = (*cli.SPLIT_CONDITIONS, *cli.CHANNEL_CONDITIONS)


def run(config: Config) -> dict[str, Any]:
    """Print a table of the networks, the best first."""
    from tljax.data.sources import open_splits
    from tljax.features.evaluate import METRICS
    from tljax.report import figures
    from tljax.runtime.errors import DivergenceError, RequestError
    from tljax.runtime.hardware import require_plugin
    from tljax.runtime.tables import format_table
    from tljax.studies.compare import Candidate, measure

    require_plugin(config.platform)
    splits = open_splits(config.data, val_fraction=config.val_fraction, labels=config.labels)
    for note in splits.notes:
        print(note)
    networks: list[Candidate] = []
    failed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    cli.print_devices(config, "precision of each network")
    for weights in config.weights:
        name = Path(weights).name
        try:
            network = config.read(weights)
            cli.print_notes(network)
            network = config.adapt(network.with_size(config.image_size), splits.train)
            networks.append(measure(name, network, splits, config.loading, config.seed, skipped))
        except (RequestError, DivergenceError) as error:  # the others are measured all the same
            failed[weights] = str(error)
            print(f"left out {weights}: {error}")
    if not networks:
        raise RequestError("none of these networks could be measured")
    metric = METRICS[splits.train.task.kind][networks[0].metric]
    networks.sort(key=lambda one: one.value if metric.is_error else -one.value)
    rows = [
        (
            one.name,
            metric.format_with(one.value, one.interval),
            f"{one.images_per_second:.1f}",
            f"{one.parameters / 1e6:.1f} M",
            one.features,
            one.size,
        )
        for one in networks
    ]
    header = ("weights", metric.title, "images/s", "parameters", "features", "pixels")
    print(format_table(header, rows))
    for image, reason in skipped.items():
        print(f"not read: {image}: {reason}")
    if config.out:
        figures.write_figure(config.out, figures.accuracy_and_speed(networks))
        print(f"accuracy against speed: {config.out}")
    return {"networks": [candidate._asdict() for candidate in networks], "failed": failed}
