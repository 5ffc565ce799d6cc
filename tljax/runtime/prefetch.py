"""Compute the items of an iterator before they are asked for."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")

_END: Any = object()
_SHORT = 1e-3  # seconds; two threads that take turns lose about a third of it at each item


def prefetch(items: Iterator[Item], size: int = 2) -> Iterator[Item]:
    """Yield the items of an iterator, which a thread computes ``size`` of them ahead.

    After an item that took less than a millisecond, the next one is computed without the thread, as
    long ahead. An error is raised where its item would be yielded. Closing the generator closes the
    iterator.
    """

    def compute() -> tuple[Item, float]:
        began = time.perf_counter()
        return next(items, _END), time.perf_counter() - began

    def fill(*, now: bool) -> None:
        # One iterator cannot be read by two threads at once.
        while len(pending) < size and not (now and any(not ahead.done() for ahead in pending)):
            pending.append(_compute_now(compute) if now else thread.submit(compute))

    pending = deque[Future[tuple[Item, float]]]()
    with ThreadPoolExecutor(1, "prefetch") as thread:
        try:
            fill(now=False)
            while (done := pending.popleft().result())[0] is not _END:
                item, seconds = done
                fill(now=seconds < _SHORT)
                yield item
        finally:
            thread.shutdown(cancel_futures=True)
            if close := getattr(items, "close", None):
                close()


def _compute_now(function: Callable[[], Any]) -> Future[Any]:
    """Call a function as an executor does, in this thread."""
    future: Future[Any] = Future()
    try:
        future.set_result(function())
    except Exception as error:  # noqa: BLE001 - raised by `Future.result`
        future.set_exception(error)
    return future


def in_flight(items: Iterable[Item], size: int = 2) -> Iterator[Item]:
    """Yield the items of an iterator, each after ``size`` further ones have been computed.

    Devices compute in the background: until an item is read, they have work.
    """
    pending = deque[Item]()
    for item in items:
        pending.append(item)
        if len(pending) > size:
            yield pending.popleft()
    yield from pending
