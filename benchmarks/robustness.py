"""Measure the robust accuracy of a network over epsilon; print JSON.

python benchmarks/robustness.py FOLDER --weights resnet18.tv_in1k --count 200 --curve curve.png
"""

import tljax

tljax.configure()

import json
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tljax.attack import apgd, auto_attack, fgsm, pgd
from tljax.data.folders import open_folder
from tljax.data.options import Loading
from tljax.pretrained import load_pretrained
from tljax.pretrained.catalog import imagenet_wordnet_ids
from tljax.report.figures import robustness_curve, write_figure
from tljax.studies import robustness as attacks
from tljax.train.run_directory import environment


@dataclass(frozen=True)
class Config:
    """Robust accuracy of a network under FGSM, PGD-20 and AutoAttack, whose first part is APGD."""

    data: Annotated[str, tyro.conf.Positional]
    """A folder with one subfolder per class; or foolbox, for the 20 ImageNet images it has."""
    weights: str = "efficientnet_lite0.in1k"
    """Pretrained weights, as in tljax train."""
    attacks: tuple[Literal["fgsm", "pgd-20", "apgd-ce", "autoattack"], ...] = (
        "fgsm",
        "pgd-20",
        "autoattack",
    )
    """The attacks to run; autoattack takes most of the time."""
    count: int = 200
    """Number of images."""
    epsilons: tuple[float, ...] = (0.25, 0.5, 1, 2, 4)
    """Radii of the Linf ball, in units of 1/255."""
    steps: int = 100
    """Number of steps of APGD and FAB; standard AutoAttack uses 100."""
    queries: int = 5000
    """Number of queries of Square; standard AutoAttack uses 5000."""
    curve: Path | None = None
    """A PNG file for the plot of accuracy over epsilon; by default none is drawn."""
    loading: tyro.conf.OmitArgPrefixes[Loading] = field(default_factory=Loading)


def foolbox_folder(folder: Path) -> Path:
    """Copy the images of foolbox, whose names end in the class index, into class folders."""
    from foolbox import utils

    for path in sorted((Path(utils.__file__).parent / "data").glob("imagenet_*")):
        index = re.fullmatch(r"imagenet_\d+_(\d+)\.\w+", path.name)
        if index:
            class_folder = folder / imagenet_wordnet_ids()[int(index[1])]
            class_folder.mkdir(exist_ok=True)
            shutil.copy(path, class_folder)
    return folder


def main() -> None:
    """Run the benchmark; print its report as JSON, and its table on stderr."""
    config = tyro.cli(Config)
    network = load_pretrained(config.weights)
    with tempfile.TemporaryDirectory() as folder:
        is_foolbox = config.data == "foolbox"
        source = open_folder(str(foolbox_folder(Path(folder))) if is_foolbox else config.data)
        victims = attacks.read_attacked_images(network, source, config.loading, count=config.count)
    all_attacks = {
        "fgsm": fgsm,
        "pgd-20": partial(pgd, num_steps=20),
        "apgd-ce": partial(apgd, num_steps=config.steps, stop_early=True),
        "autoattack": partial(auto_attack, num_steps=config.steps, num_queries=config.queries),
    }
    chosen = {name: all_attacks[name] for name in config.attacks}
    radii = [epsilon / 255 for epsilon in config.epsilons]
    began = time.perf_counter()
    result = attacks.attack(network, victims, chosen, radii, config.loading, nested=True)
    seconds = time.perf_counter() - began
    print(attacks.table(result), file=sys.stderr)
    if config.curve:
        shares = {name: result.accuracy(name) for name in result.outcomes}
        figure = robustness_curve(result.epsilons * 255, float(result.clean.mean()), shares)
        write_figure(config.curve, figure)
    report = {
        "environment": environment(),
        "data": "foolbox" if is_foolbox else Path(config.data).name,
        "weights": Path(config.weights).name,
        "image_size": network.model.preprocess.size,
        "steps": config.steps,
        "queries": config.queries,
        "seconds": round(seconds, 1),
        **attacks.summary(result),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
