"""Settings of dataclasses by name, and which of them have no effect.

Imports nothing heavy, because ``--help`` imports it.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any, Literal

from tljax.runtime.ranges import format_flag

Dtype = Literal["float32", "bfloat16"]

Platform = Literal["cpu", "gpu", "tpu"]

Normalization = Literal["torch", "tf", "caffe", "clip"]

Kind = Literal["classification", "multilabel", "regression", "ordinal"]
"""Kinds of tasks; see `tljax.runtime.task.Task`."""

Conditions = tuple[tuple[str, Callable[[Any], Any], str], ...]
"""Conditions under which settings have an effect.

Each is (names of settings, predicate of a namespace of all settings, reason that follows "has no
effect" if the predicate is false). The first false predicate of a setting determines its message; a
setting that no condition names always has an effect.
"""


def settings(config: Any) -> dict[str, Any]:
    """Return the values of all settings by name, including those of nested dataclasses."""
    values: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        values |= settings(value) if is_dataclass(value) else {field.name: value}
    return values


def find_unused_settings(
    config: Any, conditions: Conditions, names: Iterable[str]
) -> dict[str, str]:
    """Find the settings among ``names`` that have no effect.

    Returns:
        A message per setting without effect, by its name.
    """
    values = settings(config)
    namespace, messages = SimpleNamespace(**values), dict[str, str]()
    for condition_names, has_effect, reason in conditions:
        for name in set(names).intersection(condition_names.split()) - messages.keys():
            if not has_effect(namespace):
                messages[name] = f"{format_flag(name, values[name])} has no effect {reason}"
    return {name: messages[name] for name in values if name in messages}
