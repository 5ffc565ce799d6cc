"""Regression tests of small use cases, which ../shared/cases/README.md lists.

Their inputs are built by a script; the expected results are those of Keras, torch and transformers.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tljax
from tljax.models import apply
from tljax.pretrained import load_pretrained
from tljax.runtime.errors import RequestError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT.parent / "shared" / "cases"
TRAIN = ("--image-size", 32, "--epochs", 1)
PROBE = ("--image-size", 32, "--recipe", "probe", "--val-fraction", 0)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not CASES.is_dir():
        pytest.skip("needs ../shared/cases, which is not part of the repository")
    folder = tmp_path_factory.mktemp("cases")
    command = [sys.executable, CASES / "make_cases.py", folder]
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, env=environment)
    return folder


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a script with its own cache, by default in the root folder."""

    def run_script(name, *arguments, cwd=ROOT, code=0, limit=None, **environment):
        command = [sys.executable, ROOT / "scripts" / name, *map(str, arguments)]
        if limit:
            command = ["bash", "-c", f'ulimit -v {limit}; exec "$@"', "-", *command]
        cache = {"TLJAX_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            cwd=cwd,
            env={**os.environ, **cache, **environment},
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run_script


def error(done: subprocess.CompletedProcess[str]) -> str:
    """Return the only error line."""
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def api_case(cases, tmp_path):
    """Return a function that runs a case in Python and parses its output."""

    def run_case(name):
        done = subprocess.run(
            [sys.executable, CASES / "api_cases.py", name, cases],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={**os.environ, "TLJAX_CACHE": str(tmp_path / "cache")},
        )
        results: dict[str, str] = {}
        for line in done.stdout.splitlines()[1:]:
            name, _, result = line.partition(": ")
            results[name] = result
        return results

    return run_case


@pytest.fixture
def answers(cases):
    """Return a function that computes the relative error of a network's outputs."""
    expected = json.loads((cases / "expected.json").read_text())
    pixels = np.load(cases / "pixels.npy")

    def difference(name, kind="logits", **options):
        model, variables, _ = load_pretrained(cases / "weights" / name, **options)
        reference = np.asarray(expected[name][kind])
        if kind == "features":
            actual = apply(model, variables, pixels, stop="head").value
        else:
            actual = apply(model, variables, pixels).logits
        actual = np.asarray(actual)
        if kind == "probabilities":
            odds = np.exp(actual - actual.max(1, keepdims=True))
            actual = odds / odds.sum(1, keepdims=True)
            if reference.shape[1] == 1:
                reference = np.concatenate([1 - reference, reference], axis=1)
        return np.abs(actual - reference).max() / np.abs(reference).max()

    return difference


def assert_correct_or_refused(difference, tolerance, reason):
    """Check for the correct result, or for an error that contains the reason."""
    try:
        error = difference()
    except RequestError as refusal:
        error, message = 0.0, str(refusal)
        assert reason in message
        assert "\n" not in message
    assert error < tolerance


def copy(cases, name, target):
    return shutil.copytree(cases / name, target)


def weights_of(run):
    return (run / "best" / "model.safetensors").read_bytes()


# --- silently wrong results --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "tolerance"),
    [
        ("timm_plain", "logits", 1e-5),
        ("keras_avg.keras", "probabilities", 1e-4),
        ("keras_avg.h5", "probabilities", 1e-4),
        ("keras_one_output.keras", "probabilities", 1e-4),
    ],
)
def test_weight_files_give_the_results_of_their_library(answers, name, kind, tolerance):
    assert answers(name, kind) < tolerance


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("keras_max.keras", "probabilities", "pooling"),
        ("keras_max.h5", "probabilities", "pooling"),
        ("timm_silu", "logits", "act_layer"),
        ("timm_max", "logits", "global_pool"),
    ],
)
def test_architecture_variants_are_supported_or_refused(answers, name, kind, reason):
    assert_correct_or_refused(lambda: answers(name, kind), 1e-4, reason)


