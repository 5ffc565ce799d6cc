"""The command ``tljax visualize``: draw what a network and its stages respond to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from tljax.commands import cli
from tljax.runtime.ranges import Amount, Count, NotNegative


@dataclass(frozen=True, kw_only=True)
class Common(cli.Network):
    """Options of all subcommands.

    Attributes:
        out: Folder for the PNG files.
    """

    out: Path = Path("pictures")


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Common):
    """Options of the subcommands that read images.

    Attributes:
        images: Image files, folders of images or URLs.
    """

    images: cli.Images


@dataclass(frozen=True)
class Ideal(Common):
    """Draw images that a network assigns to a class with confidence, by gradient ascent.

    Labels are drawn as classes are; of numbers, images for which they are high. Each is drawn four
    times: in pixels and in Fourier space, with and without a penalty on total variation.

    Attributes:
        classes: Names or indices of classes, labels or numbers; by default Siamese cat and zebra if
            the network has either, otherwise its first two.
        steps: Number of gradient steps.
        tv_weight: Weight of the total variation, summed over pixels, in the pictures that are
            penalized; 0 is no penalty.
    """

    classes: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    steps: Count = 128
    tv_weight: NotNegative = 1e-3


@dataclass(frozen=True)
class Explain(ImageOptions):
    """Draw which regions of images are evidence for a class, by five attribution methods.

    Attributes:
        target: Name or index of the class, label or number to explain; by default the most probable
            class or label of each image, or the first number.
    """

    target: str | None = None


@dataclass(frozen=True)
class Features(ImageOptions):
    """Draw the channels of every stage with the strongest response to each image.

    Attributes:
        count: Number of channels to draw for each stage.
    """

    count: Count = 8


@dataclass(frozen=True)
class Dream(ImageOptions):
    """Amplify in images what a stage responds to (DeepDream).

    Attributes:
        stage: Stage whose output is amplified; by default the one at two thirds of the stages that
            return feature maps.
        steps: Number of gradient steps at each of three image sizes.
    """

    stage: str | None = None
    steps: Count = 20


@dataclass(frozen=True)
class Channel(Common):
    """Draw images that maximize the response of single channels of a stage.

    Attributes:
        channels: Indices of channels, from 0.
        stage: Stage whose output channels are drawn; by default the one at two thirds of the stages
            that return feature maps.
        steps: Number of gradient steps.
    """

    channels: Annotated[tuple[Amount, ...], tyro.conf.Positional] = (0, 1, 2, 3)
    stage: str | None = None
    steps: Count = 128


Config = Ideal | Explain | Features | Dream | Channel


def run(config: Config) -> dict[str, Any]:
    """Draw the pictures, and write each of them and a grid of all."""
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
    files = {mode: gallery.grid(pictures, len(rows[0]), smallest=112)}
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
