"""What an earlier version wrote says what it said then.

`fixtures/make_version1.py` tells what is in the archive, and how it was made.
"""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from tljax.commands import main
from tljax.data.options import Loading
from tljax.data.sources import open_images
from tljax.features.extract import compute_features
from tljax.models.layers import LinearHead
from tljax.pretrained import Pretrained, load_pretrained, save
from tljax.pretrained.deploy import export_stablehlo
from tljax.runtime.trees import flatten

FIXTURES = Path(__file__).parent / "fixtures"
SAID: dict[str, Any] = json.loads((FIXTURES / "version1.json").read_text("utf-8"))
RECIPES = ("probe", "lp-ft", "gradual", "finetune", "bit", "scratch")
TOLERANCE = 1e-6


def unpack(folder: Path) -> Path:
    """The files of version 1, as if their runs had been made in this folder."""
    with tarfile.open(FIXTURES / "version1.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    for path in folder.glob("runs/*/config.json"):
        place = json.dumps(str(folder))[1:-1]
        path.write_text(path.read_text("utf-8").replace("{FOLDER}", place), "utf-8")
    return folder


@pytest.fixture(autouse=True)
def as_users_compile():
    """With XLA's optimizations, which tests of training switch off in their process."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that only read."""
    return unpack(tmp_path_factory.mktemp("version1"))


def outputs(found: Pretrained, folder: Path, names: list[str]) -> np.ndarray:
    """What the whole network returns for pictures of the data."""
    source = open_images([folder / "data" / name for name in names])
    values = compute_features(found.model, found.variables, source, Loading(), stop=None)
    assert values.indices.tolist() == list(range(len(names)))
    return np.asarray(values.values)


def assert_probabilities(found: Pretrained, folder: Path, said: dict[str, list[float]]) -> None:
    assert len(said) == 36
    assert found.card.classes == ("blue", "green", "red")
    now = jax.nn.softmax(outputs(found, folder, list(said)))
    np.testing.assert_allclose(now, list(said.values()), rtol=0, atol=TOLERANCE)


def command(*arguments: object) -> tuple[int, list[str], list[str]]:
    """The exit code of ``tljax ...`` and the lines that it prints, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["tljax", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as done:
            code = int(done.code or 0)
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


def contents(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def assert_equal(left: Pretrained, right: Pretrained) -> None:
    """Bit for bit."""
    assert left.model == right.model
    assert left.card.classes == right.card.classes
    ours, theirs = flatten(left.variables), flatten(right.variables)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf, strict=True, err_msg=path)


def test_there_is_a_run_of_each_recipe(old: Path):
    recipes = {
        path.parent.name: json.loads(path.read_text("utf-8"))["fit"]["recipe"]
        for path in old.glob("runs/*/config.json")
    }
    assert recipes == {**{name: name for name in RECIPES}, "unfinished": "finetune"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_predicts_what_it_predicted(old: Path, recipe: str):
    found = load_pretrained(old / "runs" / recipe)
    assert_probabilities(found, old, SAID["runs"][recipe]["probabilities"])


def test_the_runs_differ_by_much_more_than_the_tolerance():
    """Or the test above could mistake one for another."""
    rows = [np.array(list(SAID["runs"][name]["probabilities"].values())) for name in RECIPES]
    rows.append(np.array(list(SAID["cut"].values())))
    apart = [np.abs(a - b).max() for i, a in enumerate(rows) for b in rows[:i]]
    assert min(apart) > 1000 * TOLERANCE
    assert all(np.ptp(each, axis=0).max() > 1000 * TOLERANCE for each in rows)


@pytest.mark.parametrize(
    "recipe", ["bit", *(pytest.param(r, marks=pytest.mark.slow) for r in RECIPES if r != "bit")]
)
def test_a_run_is_evaluated_to_the_same_accuracy(tmp_path: Path, recipe: str):
    workdir = unpack(tmp_path) / "runs" / recipe
    code, out, err = command("evaluate", "--workdir", workdir, "--json")
    assert code == 0, err
    found = json.loads(out[-1])
    examples = (workdir / "split.csv").read_text("utf-8").count("\nval,")
    assert (found["top1"], found["examples"]) == (SAID["runs"][recipe]["top1"], examples)
    assert (workdir / "eval" / "report.html").exists()


def test_a_cut_file_keeps_its_dropout_and_its_cut(old: Path):
    found = load_pretrained(old / "cut.safetensors")
    assert found.model.stage_names == ("stem", "stage1", "stage2", "stage3", "pool", "head")
    head = found.model.stages[-1].module
    assert isinstance(head, LinearHead)
    assert (head.num_classes, head.dropout) == (3, 0.25)
    assert_probabilities(found, old, SAID["cut"])


def test_a_backbone_keeps_its_dtype_and_its_features(old: Path):
    found = load_pretrained(old / "backbone.safetensors")
    assert (found.model.num_classes, found.model.dtype) == (0, "bfloat16")
    exact = found._replace(model=replace(found.model, dtype="float32"))
    said = SAID["backbone"]
    now = outputs(exact, old, list(said))
    np.testing.assert_allclose(now, list(said.values()), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "name", ["net.safetensors", "cut.safetensors", "backbone.safetensors", *RECIPES]
)
def test_what_is_read_can_be_saved_again(old: Path, tmp_path: Path, name: str):
    found = load_pretrained(old / ("runs" if name in RECIPES else ".") / name)
    save(tmp_path / "again.safetensors", found)
    again = load_pretrained(tmp_path / "again.safetensors")
    assert_equal(again, found)
    assert again.card == replace(found.card, layout=again.card.layout, notes=again.card.notes)


def call(folder: Path, path: Path) -> np.ndarray:
    """The probabilities that the ``predict.py`` of an exported folder finds, without rounding."""
    with (
        mock.patch.object(sys, "argv", ["predict.py", str(path)]),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        return runpy.run_path(str(folder / "predict.py"))["probabilities"]


def test_an_exported_folder_still_runs(old: Path):
    """JAX promises six months to such files: where a later one reads it no more, make another."""
    for name in ("red/0.png", "blue/11.png"):
        said = SAID["runs"]["finetune"]["probabilities"][name]
        now = call(old / "exported", old / "data" / name)
        np.testing.assert_allclose(now, said, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_an_exported_folder_runs_without_tljax(old: Path):
    script = (
        "import runpy, sys; sys.modules['tljax'] = sys.modules['flax'] = None;"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
    )
    words = [sys.executable, "-c", script, old / "exported" / "predict.py", old / "data/red/0.png"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    found = {line.split()[1]: float(line.split()[0]) for line in done.stdout.splitlines()[1:]}
    said = SAID["runs"]["finetune"]["probabilities"]["red/0.png"]
    expected = dict(zip(("blue", "green", "red"), said, strict=True))
    assert found == pytest.approx(expected, abs=6e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cut.safetensors", "runs/finetune", "runs/probe"])
def test_what_is_read_can_be_exported(old: Path, tmp_path: Path, name: str):
    export_stablehlo(tmp_path, load_pretrained(old / name), platforms=("cpu",))
    said = SAID["cut"] if "cut" in name else SAID["runs"][Path(name).name]["probabilities"]
    now = call(tmp_path, old / "data" / "green" / "3.png")
    # What is exported takes XLA's own convolutions, whose sums have another order.
    np.testing.assert_allclose(now, said["green/3.png"], rtol=0, atol=1e-5)


def test_an_unfinished_run_goes_on_to_the_right_end_or_is_refused(tmp_path: Path):
    folder = unpack(tmp_path)
    workdir = folder / "runs" / "unfinished"
    assert sorted(path.name for path in workdir.glob("checkpoints/[0-9]*"))
    before = contents(folder)
    code, _, err = command("train", "--resume", workdir)
    if code == 2:
        assert len(err) == 1, err
        assert err[0].startswith("error: ")
        assert str(workdir) in err[0]
        assert contents(folder) == before
        return
    assert code == 0, err
    assert (workdir / "metrics.jsonl").read_text("utf-8") == SAID["unfinished"]["metrics.jsonl"]
    assert_probabilities(load_pretrained(workdir), folder, SAID["unfinished"]["probabilities"])


def test_an_unfinished_run_predicts_nothing_yet(old: Path):
    code, _, err = command(
        *("predict", old / "data" / "red" / "0.png", "--weights", old / "runs" / "unfinished")
    )
    assert code == 2
    assert err[-1].startswith("error: ")
    assert "is an unfinished run" in err[-1]
