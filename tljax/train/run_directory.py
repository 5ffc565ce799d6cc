"""A run directory: what was asked, what it ran on, what came out.

With the images and base weights, which it names and knows again, it is enough to go on.

config.json  env.json  classes.json  split.csv  skipped.csv  metrics.jsonl
checkpoints/  best/model.safetensors  report.html  README.md  eval/
"""

import csv
import io
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import jax

from tljax.data.examples import printable, shortened
from tljax.data.sources import Source, Splits, open_splits
from tljax.runtime.errors import DivergenceError, RequestError, StoppedError, WriteError
from tljax.runtime.files import MARKER, mark_output, read_config, sha256, to_json, written_whole
from tljax.runtime.parallel import is_writer

BEST = Path("best") / "model.safetensors"
"""The network of the best epoch, in tljax's own format: `load_pretrained` reads it."""


def new_workdir(splits: Splits) -> Path:
    """Make a folder under ``runs/`` that no other process has, though it began in the same second.

    Raises:
        RequestError: ``runs`` cannot be written, or images lie there.
    """
    mark(Path("runs"), splits)
    workdir = first = Path("runs", time.strftime("%Y%m%d-%H%M%S"))
    for number in count(2):
        with suppress(FileExistsError):
            workdir.mkdir()
            break
        workdir = first.with_name(f"{first.name}-{number}")
    return workdir


def mark(folder: Path, splits: Splits) -> None:
    """Mark a folder as results, which are never read as data.

    Raises:
        RequestError: images lie there, or it cannot be written.
    """
    inside = f"{printable(folder.resolve())}{os.sep}"
    if found := [name for part in splits[:2] for name in part.names if name.startswith(inside)]:
        raise RequestError(f"{folder} holds images, {found[0]}: choose another --workdir")
    mark_output(folder)


@contextmanager
def occupied(workdir: Path, splits: Splits) -> Iterator[None]:
    """Mark a folder as results, and keep other processes from training in it.

    The system lifts this lock when the process ends, however it ends; where a file system has no
    locks there is none.

    Raises:
        RequestError: another process trains there, images lie there, or it cannot be written.
    """
    mark(workdir, splits)
    with (workdir / MARKER).open("a") as marker:
        try:
            import fcntl  # noqa: PLC0415 - not everywhere

            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RequestError(
                f"another process trains in {workdir}: wait for it, or choose another --workdir"
            ) from error
        except (ImportError, OSError):
            pass
        yield


def open_run(
    workdir: Path,
    config: dict[str, Any],
    splits: Splits,
    weights: str,
    extension: str | None = None,
) -> bool:
    """Write down what a run starts from, or compare it with what was written down before.

    Args:
        workdir: of the run.
        config: what it was asked, with absolute paths.
        splits: its images.
        weights: `tree_digest` of its base weights.
        extension: the SHA-256 of its extension's file, if it has one.

    Returns:
        Whether the run was there and goes on.

    Raises:
        RequestError: it cannot be written, or its images, weights or extension have changed.
    """
    path = workdir / "config.json"
    split = _split_csv(config["data"], splits)
    found = {
        "weights": weights,
        "images": [splits.train.digest, splits.val.digest],
        "split.csv": sha256(split),
    }
    if extension:
        found["extension"] = extension
    goes_on = path.exists()
    if goes_on:
        known = read_config(workdir)
        _compare_split(workdir, known, config["data"], split)
        before = known.get("fingerprint", found)  # earlier versions kept none
        said = {
            "images": f"images, of {config['data']}, have other contents of the same size",
            "weights": f"base weights, {config['weights']}, have changed",
            "extension": f"extension's functions, {config.get('extension')}, have changed",
        }
        for name, what in said.items():
            if before.get(name) != found.get(name):
                raise RequestError(f"{workdir}: its {what}: restore them, or start a new run")
        here = {name: config[name] for name in config.keys() & {"data", "weights", "extension"}}
        if known != {**known, **here} and "fingerprint" in known:
            write_json(path, {**known, **here})
    else:
        write_json(path, {**config, "fingerprint": found}, exclusive=True)
    if not (workdir / "split.csv").exists():
        write_json(workdir / "env.json", environment())
        write_json(workdir / "classes.json", list(splits.train.classes))
        _write(workdir / "split.csv", split)
    return goes_on


@contextmanager
def attempt(workdir: Path, *, new: bool) -> Iterator[None]:
    """Let a new run that fails before its first checkpoint be tried again with other settings."""
    try:
        yield
    except (DivergenceError, StoppedError):
        raise
    except Exception:
        begun = any((workdir / "checkpoints").glob("[0-9]*"))
        for name in ("config.json", "split.csv") if new and is_writer() and not begun else ():
            (workdir / name).unlink(missing_ok=True)
        raise


def _split_csv(spec: str, splits: Splits) -> bytes:
    rows = (
        (part, _within(spec, name), source.classes[label], _size(name))
        for part, source in (("train", splits.train), ("val", splits.val))
        for name, label in zip(source.names, source.labels, strict=True)
    )
    return _csv(("part", "name", "class", "size"), rows)


def _within(spec: str, name: str) -> str:
    """The path of an example within the data, which may be moved."""
    return name.removeprefix(printable(Path(spec))).removeprefix(spec).lstrip("/ ")


def _size(name: str) -> int | None:
    """Bytes of an example that is a file of its own."""
    with suppress(OSError, ValueError):
        return Path(name).stat().st_size
    return None


