"""The cache of activations of frozen stages, on disk and in memory."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny as tiny_network
from engine import LOADING, config, source, splits

import tljax.features.extract as features_module
from tljax.features import store
from tljax.features.extract import compute_features, split_features
from tljax.runtime.errors import RequestError, WriteError
from tljax.train import inputs
from tljax.train.inputs import cache_bytes, cache_location, open_inputs

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path))
    return tmp_path / "features"


def retained(tiny, **options):
    return compute_features(
        *tiny, source(10, broken=(3,)), LOADING, stop="layer1", cache=True, **options
    )


def test_bfloat16_activations_are_read_as_written(tiny, folder):
    first = retained(tiny, dtype="bfloat16")
    again = retained(tiny, dtype="bfloat16")
    exact = retained(tiny)
    assert len(list(folder.iterdir())) == 2
    assert first.values.dtype == again.values.dtype == ml_dtypes.bfloat16
    assert isinstance(again.values, np.memmap)
    np.testing.assert_array_equal(first.values, again.values)
    np.testing.assert_array_equal(again.values, exact.values.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(again.indices, exact.indices)


def test_a_cache_larger_than_the_disk_is_refused_in_one_line(tiny, folder, monkeypatch):
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 * 16 * 16 * 8 * 4 - 1))
    with pytest.raises(RequestError, match=r"GiB and .* free: set TLJAX_CACHE to another disk$"):
        retained(tiny)
    assert not folder.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 * 16 * 16 * 8 * 4))
    retained(tiny)


def test_an_error_leaves_no_unfinished_file(tiny, folder, monkeypatch):
    compute = features_module.over_source

    def failing(*args):
        yield from list(compute(*args))[:2]
        raise RuntimeError("in the middle")

    monkeypatch.setattr(features_module, "over_source", failing)
    with pytest.raises(RuntimeError, match="in the middle"):
        retained(tiny)
    assert list(folder.iterdir()) == []


def full(*_args, **_how):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("where", "name"),
    [(Path, "touch"), (store, "array_bytes"), (Path, "write_text"), (os, "link")],
    ids=["the first file", "values", "about.json", "its name"],
)
def test_a_disk_that_becomes_full_is_reported_in_one_line(tiny, folder, monkeypatch, where, name):
    with monkeypatch.context() as patch:
        patch.setattr(where, name, full)
        with pytest.raises(
            WriteError, match=r"cannot be written .No space left.*: set TLJAX_CACHE"
        ):
            retained(tiny)
    assert list(folder.iterdir()) == []
    retained(tiny)


def test_an_interrupt_leaves_no_unfinished_file(tiny, folder, monkeypatch):
    def interrupted(*_args, **_how):
        raise KeyboardInterrupt

    for where, name in ((store, "array_bytes"), (Path, "write_text"), (os, "link")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                retained(tiny)
        assert list(folder.iterdir()) == []


def test_a_read_only_cache_is_read(tiny, folder, monkeypatch):
    first = retained(tiny)
    monkeypatch.setattr(os, "utime", full)
    for where, name in ((Path, "touch"), (Path, "mkdir")):
        monkeypatch.setattr(where, name, full)
    np.testing.assert_array_equal(retained(tiny).values, first.values)


def test_a_cache_folder_that_cannot_be_created_is_reported_in_one_line(tiny, monkeypatch):
    monkeypatch.setenv("TLJAX_CACHE", "/dev/null/cache")
    with pytest.raises(WriteError, match=r"cannot be written .Not a directory"):
        retained(tiny)


def test_features_are_computed_when_the_cache_cannot_be_written(folder, monkeypatch, capsys):
    """A probe takes the disk without a setting."""
    arguments = tiny_network.MODEL, tiny_network.random_variables(), splits(), LOADING
    expected = split_features(*arguments)
    capsys.readouterr()
    monkeypatch.setenv("TLJAX_CACHE", "/dev/null/cache")
    actual = split_features(*arguments)
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(one.values, other.values)
        np.testing.assert_array_equal(one.indices, other.indices)
    notes = [line for line in capsys.readouterr().err.splitlines() if "note: " in line]
    assert [line.partition(" are not cached")[0] for line in notes] == [
        "note: train features",
        "note: val features",
    ]


def open_cached(cache):
    fit_config = config(freeze_to="layer1", cache=cache)
    arguments = tiny_network.MODEL, tiny_network.random_variables(), splits(), fit_config
    return open_inputs(*arguments, LOADING, 0, "layer1")


def test_auto_chooses_memory_then_disk_then_none(folder, monkeypatch):
    fit_config = config(freeze_to="layer1")
    size = cache_bytes(tiny_network.MODEL, splits(), fit_config, "layer1")
    memory, disk = [0], [0]
    monkeypatch.setattr(inputs, "free_memory", lambda: memory[0])
    monkeypatch.setattr(store, "available_bytes", lambda: disk[0])

    def place(cache="auto"):
        return cache_location(tiny_network.MODEL, splits(), config(cache=cache), "layer1")

    for memory[0], disk[0], expected in (
        (2 * size, 0, "memory"),
        (2 * size - 1, size, "disk"),
        (2 * size - 1, size - 1, "none"),
    ):
        assert place() == expected
    assert [place(asked) for asked in ("memory", "disk", "none")] == ["memory", "disk", "none"]


def test_the_cache_is_limited_by_the_disk_and_the_setting(folder, monkeypatch):
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30))
    assert store.available_bytes() == 2**30
    monkeypatch.setenv("TLJAX_FEATURE_CACHE_GIB", "0.5")
    assert store.available_bytes() == 2**29
    monkeypatch.setenv("TLJAX_CACHE", str(folder / "not" / "there"))
    assert store.available_bytes() == 2**29


def test_a_cache_that_cannot_be_written_is_skipped_by_auto_and_refused_by_disk(monkeypatch, capsys):
    monkeypatch.setenv("TLJAX_CACHE", "/dev/null/cache")
    monkeypatch.setattr(inputs, "free_memory", lambda: 0)
    monkeypatch.setattr(store, "available_bytes", lambda: 2**30)
    assert open_cached("auto").start is None
    assert "note: nothing is cached: /dev/null/cache/" in capsys.readouterr().err
    with pytest.raises(RequestError, match=r"cannot be written .*, or --cache none$"):
        open_cached("disk")
