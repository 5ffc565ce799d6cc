"""What all commands share: the common flags, one-line errors, and a last line for machines."""

import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import groupby
from pathlib import Path
from shutil import get_terminal_size
from threading import Timer, current_thread, main_thread
from traceback import walk_tb
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import tyro

from tljax.data.options import Loading
from tljax.runtime.errors import DivergenceError, RequestError, StoppedError, VerificationError
from tljax.runtime.files import to_json
from tljax.runtime.process import configure
from tljax.runtime.ranges import Amount, Checked, Count, Pixels, Seed
from tljax.runtime.settings import Conditions, Dtype, Normalization, idle, settings

if TYPE_CHECKING:
    from tljax.commands.extension import Extension
    from tljax.pretrained import Pretrained

RENAMED = {"--average": "--ema-decay"}


@dataclass(frozen=True, kw_only=True)
class Output(Checked):
    """How a command reports."""

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
class Extended(Output):
    """A Python file that comes with the network."""

    extension: str | None = None
    """FILE.py[:NAME], a Python file of yours with a dict called NAME, by default extension, of what
    fit takes (objective, materialize, transform, on_step, on_epoch, new_head) and of modules by
    name, which networks are made of. Runs its code."""

    def hooks(self) -> "Extension":
        """The extension; empty without one."""
        from tljax.commands.extension import load_extension

        return load_extension(self.extension)[0] if self.extension else {}

    def modules(self) -> dict[str, Any]:
        """Arguments of `load_pretrained` that the extension adds."""
        return {"modules": found} if (found := self.hooks().get("modules")) else {}


@dataclass(frozen=True, kw_only=True)
class Network(Extended):
    """Which network, and its images."""

    weights: str = "efficientnet_lite0.in1k"
    """Pretrained weights: a catalog name, hub id, file, saved folder or run directory."""
    model: str | None = None
    """The architecture that the weights must be; found out if not given."""
    normalization: Normalization | None = None
    """What a bare file of weights expects, which says nothing of it, by keras.applications' names;
    by default what is usual for its architecture and format."""
    image_size: Pixels | None = None
    """Side of the square the network sees, in pixels; by default what the weights expect."""
    precision: Dtype | None = None
    """What activations are computed in; parameters, statistics and logits stay in float32. By
    default what the weights were saved with."""
    seed: Seed = 0
    """Of everything random; where nothing is, it changes nothing."""

    def load(self, weights: str | Path | None = None) -> "Pretrained":
        """The network, by default that of ``--weights``, for images of the size asked for."""
        from tljax.pretrained import load_pretrained

        found = load_pretrained(
            weights or self.weights,
            model=self.model,
            normalization=self.normalization,
            **self.modules(),
        )
        say_notes(found)
        model = replace(found.model, dtype=self.precision or found.model.dtype)
        return found._replace(model=model).with_size(self.image_size)


@dataclass(frozen=True, kw_only=True)
class Common(Network):
    """Flags with the same name and meaning in every command that runs over data."""

    batch_size: Count = 32
    """Images a step."""
    workers: Amount = 0
    """Processes that decode images; 0 decodes in threads."""
    devices: Count | None = None
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
    """Parse the flags, run, and exit.

    The exit code is 0; 2 for a bad request; 1 for a failure; 130 for Ctrl-C; and 75, which
    schedulers take for "run it again", where SIGTERM stopped training.

    Args:
        config_type: a frozen dataclass of flags, after `Common`, or a union of them, which are
            then subcommands; the docstring is the help text.
        run: does the work and returns what ``--json`` prints.
    """
    _open_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _raise_again
    code = _main(config_type, run)
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python would try again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            code = _say(f"the output cannot be written ({error.strerror})", 1)
    if code:
        sys.exit(code)


