"""Files and runs written by version 1 give the same results as then.

`fixtures/make_version1.py` describes the archive and how it was created.
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
from tljax.data.folders import open_images
from tljax.data.options import Loading
from tljax.features.extract import compute_features
from tljax.models.layers import LinearHead
from tljax.pretrained import Pretrained, load_pretrained, save
from tljax.pretrained.deploy import export_stablehlo
from tljax.runtime.trees import flatten

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED: dict[str, Any] = json.loads((FIXTURES / "version1.json").read_text("utf-8"))
RECIPES = ("probe", "lp-ft", "gradual", "finetune", "bit", "scratch")
TOLERANCE = 1e-6


def unpack(folder: Path) -> Path:
    """Unpack the files of version 1 and replace their folder by this one."""
    with tarfile.open(FIXTURES / "version1.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    for path in folder.glob("runs/*/config.json"):
        place = json.dumps(str(folder))[1:-1]
        path.write_text(path.read_text("utf-8").replace("{FOLDER}", place), "utf-8")
    return folder


@pytest.fixture(autouse=True)
def default_optimizations():
    """Enable XLA's optimizations, which tests of training disable in their process."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the files for tests that only read them."""
    return unpack(tmp_path_factory.mktemp("version1"))


def outputs(loaded: Pretrained, folder: Path, names: list[str]) -> np.ndarray:
    """Return the outputs of the whole network for images of the data."""
    source = open_images([folder / "data" / name for name in names])
    values = compute_features(loaded.model, loaded.variables, source, Loading(), stop=None)
    assert values.indices.tolist() == list(range(len(names)))
    return np.asarray(values.values)


def assert_probabilities(
    loaded: Pretrained, folder: Path, expected: dict[str, list[float]]
) -> None:
    assert len(expected) == 36
    assert loaded.card.classes == ("blue", "green", "red")
    actual = jax.nn.softmax(outputs(loaded, folder, list(expected)))
    np.testing.assert_allclose(actual, list(expected.values()), rtol=0, atol=TOLERANCE)


def command(*arguments: object) -> tuple[int, list[str], list[str]]:
    """Run ``tljax ...`` in this process; return its exit code and the lines it prints."""
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
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_equal(left: Pretrained, right: Pretrained) -> None:
    """Check that models and classes are equal, and variables bit for bit."""
    assert left.model == right.model
    assert left.card.classes == right.card.classes
    left_leaves, right_leaves = flatten(left.variables), flatten(right.variables)
    assert left_leaves.keys() == right_leaves.keys()
    for path, leaf in right_leaves.items():
        np.testing.assert_array_equal(left_leaves[path], leaf, strict=True, err_msg=path)