def test_a_keras_network_with_one_output_has_two_classes(cases, run):
    photos = (cases / f"photos/two/{name}/0.jpg" for name in ("lynx", "wolf"))
    done = run("predict.py", *photos, "--weights", cases / "weights/keras_one_output.keras")
    assert "1.000  class 0" not in done.stdout
    assert done.stdout.count("class 1") == 2  # each photograph gets both


def test_a_file_that_fits_two_networks_is_refused(cases, run, answers):
    weights = cases / "weights/tf_mobilenetv3_small_075.safetensors"
    assert answers(weights.name, model="tf_mobilenetv3_small_075") < 1e-5
    done = run("predict.py", cases / "photos/two/lynx/0.jpg", "--weights", weights, code=2)
    for word in ("--model", " mobilenetv3_small_075", " tf_mobilenetv3_small_075"):
        assert word in error(done)


def test_a_class_that_is_a_number_is_found_by_name_first(cases, run, tmp_path):
    assert load_pretrained(cases / "weights/timm_stars").card.index_of("2") == 1
    data = ("--data", cases / "photos/stars", "--weights", cases / "weights/timm_plain")
    run("train.py", *data, *PROBE, "--image-size", 64, "--workdir", tmp_path / "run")
    done = run(
        *("attack.py", cases / "photos/stars/1/0.jpg", "--weights", tmp_path / "run"),
        *("--attacks", "pgd", "--steps", 10, "--epsilons", 64, "--target", 2),
        *("--out", tmp_path / "out", "--json"),
    )
    assert "2" in done.stdout


def test_either_of_two_classes_with_the_same_name_is_correct(cases, run):
    data = ("--data", cases / "photos/crane", "--weights", cases / "weights/hf_crane")
    done = run("evaluate.py", *data)
    assert "top-1 accuracy           100.0%" in done.stdout
    assert "crane" in done.stdout


def test_a_url_whose_image_changes_is_downloaded_again(cases, run):
    photos = [cases / f"photos/two/{name}/0.jpg" for name in ("lynx", "wolf")]
    command = [sys.executable, CASES / "server.py", *photos]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    assert server.stdout
    try:
        address = server.stdout.readline().strip()
        command = ("predict.py", address, "--weights", cases / "weights/timm_plain", "--top", 2)
        first, second = run(*command), run(*command)
    finally:
        server.kill()
        server.communicate()
    assert "0.573  toad" in first.stdout
    assert "0.892  toad" in second.stdout
    assert "0.058  heron" in second.stdout


# --- training and its messages ----------------------------------------------------------------


def test_training_that_diverges_fails(cases, run, tmp_path):
    done = run(
        *("train.py", "--data", cases / "photos/two", "--weights", cases / "weights/timm_plain"),
        *("--image-size", 32, "--recipe", "finetune", "--epochs", 2, "--optimizer", "sgd"),
        *("--clip-norm", 0, "--learning-rate", 1e38, "--workdir", tmp_path / "run"),
        code=1,
    )
    assert "diverged" in error(done)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line


def test_accumulated_batches_of_padding_change_nothing(cases, run, tmp_path):
    options = ("--image-size", 32, "--recipe", "scratch", "--val-fraction", 0, "--epochs", 2)
    data = ("--data", cases / "photos/nine", "--weights", cases / "weights/resnet18.safetensors")
    run(
        *("train.py", *data, *options, "--batch-size", 8, "--accumulate", 4),
        *("--workdir", tmp_path / "run"),
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["val_loss"] for line in lines]
    assert len(losses) == 3
    assert np.isfinite(losses).all()


def train(run, cases, workdir, *options, **run_options):
    data = options if "--data" in options else ("--data", cases / "photos/two", *options)
    weights = ("--weights", cases / "weights/timm_plain")
    return run("train.py", *data, *weights, *TRAIN, "--workdir", workdir, **run_options)


def test_other_options_with_resume_are_refused(cases, run, tmp_path):
    train(run, cases, tmp_path / "run")
    done = run(
        *("train.py", "--resume", tmp_path / "run", "--epochs", 3, "--learning-rate", 1), code=2
    )
    assert "--epochs 3" in error(done)
    assert "--learning-rate 1" in error(done)


