"""Small situations of use that once went wrong, a test each: ../shared/cases/README.md lists them.

Their inputs are built on the spot; the right answers are what Keras, torch and transformers say.
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
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not CASES.is_dir():
        pytest.skip("needs ../shared/cases, which is not part of the repository")
    folder = tmp_path_factory.mktemp("cases")
    command = [sys.executable, CASES / "make_cases.py", folder]
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, env=environment)
    return folder


@pytest.fixture
def run(tmp_path):
    """Run a script in the project's root, or elsewhere, with a cache of its own."""

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
    """The one line that says what is wrong."""
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def api_case(made, tmp_path):
    """What one of the cases in Python prints."""

    def run_case(name):
        done = subprocess.run(
            [sys.executable, CASES / "api_cases.py", name, made],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={**os.environ, "TLJAX_CACHE": str(tmp_path / "cache")},
        )
        said: dict[str, str] = {}
        for line in done.stdout.splitlines()[1:]:
            what, _, found = line.partition(": ")
            said[what] = found
        return said

    return run_case


@pytest.fixture
def answers(made):
    """How far a network's answers are from the right ones, relative to their maximum."""
    expected = json.loads((made / "expected.json").read_text())
    pixels = np.load(made / "pixels.npy")

    def difference(name, kind="logits", **options):
        model, variables, _ = load_pretrained(made / "weights" / name, **options)
        right = np.asarray(expected[name][kind])
        if kind == "features":
            found = apply(model, variables, pixels, stop="head").value
        else:
            found = apply(model, variables, pixels).logits
        found = np.asarray(found)
        if kind == "probabilities":
            odds = np.exp(found - found.max(1, keepdims=True))
            found = odds / odds.sum(1, keepdims=True)
            if right.shape[1] == 1:
                right = np.concatenate([1 - right, right], axis=1)
        return np.abs(found - right).max() / np.abs(right).max()

    return difference


def right_or_refused(difference, tolerance, names):
    """Either the right answer, or an error that names the reason."""
    try:
        found = difference()
    except RequestError as refusal:
        found, said = 0.0, str(refusal)
        assert names in said
        assert "\n" not in said
    assert found < tolerance


def copy(made, what, to):
    return shutil.copytree(made / what, to)


def digest_of(run):
    return (run / "best" / "model.safetensors").read_bytes()


# --- wrong answers without a word -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "tolerance"),
    [
        ("timm_plain", "logits", 1e-5),
        ("keras_avg.keras", "probabilities", 1e-4),
        ("keras_avg.h5", "probabilities", 1e-4),
        ("keras_one_output.keras", "probabilities", 1e-4),
    ],
)
def test_plain_files_give_what_their_library_gives(answers, name, kind, tolerance):
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
def test_another_computation_is_computed_or_refused(answers, name, kind, reason):
    right_or_refused(lambda: answers(name, kind), 1e-4, reason)


def test_one_output_of_keras_names_two_classes(made, run):
    photos = (made / f"photos/two/{name}/0.jpg" for name in ("lynx", "wolf"))
    done = run("predict.py", *photos, "--weights", made / "weights/keras_one_output.keras")
    assert "1.000  class 0" not in done.stdout
    assert done.stdout.count("class 1") == 2  # each photograph gets both


def test_a_bare_file_that_fits_two_networks_says_so(made, run, answers):
    weights = made / "weights/tf_mobilenetv3_small_075.safetensors"
    assert answers(weights.name, model="tf_mobilenetv3_small_075") < 1e-5
    done = run("predict.py", made / "photos/two/lynx/0.jpg", "--weights", weights, code=2)
    for word in ("--model", " mobilenetv3_small_075", " tf_mobilenetv3_small_075"):
        assert word in error(done)


def test_classes_called_by_numbers_are_names_first(made, run, tmp_path):
    assert load_pretrained(made / "weights/timm_stars").card.index_of("2") == 1
    data = ("--data", made / "photos/stars", "--weights", made / "weights/timm_plain")
    run("train.py", *data, *PROBE, "--image-size", 64, "--workdir", tmp_path / "run")
    done = run(
        *("attack.py", made / "photos/stars/1/0.jpg", "--weights", tmp_path / "run"),
        *("--attacks", "pgd", "--steps", 10, "--epsilons", 64, "--target", 2),
        *("--out", tmp_path / "out", "--json"),
    )
    assert "2" in done.stdout


def test_any_of_two_classes_of_one_name_counts(made, run):
    data = ("--data", made / "photos/crane", "--weights", made / "weights/hf_crane")
    done = run("evaluate.py", *data)
    assert "top-1  100.0%" in done.stdout
    assert "crane" in done.stdout


def test_an_address_whose_picture_changes_is_asked_again(made, run):
    photos = [made / f"photos/two/{name}/0.jpg" for name in ("lynx", "wolf")]
    command = [sys.executable, CASES / "server.py", *photos]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    assert server.stdout
    try:
        address = server.stdout.readline().strip()
        ask = ("predict.py", address, "--weights", made / "weights/timm_plain", "--top", 2)
        first, second = run(*ask), run(*ask)
    finally:
        server.kill()
        server.communicate()
    assert "0.573  toad" in first.stdout
    assert "0.892  toad" in second.stdout
    assert "0.058  heron" in second.stdout


