"""JSON objects in the configuration files of other projects, validated while they are read."""

import json
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tljax.runtime.errors import RequestError


@dataclass(frozen=True)
class Section:
    """A JSON object whose values are validated when they are read.

    Attributes:
        where: file, and key within the file, for error messages.
        values: the object; empty if it is absent.
    """

    where: str
    values: dict[str, Any]

    def get(
        self, key: str, is_valid: Callable[[Any], bool], expected: str, default: object = None
    ) -> Any:
        """Return a valid value, or the default for a missing value or null."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not is_valid(value):
            problem = "is missing" if value is None else f"is {reprlib.repr(value)}"
            raise self.error(f"{key} {problem} and should be {expected}; correct it")
        return value

    def section(self, key: str) -> "Section":
        """Return a nested object."""
        value = self.get(key, lambda value: isinstance(value, dict), "an object", {})
        return Section(f"{self.where}: {key}", value)

    def error(self, reason: str) -> RequestError:
        """Return an error that names the section and a workaround."""
        return RequestError(
            f"{self.where}: {reason}, or load the weight file alone, with the default "
            "preprocessing of its architecture"
        )


def read_section(path: Path) -> Section:
    """Return the object in a file; an empty one if there is no file.

    Raises:
        RequestError: the file is no JSON object.
    """
    section = Section(str(path), {})
    if not path.exists():
        return section
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise section.error(f"cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise section.error("is JSON, but not an object; fetch it again")
    return Section(str(path), values)
