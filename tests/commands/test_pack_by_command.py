"""tljax pack, and the commands that read what it wrote."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from networks import random_pretrained
from test_scripts import answer, call_script, messages, paint

import tljax

OF_NETWORK = ("--size", 37, "--interpolation", "bicubic")  # with which it takes 32 pixels


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a network, and photographs of which one cannot be read."""
    folder = tmp_path_factory.mktemp("place")
    tljax.save(folder / "net.safetensors", random_pretrained("mobilenetv2_050", 2))
    for i in range(16):
        part, name = ("train", "val")[i >= 10], "ab"[i % 2]
        paint(folder / "images" / part / name / f"{i}.png", (200 * (i % 2), 60, 60), i)
    (folder / "images" / "train" / "a" / "broken.png").write_text("<html>404")
    return folder


@pytest.fixture(scope="module")
def packed(place: Path) -> Path:
    done = call_script(place, "pack", "images", "packed", *OF_NETWORK, "--json")
    found = answer(done)
    broken = place / "images" / "train" / "a" / "broken.png"
    assert found["images"] == 16
    assert found["skipped"] == {"images/train/a/broken.png": "an HTML page, not an image"}
    assert broken.exists()
    assert done.stdout.splitlines()[:-1] == [
        f"16 images of {found['bytes'] / 1e6:.1f} MB in packed",
        "not read: images/train/a/broken.png: an HTML page, not an image",
        "open them with --data packed:packed",
    ]
    assert messages(done.stderr)[-1].startswith("pack  17 images  ")
    return place / "packed"


@pytest.mark.slow
def test_extracted_features_are_those_of_the_files(place: Path, packed: Path):
    network = ("--weights", "net.safetensors", "--image-size", 32)
    for data, out in (("images/val", "files.npz"), ("packed:packed", "packed.npz")):
        done = call_script(place, "extract", data, "--out", out, *network)
        assert done.returncode == 0, done.stderr
        assert "note: " not in done.stderr
    files, ours = np.load(place / "files.npz"), np.load(place / "packed.npz")
    assert [Path(name).name for name in ours["names"]] == [Path(n).name for n in files["names"]]
    np.testing.assert_array_equal(ours["labels"], files["labels"])
    np.testing.assert_array_equal(ours["embeddings"], files["embeddings"])


@pytest.mark.slow
def test_a_run_that_packs_its_images_is_the_same(place: Path, tmp_path: Path):
    data = ("--data", place / "images", "--workdir", "run", "--recipe", "finetune", "--epochs", 2)
    options = (*data, "--weights", place / "net.safetensors", "--image-size", 32, "--json")
    done = call_script(tmp_path, "train", *options, "--pack", "always")
    result = answer(done)
    assert "note: images are packed at 37 pixels" in done.stderr
    assert [*(tmp_path / "packed").glob("*/header.json")]
    again = call_script(tmp_path, "train", *options, "--pack", "always")
    assert "note: the run in run is continued" in again.stderr
    assert answer(again)["val_top1"] == result["val_top1"]
    shutil.move(tmp_path / "run", tmp_path / "packed_run")
    answer(call_script(tmp_path, "train", *options))
    files = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "packed_run")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_run_on_packed_images_is_that_on_the_files_and_needs_them_no_more(
    place: Path, packed: Path, tmp_path: Path
):
    shutil.copytree(place, tmp_path / "copy")
    copy = tmp_path / "copy"
    options = ("--weights", "net.safetensors", "--image-size", 32, "--epochs", 2, "--json")
    runs = {}
    for data, workdir in (("images", "files"), ("packed:packed", "ours")):
        done = call_script(copy, "train", "--data", data, "--workdir", workdir, *options)
        runs[workdir] = answer(done)
    for name in ("val_top1", "probe_top1", "skipped"):
        assert runs["ours"][name] == runs["files"][name]
    metrics = [(copy / name / "metrics.jsonl").read_text() for name in ("files", "ours")]
    assert metrics[0] == metrics[1]
    shutil.rmtree(copy / "images")
    evaluated = answer(call_script(copy, "evaluate", "--workdir", "ours", "--json"))
    assert evaluated["top1"] == runs["ours"]["val_top1"]
    again = call_script(copy, "train", "--data", "packed:packed", "--workdir", "ours", *options)
    assert answer(again)["val_top1"] == runs["ours"]["val_top1"]
    moved = ("--weights", "ours", "--data", f"packed:{packed}", "--json")
    assert answer(call_script(copy, "evaluate", *moved))["top1"] == evaluated["top1"]


def test_verify_names_what_has_changed(place: Path, packed: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    for spec in ("copy", "packed:copy"):
        done = call_script(tmp_path, "pack", "--verify", spec, "--json")
        assert answer(done) == {"shards": 1, "problems": []}
        assert done.stdout.splitlines()[0] == "copy is as it was packed"
    with (copy / "part-00000.bin").open("r+b") as file:
        file.write(b"????")
    done = call_script(tmp_path, "pack", "copy", "--verify", "--json")
    assert done.returncode == 1
    [problem] = json.loads(done.stdout.splitlines()[-1])["problems"]
    assert problem == "copy/part-00000.bin: its checksum differs"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("images",), "name the folder to write: tljax pack DATA OUT"),
        (("packed:packed", "x"), "packed:packed is packed already: pack the images it was made of"),
        (("images", "images"), "images holds something else, train: choose an empty folder"),
        (("images", "packed"), "packed was packed with size 37, not 256: choose another folder"),
        (("images", "x", "--verify"), "--verify reads one folder: leave out x"),
        (("--verify", "images"), "images holds no packed images: make them with tljax pack"),
        (("packed", "x"), "packed holds packed images: write packed:packed"),
    ],
)
def test_a_bad_request_is_one_line(place: Path, packed: Path, arguments, said):
    before = sorted(place.rglob("*"))
    done = call_script(place, "pack", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert messages(done.stderr) == [f"error: {said}"]
    assert sorted(place.rglob("*")) == before
