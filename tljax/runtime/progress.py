# ruff: noqa: PLC0415 - rich is imported only where a terminal is there to draw on
"""One progress bar for every loop over batches."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")


def track(
    batches: Iterable[Item],
    *,
    description: str,
    total: int | None,
    unit: str = "images",
    size: Callable[[Item], int] = lambda _: 1,
    quiet: bool = False,
) -> Iterator[Item]:
    """Yields the batches and shows on stderr how far the loop over them has come.

    A terminal gets a bar with the count, the recent speed, the time spent and the time left. The
    bar disappears when the loop ends, fails or is left early. A loop that ran to its end leaves one
    line, and that line is all that a file or a pipe gets::

        features  1797 images  12.3 s  146 images/s

    An item counts once the caller has come back for the next one. Bars may nest.

    Args:
        batches: what to iterate over.
        description: the name of the loop, such as ``"features"``.
        total: the number of units in all items together; None where nobody knows.
        unit: what is counted, in the plural.
        size: the number of units in one item.
        quiet: show nothing at all.
    """
    if quiet:
        yield from batches
        return
    done = 0
    start = time.perf_counter()
    display = _bar(description, total, unit) if sys.stderr.isatty() else nullcontext(lambda _: None)
    with display as advance:
        for item in batches:
            units = size(item)
            yield item
            done += units
            advance(units)
    seconds = time.perf_counter() - start
    speed = _speed(done / max(seconds, 1e-9), unit)
    print(f"{description}  {done} {unit}  {seconds:.1f} s  {speed}", file=sys.stderr)


@contextmanager
def _bar(description: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.fields[of]}", markup=False),
        TextColumn("{task.fields[speed]}", markup=False),
        TimeElapsedColumn(),
        *(() if total is None else (TextColumn("left"), TimeRemainingColumn())),
        console=_stderr(),
        transient=True,
        # What a command prints for machines must not end up on stderr.
        redirect_stdout=sys.stdout.isatty(),
    )
    of = f"{'?' if total is None else total} {unit}"
    task_id = progress.add_task(description, total=total, of=of, speed="")

    def advance(units: int) -> None:
        progress.advance(task_id, units)
        recent = progress.tasks[task_id].speed
        if recent is not None:
            progress.update(task_id, speed=_speed(recent, unit))

    with progress:
        yield advance


@cache
def _stderr() -> "Console":
    """The one console of all bars: only bars of the same console can nest."""
    from rich.console import Console

    return Console(stderr=True)


def _speed(units_per_second: float, unit: str) -> str:
    return f"{units_per_second:.{0 if units_per_second >= 10 else 1}f} {unit}/s"
