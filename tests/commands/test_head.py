"""--head: classify by embeddings, and fine-tune from there."""

import json
from pathlib import Path

import numpy as np
import pytest
from networks import random_pretrained, run
from test_scripts import answer, call_script, paint

from tljax.data.decode import decode
from tljax.data.folders import open_folder
from tljax.pretrained import load_pretrained, save

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with images, a network, and the mean outputs for each class as embeddings."""
    pretrained = random_pretrained("mobilenetv2_050", 5).with_size(32)
    save(tmp_path / "net.safetensors", pretrained)
    for i in range(8):
        part = "train" if i < 4 else "val"
        paint(tmp_path / "data" / part / "ab"[i % 2] / f"{i}.png", (200 * (i % 2), 60, 60), i)
    source = open_folder(tmp_path / "data" / "train")
    model, variables, _ = pretrained
    images = np.stack([decode(source.read(i), model.preprocess) for i in range(4)])
    outputs = np.asarray(run(model, variables, images).value)
    means = [outputs[source.labels == i].mean(0) for i in range(2)]
    center = np.mean(means, 0)
    np.savez(tmp_path / "texts.npz", names=["b", "c", "a"], vectors=[means[1], -center, means[0]])
    return tmp_path


@pytest.mark.slow
def test_a_network_classifies_by_embeddings_and_is_trained_from_there(place: Path) -> None:
    network = ("--weights", place / "net.safetensors", "--image-size", "32", "--head", "texts.npz")
    image = place / "data" / "train" / "b" / "1.png"
    done = answer(call_script(place, "predict", image, *network, "--json"))
    assert {guess["name"] for guess in done["images"][0]["top"]} == {"a", "b", "c"}
    measured = answer(call_script(place, "evaluate", "--data", place / "data", *network, "--json"))
    options = ("--recipe", "finetune", "--epochs", "1", "--json")
    train = ("train", "--data", place / "data", *network, *options, "--workdir", place / "run")
    answer(call_script(place, *train))
    lines = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["val_top1"] == measured["top1"]
    trained = load_pretrained(place / "run")
    assert trained.card.classes == ("a", "b")
    assert trained.model.stage_names[-1] == "similarity"


def test_a_head_that_lacks_a_class_and_recipes_that_fit_a_head_are_refused(place: Path) -> None:
    network = ("--weights", place / "net.safetensors", "--head", "texts.npz")
    train = ("train", "--data", place / "data", *network)
    line = call_script(place, *train).stderr.splitlines()[-1]
    assert (
        line
        == "error: --head texts.npz has no effect where a head is fitted: choose --recipe finetune"
    )
    for i, part in enumerate(("train", "train", "val")):
        paint(place / "data" / part / "z" / f"{i}.png", (0, 0, 0), i)
    line = call_script(place, *train, "--recipe", "finetune").stderr.splitlines()[-1]
    assert line == "error: the embeddings name 3 classes, but not z: add its vector"
    assert not (place / "runs").exists()


@pytest.mark.slow
def test_a_run_continues_with_the_same_file_under_another_name(place: Path) -> None:
    train = ("train", "--data", place / "data", "--weights", place / "net.safetensors")
    train += ("--image-size", "32", "--head", "texts.npz", "--recipe", "finetune", "--epochs", "1")
    answer(call_script(place, *train, "--workdir", place / "run", "--json"))
    again = ("train", "--resume", place / "run", "--head", "../" + place.name + "/texts.npz")
    answer(call_script(place, *again, "--json"))


def test_a_file_that_is_no_npz_is_refused_without_advice_to_trust_it(place: Path) -> None:
    for name, said in (
        ("nowhere.npz", "No such file or directory"),
        ("data/train/a/0.png", "write it by numpy.savez, the names as text"),
    ):
        done = call_script(place, "predict", place / "data/train/a/0.png", "--head", name)
        assert done.stderr.splitlines()[-1] == f"error: {name} cannot be read as .npz: {said}"
