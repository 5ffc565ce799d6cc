"""Many byte strings as two arrays: a million paths or labels without a million objects."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from jaxtyping import Int, UInt8


@dataclass(frozen=True, eq=False)
class ByteStrings(Sequence[bytes]):
    """A sequence of byte strings.

    Attributes:
        data: ``[bytes]`` uint8, all strings one after the other.
        ends: ``[n]`` int64, where each string ends in ``data``.
    """

    data: UInt8[np.ndarray, " bytes"]
    ends: Int[np.ndarray, " n"]

    @classmethod
    def of(cls, strings: Iterable[bytes]) -> "ByteStrings":
        """Copy byte strings into arrays."""
        strings = list(strings)
        lengths = np.fromiter(map(len, strings), np.int64, len(strings))
        return cls(np.frombuffer(b"".join(strings), np.uint8), np.cumsum(lengths))

    @classmethod
    def concatenate(cls, parts: Sequence["ByteStrings"]) -> "ByteStrings":
        """Join sequences."""
        starts = np.cumsum([0, *(len(part.data) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, starts[:-1], strict=True)]
        return cls(
            np.concatenate([np.empty(0, np.uint8), *(part.data for part in parts)]),
            np.concatenate([np.empty(0, np.int64), *ends]),
        )

    def take(self, rows: np.ndarray) -> list[bytes]:
        """Return the strings at indices, 0 or more, as objects; faster than one by one."""
        data, ends = self.data.data, self.ends
        starts = np.where(rows > 0, ends[rows - 1], 0)
        pairs = zip(starts.tolist(), ends[rows].tolist(), strict=True)
        return [data[start:end].tobytes() for start, end in pairs]

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> "ByteStrings": ...
    def __getitem__(self, index: int | slice) -> "bytes | ByteStrings":
        if isinstance(index, slice):
            rows = range(len(self))[index]
            if rows.step != 1 or not rows:
                return ByteStrings.of(self.take(np.array(rows, np.int64)))
            start = int(self.ends[rows.start - 1]) if rows.start else 0
            ends = self.ends[rows.start : rows.stop]
            return ByteStrings(self.data[start : int(ends[-1])], ends - start)
        index = range(len(self))[index]  # also checks it
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start : int(self.ends[index])].tobytes()

    def tolist(self) -> list[bytes]:
        """Return all strings as objects; much faster than one by one."""
        data, ends = self.data.tobytes(), self.ends.tolist()
        return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
