"""Rows of examples that are divided over the processes, and the part of one process."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int, Shaped

from tljax.runtime.parallel import GATHER_BYTES, gather, gather_json, pad_rows, process_share
from tljax.runtime.types import Array


class Share(NamedTuple):
    """The rows of this process, of those of all processes; a single process has all.

    Attributes:
        values: ``[m, ...]`` the rows.
        rows: ``[m]`` which of all rows they are, ascending; no other process has them.
        total: number of rows of all processes, ``n``.
    """

    values: Shaped[np.ndarray, "m ..."]
    rows: Int[np.ndarray, " m"]
    total: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape ``[n, ...]`` of all rows together."""
        return self.total, *self.values.shape[1:]

    def select(self, used: Bool[np.ndarray, " n"]) -> "Share":
        """Leave out rows.

        Args:
            used: whether to keep each of all rows, known to all processes.
        """
        if used.all():
            return self
        here = used[self.rows]
        rows = (np.cumsum(used) - 1)[self.rows[here]]
        return Share(self.values[here], rows, int(np.count_nonzero(used)))

    def blocks(self) -> Iterator[tuple[Shaped[np.ndarray, "k ..."], Int[np.ndarray, " k"]]]:
        """Gather the rows of all processes, which call this together, block by block.

        A block takes at most `GATHER_BYTES` of a device, or one row of each process. A single
        process gets all rows at once.

        Yields:
            Values, and which rows they are: of several processes, not in order.
        """
        values, rows, _ = self
        if jax.process_count() == 1:
            yield values, rows
            return
        most = max(gather_json(len(rows)))
        row_bytes = math.prod(values.shape[1:]) * values.itemsize
        size = max(1, GATHER_BYTES // (jax.process_count() * row_bytes))
        for start in range(0, most, size):
            stop = min(start + size, most)
            present = gather(np.arange(start, stop) < len(rows))
            yield (
                gather(pad_rows(values[start:stop], stop - start))[present],
                gather(pad_rows(rows[start:stop], stop - start))[present],
            )

    def whole(self) -> Shaped[np.ndarray, "n ..."]:
        """Gather the rows of all processes in order, on the host of each of them."""
        if jax.process_count() == 1:
            return self.values
        whole = np.empty(self.shape, self.values.dtype)
        for values, rows in self.blocks():
            whole[rows] = values
        return whole


def share_of(values: Shaped[Array, "n ..."] | Share) -> Share:
    """Take the share of this process of an array that all have; return a `Share` unchanged."""
    if isinstance(values, Share):
        return values
    values = np.asarray(values)
    own = process_share(len(values))
    return Share(values[own], np.arange(len(values))[own], len(values))
