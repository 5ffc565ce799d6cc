"""The ranges of numbers, declared in the types of settings. Imports nothing heavy."""

from dataclasses import fields
from itertools import cycle
from numbers import Integral, Real
from typing import Annotated, Any, Literal, NamedTuple, get_args

from tljax.runtime.errors import RequestError


class Range(NamedTuple):
    """The range of a setting, as in ``Annotated[int, Range(1, 9)]``.

    Attributes:
        low: the lowest value.
        high: the highest value.
        without: which of the two is out of range itself.
    """

    low: float
    high: float
    without: Literal["low", "high"] | None = None

    def holds(self, number: Any, kind: type = float) -> bool:
        """Check a number; nan is in no range."""
        return (
            isinstance(number, Integral if kind is int else Real)
            and self.low <= float(number) <= self.high
            and number != {"low": self.low, "high": self.high}.get(self.without or "")
        )

    def __str__(self) -> str:
        low, high = (f"{end:g}" if end > 2**32 else f"{end:,}" for end in self[:2])
        return {
            None: f"from {low} to {high}",
            "low": f"above {low}, up to {high}",
            "high": f"from {low} to below {high}",
        }[self.without]


Count = Annotated[int, Range(1, 10**9)]
Amount = Annotated[int, Range(0, 10**9)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Pixels = Annotated[int, Range(1, 10_000)]
Share = Annotated[float, Range(0, 1, without="high")]
Ratio = Annotated[float, Range(0, 1, without="low")]
NotNegative = Annotated[float, Range(0, 3e38)]
Positive = Annotated[float, Range(0, 3e38, without="low")]


def ranges(hint: Any) -> list[tuple[type, Range]]:
    """List the types of numbers within a type, and their ranges: one, or one for each of a pair."""
    if found := [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)]:
        return [(get_args(hint)[0], found[0])]
    return [found for part in get_args(hint) for found in ranges(part)]


class Checked:
    """A dataclass whose numbers are in their ranges, or it cannot be made.

    Raises:
        RequestError: one is not; the line names the setting, its value and the range.
    """

    def __post_init__(self) -> None:
        for one in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, one.name)
            values = value if isinstance(value, tuple | list) else (value,)
            for number, (kind, allowed) in zip(values, cycle(ranges(one.type)), strict=False):
                if number is not None and not allowed.holds(number, kind):
                    what = "a whole number" if kind is int else "a number"
                    raise RequestError(f"{spelled(one.name, value)}: choose {what} {allowed}")


def spelled(name: str, value: Any) -> str:
    """Writes a setting as a flag with its value."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
