"""The loader yields the same batches for any number of workers and processes, with every image."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tljax.data.boxes import Crops
from tljax.data.decode import decode
from tljax.data.examples import Source
from tljax.data.folders import open_folder
from tljax.data.loader import load_batches, num_batches
from tljax.data.options import AugmentConfig
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.types import Batch

TINY = Preprocess(size=2, resize=2)


def in_memory(n: int) -> Source:
    """Create ``n`` images whose pixels are their index; the label is the index modulo 3."""
    images = (
        np.arange(n, dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2).repeat(3, 3)
    )
    labels = np.arange(n, dtype=np.int32) % 3
    return Source(images, labels, ("a", "b", "c"), [f"example {i}" for i in range(n)])


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Source:
    """Create eleven images of two classes; the file at index 5 is a web page."""
    rng = np.random.default_rng(0)
    for i in range(11):
        path = tmp_path / "ab"[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 14, 3), np.uint8)).save(path)
    source = open_folder(tmp_path)
    Path(source.names[5]).write_bytes(b"<html>")
    return source


def assert_same(batches: Iterator[Batch], expected: list[Batch]) -> None:
    for batch, reference in zip(batches, expected, strict=True):
        for field, value in zip(batch[:4], reference[:4], strict=True):
            np.testing.assert_array_equal(field, value)
            assert field.dtype == value.dtype


def joined(batches: list[Batch]) -> Batch:
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)


def test_random_crops_depend_on_the_epoch_and_the_example_only(folder):
    preprocess, crops = Preprocess(size=6, resize=7), Crops(0, 1, AugmentConfig())
    load = partial(load_batches, folder, preprocess, crops=crops)
    whole = joined(list(load(batch_size=11)))
    for index in (0, 4, 10):
        expected = decode(folder.read(index), preprocess, crop=crops.of(index, preprocess))
        np.testing.assert_array_equal(whole.inputs[index], expected)
    shuffled = joined(list(load(batch_size=4, seed=3)))
    rows = shuffled.indices >= 0
    np.testing.assert_array_equal(shuffled.inputs[rows], whole.inputs[shuffled.indices[rows]])
    other = joined(list(load(batch_size=11, crops=replace(crops, epoch=2))))
    assert (other.inputs != whole.inputs)[whole.mask].any((1, 2, 3)).all()


def test_without_a_seed_the_order_is_that_of_the_source(folder):
    source = folder
    everything = joined(list(load_batches(source, TINY, batch_size=3)))
    assert everything.indices.tolist() == [*range(11), -1]
    assert everything.targets.tolist() == [*source.labels, source.labels[0]]
    assert everything.mask.tolist() == [i not in (5, 11) for i in range(12)]
    assert [field.dtype for field in everything[:4]] == [np.uint8, np.int32, bool, np.int32]
    for i in set(range(11)) - {5}:
        np.testing.assert_array_equal(everything.inputs[i], decode(source.read(i), TINY))


def test_the_tail_is_padded_to_the_full_shape():
    *_, last = load_batches(in_memory(10), TINY, batch_size=4)
    assert last.inputs.shape == (4, 2, 2, 3)
    assert last.indices.tolist() == [8, 9, -1, -1]
    assert last.targets.tolist() == [2, 0, 0, 0]
    assert last.mask.tolist() == [True, True, False, False]
    assert last.inputs[:, 0, 0, 0].tolist() == [8, 9, 0, 0]


@pytest.mark.parametrize(("n", "expected"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_num_batches_is_the_number_of_batches_yielded(n, expected):
    assert num_batches(n, 4) == num_batches(in_memory(n), 4) == expected
    assert len(list(load_batches(in_memory(n), TINY, batch_size=4))) == expected


def order(seed: int | None, epoch: int = 0, n: int = 10) -> list[int]:
    batches = list(load_batches(in_memory(n), TINY, batch_size=n, seed=seed, epoch=epoch))
    return joined(batches).indices.tolist()


def test_shuffling_depends_on_seed_and_epoch_alone():
    assert order(None) == list(range(10))
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(sorted(o) == list(range(10)) for o in orders)
    assert len({tuple(o) for o in orders}) == 9
    assert order(1, 2) == order(1, 2)
    # A run resumed with another version of numpy must see the same order.
    assert order(1, 2) == [7, 1, 3, 0, 4, 8, 9, 2, 6, 5]


def test_shuffled_rows_stay_together():
    for batch in load_batches(in_memory(20), TINY, batch_size=8, seed=7):
        indices = batch.indices[batch.mask]
        assert (batch.inputs[batch.mask] == indices[:, None, None, None]).all()
        assert (batch.targets[batch.mask] == indices % 3).all()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 30),
    rows=st.integers(1, 5),
    processes=st.integers(1, 4),
    seed=st.none() | st.integers(0, 9),
    data=st.data(),
)
def test_the_batches_of_several_processes_make_up_those_of_one(n, rows, processes, seed, data):
    source, batch_size = in_memory(n), rows * processes
    expected = list(load_batches(source, TINY, batch_size=batch_size, seed=seed))
    start = data.draw(st.integers(0, len(expected)))
    shards = [
        load_batches(
            source, TINY, batch_size=batch_size, seed=seed, start=start, shard=(process, processes)
        )
        for process in range(processes)
    ]
    together = (joined(list(parts)) for parts in zip(*shards, strict=True))
    assert_same(together, expected[start:])


@dataclass(frozen=True)
class Recording:
    read: set[int]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> np.ndarray:
        self.read.add(int(index))
        return np.zeros((2, 2, 3), np.uint8)


def test_resuming_does_not_read_skipped_batches():
    read: set[int] = set()
    source = replace(in_memory(12), examples=Recording(read))
    assert len(list(load_batches(source, TINY, batch_size=4, start=2))) == 1
    assert read == {8, 9, 10, 11}
    assert list(load_batches(source, TINY, batch_size=4, start=3)) == []


def test_workers_do_not_change_the_batches(folder, capfd):
    expected_skipped: dict[int, str] = {}
    skipped: dict[int, str] = {}
    load = partial(load_batches, folder, TINY, batch_size=2, seed=3, start=1)
    expected = list(load(skipped=expected_skipped))
    assert len(expected) == 5
    batches = list(load(skipped=skipped, workers=2))
    assert_same(iter(batches), expected)
    assert skipped == expected_skipped == {5: "an HTML page, not an image"}
    # An array in shared memory keeps a file open.
    assert all(type(batch.inputs) is np.ndarray and batch.inputs.base is None for batch in batches)
    assert capfd.readouterr() == ("", "")


def test_a_bad_image_is_masked_and_recorded_with_its_batch(folder):
    skipped: dict[int, str] = {}
    batches = load_batches(folder, TINY, batch_size=4, skipped=skipped)
    next(batches)
    assert skipped == {}
    second = next(batches)
    assert skipped == {5: "an HTML page, not an image"}
    assert second.indices.tolist() == [4, 5, 6, 7]
    assert second.mask.tolist() == [True, False, True, True]
    assert second.targets.tolist() == folder.labels[4:8].tolist()
    assert not second.inputs[1].any()
    assert len(list(load_batches(folder, TINY, batch_size=4))) == 3  # skipped is optional


def test_a_bad_image_raises_if_requested(folder):
    batches = load_batches(folder, TINY, batch_size=4, on_bad_image="fail")
    assert next(batches).mask.all()
    with pytest.raises(RequestError) as error:
        next(batches)
    assert str(error.value) == (
        f"{folder.names[5]}: an HTML page, not an image; repair, remove or skip it"
    )


def test_a_deleted_file_is_a_bad_image(folder):
    Path(folder.names[0]).unlink()
    skipped: dict[int, str] = {}
    list(load_batches(folder, TINY, batch_size=4, skipped=skipped))
    assert skipped[0] == "cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "shard": (0, 4)}, "batch size 6: choose a positive multiple of 4"),
        ({"batch_size": 0}, "batch size 0: choose a positive multiple of 1"),
        ({"batch_size": 4, "start": -1}, "first batch -1: choose 0 or more"),
        ({"batch_size": 4, "seed": -1}, "seed -1: choose 0 or more"),
    ],
)
def test_wrong_arguments_are_refused_before_the_iteration(options, message):
    with pytest.raises(RequestError, match=message):
        load_batches(in_memory(9), TINY, **options)


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


def wait_for_no_threads() -> None:
    deadline = time.monotonic() + 10
    while decoding_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not decoding_threads()


def test_deleting_the_iterator_ends_its_threads(capfd):
    wait_for_no_threads()  # of the tests before
    batches = load_batches(in_memory(200), TINY, batch_size=4)
    next(batches)
    assert decoding_threads()
    del batches
    wait_for_no_threads()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_truncated_image_is_reported_once_for_all_epochs(folder, capfd, workers):
    path = Path(folder.names[2])
    path.write_bytes(path.read_bytes()[:-2])
    for epoch in range(2):
        list(load_batches(folder, TINY, batch_size=4, workers=workers, seed=0, epoch=epoch))
    expected = f"note: {path}: the end of the file is missing; the decoded part is used\n"
    assert capfd.readouterr() == ("", expected)


def test_real_photographs_are_all_loaded(shared_data):
    source = open_folder(shared_data / "hymenoptera" / "val")
    skipped: dict[int, str] = {}
    everything = joined(
        list(load_batches(source, Preprocess(), batch_size=32, seed=0, skipped=skipped))
    )
    assert everything.inputs.shape == (160, 224, 224, 3)
    assert sorted(everything.indices[everything.mask]) == list(range(153))
    assert skipped == {}
