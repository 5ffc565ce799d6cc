"""Shared parts of the commands: common options, one-line errors and exit codes."""

import inspect
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import groupby
from pathlib import Path
from shutil import get_terminal_size
from threading import Timer, current_thread, main_thread
from traceback import walk_tb
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import tyro

from tljax.data.options import LabelOptions, Loading
from tljax.runtime.errors import DivergenceError, RequestError, StoppedError, VerificationError
from tljax.runtime.files import open_path, read_config, to_json
from tljax.runtime.process import configure
from tljax.runtime.ranges import Amount, Checked, Count, Pixels, Range, Seed
from tljax.runtime.settings import (
    Conditions,
    Dtype,
    Normalization,
    Platform,
    find_unused_settings,
    settings,
)

if TYPE_CHECKING:
    from tljax.commands.extension import Extension
    from tljax.data.examples import Source
    from tljax.pretrained import Pretrained
    from tljax.pretrained.network import Card

Images = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[IMAGE ...]")]

RENAMED = {
    "--average": "--ema-decay",
    "--neighbours": "--neighbors",
    "--no-crop": "--crop center",
}


@dataclass(frozen=True, kw_only=True)
class Output(Checked):
    """Options of every command.

    Attributes:
        json: Print one JSON object on the last line of stdout.
        debug: Show the traceback of an error.
        platform: Platform to compute on; gpu is an NVIDIA GPU. By default the one that JAX chooses,
            where a GPU or TPU that JAX cannot use is an error.
        conditions: Conditions under which an option has an effect; one that is given without effect
            is an error.
    """

    json: bool = False
    debug: bool = False
    platform: Platform | None = None

    conditions: ClassVar[Conditions] = ()

    def completed(self) -> Self:
        """Return these options with those filled in that the others refer to."""
        return self


@dataclass(frozen=True, kw_only=True)
class Trained(Output):
    """The option for the run directory of a training, which may be in a bucket.

    Attributes:
        workdir: Run directory; each command says what it does with it.
    """

    workdir: Path | None = None

    def completed(self) -> Self:
        """Return these options with the path of the run directory as `open_path` gives it."""
        return replace(self, workdir=open_path(self.workdir)) if self.workdir else self


