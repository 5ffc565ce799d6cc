"""Which backbone for your images? Probes several networks, and draws accuracy against speed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from tljax.commands import cli
from tljax.runtime.ranges import Amount, Count, Pixels, Seed, Share


@dataclass(frozen=True, kw_only=True)
class Config(cli.Extended):
    """Compare pretrained networks on a data set, by a linear probe of their frozen features."""

    weights: Annotated[tuple[str, ...], tyro.conf.Positional] = ("efficientnet_lite0.in1k",)
    """What to compare: catalog names, hub ids, files, saved folders or run directories."""
    data: str = "digits"
    """A folder of class folders (with or without train/ and val/), digits, tfds:NAME or hf:NAME."""
    image_size: Pixels | None = None
    """Side of the square all networks see, in pixels; by default what each expects."""
    val_fraction: Share = 0.2
    """As for tljax train."""
    batch_size: Count = 32
    """Images a step."""
    workers: Amount = 0
    """Processes that decode images; 0 decodes in threads."""
    devices: Count | None = None
    """Number of devices; by default all."""
    seed: Seed = 0
    """Of everything random."""
    out: Path | None = None
    """Where to draw accuracy against speed, a PNG file."""

    conditions = cli.OF_SPLIT


def run(config: Config) -> dict[str, Any]:
    """Prints a line for each network, the most accurate first."""
    from tljax.data.options import Loading
    from tljax.data.sources import open_splits
    from tljax.pretrained import load_pretrained
    from tljax.report import figures
    from tljax.report.runs import percent
    from tljax.runtime.errors import DivergenceError, RequestError
    from tljax.studies.compare import Candidate, measure

    splits = open_splits(config.data, val_fraction=config.val_fraction)
    for note in splits.notes:
        print(note)
    loading = Loading(config.batch_size, config.workers, config.devices)
    found: list[Candidate] = []
    failed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for weights in config.weights:
        name = Path(weights).name
        try:
            network = load_pretrained(weights, **config.modules())
            cli.say_notes(network)
            network = network.with_size(config.image_size)
            found.append(measure(name, network, splits, loading, config.seed, skipped))
        except (RequestError, DivergenceError) as error:  # the others shall not wait for this one
            failed[weights] = str(error)
            print(f"left out {weights}: {error}")
    if not found:
        raise RequestError("none of these networks could be measured")
    found.sort(key=lambda candidate: -candidate.val_top1)
    width = max(len(candidate.name) for candidate in found)
    print(f"{'weights':{width}}  accuracy          images/s  parameters  features  pixels")
    for one in found:
        accuracy = f"{percent(one.val_top1)} +- {percent(one.error)}"
        print(
            f"{one.name:{width}}  {accuracy:16}  {one.images_per_second:8.1f}  "
            f"{one.parameters / 1e6:8.1f} M  {one.features:8}  {one.size:6}"
        )
    for image, reason in skipped.items():
        print(f"not read: {image}: {reason}")
    if config.out:
        figures.write_figure(config.out, figures.accuracy_and_speed(found))
        print(f"accuracy against speed: {config.out}")
    return {"networks": [candidate._asdict() for candidate in found], "failed": failed}


def main() -> None:
    """Run ``tljax compare``."""
    cli.main(Config, run)