# --- training, and what is said of it -------------------------------------------------------------


def test_training_that_diverges_fails(made, run, tmp_path):
    done = run(
        *("train.py", "--data", made / "photos/two", "--weights", made / "weights/timm_plain"),
        *("--image-size", 32, "--recipe", "finetune", "--epochs", 2, "--optimizer", "sgd"),
        *("--clip-norm", 0, "--learning-rate", 1e38, "--workdir", tmp_path / "run"),
        code=1,
    )
    assert "diverged" in error(done)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line


def test_parts_that_are_all_padding_change_nothing(made, run, tmp_path):
    options = ("--image-size", 32, "--recipe", "scratch", "--val-fraction", 0, "--epochs", 2)
    data = ("--data", made / "photos/nine", "--weights", made / "weights/resnet18.safetensors")
    run(
        *("train.py", *data, *options, "--batch-size", 8, "--accumulate", 4),
        *("--workdir", tmp_path / "run"),
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["val_loss"] for line in lines]
    assert len(losses) == 3
    assert np.isfinite(losses).all()


def train(run, made, workdir, *options, **how):
    data = options if "--data" in options else ("--data", made / "photos/two", *options)
    weights = ("--weights", made / "weights/timm_plain")
    return run("train.py", *data, *weights, *TRAIN, "--workdir", workdir, **how)


def test_other_settings_beside_resume_are_refused(made, run, tmp_path):
    train(run, made, tmp_path / "run")
    done = run(
        *("train.py", "--resume", tmp_path / "run", "--epochs", 3, "--learning-rate", 1), code=2
    )
    assert "--epochs 3" in error(done)
    assert "--learning-rate 1" in error(done)


def test_mixup_without_augment_is_refused(made, run, tmp_path):
    done = train(run, made, tmp_path / "run", "--mixup", 0.4, code=2)
    assert "--augment" in error(done)
    assert not (tmp_path / "run").exists()


def test_a_run_on_relative_data_goes_on_from_anywhere(made, run, tmp_path):
    copy(made, "photos/two", tmp_path / "animals")
    (tmp_path / "b").mkdir()
    train(run, made, "run", "--data", "animals", cwd=tmp_path)
    run("train.py", "--resume", "../run", cwd=tmp_path / "b")
    run("evaluate.py", "--workdir", "../run", cwd=tmp_path / "b")


def test_runs_inside_the_data_are_no_class(made, run, tmp_path):
    data = copy(made, "photos/two", tmp_path / "data")
    ask = ("train.py", "--data", ".", "--weights", made / "weights/timm_plain", *TRAIN)
    run(*ask, cwd=data)
    [first] = (data / "runs").glob("[!.]*/")
    time.sleep(1.1)  # runs are called by the second
    run(*ask, cwd=data)
    for one in (data / "runs").glob("[!.]*/"):
        assert json.loads((one / "classes.json").read_text()) == ["lynx", "wolf"]
    run("train.py", "--resume", first.relative_to(data), cwd=data)


def test_an_unfinished_run_names_resume(made, run, tmp_path):
    train(run, made, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "best")
    for name in ("report.html", "README.md"):
        (tmp_path / "run" / name).unlink()
    photo = made / "photos/two/lynx/0.jpg"
    done = run("predict.py", photo, "--weights", tmp_path / "run", code=2)
    assert "not finished" in error(done)
    assert "--resume" in error(done)


def test_a_photograph_that_was_added_is_named(made, run, tmp_path):
    data = copy(made, "photos/two", tmp_path / "data")
    train(run, made, tmp_path / "run", "--data", data)
    shutil.copy(made / "photos/another.jpg", data / "lynx")
    done = run("train.py", "--resume", tmp_path / "run", code=2)
    assert "another.jpg" in error(done)
    assert "weights" not in error(done)


def test_a_head_of_two_layers_trains_and_is_saved_or_refused(api_case):
    said = api_case("two_layer_head")
    assert said["the default recipe"].startswith("RequestError")
    assert "probe" in said["the default recipe"]
    assert said["finetune"].startswith("trained")
    assert said["finetune, freeze_to"].startswith("trained")
    if not said["saved"].startswith("RequestError"):
        assert said["loaded"] == "mobilenetv2_050"


def test_a_disk_that_fails_once_costs_no_checkpoint(api_case):
    said = api_case("restore_after_an_error")
    assert said["checkpoints left"] == "['1', '2']"
    found = said["restored"]
    assert found == "{'epoch': 2}" or "Input/output error" in found


# --- the cache of features ------------------------------------------------------------------------


def test_a_second_process_finds_the_features_of_the_first(made, run, tmp_path):
    for _ in range(2):
        run("probe.py", "--data", made / "photos/two", "--image-size", 32)
        assert len(list((tmp_path / "cache" / "features").glob("[!.]*"))) == 2