@dataclass(frozen=True, kw_only=True)
class Extended(Output):
    """The option for a Python file that comes with a network.

    Attributes:
        extension: Python file FILE.py[:NAME] to run. Its dict NAME, by default "extension", holds
            arguments of tljax.fit (objective, materialize, transform, on_step, on_epoch, new_head)
            and "modules", the Flax modules by name that networks are built from.
    """

    extension: str | None = None

    def hooks(self) -> "Extension":
        """Load the extension; an empty one without ``--extension``."""
        from tljax.commands.extension import load_extension

        return load_extension(self.extension)[0] if self.extension else {}

    def read(self, weights: str | Path, **options: Any) -> "Pretrained":
        """Load weights by `load_pretrained`, with the modules of the extension.

        Raises:
            RequestError: as `load_pretrained`. If the network of a run needs the extension that it
                was trained with, the line names the option to add: a file alone never runs code.
        """
        from tljax.pretrained import load_pretrained

        try:
            return load_pretrained(weights, modules=self.hooks().get("modules"), **options)
        except RequestError as error:
            run = open_path(weights)
            file = read_config(run).get("extension") if (run / "config.json").exists() else None
            if self.extension or not file or "--extension" not in str(error):
                raise
            raise RequestError(
                f"{weights}: its network needs the modules of the extension it was trained with: "
                f"add --extension {shlex.quote(file)}, which runs that file"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Network(Extended):
    """Options of the network and its input.

    Attributes:
        weights: Pretrained weights: a catalog name, hub id, file, saved folder or run directory,
            also in a bucket (gs://).
        model: Architecture that the weights must have; by default it is read from the weights.
        normalization: Normalization of the input that a bare weights file expects, by its name in
            keras.applications, or clip for CLIP's; by default the usual one of the architecture and
            file format.
        image_size: Side of the square input, in pixels; by default the size that the weights
            expect.
        precision: Dtype of activations; parameters, batch statistics and logits stay in float32. By
            default the dtype that was saved with the weights.
        seed: Seed of the random number generator; commands that draw no random numbers ignore it.
    """

    weights: str = "efficientnet_lite0.in1k"
    model: str | None = None
    normalization: Normalization | None = None
    image_size: Pixels | None = None
    precision: Dtype | None = None
    seed: Seed = 0

    def load(self, weights: str | Path | None = None) -> "Pretrained":
        """Load ``weights``, by default those of ``--weights``, for images of ``--image-size``."""
        from tljax.runtime.hardware import require_plugin

        require_plugin(self.platform)
        pretrained = self.read(
            weights or self.weights, model=self.model, normalization=self.normalization
        )
        model = replace(pretrained.model, dtype=self.precision or pretrained.model.dtype)
        self.describe_devices(model.dtype)
        print_notes(pretrained)
        return pretrained._replace(model=model).with_size(self.image_size)

    def describe_devices(self, precision: str) -> None:
        """Print which devices are used, see `print_devices`."""
        print_devices(self, precision)


@dataclass(frozen=True, kw_only=True)
class Classifier(Network):
    """The option to classify by embeddings.

    Attributes:
        head: File of embeddings, .npz, to classify by: arrays names, vectors and, by default 100,
            scale, such as those of sentences by the other tower of a CLIP network. By default the
            network's own head.
    """

    head: str | None = None

    def load(self, weights: str | Path | None = None) -> "Pretrained":
        """Load ``weights``, by default those of ``--weights``, with the head of ``--head``."""
        pretrained = super().load(weights)
        if self.head is None:
            return pretrained
        from tljax.pretrained.embeddings import read_embeddings, with_embeddings

        return with_embeddings(pretrained, read_embeddings(self.head))


@dataclass(frozen=True, kw_only=True)
class Batches(Output):
    """Options of how images are read and distributed.

    Attributes:
        batch_size: Number of images in a step, on all devices together.
        workers: Number of processes that decode images; 0 decodes in threads.
        devices: Number of devices to use; by default all.
    """

    batch_size: Count = 32
    workers: Amount = 0
    devices: Count | None = None

    @property
    def loading(self) -> Loading:
        """Options of how images are read."""
        return Loading(self.batch_size, self.workers, self.devices)


@dataclass(frozen=True, kw_only=True)
class Distributed(Output):
    """The option to compute in several processes.

    Attributes:
        distributed: Run as one of several processes: start the same command on every host, with
            paths that mean the same files. The first process prints and writes.
    """

    distributed: bool = False

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Join the other processes: only the first writes to stdout, and SIGTERM ends all."""
        from tljax.runtime.parallel import Preemption, is_main_process, join

        join()
        if not is_main_process():
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        with Preemption():
            yield


@dataclass(frozen=True, kw_only=True)
class Channels(Output):
    """Options of images with other channels than RGB, or with more than 8 bits.

    Attributes:
        channels: Number of channels of the images, each with its own mean and standard deviation;
            pixels keep the bits of the files. The first kernel of the weights is summed for one
            channel and repeated for more. By default images are RGB of 8 bits, or as those of the
            run whose network is taken.
        mean: Mean of each channel, of pixels that are in [0, 1] if they have 8 or 16 bits; by
            default it is measured over the training images.
        std: Standard deviation of each channel, likewise.
    """

    channels: Annotated[int, Range(1, 1024)] | None = None
    mean: tuple[Annotated[float, Range(-(10**6), 10**6)], ...] = ()
    std: tuple[Annotated[float, Range(0, 10**6, without="low")], ...] = ()

    def adapt(self, pretrained: "Pretrained", train: "Source") -> "Pretrained":
        """Return the network for images of ``--channels``, and print their mean and deviation.

        Raises:
            RequestError: an option does not fit the others, the images or the network.
        """
        if self.channels is None:
            return pretrained
        from tljax.data.statistics import measure_channels
        from tljax.models import adapt_input
        from tljax.models.spec import is_valid_preprocess

        for name in ("mean", "std"):
            count = len(getattr(self, name))
            if count != self.channels and (self.mean or self.std):
                raise RequestError(
                    f"--{name} has {count} numbers for {_plural(self.channels, 'channel')}: give "
                    "--mean and --std, one number per channel"
                )
        model = pretrained.model
        measured = measure_channels(train, model.preprocess.with_channels(self.channels))
        if self.mean:
            measured = replace(measured, mean=self.mean, std=self.std)
        if not is_valid_preprocess(measured):
            raise RequestError(
                f"the mean or deviation of a channel is a million or more, {measured.mean} and "
                f"{measured.std}: scale the pixels"
            )
        statistics = measured.mean, measured.std
        mean, std = (" ".join(f"{x:.3g}" for x in values) for values in statistics)
        model, variables = adapt_input(model, pretrained.variables, measured)
        bits = "8 bits" if measured.dtype == "uint8" else "more than 8 bits"
        origin = "given" if self.mean else "measured"
        print(
            f"note: {_plural(self.channels, 'channel')} of {bits}; {origin} mean {mean}, "
            f"deviation {std}",
            file=sys.stderr,
        )
        return pretrained._replace(model=model, variables=variables)


CHANNEL_CONDITIONS: Conditions = (
    ("mean std", lambda s: s.channels is not None, "without --channels"),
)
"""Conditions of commands with options of channels."""


@dataclass(frozen=True, kw_only=True)
class Common(Network, Batches):
    """Options of every command that runs one network over images."""


Labels = tyro.conf.OmitArgPrefixes[LabelOptions]
"""Options of labels, as flags without a prefix."""


def labels_of(
    labels: LabelOptions, data: str | None, weights: str | Path, card: "Card"
) -> LabelOptions:
    """Return options to read labels for a network.

    Args:
        labels: options on the command line. If all are the defaults, those of the run are taken for
            a table or a hub's data set.
        data: the images.
        weights: the network, maybe a run directory.
        card: what the network predicts, which is the default of the task.
    """
    from tljax.data.folders import expand_path
    from tljax.data.packed_splits import is_packed
    from tljax.data.shards import is_shards
    from tljax.train.run_directory import label_options

    run = open_path(weights)
    has_columns = data is not None and (
        is_shards(data) or not (is_packed(data) or expand_path(data).is_dir())
    )
    if labels == LabelOptions() and has_columns and (run / "config.json").exists():
        labels = replace(label_options(read_config(run)), root=None)
    if labels.task is None and labels.order is None:
        labels = replace(labels, task=card.task.kind)
    if labels.task == "ordinal" and labels.order is None and card.task.kind == "ordinal":
        labels = replace(labels, order=",".join(card.classes))
    return labels


def print_devices(config: Output, precision: str) -> None:
    """Print the first line of a run on stderr, such as ``cpu: 1 device, float32, 1 process``.

    Raises:
        RequestError: JAX does not use the requested platform, or a GPU or TPU that is present.
    """
    import jax

    from tljax.runtime.hardware import require_backend

    devices = jax.devices()[: getattr(config, "devices", 1)]
    backend, kind = jax.default_backend(), devices[0].device_kind
    require_backend(config.platform, backend)
    if jax.process_index() == 0:
        count = _plural(len(devices), "device")
        line = f"{backend}: {count}{format_kind(backend, kind)}, {precision}"
        print(f"{line}, {_plural(jax.process_count(), 'process', 'es')}", file=sys.stderr)


def format_kind(backend: str, kind: str) -> str:
    """Return the kind of a device as a suffix of its backend; empty if it says nothing more."""
    return "" if kind == backend else f" ({kind})"


def _plural(count: int, noun: str, ending: str = "s") -> str:
    return f"{count} {noun}{'' if count == 1 else ending}"


def print_notes(pretrained: "Pretrained") -> None:
    """Print on stderr what was assumed about weights whose file does not say it."""
    for note in pretrained.card.notes:
        print(f"note: {note}", file=sys.stderr)


def main(config_type: Any, run: Callable[[Any], dict[str, Any]]) -> None:
    """Parse the command line, run the command and exit.

    The exit code is 0 on success, 2 for a bad request, 1 for a failure, 130 after Ctrl-C, and 75,
    which tells schedulers to run the command again, after SIGTERM stopped a training.

    Args:
        config_type: a frozen dataclass of options, or a union of them, one for each subcommand.
            Docstrings are the help text.
        run: the function that does the work. ``--json`` prints what it returns; the exit code is 1
            if that holds a list of ``problems``.
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
        # Without this, Python flushes again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            code = _print_error(f"the output cannot be written ({error.strerror})", 1)
    if code:
        sys.exit(code)


def _open_streams() -> None:
    """Make stdout and stderr accept any text, even if they are closed or encode only ASCII."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _main(config_type: Any, run: Callable[[Any], dict[str, Any]]) -> int:
    config = Output()
    try:
        config = _parse(config_type).completed()
        configure(getattr(config, "precision", None) or "float32", config.platform)
        _reject_unused_options(config)
        several = isinstance(config, Distributed) and config.distributed
        with config.joined() if several else nullcontext():
            result = run(config)
        if config.json:
            print(to_json(result))
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        return 0
    except KeyboardInterrupt as error:
        return _print_error(str(error) or "interrupted", 130)
    except (Exception, StoppedError) as error:
        if "--debug" in sys.argv:
            raise
        message, code = _explain(error, config)
        _print_error(message, code)
        if getattr(config, "distributed", False) and not isinstance(error, StoppedError):
            from tljax.runtime.parallel import exit_all_processes

            exit_all_processes(message, code)
        return code
    return 1 if result and result.get("problems") else 0


def _parse(config_type: Any) -> Any:
    """Parse the command line; report an error in one line instead of tyro's box."""
    if any(not word or re.fullmatch(r"--[\w-]+=", word) for word in sys.argv[1:]):
        raise RequestError("an argument is empty: check that every shell variable in it is set")
    for word in sys.argv[1:]:
        if new_name := RENAMED.get(flag := word.partition("=")[0]):
            raise RequestError(f"{flag} was renamed: use {new_name}")
        if flag in ("--json", "--debug") and flag != word:  # tyro takes the value for an argument
            raise RequestError(f"{flag} takes no value: write {flag} alone")
    box, columns = io.StringIO(), os.environ.get("COLUMNS", "")
    # Errors are not wrapped. Help needs 40 columns: tyro does not terminate in a few.
    width = max(40, get_terminal_size().columns) if {"-h", "--help"} & set(sys.argv) else 9999
    os.environ["COLUMNS"] = str(width)
    try:
        with redirect_stderr(box), _without_typeguard(), _without_sources():
            return tyro.cli(config_type)
    except SystemExit as exit_error:
        if not exit_error.code:
            raise
        cause: BaseException | None = exit_error
        while cause := cause.__context__:
            if isinstance(cause, RequestError):
                raise cause from None
        raise RequestError(_summarize(box.getvalue())) from None
    finally:
        os.environ["COLUMNS"] = columns


@contextmanager
def _without_typeguard() -> Iterator[None]:
    """Keep tyro from importing typeguard, which would double the time of ``--help``.

    tyro uses it to check defaults against their types, which pyright has done before.
    """
    stand_in = ModuleType("typeguard")
    vars(stand_in).update(check_type=lambda value, _: value, TypeCheckError=TypeError)
    module = sys.modules.setdefault("typeguard", stand_in)
    try:
        yield
    finally:
        if module is stand_in:
            del sys.modules["typeguard"]


@contextmanager
def _without_sources() -> Iterator[None]:
    """Keep tyro from parsing the source of every class, a third of the time of ``--help``.

    It looks for docstrings of single fields; ours are in the docstrings of their classes.
    """
    import docstring_parser

    original = docstring_parser.parse_from_object
    docstring_parser.parse_from_object = lambda documented: docstring_parser.parse(
        inspect.getdoc(documented) or ""
    )
    try:
        yield
    finally:
        docstring_parser.parse_from_object = original


def _summarize(box: str) -> str:
    """Return the first message in an error box of tyro, and its suggestion, as one line."""
    lines = [line.strip("│|") for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]]
    sections = groupby(lines, key=lambda line: bool(line.strip(" ─-")))
    first = next(section for is_text, section in sections if is_text)
    message = " ".join(line.strip() for line in first if not line.startswith(" " * 8))
    message = re.sub(r"^(Error parsing )?(.)", lambda match: match[2].lower(), message).rstrip(".")
    similar = re.findall(r"Perhaps you meant:\s+(--[\w-]+)|subcommands: (.*\w)", "\n".join(lines))
    hints = "".join(f"did you mean {max(names)}? " for names in similar)
    return f"{message}; {hints}--help lists them all"


