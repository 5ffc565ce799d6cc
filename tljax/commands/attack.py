"""The command ``tljax attack``: measure accuracy under adversarial attacks."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tljax.commands import cli
from tljax.data.options import LabelOptions
from tljax.runtime.ranges import Count, Positive

if TYPE_CHECKING:
    from tljax.data.examples import Source
    from tljax.pretrained.network import Card


@dataclass(frozen=True)
class Config(cli.Common, cli.Classifier, cli.Distributed, cli.Trained):
    """Measure the accuracy of a network under adversarial attacks.

    For images without labels, the prediction of the network counts as the label. With several
    labels the figures are the share of known labels that are predicted right, the share of images
    with all of them right, and mAP.

    Attributes:
        images: Image files, URLs, a folder of images or a folder of class folders, which are
            matched by name.
        data: Labeled images instead: a table, a folder of class folders, shards, the URL of a
            bucket, digits, tfds:NAME, hf:NAME or packed:FOLDER.
        columns: Columns of a table with labels, separated by commas; of a tfds or hf data set one
            feature. By default those of the run, or else the only one that can be a label.
        root: Folder that the paths in a table are relative to; by default the folder of the table.
        path_column: Column of a table with the paths of the images; by default the first whose
            values are paths of existing files.
        split_column: Column of a table that says which part a row belongs to; by default a column
            named split, if its values are such names.
        workdir: Run directory whose network is attacked instead of --weights, by default on the
            validation images of the run.
        count: Number of images to attack, a random choice by --seed; by default all.
        attacks: Attacks to run, any of fgsm, bim, mi-fgsm, pgd, apgd-ce, apgd-dlr, apgd-t, fab-t,
            square, deepfool, cw and autoattack; with several labels only the first five.
        epsilons: Radii of the perturbation, in units of 1/255 of the range of a pixel value.
        norm: Norm of the perturbation in which radii are measured; l1 only for fgsm, bim, mi-fgsm
            and pgd.
        steps: Number of gradient steps of each attack, or of queries of square; by default the
            number in the paper of each attack.
        target: Name or index of the class that the network is to predict; by default any wrong
            class. With several labels, LABEL is a label that is to be predicted and not:LABEL one
            that is not, and the figure is the rate of success.
        out: Folder for a plot of accuracy over radius, adversarial images (PNG, of the input size)
            and a grid of them; by default none are written.
        pictures: Number of adversarial images to write, those with the smallest perturbation first.
    """

    images: cli.Images = ()
    data: str | None = None
    columns: str | None = None
    root: Path | None = None
    path_column: str | None = None
    split_column: str | None = None
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
        ("columns root path_column split_column", lambda s: s.data, "without --data"),
        ("steps", lambda s: set(s.attacks) - {"fgsm"}, "with --attacks fgsm, which takes one step"),
        ("pictures", lambda s: s.out is not None, "without --out"),
    )


def run(config: Config) -> dict[str, Any]:
    """Print a table of accuracies; with ``--out`` also write pictures."""
    from tljax.report import gallery
    from tljax.runtime.errors import RequestError
    from tljax.runtime.parallel import is_main_process
    from tljax.studies import label_robustness
    from tljax.studies import robustness as attacks

    if not config.attacks or not config.epsilons:
        raise RequestError("--attacks and --epsilons need at least one value each")
    if not (config.images or config.data or config.workdir):
        raise RequestError("no images to attack: name some, or add --data FOLDER or --workdir RUN")
    network = config.load(config.workdir).require_classes()
    card, kind = network.card, network.card.task.kind
    attacks.require_attackable(card)
    source, notes = _open(config, card)
    target = None if config.target is None else attacks.find_target(card, config.target)
    chosen = attacks.choose_attacks(
        config.attacks, norm=config.norm, num_steps=config.steps, target=target,
        several_labels=kind == "multilabel",
    )  # fmt: skip
    victims = attacks.read_attacked_images(
        network, source, config.loading, count=config.count, seed=config.seed, target=target
    )
    for note in (*notes, *victims.notes):
        print(note)
    pictures = config.out if is_main_process() else None
    if pictures:
        gallery.open_output(pictures)
    radii = [epsilon / 255 for epsilon in config.epsilons]
    if kind == "multilabel":
        labels = label_robustness.attack_labels(
            network, victims, chosen, radii, config.loading, seed=config.seed
        )
        report = label_robustness.by_image(labels, target)
        table = label_robustness.table(labels, card, target)
        result = label_robustness.summary(labels, card, target)
    else:
        report = attacks.attack(network, victims, chosen, radii, config.loading, seed=config.seed)
        table, result = attacks.table(report), attacks.summary(report)
    print(table)
    for flag, meaning in report.flags.items():
        print(f"warning ({flag}): {meaning}")
    if pictures:
        paintings = attacks.paint(
            network, victims, chosen, report,
            count=config.pictures, target=target, seed=config.seed,
        )  # fmt: skip
        paths = gallery.write_attack_pictures(pictures, report, paintings)
        print("\n".join(painting.line for painting in paintings))
        print(f"curve {paths[0]}\ngrid  {paths[1]}")
        result["pictures"] = [str(path) for path in paths]
        result["images"] = [painting.facts for painting in paintings]
    return result


def _open(config: Config, card: "Card") -> "tuple[Source, tuple[str, ...]]":
    """Open the images to attack, labeled for a network, with notes on them."""
    from tljax.data.folders import exists, expand_path, open_folder, open_images
    from tljax.data.sources import open_labeled
    from tljax.runtime.errors import RequestError
    from tljax.train import run_directory

    if config.images:
        path = expand_path(config.images[0])
        one_folder = len(config.images) == 1 and exists(path) and path.is_dir()
        return (open_folder(config.images[0]) if one_folder else open_images(config.images)), ()
    if config.data is None:
        assert config.workdir is not None
        return run_directory.open_validation(config.workdir)
    given = LabelOptions(
        root=config.root,
        target=config.columns,
        path_column=config.path_column,
        split_column=config.split_column,
    )
    options = cli.labels_of(given, config.data, config.workdir or config.weights, card)
    try:
        return open_labeled(config.data, options), ()
    except RequestError as error:  # which names the options of other commands
        raise RequestError(str(error).replace("--target", "--columns")) from error