def test_two_processes_at_once_share_one_cache(api_case):
    assert "0 of 8 failed" in api_case("two_processes_one_cache")


# --- weight files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["training_script.pth.tar", "compiled.pth", "lightning.ckpt"])
def test_what_training_scripts_leave_is_read(answers, name):
    assert answers(name) < 1e-5


@pytest.mark.parametrize("name", ["timm_no_head", "hf_backbone", "keras_no_top.keras"])
def test_a_backbone_without_a_head_is_enough_to_train(made, run, answers, tmp_path, name):
    assert answers(name, "features") < 1e-4
    weights = ("--weights", made / "weights" / name)
    run("train.py", "--data", made / "photos/two", *weights, *PROBE, "--workdir", tmp_path / "run")
    done = run("predict.py", made / "photos/two/lynx/0.jpg", *weights, code=2)
    assert "head" in error(done)


def test_a_header_that_asks_for_huge_images_is_damaged(made, run):
    weights = made / "weights/native_huge.safetensors"
    with pytest.raises(RequestError, match="damaged"):
        load_pretrained(weights)
    photo = made / "photos/two/lynx/0.jpg"
    done = run("predict.py", photo, "--weights", weights, code=2, limit=30_000_000)
    assert "damaged" in error(done)


# --- photographs and folders ----------------------------------------------------------------------


def test_a_jpeg_without_its_end_marker_is_read(made, run):
    done = run("predict.py", made / "photos/cut", "--weights", made / "weights/timm_plain")
    assert done.stdout.count("0.573  toad") == 2


def test_thumbnails_of_a_network_disk_are_no_class(made, run, tmp_path):
    data = ("--data", made / "photos/synology", "--weights", made / "weights/timm_plain")
    run("train.py", *data, *PROBE, "--workdir", tmp_path / "run")
    assert json.loads((tmp_path / "run/classes.json").read_text()) == ["lynx", "wolf"]
    # Without a validation part every image is in both.
    split = (tmp_path / "run/split.csv").read_text().splitlines()
    assert sum(row.startswith("train,") for row in split) == 8


def test_one_unreadable_file_does_not_stop_the_others(made, run, tmp_path):
    weights = ("--weights", made / "weights/timm_plain", "--image-size", 32)
    done = run(
        "visualize.py", "explain", made / "photos/one_bad", *weights, "--out", tmp_path / "out"
    )
    assert "explain-0-photograph.png  good.jpg" in done.stdout
    assert (tmp_path / "out" / "explain-0-saliency.png").exists()
    assert "cut.jpg" in done.stdout + done.stderr


def test_a_batch_larger_than_the_data_is_capped(made, run, tmp_path):
    for size in (15, 2048):
        run(
            *("train.py", "--data", made / "photos/two", "--weights", made / "weights/timm_plain"),
            *("--image-size", 32, "--recipe", "finetune", "--epochs", 2),
            *("--workdir", tmp_path / str(size), "--batch-size", size),
        )
    assert digest_of(tmp_path / "15") == digest_of(tmp_path / "2048")


# --- arguments and surroundings -------------------------------------------------------------------


def test_attacks_refuse_arguments_without_sense(api_case):
    said = api_case("attack_arguments")
    assert "changed by up to" in said["as it should be"]
    for name in ("images * 255", "labels of classes 5 to 9 of 5", "epsilon -8/255"):
        assert said[name].startswith("RequestError")
    for name in ("no images", "bfloat16, random start", "bfloat16, fgsm"):
        assert said[name].startswith(("RequestError", "changed by up to 0.0000")) or (
            "changed by up to 0.03" in said[name] and "0.0332" not in said[name]
        )


def test_senseless_numbers_are_refused(made, run, tmp_path):
    photo, weights = made / "photos/two/lynx/0.jpg", ("--weights", made / "weights/timm_plain")
    small = (*weights, "--image-size", 32)
    done = run("predict.py", photo, *weights, "--image-size", 0, code=2)
    assert "--image-size 0" in error(done)
    done = run("probe.py", "--data", made / "photos/two", *small, "--neighbours", 0, code=2)
    assert "--neighbours 0" in error(done)
    attack = ("--attacks", "fgsm", "--epsilons", 4, "--pictures", 0, "--out", tmp_path / "out")
    done = run("attack.py", photo, *small, *attack, code=2)
    assert "--pictures 0" in error(done)
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_said(made, run):
    ask = ("predict.py", made / "photos/two/lynx/0.jpg", "--weights", made / "weights/timm_plain")
    done = run(*ask, JAX_PLATFORMS="cuda", code=2)
    assert "cuda" in error(done)


def test_names_with_accents_reach_an_ascii_output(made, run):
    ask = ("predict.py", made / "photos/two/lynx/0.jpg", "--weights", made / "weights/timm_accents")
    done = run(*ask, PYTHONIOENCODING="ascii")
    assert len(done.stdout.splitlines()) == 1 + len(tljax.load_pretrained(ask[-1]).card.classes)
