"""The command ``tljax attack``: measure accuracy under adversarial attacks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tljax.commands import cli
from tljax.runtime.ranges import Count, Positive


@dataclass(frozen=True)
class Config(cli.Common):
    """Measure the accuracy of a network under adversarial attacks.

    For images without labels, the prediction of the network counts as the label.

    Attributes:
        images: Image files, URLs, a folder of images or a folder of class folders, which are
            matched by name.
        data: Labeled images instead: a folder of class folders, digits, tfds:NAME or hf:NAME.
        workdir: Run directory whose network is attacked instead of --weights, by default on the
            validation images of the run.
        count: Number of images to attack, a random choice by --seed; by default all.
        attacks: Attacks to run, any of fgsm, bim, mi-fgsm, pgd, apgd-ce, apgd-dlr, apgd-t, fab-t,
            square, deepfool, cw and autoattack.
        epsilons: Radii of the perturbation, in units of 1/255 of the range of a pixel value.
        norm: Norm of the perturbation in which radii are measured; l1 only for fgsm, bim, mi-fgsm
            and pgd.
        steps: Number of gradient steps of each attack, or of queries of square; by default the
            number in the paper of each attack.
        target: Name or index of the class that the network is to predict; by default any wrong
            class.
        out: Folder for a plot of accuracy over radius, adversarial images (PNG, of the input size)
            and a grid of them; by default none are written.
        pictures: Number of adversarial images to write, those with the smallest perturbation first.
    """

    images: cli.Images = ()
    data: str | None = None
    workdir: Path | None = None
    count: Count | None = None
    attacks: tuple[str, ...] = ("fgsm", "pgd")
    epsilons: tuple[Positive, ...] = (0.25, 0.5, 1, 2, 4)
    norm: Literal["linf", "l2", "l1"] = "linf"
    steps: Count | None = None
    target: str | None = None
    out: Path | None = None
    pictures: Count = 8

    conditions = (
        *cli.WORKDIR_CONDITIONS,
        ("data", lambda s: not s.images, "with images"),
        ("steps", lambda s: set(s.attacks) - {"fgsm"}, "with --attacks fgsm, which takes one step"),
        ("pictures", lambda s: s.out is not None, "without --out"),
    )


def run(config: Config) -> dict[str, Any]:
    """Print a table of accuracies; with ``--out`` also write pictures."""
    from tljax.data.folders import exists, expand_path, open_folder, open_images
    from tljax.data.sources import open_labeled
    from tljax.report import gallery
    from tljax.runtime.errors import RequestError
    from tljax.studies import robustness as attacks
    from tljax.train import run_directory

    if not config.attacks or not config.epsilons:
        raise RequestError("--attacks and --epsilons need at least one value each")
    notes: tuple[str, ...] = ()
    if config.images:
        path = expand_path(config.images[0])
        one_folder = len(config.images) == 1 and exists(path) and path.is_dir()
        source = open_folder(config.images[0]) if one_folder else open_images(config.images)
    elif config.data:
        source = open_labeled(config.data)
    elif config.workdir:
        source, notes = run_directory.open_validation(config.workdir)
    else:
        raise RequestError("no images to attack: name some, or add --data FOLDER or --workdir RUN")
    network = config.load(config.workdir).require_classes()
    target = None if config.target is None else network.card.index_of(config.target)
    chosen = attacks.choose_attacks(
        config.attacks, norm=config.norm, num_steps=config.steps, target=target
    )
    victims = attacks.read_attacked_images(
        network, source, config.loading, count=config.count, seed=config.seed
    )
    for note in (*notes, *victims.notes):
        print(note)
    if config.out:
        gallery.open_output(config.out)
    radii = [epsilon / 255 for epsilon in config.epsilons]
    report = attacks.attack(network, victims, chosen, radii, config.loading, seed=config.seed)
    print(attacks.table(report))
    for flag, meaning in report.flags.items():
        print(f"warning ({flag}): {meaning}")
    result = attacks.summary(report)
    if config.out:
        paintings = attacks.paint(
            network, victims, chosen, report,
            count=config.pictures, target=target, seed=config.seed,
        )  # fmt: skip
        paths = gallery.write_attack_pictures(config.out, report, paintings)
        print("\n".join(painting.line for painting in paintings))
        print(f"curve {paths[0]}\ngrid  {paths[1]}")
        result["pictures"] = [str(path) for path in paths]
        result["images"] = [painting.facts for painting in paintings]
    return result