def test_there_is_a_run_of_each_recipe(old: Path):
    recipes = {
        path.parent.name: json.loads(path.read_text("utf-8"))["fit"]["recipe"]
        for path in old.glob("runs/*/config.json")
    }
    assert recipes == {**{name: name for name in RECIPES}, "unfinished": "finetune"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_predicts_the_same_probabilities(old: Path, recipe: str):
    loaded = load_pretrained(old / "runs" / recipe)
    assert_probabilities(loaded, old, EXPECTED["runs"][recipe]["probabilities"])


def test_the_runs_differ_by_much_more_than_the_tolerance():
    """Otherwise the test above could not tell them apart."""
    rows = [np.array(list(EXPECTED["runs"][name]["probabilities"].values())) for name in RECIPES]
    rows.append(np.array(list(EXPECTED["cut"].values())))
    differences = [np.abs(a - b).max() for i, a in enumerate(rows) for b in rows[:i]]
    assert min(differences) > 1000 * TOLERANCE
    assert all(np.ptp(row, axis=0).max() > 1000 * TOLERANCE for row in rows)


@pytest.mark.parametrize(
    "recipe", ["bit", *(pytest.param(r, marks=pytest.mark.slow) for r in RECIPES if r != "bit")]
)
def test_a_run_is_evaluated_to_the_same_accuracy(tmp_path: Path, recipe: str):
    workdir = unpack(tmp_path) / "runs" / recipe
    code, out, err = command("evaluate", "--workdir", workdir, "--json")
    assert code == 0, err
    result = json.loads(out[-1])
    examples = (workdir / "split.csv").read_text("utf-8").count("\nval,")
    assert (result["top1"], result["examples"]) == (EXPECTED["runs"][recipe]["top1"], examples)
    assert (workdir / "eval" / "report.html").exists()


def test_a_network_without_its_last_stages_keeps_stages_and_dropout(old: Path):
    loaded = load_pretrained(old / "cut.safetensors")
    assert loaded.model.stage_names == ("stem", "stage1", "stage2", "stage3", "pool", "head")
    head = loaded.model.stages[-1].module
    assert isinstance(head, LinearHead)
    assert (head.num_classes, head.dropout) == (3, 0.25)
    assert_probabilities(loaded, old, EXPECTED["cut"])


def test_a_backbone_keeps_its_dtype_and_its_features(old: Path):
    loaded = load_pretrained(old / "backbone.safetensors")
    assert (loaded.model.num_classes, loaded.model.dtype) == (0, "bfloat16")
    exact = loaded._replace(model=replace(loaded.model, dtype="float32"))
    expected = EXPECTED["backbone"]
    actual = outputs(exact, old, list(expected))
    np.testing.assert_allclose(actual, list(expected.values()), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "name", ["net.safetensors", "cut.safetensors", "backbone.safetensors", *RECIPES]
)
def test_loaded_files_can_be_saved_again(old: Path, tmp_path: Path, name: str):
    loaded = load_pretrained(old / ("runs" if name in RECIPES else ".") / name)
    save(tmp_path / "again.safetensors", loaded)
    again = load_pretrained(tmp_path / "again.safetensors")
    assert_equal(again, loaded)
    assert again.card == replace(loaded.card, layout=again.card.layout, notes=again.card.notes)


def predict(folder: Path, path: Path) -> np.ndarray:
    """Return the unrounded probabilities of the ``predict.py`` of an exported folder."""
    with (
        mock.patch.object(sys, "argv", ["predict.py", str(path)]),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        return runpy.run_path(str(folder / "predict.py"))["probabilities"]


def test_an_exported_folder_still_runs(old: Path):
    """JAX guarantees to read them for six months: replace the file if a later JAX does not."""
    for name in ("red/0.png", "blue/11.png"):
        expected = EXPECTED["runs"]["finetune"]["probabilities"][name]
        actual = predict(old / "exported", old / "data" / name)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_an_exported_folder_runs_without_tljax(old: Path):
    script = (
        "import runpy, sys; sys.modules['tljax'] = sys.modules['flax'] = None;"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
    )
    arguments = [
        sys.executable,
        "-c",
        script,
        old / "exported" / "predict.py",
        old / "data/red/0.png",
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    actual = {line.split()[1]: float(line.split()[0]) for line in done.stdout.splitlines()[1:]}
    probabilities = EXPECTED["runs"]["finetune"]["probabilities"]["red/0.png"]
    expected = dict(zip(("blue", "green", "red"), probabilities, strict=True))
    assert actual == pytest.approx(expected, abs=6e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cut.safetensors", "runs/finetune", "runs/probe"])
def test_loaded_files_can_be_exported(old: Path, tmp_path: Path, name: str):
    export_stablehlo(tmp_path, load_pretrained(old / name), platforms=("cpu",))
    runs = EXPECTED["runs"]
    expected = EXPECTED["cut"] if "cut" in name else runs[Path(name).name]["probabilities"]
    actual = predict(tmp_path, old / "data" / "green" / "3.png")
    # Exported programs use XLA's convolutions, which sum in another order.
    np.testing.assert_allclose(actual, expected["green/3.png"], rtol=0, atol=1e-5)


def test_an_unfinished_run_is_resumed_to_the_same_result_or_refused(tmp_path: Path):
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
    assert (workdir / "metrics.jsonl").read_text("utf-8") == EXPECTED["unfinished"]["metrics.jsonl"]
    assert_probabilities(load_pretrained(workdir), folder, EXPECTED["unfinished"]["probabilities"])


def test_an_unfinished_run_cannot_predict(old: Path):
    code, _, err = command(
        *("predict", old / "data" / "red" / "0.png", "--weights", old / "runs" / "unfinished")
    )
    assert code == 2
    assert err[-1].startswith("error: ")
    assert "is an unfinished run" in err[-1]
