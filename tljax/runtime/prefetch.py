"""Compute the items of an iterator before they are asked for."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")

_END: Any = object()


def prefetch(items: Iterator[Item], size: int = 2) -> Iterator[Item]:
    """Yield the items of an iterator, which a thread computes ``size`` of them ahead.

    An error is raised where its item would be yielded. Closing the generator closes the iterator.
    """
    with ThreadPoolExecutor(1, "prefetch") as thread:
        pending = deque(thread.submit(next, items, _END) for _ in range(size))
        try:
            while (item := pending.popleft().result()) is not _END:
                pending.append(thread.submit(next, items, _END))
                yield item
        finally:
            thread.shutdown(cancel_futures=True)
            if close := getattr(items, "close", None):
                close()


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
