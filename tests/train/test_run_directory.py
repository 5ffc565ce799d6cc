"""A run directory: inputs of a run are recorded and compared, and one process at a time trains."""

import csv
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from tljax.data.files import Files
from tljax.data.sources import open_splits
from tljax.runtime.errors import RequestError
from tljax.runtime.files import MARKER
from tljax.runtime.trees import tree_digest
from tljax.train import run_directory
from tljax.train.run_directory import MetricsFile


@pytest.fixture
def data(tmp_path):
    """Write twelve images of two classes, in folders of training and validation data."""
    for i in range(12):
        path = tmp_path / "data" / ("val" if i % 3 == 0 else "train") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "data"


def begin(run, data, weights=None, **others):
    config = {
        "data": str(data),
        "weights": "some.net",
        "val_fraction": 0.2,
        "verify_content": False,
    }
    config |= others
    digest = tree_digest(weights or tiny.random_variables())
    return run_directory.open_run(run, config, open_splits(str(data)), digest)


def test_a_run_resumes_with_the_same_images_in_another_place(data, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "elsewhere" / "moved"
    assert not begin(run, data)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert begin(run, data)
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    moved.parent.mkdir()
    data.rename(moved)
    for path in moved.rglob("*"):
        os.utime(path, (1, 1))  # a copy has another time
    with pytest.raises(
        RequestError, match=rf"{data} with the data of the run does not exist: .* --data"
    ):
        run_directory.open_validation(run)
    assert begin(run, moved)
    assert len(run_directory.open_validation(run)[0]) == 4
    changed = {p.name for p in run.iterdir() if p.read_bytes() != before[p.name]}
    assert changed == {"config.json"}


def add(data):
    (data / "train" / "a" / "another.png").write_bytes((data / "train/a/2.png").read_bytes())


def remove(data):
    (data / "val" / "b" / "9.png").unlink()


def grow(data):
    with (data / "train" / "a" / "4.png").open("ab") as file:
        file.write(b"more")


def move(data):
    (data / "train" / "a" / "2.png").rename(data / "train" / "b" / "2.png")


def flip(data):
    path = data / "train" / "a" / "4.png"
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add, "1 added (train/a/another.png)"),
        (remove, "1 missing (val/b/9.png)"),
        (grow, "of another size"),
        (move, "1 added (train/b/2.png); 1 missing (train/a/2.png)"),
        (flip, "the contents of the images in"),
    ],
)
@pytest.mark.parametrize("verify_content", [True, False])
def test_changed_images_are_named(data, tmp_path, change, message, verify_content):
    begin(tmp_path / "run", data, verify_content=verify_content)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    change(data)
    if change is flip and not verify_content:
        assert begin(tmp_path / "run", data, verify_content=False)
        return
    with pytest.raises(RequestError) as error:
        begin(tmp_path / "run", data, verify_content=verify_content)
    assert message in str(error.value)
    assert str(data) in str(error.value)
    assert "restore them or start a new run" in str(error.value)
    assert "\n" not in str(error.value)
    if change is not flip:  # contents of training images are not read for an evaluation
        with pytest.raises(RequestError, match=re.escape(message)):
            run_directory.open_validation(tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_other_weights_of_the_images_are_named(data, tmp_path):
    splits = open_splits(str(data))
    extra = {"weight": np.ones(len(splits.train), np.float32)}
    other = splits._replace(train=replace(splits.train, extra=extra))
    config = {"data": str(data), "weights": "some.net", "verify_content": False}
    run_directory.open_run(tmp_path / "run", config, splits, "weights")
    with pytest.raises(RequestError, match=r"the paths, sizes or labels of the images in .* have"):
        run_directory.open_run(tmp_path / "run", config, other, "weights")


def test_a_run_reads_images_only_to_verify_their_content(data, tmp_path, monkeypatch):
    splits = open_splits(str(data))
    assert len({*run_directory.identify(splits, True), *run_directory.identify(splits, False)}) == 4
    monkeypatch.setattr(Files, "__getitem__", lambda *_: pytest.fail("a file was read"))
    assert not begin(tmp_path / "run", data, verify_content=False)


def test_changed_base_weights_are_named(data, tmp_path):
    begin(tmp_path / "run", data)
    others = tiny.random_variables()
    others["params"]["head"]["bias"] = others["params"]["head"]["bias"] + 1
    with pytest.raises(RequestError, match=r"the base weights, some\.net, have changed: restore"):
        begin(tmp_path / "run", data, others)


def test_a_run_of_an_earlier_version_resumes_with_the_same_images(data, tmp_path):
    """Such a run has no fingerprint, no file sizes and a relative path."""
    run = tmp_path / "run"
    begin(run, data)
    config = json.loads((run / "config.json").read_text())
    del config["fingerprint"]
    (run / "config.json").write_text(json.dumps({**config, "data": "data"}))
    rows = list(csv.DictReader((run / "split.csv").read_text().splitlines()))
    lines = [f"{row['part']},data/{row['name']},{row['class']}" for row in rows]
    (run / "split.csv").write_text("\n".join(["part,name,class", *lines, ""]))
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert begin(run, data)
    assert before == {path: path.read_bytes() for path in run.iterdir()}
    add(data)
    with pytest.raises(RequestError, match=re.escape("changed: 1 added (train/a/another.png): re")):
        begin(run, data)


def test_a_run_that_was_stopped_before_it_wrote_its_split_resumes(data, tmp_path):
    begin(tmp_path / "run", data)
    before = (tmp_path / "run" / "split.csv").read_bytes()
    (tmp_path / "run" / "split.csv").unlink()
    assert begin(tmp_path / "run", data)
    assert (tmp_path / "run" / "split.csv").read_bytes() == before


@pytest.mark.parametrize("name", ["config.json", "split.csv"])
@pytest.mark.parametrize("damage", ["cut", "a line less", "garbled", "empty"])
def test_a_damaged_file_of_a_run_is_named_and_not_changed(data, tmp_path, name, damage):
    path = tmp_path / "run" / name
    begin(path.parent, data)
    content = path.read_bytes()
    cut = content.rstrip(b"\n").rindex(b"\n") + 1
    path.write_bytes(
        {
            "cut": content[: cut + 3],
            "a line less": content[:cut],
            "garbled": content[:40] + b"\xff\x00" + content[42:],
            "empty": b"",
        }[damage]
    )
    before = path.read_bytes()
    if name == "config.json" and damage == "cut":
        path.write_bytes(before := content[: len(content) // 2])
    for read in (
        lambda: begin(path.parent, data),
        lambda: run_directory.open_validation(path.parent),
    ):
        with pytest.raises(RequestError, match=rf"^{path} is damaged \(.*\): restore it") as error:
            read()
        assert "\n" not in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("data", 5), ("weights", None), ("val_fraction", "x")),
        *(("fingerprint", 5), ("fingerprint", {}), ("fingerprint", {"images": []})),
    ],
)
def test_an_invalid_value_counts_as_damage(data, tmp_path, name, value):
    path = tmp_path / "run" / "config.json"
    begin(path.parent, data)
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(RequestError, match=rf"^{path} is damaged \(its \S+\): restore it"):
        run_directory.open_validation(path.parent)


