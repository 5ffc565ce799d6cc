"""What bounds training is the slowest of what was measured."""

from collections.abc import Iterator

import numpy as np
import pytest

from tljax.runtime.parallel import data_mesh
from tljax.runtime.types import Batch
from tljax.train import throughput
from tljax.train.throughput import describe_rates, loading_rate, matmul_rate, transfer_rate


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def batch_of(valid: int) -> Batch:
    indices = np.where(np.arange(8) < valid, np.arange(8), -1).astype(np.int32)
    return Batch(np.zeros((8, 2, 2, 3), np.uint8), indices, indices >= 0, indices)


def loaded(clock: Clock, seconds: list[float], valid: int = 8) -> Iterator[Batch]:
    for duration in seconds:
        clock.now += duration
        yield batch_of(valid)


@pytest.fixture(name="clock")
def _clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def test_the_start_of_the_workers_is_not_counted(clock):
    assert loading_rate(loaded(clock, [7.0, 0.1, 0.1])) == pytest.approx(8 / 0.1)


def test_loading_is_measured_for_a_second(clock):
    batches = loaded(clock, [1.0] + 100 * [0.25])
    assert loading_rate(batches) == pytest.approx(8 / 0.25)
    assert clock.now == 2.25


def test_a_single_batch_is_measured_with_the_start_and_without_its_padding(clock):
    assert loading_rate(loaded(clock, [0.5], valid=3)) == pytest.approx(3 / 0.5)


@pytest.mark.parametrize(
    ("rates", "slowest"),
    [((1, 20, 300), "loading"), ((20, 1, 300), "transfer"), ((20, 300, 1), "the step")],
)
def test_the_slowest_is_named(rates, slowest):
    assert describe_rates(*rates).endswith(f": {slowest} bounds")


def test_rates_of_the_device_are_positive():
    assert transfer_rate(batch_of(8), data_mesh(1)) > 0
    assert matmul_rate("float32", 1) > 0
