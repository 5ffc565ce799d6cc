# ruff: noqa: PLC0415 - rich is imported only if stderr is a terminal
"""Progress bars of loops over batches."""

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
    """Yield the batches and show the progress of the loop on stderr.

    A terminal shows a bar with the count, the current speed, the elapsed and the remaining time;
    the bar disappears at the end of the loop. A loop that was not interrupted prints one line at
    its end, which is all that a file or a pipe receives::

        features  1797 images  12.3 s  146 images/s

    An item is counted when the caller requests the next one. Bars may be nested.

    Args:
        batches: items to iterate over.
        description: name of the loop, such as ``"features"``.
        total: number of units in all items; None if unknown.
        unit: name of the counted unit, in the plural.
        size: function that returns the number of units in an item; by default 1.
        quiet: show nothing.
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
    import rich.progress as columns

    progress = columns.Progress(
        columns.TextColumn("{task.description}", markup=False),
        columns.BarColumn(bar_width=24),
        columns.TextColumn("{task.completed}/{task.fields[total_units]}", markup=False),
        columns.TextColumn("{task.fields[speed]}", markup=False),
        columns.TimeElapsedColumn(),
        *(() if total is None else (columns.TextColumn("left"), columns.TimeRemainingColumn())),
        console=_stderr(),
        transient=True,
        # Output that a command prints for other programs must stay on stdout.
        redirect_stdout=sys.stdout.isatty(),
    )
    total_units = f"{'?' if total is None else total} {unit}"
    task_id = progress.add_task(description, total=total, total_units=total_units, speed="")

    def advance(units: int) -> None:
        progress.advance(task_id, units)
        speed = progress.tasks[task_id].speed
        if speed is not None:
            progress.update(task_id, speed=_speed(speed, unit))

    with progress:
        yield advance


@cache
def _stderr() -> "Console":
    """Return the console of all bars; only bars of the same console can be nested."""
    from rich.console import Console

    return Console(stderr=True)


def _speed(units_per_second: float, unit: str) -> str:
    return f"{units_per_second:.{0 if units_per_second >= 10 else 1}f} {unit}/s"