def _compare_split(workdir: Path, known: dict[str, Any], spec: str, split: bytes) -> None:
    """Refuse images that are not those which a run was made with."""
    path = workdir / "split.csv"
    if not path.exists():  # the run was stopped before that
        return
    kept = path.read_bytes()
    digest = sha256(kept)
    try:
        if known.get("fingerprint", {}).get("split.csv", digest) != digest:
            raise ValueError("not what was written")  # noqa: TRY301
        before, now = (_by_name(known["data"], text) for text in (kept, split))
    except (KeyError, ValueError, csv.Error) as error:
        raise RequestError(f"{path} is damaged ({error}): restore it or start anew") from error
    kinds = ("part", "class", "size")  # earlier versions kept no sizes
    differences = {
        "added": now.keys() - before.keys(),
        "gone": before.keys() - now.keys(),
        "of another size, class or part": {
            name
            for name in before.keys() & now.keys()
            if any(before[name].get(kind, now[name][kind]) != now[name][kind] for kind in kinds)
        },
    }
    if said := [f"{len(n)} {w} ({shortened(sorted(n))})" for w, n in differences.items() if n]:
        raise RequestError(
            f"{workdir}: its images, of {spec}, have changed: {'; '.join(said)}: restore them, or "
            "start a new run"
        )


def _by_name(spec: str, split: bytes) -> dict[str, dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(split.decode(), newline=""), strict=True))
    if any(None in row.values() for row in rows):
        raise ValueError("a line is cut short")
    return {_within(spec, row["name"]): row for row in rows}


class MetricsFile:
    """``metrics.jsonl``: a line an epoch, and before it the lines of some of its steps.

    A run that goes on from a checkpoint writes the steps behind that again.
    """

    def __init__(self, workdir: Path) -> None:
        """Read the lines of steps that are there."""
        self._path = workdir / "metrics.jsonl"
        self._epochs: list[str] = []
        self._steps: list[tuple[int, int, str]] = []  # epochs before it, step, line
        before = 0
        for line in self._path.read_text("utf-8").splitlines() if self._path.exists() else ():
            with suppress(ValueError):  # the last one was cut short
                step = json.loads(line).get("step")
                before += step is None
                if step is not None:
                    self._steps.append((before, step, line))

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line; those of later steps, of a process that was killed, go."""
        if not is_writer():
            return
        late = bool(self._steps) and self._steps[-1][1] >= step
        if late:
            self._steps = [found for found in self._steps if found[1] < step]
        line = to_json({"step": step, **metrics})
        self._steps.append((len(self._epochs), step, line))
        if late:
            self._write_all()
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise WriteError(f"{self._path} cannot be written ({error.strerror})") from error

    def on_epoch(self, history: Sequence[dict[str, Any]]) -> None:
        """Write the whole history, nothing of the clock, and the lines of steps."""
        if is_writer():
            self._epochs = [to_json(entry) for entry in history]
            self._write_all()

    def _write_all(self) -> None:
        lines = []
        for number, epoch in enumerate(self._epochs):
            lines += [line for before, _, line in self._steps if before == number] + [epoch]
        lines += [line for before, _, line in self._steps if before >= len(self._epochs)]
        _write(self._path, "".join(f"{line}\n" for line in lines).encode())


def skipped_rows(source: Source, skipped: dict[int, str]) -> list[tuple[str, str]]:
    """(name, reason) of every image of a source that could not be read."""
    return [(source.names[i], reason) for i, reason in sorted(skipped.items())]


def skipped_lines(source: Source, skipped: dict[int, str]) -> list[str]:
    """The same for a person, one line each."""
    return [f"not read: {name}: {reason}" for name, reason in skipped_rows(source, skipped)]


def refuse_missing(workdir: Path, config: Mapping[str, Any], *names: str) -> None:
    """Say which of a run's inputs, ``data`` or ``weights``, are gone.

    Raises:
        RequestError: one of them is.
    """
    for name in names:
        path = Path(config[name])
        if path.is_absolute() and not path.exists():
            raise RequestError(
                f"{workdir}: its {name} are gone from {path}: put them back, or say where they are "
                f"now by --{name}"
            )


def open_validation(workdir: Path) -> tuple[Source, tuple[str, ...]]:
    """Opens the validation part of a run's data; notes for a person beside it.

    Raises:
        RequestError: there is no run, or its data is gone or has changed.
    """
    asked = read_config(workdir)
    if not {"data", "val_fraction"} <= asked.keys():
        raise RequestError(f"{workdir / 'config.json'} does not say what data the run was made of")
    refuse_missing(workdir, asked, "data")
    splits = open_splits(asked["data"], val_fraction=asked["val_fraction"])
    _compare_split(workdir, asked, asked["data"], _split_csv(asked["data"], splits))
    return splits.val, splits.notes


def environment() -> dict[str, str]:
    """Versions and devices that results depend on."""
    packages = ("tljax", "jax", "jaxlib", "flax", "optax", "grain", "numpy", "pillow")
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        **{package: version(package) for package in packages},
    }


def write_json(path: Path, value: Any, *, exclusive: bool = False) -> None:
    """Writes a whole JSON file or none."""
    _write(path, (to_json(value, indent=2, default=str) + "\n").encode(), exclusive=exclusive)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a whole CSV file or none."""
    _write(path, _csv(header, rows))


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def _write(path: Path, content: bytes, *, exclusive: bool = False) -> None:
    with written_whole(path, exclusive=exclusive) as temporary:
        temporary.write_bytes(content)