_CODES = {
    RequestError: 2,
    StoppedError: StoppedError.CODE,
    VerificationError: 1,
    DivergenceError: 1,
}


_PEER = re.compile("(?i)gloo|nccl|coordination service|(closed|reset) by peer")
"""Matches errors of a collective operation whose other processes have ended."""


def _explain(error: BaseException, config: Any) -> tuple[str, int]:
    """Return the message of an error as one line, and the exit code."""
    text = " ".join(str(error).split())
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return text, code
    if getattr(config, "distributed", False) and _PEER.search(text):
        fault = "another process has ended or does not answer; see its messages, and run the same"
        return f"{fault} command in all processes again", StoppedError.CODE
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        advice = [words for name, words in _LESS_MEMORY.items() if name in settings(config)]
        where = "" if isinstance(error, MemoryError) else "device "
        return f"out of {where}memory{': ' if advice else ''}{', or '.join(advice)}", 1
    if (platforms := os.environ.get("JAX_PLATFORMS")) and _lacks_devices():
        cause = f"--platform {chosen}" if (chosen := config.platform) else ""
        cause = cause or f"JAX_PLATFORMS={platforms}: unset it, or set it to cpu"
        return f"JAX finds no device for {cause}", 2
    frames = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    if spec := getattr(config, "extension", None):
        from tljax.commands.extension import split_name

        path = str(Path(split_name(spec)[0]).resolve())
        if lines := [line for file, line in frames if file == path]:
            return f"{path}, line {lines[-1]}: {type(error).__name__}: {text}", 2
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
    """Raise at the first Ctrl-C, so that files are completed; exit at once at the second."""
    signal.signal(signal.SIGINT, _interrupt_again)
    raise KeyboardInterrupt


