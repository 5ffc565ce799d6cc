"""What all scripts share: the common flags, one-line errors, and a last line for machines."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import tyro

from tljax.errors import RequestError


@dataclass(frozen=True)
class Common:
    """Flags with the same name and meaning in every script."""

    weights: str = "efficientnet_lite0.in1k"
    """Pretrained weights: a catalog name, hub id, file, saved folder or run directory."""
    model: str | None = None
    """The architecture that the weights must be; found out if not given."""
    image_size: int | None = None
    """Side of the square the network sees, in pixels; by default what the weights expect."""
    batch_size: int = 32
    """Images a step."""
    workers: int = 0
    """Processes that decode images; 0 decodes in threads."""
    devices: int | None = None
    """Number of devices; by default all."""
    seed: int = 0
    """Of everything random."""
    json: bool = False
    """Print one JSON object on the last line of stdout."""
    debug: bool = False
    """Show the traceback of an error."""


Config = TypeVar("Config", bound=Common)


def main(config_type: type[Config], run: Callable[[Config], dict[str, Any]]) -> None:
    """Parses the flags, runs, and exits: 0; 2 for a bad request; 1 for a failure; 130 for Ctrl-C.

    Args:
        config_type: a frozen dataclass of flags, after `Common`; its docstring is the help text.
        run: does the work and returns what ``--json`` prints.
    """
    config = tyro.cli(config_type)
    try:
        result = run(config)
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", 130))
    except Exception as error:
        if config.debug:
            raise
        if isinstance(error, RequestError):
            sys.exit(_say(str(error), 2))
        text = " ".join(str(error).split()) or "no message"
        sys.exit(_say(f"{type(error).__name__}: {text} (--debug shows where)", 1))
    if config.json:
        print(json.dumps(result))


def _say(message: str, code: int) -> int:
    # Names of files need not be UTF-8.
    printable = message.encode("utf-8", "backslashreplace").decode()
    print(f"error: {printable}", file=sys.stderr)
    return code
