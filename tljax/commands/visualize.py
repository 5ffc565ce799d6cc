"""Shows what a network looks at on photographs, and what it has in mind: PNG files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from tljax.commands import cli
from tljax.runtime.ranges import Amount, Count, NotNegative


@dataclass(frozen=True, kw_only=True)
class Common(cli.Network):
    """Flags of all subcommands."""

    out: Path = Path("pictures")
    """The folder for the PNG files."""


@dataclass(frozen=True)
class Ideal(Common):
    """Paint what a class looks like to the network, without and with total variation."""

    classes: Annotated[tuple[str, ...], tyro.conf.Positional] = ("Siamese cat", "zebra")
    """Names or indices of classes."""
    steps: Count = 128
    """Gradient steps."""
    tv_weight: NotNegative = 1e-3
    """Of the total variation."""


@dataclass(frozen=True)
class Explain(Common):
    """Show which parts of photographs speak for a class, by five methods."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files, folders or URLs."""
    target: str | None = None
    """Name or index of the class to explain; by default what the network sees."""


@dataclass(frozen=True)
class Features(Common):
    """Show the channels of every stage that answer most to each photograph."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files, folders or URLs."""
    count: Count = 8
    """Channels of a stage."""


@dataclass(frozen=True)
class Dream(Common):
    """Let a stage see more and more of what it sees on photographs (DeepDream)."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files, folders or URLs."""
    stage: str | None = None
    """Whose output is strengthened; by default one in the middle."""
    steps: Count = 20
    """Gradient steps at each of three sizes."""


@dataclass(frozen=True)
class Channel(Common):
    """Paint what single channels of a stage answer to."""

    channels: Annotated[tuple[Amount, ...], tyro.conf.Positional] = (0, 1, 2, 3)
    """Which ones."""
    stage: str | None = None
    """Of which stage's output; by default one in the middle."""
    steps: Count = 128
    """Gradient steps."""


def run(config: Ideal | Explain | Features | Dream | Channel) -> dict[str, Any]:
    """Paints, and writes each picture and a grid of all."""
    from tljax.report import gallery
    from tljax.studies import pictures as studies

    network = config.load()
    skipped: dict[str, str] = {}
    match config:
        case Ideal(classes=classes, steps=steps, tv_weight=tv_weight, seed=seed):
            rows = studies.ideal_pictures(
                network, classes, num_steps=steps, tv_weight=tv_weight, seed=seed
            )
        case Explain(images=images, target=target, seed=seed):
            photographs, skipped = studies.read_photographs(network, images)
            rows = studies.explanation_pictures(network, photographs, target=target, seed=seed)
        case Features(images=images, count=count):
            photographs, skipped = studies.read_photographs(network, images)
            rows = studies.feature_pictures(network, photographs, count=count)
        case Dream(images=images, stage=stage, steps=steps):
            photographs, skipped = studies.read_photographs(network, images)
            rows = studies.dream_pictures(network, photographs, stage=stage, num_steps=steps)
        case Channel(channels=channels, stage=stage, steps=steps, seed=seed):
            rows = studies.channel_pictures(
                network, channels, stage=stage, num_steps=steps, seed=seed
            )
    pictures = [picture for row in rows for picture in row]
    mode = type(config).__name__.lower()
    files = {mode: gallery.grid(pictures, len(rows[0]))}
    files |= {f"{mode}-{picture.name}": picture.pixels for picture in pictures}
    gallery.open_output(config.out)
    paths = [config.out / f"{name}.png" for name in files]
    for path, image in zip(paths, files.values(), strict=True):
        gallery.write_png(path, image)
    for picture in pictures:
        print(f"{mode}-{picture.name}.png  {'  '.join(picture.caption.splitlines())}")
    print(f"all of them in {paths[0]}")
    for name, reason in skipped.items():
        print(f"not read: {name}: {reason}")
    return {"pictures": [str(path) for path in paths], "skipped": skipped}


def main() -> None:
    """Run ``tljax visualize``."""
    cli.main(Ideal | Explain | Features | Dream | Channel, run)
