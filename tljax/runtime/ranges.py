"""Ranges of numeric settings, declared in their types. Imports nothing heavy."""

from dataclasses import fields
from itertools import cycle
from numbers import Integral, Real
from typing import Annotated, Any, Literal, NamedTuple, get_args

from tljax.runtime.errors import RequestError


class Range(NamedTuple):
    """Range of a numeric setting, as in ``Annotated[int, Range(1, 9)]``.

    Attributes:
        low: lowest value.
        high: highest value.
        without: which of the two bounds is excluded; by default none.
    """

    low: float
    high: float
    without: Literal["low", "high"] | None = None

    def holds(self, number: Any, kind: type = float) -> bool:
        """Return True if a number is in the range and has the right kind; NaN is in no range."""
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
    """Return the numeric types in a type hint with their ranges, in order (two for a pair)."""
    for metadata in getattr(hint, "__metadata__", ()):
        if isinstance(metadata, Range):
            return [(get_args(hint)[0], metadata)]
    return [pair for part in get_args(hint) for pair in ranges(part)]


class Checked:
    """Base of dataclasses whose constructor checks that numbers are in their ranges.

    Raises:
        RequestError: a number is out of range; the message names the setting, its value and the
            range.
    """

    def __post_init__(self) -> None:
        for field in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            values = value if isinstance(value, tuple | list) else (value,)
            for number, (kind, allowed) in zip(values, cycle(ranges(field.type)), strict=False):
                if number is not None and not allowed.holds(number, kind):
                    noun = "a whole number" if kind is int else "a number"
                    raise RequestError(f"{format_flag(field.name, value)}: choose {noun} {allowed}")


def format_flag(name: str, value: Any) -> str:
    """Format a setting as a command-line flag with its value."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