def _open_streams() -> None:
    """Let stdout and stderr take every text, also where they are closed or know only ASCII."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _main(config_type: Any, run: Callable[[Any], dict[str, Any]]) -> int:
    config = Output()
    try:
        config = _parse(config_type).completed()
        configure(getattr(config, "precision", None) or "float32")
        _refuse_idle(config)
        result = run(config)
        if config.json:
            print(to_json(result))
    except BrokenPipeError:  # `| head` has seen enough
        return 0
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        message, code = _explain(error, config)
        _say(message, code)
        if getattr(config, "distributed", False) and not isinstance(error, StoppedError):
            from tljax.runtime.parallel import leave

            leave(message, code)
        return code
    return 0


def _parse(config_type: Any) -> Any:
    """Parse the command line, and say in one line what is wrong with it: tyro draws a box."""
    if any(not word or re.fullmatch(r"--[\w-]+=", word) for word in sys.argv[1:]):
        raise RequestError("an argument is empty; is a variable of the shell not set?")
    for word in sys.argv[1:]:
        if now := RENAMED.get(flag := word.partition("=")[0]):
            raise RequestError(f"{flag} is called {now} now")
    said, columns = io.StringIO(), os.environ.get("COLUMNS", "")
    # No line of an error is broken; and no help is laid out for a few columns, which never ends.
    width = max(40, get_terminal_size().columns) if {"-h", "--help"} & set(sys.argv) else 9999
    os.environ["COLUMNS"] = str(width)
    try:
        with redirect_stderr(said), _without_typeguard():
            return tyro.cli(config_type)
    except SystemExit as ended:
        if not ended.code:
            raise
        cause: BaseException | None = ended
        while cause := cause.__context__:
            if isinstance(cause, RequestError):
                raise cause from None
        raise RequestError(_first_lines(said.getvalue())) from None
    finally:
        os.environ["COLUMNS"] = columns


@contextmanager
def _without_typeguard() -> Iterator[None]:
    """Keep tyro from importing typeguard, which takes as long as all the rest of a ``--help``.

    It compares our defaults with their types by it, and pyright has done that.
    """
    stand_in = ModuleType("typeguard")
    vars(stand_in).update(check_type=lambda value, _: value, TypeCheckError=TypeError)
    found = sys.modules.setdefault("typeguard", stand_in)
    try:
        yield
    finally:
        if found is stand_in:
            del sys.modules["typeguard"]


def _first_lines(box: str) -> str:
    """Shorten an error of tyro's to its first part, and what it thinks was meant."""
    lines = [line.strip("│|") for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]]
    sections = groupby(lines, key=lambda line: bool(line.strip(" ─-")))
    first = next(section for is_text, section in sections if is_text)
    said = " ".join(line.strip() for line in first if not line.startswith(" " * 8))
    said = re.sub(r"^(Error parsing )?(.)", lambda match: match[2].lower(), said).rstrip(".")
    meant = re.findall(r"Perhaps you meant:\s+(--[\w-]+)|subcommands: (.*\w)", "\n".join(lines))
    return f"{said}; {''.join(f'did you mean {max(one)}? ' for one in meant)}--help lists them all"


_CODES = {
    RequestError: 2,
    StoppedError: StoppedError.CODE,
    VerificationError: 1,
    DivergenceError: 1,
}


def _explain(error: Exception, config: Any) -> tuple[str, int]:
    """Put an error into one line, with the exit code."""
    text = " ".join(str(error).split())
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return text, code
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        advice = [words for name, words in _LESS_MEMORY.items() if name in settings(config)]
        where = "" if isinstance(error, MemoryError) else "device "
        return f"out of {where}memory{': ' if advice else ''}{', or '.join(advice)}", 1
    if (platforms := os.environ.get("JAX_PLATFORMS")) and _lacks_devices():
        return f"JAX finds no device for JAX_PLATFORMS={platforms}: unset it, or set it to cpu", 2
    frames = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    if spec := getattr(config, "extension", None):
        from tljax.commands.extension import split_name

        own = str(Path(split_name(spec)[0]).resolve())
        if lines := [line for file, line in frames if file == own]:
            return f"{own}, line {lines[-1]}: {type(error).__name__}: {text}", 2
    if not text:
        file, line = frames[-1]
        text = f"in {file}, line {line}"
    return f"{type(error).__name__}: {text} (--debug shows where)", 1


def _lacks_devices() -> bool:
    import jax

    with suppress(AssertionError, RuntimeError):
        return not jax.devices()
    return True


def _interrupt(*_: object) -> None:
    """Let what is being written come to its end at the first Ctrl-C, and not at a second one."""
    signal.signal(signal.SIGINT, _interrupt_again)
    raise KeyboardInterrupt


def _interrupt_again(*_: object) -> None:
    os.write(2, b"error: interrupted again\n")
    os._exit(130)


def _terminate(*_: object) -> None:
    raise StoppedError


def _raise_again(ignored: Any) -> None:
    """Send a signal again that struck within a destructor, whose exceptions Python drops.

    What libraries drop in threads of their own is not shown: TensorStore's, of a full disk.
    """
    if current_thread() is not main_thread():
        return
    lost = {KeyboardInterrupt: signal.SIGINT, StoppedError: signal.SIGTERM}.get(ignored.exc_type)
    if lost is None:
        sys.__unraisablehook__(ignored)
        return
    if lost is signal.SIGINT:
        signal.signal(signal.SIGINT, _interrupt)
    Timer(0.05, os.kill, (os.getpid(), lost)).start()


def given() -> set[str]:
    """Names the flags that are on the command line; tyro does not tell them from defaults."""
    flags = (word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--"))
    return {flag[2:].replace("-", "_").removeprefix("no_") for flag in flags}


def _refuse_idle(config: Output) -> None:
    words = [word.partition("=")[0] for word in sys.argv]
    for name, value in settings(config).items():
        if isinstance(value, tuple) and words.count(f"--{name}") > 1:
            raise RequestError(f"--{name} is given twice: write all its values after one --{name}")
    if lines := idle(config, config.conditions, given()):
        raise RequestError("; ".join(lines.values()))


def _splits_by_content(config: Any) -> bool:
    from tljax.data.sources import has_validation

    return not has_validation(config.data)


OF_SPLIT: Conditions = (
    ("val_fraction", _splits_by_content, "as the data has a validation part of its own"),
)
"""Of commands that split data."""

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
    print(f"error: {message}", file=sys.stderr)
    return code
