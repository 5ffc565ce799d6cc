"""Settings by name, and which of them have no effect. Imports nothing heavy: --help reads this."""

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any, Literal

from tljax.runtime.ranges import spelled

Dtype = Literal["float32", "bfloat16"]

Platform = Literal["cpu", "gpu", "tpu"]

Normalization = Literal["torch", "tf", "caffe"]

Conditions = tuple[tuple[str, Callable[[Any], Any], str], ...]
"""(names of settings, whether they count given all settings, what follows "has no effect"). The
first that does not hold says why; a setting that stands in none always counts."""


def settings(config: Any) -> dict[str, Any]:
    """Lists every setting by its name, those of nested configurations too."""
    found: dict[str, Any] = {}
    for one in fields(config):
        value = getattr(config, one.name)
        found |= settings(value) if is_dataclass(value) else {one.name: value}
    return found


def idle(config: Any, conditions: Conditions, names: Iterable[str]) -> dict[str, str]:
    """Finds those of the settings called ``names`` that have no effect, with a line about each."""
    now = settings(config)
    space, why = SimpleNamespace(**now), dict[str, str]()
    for among, counts, words in conditions:
        for name in set(names).intersection(among.split()) - why.keys():
            if not counts(space):
                why[name] = f"{spelled(name, now[name])} has no effect {words}"
    return {name: why[name] for name in now if name in why}
