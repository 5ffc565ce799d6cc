"""The training loop gives the devices work before they have finished what they have."""

import threading
import time

import jax
import pytest
from engine import config, splits, train

import tljax.train.fit as fit_module
from tljax.runtime.prefetch import in_flight, prefetch
from tljax.train.feed import Feed
from tljax.train.step_log import StepLog

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_the_loop_waits_for_the_step_before_the_last_only(cache, monkeypatch):
    """No copy is implicit, either: a thread transfers batches while the devices compute."""
    taken, waits, threads = [], [], set()
    train_epoch, append, wait = fit_module.train_epoch, StepLog.append, jax.block_until_ready
    batches = Feed.batches

    def waiting(packed):
        waits.append(len(taken) - [id(x) for x in taken].index(id(packed)))
        return wait(packed)

    def guarded(*arguments):
        with monkeypatch.context() as patch, jax.transfer_guard("disallow"):
            patch.setattr(jax, "block_until_ready", waiting)
            return train_epoch(*arguments)

    def appended(self, metrics, steps):
        append(self, metrics, steps)
        taken.append(self._pending[-1][-1])

    def fed(self, epoch, first):
        for batch in batches(self, epoch, first):
            time.sleep(2e-3)  # of loading
            threads.add(threading.current_thread())
            yield batch

    monkeypatch.setattr(fit_module, "train_epoch", guarded)
    monkeypatch.setattr(StepLog, "append", appended)
    monkeypatch.setattr(Feed, "batches", fed)
    train(config(freeze_to="stem", cache=cache), splits(30))
    assert len(taken) == 2 * 8
    assert waits == [2] * (2 * 6)  # steps that had been dispatched since
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("seconds", [0, 2e-3])
def test_items_are_computed_ahead_and_errors_come_in_their_place(seconds: float):
    computed = []

    def items():
        for i in range(5):
            time.sleep(seconds)
            computed.append(i)
            yield i
        raise ValueError("the sixth")

    ahead = prefetch(items(), 2)
    assert next(ahead) == 0
    assert next(ahead) == 1
    deadline = time.monotonic() + 10
    while len(computed) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert computed == [0, 1, 2, 3]
    assert [next(ahead) for _ in range(3)] == [2, 3, 4]
    with pytest.raises(ValueError, match="the sixth"):
        next(ahead)


@pytest.mark.parametrize(("seconds", "alone"), [(0, False), (2e-3, True)])
def test_a_thread_computes_the_items_that_take_long(seconds: float, alone: bool):
    threads = []

    def items():
        for i in range(200):
            time.sleep(seconds)
            threads.append(threading.current_thread())
            yield i

    assert list(prefetch(items())) == list(range(200))
    assert (threading.main_thread() not in threads) == alone


def test_closing_the_iterator_closes_the_one_that_a_thread_reads():
    closed = []

    def items():
        try:
            yield from range(100)
        finally:
            closed.append(True)

    ahead = prefetch(items())
    next(ahead)
    ahead.close()
    assert closed == [True]


def test_two_further_items_are_computed_before_one_is_read():
    computed = []
    read = in_flight(computed.append(i) or i for i in range(4))
    assert next(read) == 0
    assert computed == [0, 1, 2]
    assert [*read] == [1, 2, 3]
