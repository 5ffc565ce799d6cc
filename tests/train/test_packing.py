"""Packing of a run's images: where they go, when it is done, and that it changes nothing."""

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from tljax.data.examples import Splits
from tljax.data.loader import load_batches
from tljax.data.sources import open_splits
from tljax.runtime.errors import RequestError
from tljax.runtime.files import MARKER, mark_output
from tljax.train.options import FitConfig
from tljax.train.packing import _place, epochs_on_images, pack_images
from tljax.train.recipes import Plan, make_plan


@pytest.fixture(name="splits")
def _splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Splits:
    """Return images of two classes, and set the cache folder."""
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + 2 * i, 31, 3), np.uint8)).save(path)
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path / "cache"))
    return open_splits(str(tmp_path / "images"), val_fraction=0.4)


def plan_of(tiny, **options) -> Plan:
    return make_plan(tiny[0], FitConfig("finetune", **options), 12, 4)


def test_packed_images_give_the_same_batches_and_are_found_again(tiny, splits, tmp_path, capsys):
    model = tiny[0]
    packed = pack_images("always", model, splits, plan_of(tiny), workers=0)
    for ours, theirs in zip(packed[:2], splits[:2], strict=True):
        assert ours.names == theirs.names
        batches = [
            load_batches(source, model.preprocess, batch_size=4, seed=1)
            for source in (ours, theirs)
        ]
        for one, other in zip(*batches, strict=True):
            np.testing.assert_array_equal(one.inputs, other.inputs)
            np.testing.assert_array_equal(one.targets, other.targets)
    [folder] = (tmp_path / "cache" / "packed").iterdir()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"note: images are packed at 16 pixels, about 0.0 GB in {folder}"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    pack_images("always", model, splits, plan_of(tiny), workers=0)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    larger = replace(model, preprocess=model.preprocess.with_size(24))
    pack_images("always", larger, splits, plan_of(tiny), workers=0)
    assert len([*folder.parent.iterdir()]) == 2


def test_images_to_train_and_to_validate_on_stay_the_same_source(tiny, splits):
    both = Splits(splits.train, splits.train)
    packed = pack_images("always", tiny[0], both, plan_of(tiny), workers=0)
    assert packed.val is packed.train


GIB = 2**30


@pytest.mark.parametrize(
    ("backend", "options", "free", "reason"),
    [
        ("cpu", {}, GIB, "a CPU takes longer to train on images than to decode them"),
        ("gpu", {"epochs": 1}, GIB, "fewer than two epochs decode them"),
        (
            "gpu",
            {"freeze_to": "layer1", "cache": "memory"},
            GIB,
            "fewer than two epochs decode them",
        ),
        ("gpu", {}, 1000, "GB free"),
        ("gpu", {}, GIB, None),
        ("tpu", {"epochs": 2, "augment": True}, GIB, None),
    ],
)
def test_auto_packs_where_decoding_takes_long(
    tiny, splits, monkeypatch, capsys, backend, options, free, reason
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    packed = pack_images("auto", tiny[0], splits, plan_of(tiny, **options), workers=0)
    note = capsys.readouterr().err.splitlines()[0]
    assert (packed is splits) == (reason is not None)
    assert ("images are not packed: " in note) == (reason is not None)
    assert note.endswith(reason or "")


def test_images_in_memory_are_packed_only_on_demand(tiny, monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    splits = open_splits("digits")
    assert pack_images("auto", tiny[0], splits, plan_of(tiny), workers=0) is splits
    assert capsys.readouterr().err == "note: images are not packed: they are in memory\n"


def test_other_images_than_rgb_of_8_bits_are_not_packed(tiny, splits, capsys):
    for preprocess in (
        tiny[0].preprocess.with_channels(5),
        replace(tiny[0].preprocess, dtype="float32"),
    ):
        model = replace(tiny[0], preprocess=preprocess)
        with pytest.raises(RequestError, match="--pack always: images with --channels are not"):
            pack_images("always", model, splits, plan_of(tiny), workers=0)
        assert pack_images("auto", model, splits, plan_of(tiny), workers=0) is splits


def test_epochs_that_start_from_cached_activations_decode_nothing(tiny, splits):
    def epochs(**options) -> int:
        return epochs_on_images(tiny[0], splits, plan_of(tiny, **options))

    assert epochs(epochs=7) == 7
    assert epochs(epochs=7, freeze_to="layer1", cache="memory") == 0
    assert epochs(epochs=7, freeze_to="layer1", cache="none") == 7
    assert epochs(epochs=7, freeze_to="layer1", augment=True) == 7


def test_another_process_that_packs_is_waited_for(tiny, splits, capsys):
    folder = _place(splits, tiny[0].preprocess)
    folder.mkdir(parents=True)
    mark_output(folder)
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX);"
        "print('locked', flush=True); time.sleep(0.5)"
    )
    command = [sys.executable, "-c", code, str(folder / MARKER)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        began = time.monotonic()
        pack_images("always", tiny[0], splits, plan_of(tiny), workers=0)
        assert time.monotonic() - began > 0.3
