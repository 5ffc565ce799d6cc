"""The commands tljax attack and tljax visualize for networks of every task."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from networks import random_pretrained, run
from PIL import Image
from scipy.special import expit
from test_scripts import answer, call_script, messages

import tljax
from tljax.pretrained import save
from tljax.runtime.task import Task

NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images, networks, and a table in the order bee, cat, ant with blanks and one error.

    Each label is predicted for half of the images.
    """
    folder, rng = tmp_path_factory.mktemp("labels"), np.random.default_rng(0)
    paths = [folder / "images" / f"{i}.png" for i in range(8)]
    (folder / "images").mkdir()
    for path in paths:
        coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(coarse.repeat(8, axis=0).repeat(8, axis=1)).save(path)
    network = random_pretrained("mobilenetv2_050", 3).with_size(32)
    images = tljax.read_images([*map(str, paths)], network.model.preprocess)
    logits = np.asarray(run(network.model, network.variables, images).logits)
    thresholds = tuple(expit(np.quantile(logits, 3.5 / 7, axis=0)).tolist())
    tasks = {
        "labels": Task("multilabel", thresholds=thresholds),
        "regression": Task("regression", units=("kg", "", "m")),
        "ordinal": Task("ordinal"),
    }
    for name, task in tasks.items():
        classes = (*NAMES, "dog") if name == "ordinal" else NAMES
        card = replace(network.card, task=task, classes=classes)
        save(folder / f"{name}.safetensors", network._replace(card=card))
    cells = tasks["labels"].applies(expit(logits))[:, [1, 2, 0]].astype(int).astype(str)
    cells[0, 0] = "1" if cells[0, 0] == "0" else "0"
    cells[1, 1] = cells[2, 2] = ""
    rows = [f"images/{i}.png,{i % 2},{','.join(row)}" for i, row in enumerate(cells)]
    (folder / "table.csv").write_text("\n".join(["file,site,bee,cat,ant", *rows]))
    return folder


def attack(cache: Path, folder: Path, *arguments: object):
    return call_script(
        cache, "attack", "--weights", folder / "labels.safetensors", "--attacks", "pgd",
        "--steps", 3, "--epsilons", 16, "--batch-size", 8, *arguments,
    )  # fmt: skip


@pytest.mark.slow
def test_labels_of_a_table_are_attacked(cache: Path, folder: Path, tmp_path: Path):
    table = ("--data", folder / "table.csv", "--columns", "bee,cat,ant")
    done = attack(cache, folder, *table, "--out", tmp_path / "out", "--pictures", 2, "--json")
    result = answer(done)
    assert result["task"] == "multilabel"
    assert result["examples"] == 8
    assert result["clean"]["decisions"] == 21 / 22  # two are blank, one is wrong
    assert result["clean"]["images"] == 7 / 8
    assert result["robust"]["pgd"]["16"]["decisions"] < 0.7
    assert "in % of 8 images with 22 known labels, +- standard error" in done.stdout
    assert len(result["pictures"]) == 2 + 2 * 2
    assert all("added" in image["after"] for image in result["images"])
    success = answer(attack(cache, folder, *table, "--target", "not:bee", "--json"))
    assert success["target"] == {"name": "bee", "applies": False}
    assert success["examples"] in (3, 4)
    assert success["success"]["pgd"]["16"] > 0.5


def test_errors_of_data_name_the_option_of_this_command(cache: Path, folder: Path):
    weights = ("--weights", folder / "labels.safetensors")
    done = call_script(cache, "attack", *weights, "--data", "digits", "--columns", "bee")
    (line,) = messages(done.stderr)
    assert "--columns bee" in line
    assert "--target" not in line


@pytest.mark.slow
def test_predictions_are_attacked_where_there_are_no_labels(cache: Path, folder: Path):
    result = answer(attack(cache, folder, folder / "images", "--json"))
    assert result["clean"] == {"decisions": 1, "images": 1, "map": 1}
    assert result["robust"]["pgd"]["16"]["map"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--weights", "regression.safetensors"), "predicts numbers: attacks are defined for cl"),
        (("--weights", "ordinal.safetensors"), "predicts ordered classes: attacks are defined"),
        (("--attacks", "square"), "square is defined for exclusive classes: for several labels ch"),
        (("--target", "not:bees"), "no label is called 'bees' among 3; did you mean bee?"),
        (("--columns", "bees"), "has no such column; did you mean bee?"),
    ],
)
def test_what_is_not_defined_is_refused_in_one_line(
    cache: Path, folder: Path, arguments: tuple[str, ...], message: str
):
    name, value = arguments
    value = folder / value if name == "--weights" else value
    given = {"--weights": folder / "labels.safetensors", "--columns": "bee,cat,ant", name: value}
    words = [word for pair in given.items() for word in pair]
    done = call_script(cache, "attack", "--data", folder / "table.csv", *words)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = messages(done.stderr)
    assert message in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "caption"), [("labels", "  p "), ("regression", "  ant  "), ("ordinal", "  p ")]
)
def test_networks_of_every_task_are_visualized(
    cache: Path, folder: Path, tmp_path: Path, kind: str, caption: str
):
    weights = ("--weights", folder / f"{kind}.safetensors")
    image = folder / "images" / "0.png"
    done = call_script(cache, "visualize", "explain", image, *weights, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert caption in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[0].endswith(" kg") == (kind == "regression")
    done = call_script(cache, "visualize", "ideal", *weights, "--steps", 2, "--out", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ideal-0-pixels.png  ant  pixels  ")
    assert "ideal-1-fourier-tv.png  bee" in done.stdout
