"""Profiler traces of training steps."""

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import jax

from tljax.runtime.errors import RequestError

Item = TypeVar("Item")

FIRST, LAST = 3, 12
"""First and last traced step of the run; earlier steps compile and warm up."""


def check_traceable(steps: int) -> None:
    """Refuse a run whose first epoch ends before the trace begins.

    Args:
        steps: number of steps per epoch; 0 for a recipe without training steps.

    Raises:
        RequestError: the epoch has fewer than `FIRST` steps.
    """
    if not steps:
        raise RequestError("--profile traces training steps, and --recipe probe takes none")
    if steps < FIRST:
        raise RequestError(
            f"--profile starts at step {FIRST}, but an epoch has {steps}: lower --batch-size"
        )


def traced(batches: Iterator[Item], folder: Path) -> Iterator[Item]:
    """Yield the batches, and trace the steps from `FIRST` to `LAST` that consume them.

    Args:
        batches: one batch per step.
        folder: where the trace is written, as ``plugins/profile/TIME/*.xplane.pb`` for TensorBoard
            and ``perfetto_trace.json.gz`` for ui.perfetto.dev.
    """
    running = False
    try:
        for number, batch in enumerate(batches, start=1):
            if number == FIRST:
                jax.profiler.start_trace(folder, create_perfetto_trace=True)
                running = True
            yield batch
            if running and number == LAST:
                jax.profiler.stop_trace()
                running = False
    finally:
        if running:
            jax.profiler.stop_trace()
