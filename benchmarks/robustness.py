"""How little does it take to fool a network? Robust accuracy over epsilon; JSON on stdout.

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
from tljax.data.options import Loading
from tljax.data.sources import open_folder
from tljax.pretrained import load_pretrained
from tljax.pretrained.catalog import imagenet_wordnet_ids
from tljax.report.figures import robustness_curve, write_figure
from tljax.studies import robustness as attacks
from tljax.train.run_directory import environment


@dataclass(frozen=True)
class Config:
    """Robust accuracy of a network under FGSM, PGD-20 and AutoAttack, whose first part is APGD."""

    data: Annotated[str, tyro.conf.Positional]
    """A folder of class folders; or foolbox: the 20 ImageNet photographs in foolbox's wheel."""
    weights: str = "efficientnet_lite0.in1k"
    """As for tljax attack."""
    attacks: tuple[Literal["fgsm", "pgd-20", "apgd-ce", "autoattack"], ...] = (
        "fgsm",
        "pgd-20",
        "autoattack",
    )
    """Which; AutoAttack takes most of the time."""
    count: int = 200
    """How many of the images."""
    epsilons: tuple[float, ...] = (0.25, 0.5, 1, 2, 4)
    """Linf radii, in units of 1/255."""
    steps: int = 100
    """Of APGD and FAB; AutoAttack's own number is 100."""
    queries: int = 5000
    """Of Square, likewise."""
    curve: Path | None = None
    """Where to draw the curve, a PNG file."""
    loading: tyro.conf.OmitArgPrefixes[Loading] = field(default_factory=Loading)


def foolbox_folder(folder: Path) -> Path:
    """Copies foolbox's photographs into class folders; their names end in the class index."""
    from foolbox import utils

    for path in sorted((Path(utils.__file__).parent / "data").glob("imagenet_*")):
        index = re.fullmatch(r"imagenet_\d+_(\d+)\.\w+", path.name)
        if index:
            of_class = folder / imagenet_wordnet_ids()[int(index[1])]
            of_class.mkdir(exist_ok=True)
            shutil.copy(path, of_class)
    return folder


def main() -> None:
    """Prints one JSON object, and the table on stderr."""
    config = tyro.cli(Config)
    network = load_pretrained(config.weights)
    with tempfile.TemporaryDirectory() as folder:
        is_foolbox = config.data == "foolbox"
        source = open_folder(str(foolbox_folder(Path(folder))) if is_foolbox else config.data)
        victims = attacks.read_victims(network, source, config.loading, count=config.count)
    known = {
        "fgsm": fgsm,
        "pgd-20": partial(pgd, num_steps=20),
        "apgd-ce": partial(apgd, num_steps=config.steps, stop_early=True),
        "autoattack": partial(auto_attack, num_steps=config.steps, num_queries=config.queries),
    }
    chosen = {name: known[name] for name in config.attacks}
    radii = [epsilon / 255 for epsilon in config.epsilons]
    began = time.perf_counter()
    found = attacks.attack(network, victims, chosen, radii, config.loading, nested=True)
    seconds = time.perf_counter() - began
    print(attacks.table(found), file=sys.stderr)
    if config.curve:
        shares = {name: found.accuracy(name) for name in found.outcomes}
        figure = robustness_curve(found.epsilons * 255, float(found.clean.mean()), shares)
        write_figure(config.curve, figure)
    report = {
        "environment": environment(),
        "data": "foolbox" if is_foolbox else Path(config.data).name,
        "weights": Path(config.weights).name,
        "image_size": network.model.preprocess.size,
        "steps": config.steps,
        "queries": config.queries,
        "seconds": round(seconds, 1),
        **attacks.summary(found),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