def test_mixup_without_augment_is_refused(cases, run, tmp_path):
    done = train(run, cases, tmp_path / "run", "--mixup", 0.4, code=2)
    assert "--augment" in error(done)
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_relative_data_path_can_be_resumed_from_anywhere(cases, run, tmp_path):
    copy(cases, "photos/two", tmp_path / "animals")
    (tmp_path / "b").mkdir()
    train(run, cases, "run", "--data", "animals", cwd=tmp_path)
    run("train.py", "--resume", "../run", cwd=tmp_path / "b")
    run("evaluate.py", "--workdir", "../run", cwd=tmp_path / "b")


def test_runs_inside_the_data_folder_are_not_a_class(cases, run, tmp_path):
    data = copy(cases, "photos/two", tmp_path / "data")
    command = ("train.py", "--data", ".", "--weights", cases / "weights/timm_plain", *TRAIN)
    run(*command, cwd=data)
    [first] = (data / "runs").glob("[!.]*/")
    time.sleep(1.1)  # the names of runs contain the second
    run(*command, cwd=data)
    for folder in (data / "runs").glob("[!.]*/"):
        assert json.loads((folder / "classes.json").read_text()) == ["lynx", "wolf"]
    run("train.py", "--resume", first.relative_to(data), cwd=data)


def test_the_error_for_an_unfinished_run_names_resume(cases, run, tmp_path):
    train(run, cases, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "best")
    for name in ("report.html", "README.md"):
        (tmp_path / "run" / name).unlink()
    photo = cases / "photos/two/lynx/0.jpg"
    done = run("predict.py", photo, "--weights", tmp_path / "run", code=2)
    assert "not finished" in error(done)
    assert "--resume" in error(done)


def test_an_added_image_is_named_when_resuming(cases, run, tmp_path):
    data = copy(cases, "photos/two", tmp_path / "data")
    train(run, cases, tmp_path / "run", "--data", data)
    shutil.copy(cases / "photos/another.jpg", data / "lynx")
    done = run("train.py", "--resume", tmp_path / "run", code=2)
    assert "another.jpg" in error(done)
    assert "weights" not in error(done)


def test_a_head_of_two_layers_trains_and_is_saved_or_refused(api_case):
    results = api_case("two_layer_head")
    assert results["the default recipe"].startswith("RequestError")
    assert "probe" in results["the default recipe"]
    assert results["finetune"].startswith("trained")
    assert results["finetune, freeze_to"].startswith("trained")
    if not results["saved"].startswith("RequestError"):
        assert results["loaded"] == "mobilenetv2_050"


def test_a_temporary_disk_error_removes_no_checkpoint(api_case):
    results = api_case("restore_after_an_error")
    assert results["checkpoints left"] == "['1', '2']"
    restored = results["restored"]
    assert restored == "{'epoch': 2}" or "Input/output error" in restored


# --- the cache of features ------------------------------------------------------------------------


def test_a_second_process_uses_the_features_of_the_first(cases, run, tmp_path):
    for _ in range(2):
        run("probe.py", "--data", cases / "photos/two", "--image-size", 32)
        assert len(list((tmp_path / "cache" / "features").glob("[!.]*"))) == 2


def test_two_concurrent_processes_share_one_cache(api_case):
    assert "0 of 8 failed" in api_case("two_processes_one_cache")


# --- weight files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["training_script.pth.tar", "compiled.pth", "lightning.ckpt"])
def test_checkpoints_of_training_scripts_can_be_loaded(answers, name):
    assert answers(name) < 1e-5


@pytest.mark.parametrize("name", ["timm_no_head", "hf_backbone", "keras_no_top.keras"])
def test_a_backbone_without_a_head_is_enough_to_train(cases, run, answers, tmp_path, name):
    assert answers(name, "features") < 1e-4
    weights = ("--weights", cases / "weights" / name)
    run("train.py", "--data", cases / "photos/two", *weights, *PROBE, "--workdir", tmp_path / "run")
    done = run("predict.py", cases / "photos/two/lynx/0.jpg", *weights, code=2)
    assert "head" in error(done)


def test_a_header_with_a_huge_image_size_is_damaged(cases, run):
    weights = cases / "weights/native_huge.safetensors"
    with pytest.raises(RequestError, match="damaged"):
        load_pretrained(weights)
    photo = cases / "photos/two/lynx/0.jpg"
    done = run("predict.py", photo, "--weights", weights, code=2, limit=30_000_000)
    assert "damaged" in error(done)


