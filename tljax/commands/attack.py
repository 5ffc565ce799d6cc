"""Attacks a network: how little it takes to fool it, in numbers, a curve and pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tljax.commands import cli
from tljax.runtime.ranges import Count, Positive


@dataclass(frozen=True)
class Config(cli.Common):
    """Measure how easily small changes of its pixels make a network mistake an image.

    Of images without labels the network's own prediction counts as the label.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files, URLs, or a folder: of images, or of class folders, which are matched by name."""
    data: str | None = None
    """A labelled data set instead: a folder of class folders, digits, tfds:NAME or hf:NAME."""
    workdir: Path | None = None
    """A run directory instead: its network is attacked, by default on its own validation data."""
    count: Count | None = None
    """Attack so many of the images, chosen by the seed; by default all."""
    attacks: tuple[str, ...] = ("fgsm", "pgd")
    """fgsm bim mi-fgsm pgd apgd-ce apgd-dlr apgd-t fab-t square deepfool cw autoattack."""
    epsilons: tuple[Positive, ...] = (0.25, 0.5, 1, 2, 4)
    """Radii, in units of 1/255 of a pixel's range."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """In which the radii are measured; l1 only for fgsm, bim, mi-fgsm and pgd."""
    steps: Count | None = None
    """Gradient steps of each attack, queries of Square; by default what each one's paper has."""
    target: str | None = None
    """Name or index of the class that the network shall see; by default any but the right one."""
    out: Path | None = None
    """A folder for the curve, adversarial PNGs of the size the network sees, and a grid of them."""
    pictures: Count = 8
    """How many images to paint, the most easily fooled first."""

    conditions = (
        *cli.WEIGHTS_OF_RUN,
        ("data", lambda s: not s.images, "with images"),
        ("steps", lambda s: set(s.attacks) - {"fgsm"}, "with --attacks fgsm, which takes one step"),
        ("pictures", lambda s: s.out is not None, "without --out"),
    )


def run(config: Config) -> dict[str, Any]:
    """Prints a table of accuracies; with a folder also writes pictures."""
    from tljax.data.sources import as_path, exists, open_folder, open_images, open_labelled
    from tljax.report import gallery
    from tljax.runtime.errors import RequestError
    from tljax.studies import robustness as attacks
    from tljax.train import run_directory

    if not config.attacks or not config.epsilons:
        raise RequestError("name at least one of --attacks and one of --epsilons")
    notes: tuple[str, ...] = ()
    if config.images:
        path = as_path(config.images[0])
        one_folder = len(config.images) == 1 and exists(path) and path.is_dir()
        source = open_folder(config.images[0]) if one_folder else open_images(config.images)
    elif config.data:
        source = open_labelled(config.data)
    elif config.workdir:
        source, notes = run_directory.open_validation(config.workdir)
    else:
        raise RequestError("name what to attack: images, --data FOLDER or --workdir RUN")
    network = config.load(config.workdir).with_classes()
    target = None if config.target is None else network.card.index_of(config.target)
    chosen = attacks.choose_attacks(
        config.attacks, norm=config.norm, num_steps=config.steps, target=target
    )
    victims = attacks.read_victims(
        network, source, config.loading, count=config.count, seed=config.seed
    )
    for note in (*notes, *victims.notes):
        print(note)
    if config.out:
        gallery.open_output(config.out)
    radii = [epsilon / 255 for epsilon in config.epsilons]
    found = attacks.attack(network, victims, chosen, radii, config.loading, seed=config.seed)
    print(attacks.table(found))
    for flag, meaning in found.flags.items():
        print(f"warning ({flag}): {meaning}")
    result = attacks.summary(found)
    if config.out:
        paintings = attacks.paint(
            network, victims, chosen, found,
            count=config.pictures, target=target, seed=config.seed,
        )  # fmt: skip
        paths = gallery.write_attack_pictures(config.out, found, paintings)
        print("\n".join(painting.line for painting in paintings))
        print(f"curve {paths[0]}\ngrid  {paths[1]}")
        result["pictures"] = [str(path) for path in paths]
        result["images"] = [painting.facts for painting in paintings]
    return result


def main() -> None:
    """Run ``tljax attack``."""
    cli.main(Config, run)
