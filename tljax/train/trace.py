"""What the devices did in a few training steps, for a person to look at."""

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import jax

from tljax.runtime.errors import RequestError

Item = TypeVar("Item")

FIRST, LAST = 3, 12
"""The steps that are traced; the first one compiles."""


def check_traceable(steps: int) -> None:
    """Raises before a run that would leave no trace.

    Args:
        steps: of an epoch.

    Raises:
        RequestError: there are too few.
    """
    if not steps:
        raise RequestError("--profile traces training steps, and --recipe probe takes none")
    if steps < FIRST:
        raise RequestError(
            f"--profile begins at step {FIRST}, and an epoch has {steps}: a smaller --batch-size "
            "makes more of them"
        )


def traced(batches: Iterator[Item], folder: Path) -> Iterator[Item]:
    """Hands on batches, and traces what is done with those from `FIRST` to `LAST`.

    Args:
        batches: one for each step.
        folder: where the trace goes, under ``plugins/profile`` and the time: ``*.xplane.pb`` for
            TensorBoard and ``perfetto_trace.json.gz`` for ui.perfetto.dev.
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