def _interrupt_again(*_: object) -> None:
    os.write(2, b"error: interrupted again\n")
    os._exit(130)


def _terminate(*_: object) -> None:
    raise StoppedError


def _raise_again(ignored: Any) -> None:
    """Send a signal again whose exception Python dropped because it was raised in a destructor.

    Exceptions dropped in other threads are not shown, such as TensorStore's about a full disk.
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


def explicit_options() -> set[str]:
    """Return the names of the options on the command line; tyro does not mark them."""
    flags = (word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--"))
    return {flag[2:].replace("-", "_").removeprefix("no_") for flag in flags}


def _reject_unused_options(config: Output) -> None:
    """Refuse options that have no effect, and options of several values that are repeated."""
    words = [word.partition("=")[0] for word in sys.argv]
    for name, value in settings(config).items():
        if isinstance(value, tuple) and words.count(f"--{name}") > 1:
            raise RequestError(f"--{name} is given twice: write all its values after one --{name}")
    if lines := find_unused_settings(config, config.conditions, explicit_options()):
        raise RequestError("; ".join(lines.values()))


def _splits_by_content(config: Any) -> bool:
    from tljax.data.sources import has_validation

    labels = LabelOptions(**{one.name: getattr(config, one.name) for one in fields(LabelOptions)})
    return not has_validation(config.data, labels)


LABEL_CONDITIONS: Conditions = (
    ("order", lambda s: s.task in (None, "ordinal"), "with another --task than ordinal"),
    ("units", lambda s: s.task in (None, "regression"), "with another --task than regression"),
)
"""Conditions of commands with options of labels."""


SPLIT_CONDITIONS: Conditions = (
    *LABEL_CONDITIONS,
    ("val_fraction", _splits_by_content, "as the data has a validation part of its own"),
)
"""Conditions of commands that split data."""

WORKDIR_CONDITIONS: Conditions = (
    ("weights", lambda s: s.workdir is None, "with --workdir, whose network is taken"),
)
"""Conditions of commands that take the network of a run directory."""


_LESS_MEMORY = {
    "batch_size": "halve --batch-size",
    "accumulate": "split the batch with --accumulate 2",
    "precision": "use --precision bfloat16",
    "freeze_to": "freeze more stages with --freeze-to",
}


def from_json(config_type: Any, values: Mapping[str, Any]) -> Any:
    """Return a dataclass of options from what `dataclasses.asdict` and JSON made of it.

    Raises:
        RequestError: an option is missing or unknown.
    """
    defaults = {field.name: getattr(config_type(), field.name) for field in fields(config_type)}
    if defaults.keys() != values.keys():
        difference = sorted(defaults.keys() ^ values.keys())
        raise RequestError(f"its options are of another version of tljax: '{difference[0]}'")

    def convert(default: Any, value: Any, name: str) -> Any:
        if is_dataclass(default):
            return from_json(type(default), value)
        if isinstance(value, list):
            return tuple(value)
        return Path(value) if name in _PATHS and value is not None else value

    return config_type(**{name: convert(defaults[name], values[name], name) for name in defaults})


_PATHS = ("workdir", "resume", "root")


def _print_error(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
