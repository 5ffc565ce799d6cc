# ruff: noqa: PLC0415 - `--help` answers before JAX is imported
"""What all scripts share: the common flags, one-line errors, and a last line for machines."""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import tyro

from tljax.config import Conditions, Dtype, Loading, Normalization, idle, settings
from tljax.errors import DivergenceError, RequestError, StoppedError, VerificationError
from tljax.files import to_json
from tljax.process import configure

if TYPE_CHECKING:
    from tljax.pretrained import Pretrained


@dataclass(frozen=True, kw_only=True)
class Output:
    """How a script reports."""

    json: bool = False
    """Print one JSON object on the last line of stdout."""
    debug: bool = False
    """Show the traceback of an error."""

    conditions: ClassVar[Conditions] = ()
    """When flags count; one that was given and does not is refused."""

    def completed(self) -> Self:
        """Fills in what the flags refer to."""
        return self


@dataclass(frozen=True, kw_only=True)
class Network(Output):
    """Which network, and its images."""

    weights: str = "efficientnet_lite0.in1k"
    """Pretrained weights: a catalog name, hub id, file, saved folder or run directory."""
    model: str | None = None
    """The architecture that the weights must be; found out if not given."""
    normalization: Normalization | None = None
    """What a bare file of weights expects, which says nothing of it, by keras.applications' names;
    by default what is usual for its architecture and format."""
    image_size: int | None = None
    """Side of the square the network sees, in pixels; by default what the weights expect."""
    precision: Dtype | None = None
    """What activations are computed in; parameters, statistics and logits stay in float32. By
    default what the weights were saved with."""
    seed: int = 0
    """Of everything random."""

    def load(self, weights: str | Path | None = None) -> "Pretrained":
        """The network, by default that of ``--weights``, for images of the size asked for."""
        from tljax.pretrained import load_pretrained

        found = load_pretrained(
            weights or self.weights, model=self.model, normalization=self.normalization
        )
        say_notes(found)
        model = replace(found.model, dtype=self.precision or found.model.dtype)
        return found._replace(model=model).with_size(self.image_size)


@dataclass(frozen=True, kw_only=True)
class Common(Network):
    """Flags with the same name and meaning in every script that runs over data."""

    batch_size: int = 32
    """Images a step."""
    workers: int = 0
    """Processes that decode images; 0 decodes in threads."""
    devices: int | None = None
    """Number of devices; by default all."""

    @property
    def loading(self) -> Loading:
        """How images are read and spread over devices."""
        return Loading(self.batch_size, self.workers, self.devices)


def say_notes(found: "Pretrained") -> None:
    """Prints on stderr what was assumed of weights that do not say it."""
    for note in found.card.notes:
        print(f"note: {note}", file=sys.stderr)


def main(config_type: Any, run: Callable[[Any], dict[str, Any]]) -> None:
    """Parses the flags, runs, and exits.

    The exit code is 0; 2 for a bad request; 1 for a failure; 130 for Ctrl-C; and 75, which
    schedulers take for "run it again", where SIGTERM stopped training.

    Args:
        config_type: a frozen dataclass of flags, after `Common`, or a union of them, which are
            then subcommands; the docstring is the help text.
        run: does the work and returns what ``--json`` prints.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        _main(config_type, run)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", 130))
    except BrokenPipeError:  # `| head` has seen enough; Python would complain again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main(config_type: Any, run: Callable[[Any], dict[str, Any]]) -> None:
    config = tyro.cli(config_type)
    try:
        config = config.completed()
        configure(getattr(config, "precision", None) or "float32")
        _refuse_idle(config)
        result = run(config)
    except BrokenPipeError:
        raise
    except Exception as error:
        if config.debug:
            raise
        message, code = _explained(error, config)
        _say(message, code)
        if getattr(config, "distributed", False) and code != _STOPPED:
            from tljax.parallel import leave

            leave(message, code)
        sys.exit(code)
    if config.json:
        print(to_json(result))


_STOPPED = 75
_CODES = {RequestError: 2, StoppedError: _STOPPED, VerificationError: 1, DivergenceError: 1}


def _explained(error: Exception, config: Output) -> tuple[str, int]:
    """One line about an error, and the exit code."""
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return str(error), code
    text = " ".join(str(error).split()) or "no message"
    if "RESOURCE_EXHAUSTED" in text:
        advice = [words for name, words in _LESS_MEMORY.items() if name in settings(config)]
        return f"out of device memory{': ' if advice else ''}{', or '.join(advice)}", 1
    return f"{type(error).__name__}: {text} (--debug shows where)", 1


def _interrupt(*_: object) -> None:
    """The first Ctrl-C lets what is being written come to its end; a second one does not."""
    signal.signal(signal.SIGINT, _interrupt_again)
    raise KeyboardInterrupt


def _interrupt_again(*_: object) -> None:
    os.write(2, b"error: interrupted again\n")
    os._exit(130)


def given() -> set[str]:
    """Names the flags that are on the command line; tyro does not tell them from defaults."""
    flags = (word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--"))
    return {flag[2:].replace("-", "_").removeprefix("no_") for flag in flags}


def _refuse_idle(config: Output) -> None:
    if lines := idle(config, config.conditions, given()):
        raise RequestError("; ".join(lines.values()))


def _splits_by_content(config: Any) -> bool:
    from tljax.data.sources import has_validation

    return not has_validation(config.data)


OF_SPLIT: Conditions = (
    ("val_fraction", _splits_by_content, "as the data has a validation part of its own"),
)
"""Of commands that split data."""

NOT_RANDOM: Conditions = (("seed", lambda _: False, "as nothing is random here"),)
"""Of commands without a random number."""

WEIGHTS_OF_RUN: Conditions = (
    ("weights", lambda s: s.workdir is None, "with --workdir, whose network is taken"),
)
"""Of commands that take a run directory instead."""


_LESS_MEMORY = {
    "batch_size": "halve --batch-size",
    "accumulate": "take it in parts with --accumulate 2",
    "precision": "take --precision bfloat16",
    "freeze_to": "freeze more with --freeze-to",
}


def from_json(config_type: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass of flags from what `dataclasses.asdict` and JSON made of it.

    Raises:
        RequestError: a value is missing or nobody knows it.
    """
    known = {field.name: getattr(config_type(), field.name) for field in fields(config_type)}
    if known.keys() != values.keys():
        odd = sorted(known.keys() ^ values.keys())
        raise RequestError(f"it is of another version of tljax: '{odd[0]}'")

    def value(default: Any, found: Any, name: str) -> Any:
        if is_dataclass(default):
            return from_json(type(default), found)
        if isinstance(found, list):
            return tuple(found)
        return Path(found) if name in _PATHS and found is not None else found

    return config_type(**{name: value(known[name], values[name], name) for name in known})


_PATHS = ("workdir", "resume")


def _say(message: str, code: int) -> int:
    # Names of files need not be UTF-8.
    printable = message.encode("utf-8", "backslashreplace").decode()
    print(f"error: {printable}", file=sys.stderr)
    return code
