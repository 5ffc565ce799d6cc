"""Checkpoints in gs://, against an emulator that Orbax reaches by TensorStore and gcsfs."""

from contextlib import suppress

import jax
import numpy as np
import pytest
from fake_bucket import needs_gcsfs, serve_bucket
from test_checkpoint import SHARDED, run_together

from tljax.runtime.errors import RequestError
from tljax.runtime.files import open_path
from tljax.train.checkpoint import Checkpoints

pytestmark = [
    pytest.mark.slow,
    needs_gcsfs,
    # Orbax leaves futures of the read that failed behind a closed event loop.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
FOLDER = "run/checkpoints/"


@pytest.fixture(name="storage")
def _storage():
    with serve_bucket() as storage:
        yield storage


def opened(identity="mine"):
    return Checkpoints(open_path("gs://bucket/run/checkpoints"), identity)


def state(number):
    return {"x": np.random.default_rng(number).random((64, 9)), "count": np.int32(number)}


def save(*numbers):
    checkpoints = opened()
    for number in numbers:
        checkpoints.save(number, {"epoch": number}, state(number))
    checkpoints.close()


def restored():
    found = opened().restore()
    number = found.position["epoch"]
    filled = found.fill(jax.tree.map(np.zeros_like, state(0)))
    jax.tree.map(np.testing.assert_array_equal, filled, state(number))
    return number


def folders(storage):
    return sorted({name.partition("/")[0] for name in storage.names(FOLDER)})


def test_the_last_checkpoint_in_a_bucket_is_restored_and_two_are_kept(storage):
    assert opened().restore() is None
    save(1, 2, 3)
    assert folders(storage) == ["2", "3"]
    assert restored() == 3
    with pytest.raises(RequestError, match=r"^gs://bucket/run/checkpoints belongs to a run with"):
        opened("yours").restore()


def test_an_unfinished_checkpoint_in_a_bucket_is_removed(storage):
    save(1, 2)
    for name in storage.names(f"{FOLDER}2/"):
        if name != "commit_success.txt":
            storage.objects[f"{FOLDER}3/{name}"] = storage.objects[f"{FOLDER}2/{name}"]
    assert folders(storage) == ["1", "2", "3"]
    assert restored() == 2
    assert folders(storage) == ["1", "2"]


def test_a_damaged_checkpoint_in_a_bucket_is_marked_and_skipped(storage):
    save(1, 2)
    good, rng, damaged = dict(storage.objects), np.random.default_rng(0), 0
    names = storage.names(f"{FOLDER}2/")
    names.remove("commit_success.txt")  # without it, the checkpoint is unfinished
    for name in names:
        full = f"{FOLDER}2/{name}"
        content = good[full].content
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1
        for wrong in (None, content[: len(content) // 2], bytes(flipped)):
            storage.objects = dict(good)
            if wrong is None:
                del storage.objects[full]
            else:
                storage.objects[full] = good[full]._replace(content=wrong)
            marked = restored() == 1
            assert marked == (f"{FOLDER}2.damaged" in storage.objects)
            damaged += marked
    assert damaged > 10


def test_a_checkpoint_that_a_bucket_does_not_hand_out_is_not_called_damaged(storage):
    save(1, 2)
    for part in ("tljax.0.json", "/d/", "manifest.ocdbt"):
        storage.refuses = lambda method, name, part=part: part in name and "/2/" in name
        with pytest.raises(RequestError, match=r"^gs://[^\n]*2 cannot be read[^\n]*: try again$"):
            opened().restore()
    storage.refuses = lambda *_: False
    assert restored() == 2


def test_wherever_writing_to_a_bucket_stops_an_intact_checkpoint_is_restored(storage):
    save(1, 2)
    good, first = dict(storage.objects), len(storage.requests)
    save(3)
    count = sum(method != "GET" for method, _ in storage.requests[first:])
    outcomes = []
    for allowed in range(count):
        storage.objects, rest = dict(good), iter(range(allowed))
        storage.refuses = lambda method, _, rest=rest: method != "GET" and next(rest, None) is None
        with suppress(RequestError):
            save(3)
        storage.refuses = lambda *_: False
        outcomes.append(restored())
    assert set(outcomes) == {2, 3}
    assert outcomes[0] == 2
    assert len(outcomes) > 8


def test_shards_of_two_processes_in_a_bucket_are_restored_by_one_and_by_two(storage):
    folder = "gs://bucket/run/checkpoints"
    assert run_together(SHARDED, folder, 2, 2) == [["1 2 64 64"]] * 2
    assert run_together(SHARDED, folder, 1) == [["2 1 256 64"]]
    assert run_together(SHARDED, folder, 2) == [["3 1 128 64"]] * 2
    assert folders(storage) == ["2", "3"]
    assert {"tljax.0.json", "tljax.1.json"} <= set(storage.names(f"{FOLDER}3/"))