# --- photographs and folders ----------------------------------------------------------------------


def test_a_jpeg_without_its_end_marker_is_read(cases, run):
    done = run("predict.py", cases / "photos/cut", "--weights", cases / "weights/timm_plain")
    assert done.stdout.count("0.573  toad") == 2


def test_thumbnail_folders_of_a_network_drive_are_not_a_class(cases, run, tmp_path):
    data = ("--data", cases / "photos/synology", "--weights", cases / "weights/timm_plain")
    run("train.py", *data, *PROBE, "--workdir", tmp_path / "run")
    assert json.loads((tmp_path / "run/classes.json").read_text()) == ["lynx", "wolf"]
    # Without validation images, every image is in both parts.
    split = (tmp_path / "run/split.csv").read_text().splitlines()
    assert sum(row.startswith("train,") for row in split) == 8


def test_one_unreadable_file_does_not_stop_the_others(cases, run, tmp_path):
    weights = ("--weights", cases / "weights/timm_plain", "--image-size", 32)
    done = run(
        "visualize.py", "explain", cases / "photos/one_bad", *weights, "--out", tmp_path / "out"
    )
    assert "explain-0-photograph.png  good.jpg" in done.stdout
    assert (tmp_path / "out" / "explain-0-saliency.png").exists()
    assert "cut.jpg" in done.stdout + done.stderr


def test_a_batch_size_above_the_number_of_images_is_capped(cases, run, tmp_path):
    for size in (15, 2048):
        run(
            *(
                "train.py",
                "--data",
                cases / "photos/two",
                "--weights",
                cases / "weights/timm_plain",
            ),
            *("--image-size", 32, "--recipe", "finetune", "--epochs", 2),
            *("--workdir", tmp_path / str(size), "--batch-size", size),
        )
    assert weights_of(tmp_path / "15") == weights_of(tmp_path / "2048")


# --- arguments and environment ------------------------------------------------------------------


def test_attacks_refuse_invalid_arguments(api_case):
    results = api_case("attack_arguments")
    assert "changed by up to" in results["as it should be"]
    for name in ("images * 255", "labels of classes 5 to 9 of 5", "epsilon -8/255"):
        assert results[name].startswith("RequestError")
    for name in ("no images", "bfloat16, random start", "bfloat16, fgsm"):
        assert results[name].startswith(("RequestError", "changed by up to 0.0000")) or (
            "changed by up to 0.03" in results[name] and "0.0332" not in results[name]
        )


def test_numbers_out_of_range_are_refused(cases, run, tmp_path):
    photo, weights = cases / "photos/two/lynx/0.jpg", ("--weights", cases / "weights/timm_plain")
    small = (*weights, "--image-size", 32)
    done = run("predict.py", photo, *weights, "--image-size", 0, code=2)
    assert "--image-size 0" in error(done)
    done = run("probe.py", "--data", cases / "photos/two", *small, "--neighbors", 0, code=2)
    assert "--neighbors 0" in error(done)
    attack = ("--attacks", "fgsm", "--epsilons", 4, "--pictures", 0, "--out", tmp_path / "out")
    done = run("attack.py", photo, *small, *attack, code=2)
    assert "--pictures 0" in error(done)
    assert not (tmp_path / "out").exists()


def test_a_missing_device_is_named(cases, run):
    command = (
        "predict.py",
        cases / "photos/two/lynx/0.jpg",
        "--weights",
        cases / "weights/timm_plain",
    )
    done = run(*command, JAX_PLATFORMS="cuda", code=2)
    assert "cuda" in error(done)


def test_names_with_accents_are_printed_to_an_ascii_output(cases, run):
    command = (
        "predict.py",
        cases / "photos/two/lynx/0.jpg",
        "--weights",
        cases / "weights/timm_accents",
    )
    done = run(*command, PYTHONIOENCODING="ascii")
    assert len(done.stdout.splitlines()) == 1 + len(tljax.load_pretrained(command[-1]).card.classes)