def test_a_folder_is_locked_against_other_processes(data, tmp_path):
    splits = open_splits(str(data))
    with run_directory.occupied(tmp_path / "run", splits):
        with (
            pytest.raises(RequestError, match=r"another process trains in .*run: wait for it"),
            run_directory.occupied(tmp_path / "run", splits),
        ):
            pytest.fail("two at once")
        with run_directory.occupied(tmp_path / "other", splits):
            pass
    with run_directory.occupied(tmp_path / "run", splits):  # free again, and nothing was removed
        assert [path.name for path in (tmp_path / "run").iterdir()] == [MARKER]


def test_runs_started_in_the_same_second_get_different_folders(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_directory.time, "strftime", lambda _: "20261122-060000")
    splits = open_splits(str(data))
    folders = [str(run_directory.new_workdir(splits)) for _ in range(3)]
    assert folders == [f"runs/20261122-060000{end}" for end in ("", "-2", "-3")]
    assert Path("runs", MARKER).exists()


def test_a_folder_that_holds_the_images_is_refused_as_run_directory(data, tmp_path):
    """It would be marked as results, and not be read as data again."""
    splits = open_splits(str(data))
    for folder in (data, data / "train" / "a", tmp_path):
        with pytest.raises(RequestError, match=r"holds images, .*png: choose another --workdir"):
            run_directory.mark(folder, splits)
    assert not list(tmp_path.rglob(MARKER))
    run_directory.mark(data / "runs", splits)


def test_a_folder_whose_files_a_run_would_overwrite_is_refused(data, tmp_path):
    readme = tmp_path / "project" / "README.md"
    readme.parent.mkdir()
    readme.write_text("notes")
    with (
        pytest.raises(RequestError, match=r"is not a run of tljax, .* overwrite its README.md"),
        run_directory.occupied(readme.parent, open_splits(str(data))),
    ):
        pass
    assert [path.name for path in readme.parent.iterdir()] == ["README.md"]
    assert readme.read_text() == "notes"


def test_lines_of_steps_precede_their_epoch_and_are_written_once(tmp_path):
    """Even if a process was killed after its last checkpoint, in the middle of a line."""
    file = MetricsFile(tmp_path)
    file.on_epoch([{"epoch": 0}])
    for step in (2, 4):
        file.on_step(step, {"loss": step / 2})
    file.on_epoch([{"epoch": 0}, {"epoch": 1}])
    for step in (6, 8):
        file.on_step(step, {"loss": np.inf})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    entries = [json.loads(line) for line in whole.splitlines()]
    names = [entry.get("step", f"epoch {entry.get('epoch')}") for entry in entries]
    assert names == ["epoch 0", 2, 4, "epoch 1", 6, 8]
    path.write_text(whole + '{"step": 10, "lo')
    file = MetricsFile(tmp_path)  # the checkpoint is of step 3
    for step in (4, 6, 8):
        if step == 6:
            file.on_epoch([{"epoch": 0}, {"epoch": 1}])
        file.on_step(step, {"loss": step / 2 if step < 5 else np.inf})
    assert path.read_text() == whole
