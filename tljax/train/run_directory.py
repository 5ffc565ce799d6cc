"""Files of a run directory: configuration, environment, data split, metrics and results.

Together with the images and base weights, which it identifies, it suffices to resume the run.

config.json  env.json  classes.json  split.csv  skipped.csv  metrics.jsonl
checkpoints/  best/model.safetensors (or best/adapter.safetensors)  report.html  README.md  eval/
"""

import csv
import io
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import jax

from tljax.data.examples import Source, Splits, format_labels, join_names
from tljax.data.files import printable
from tljax.data.options import LabelOptions
from tljax.data.packed_splits import is_packed
from tljax.data.shards import is_pattern
from tljax.data.sources import open_splits
from tljax.data.table_files import is_table
from tljax.runtime.errors import DivergenceError, RequestError, WriteError
from tljax.runtime.files import (
    MARKER,
    atomic_write,
    in_bucket,
    locked,
    mark_output,
    read_config,
    sha256,
    to_json,
)
from tljax.runtime.parallel import is_main_process

BEST = Path("best") / "model.safetensors"
"""Path of the network of the best epoch within a run directory, for `load_pretrained`."""

ADAPTER = Path("best") / "adapter.safetensors"
"""Path of the adapter of the best epoch, which a run with ``--adapter`` writes instead."""

_FILES = ("env.json", "classes.json", "split.csv", "skipped.csv", "metrics.jsonl", "report.html")
_FILES += ("README.md", "checkpoints", "best", "eval", "interpolation.csv")


def new_workdir(splits: Splits) -> Path:
    """Create a new folder under ``runs/``, named by the time and unique among all processes.

    Raises:
        RequestError: ``runs`` cannot be written, or holds images of the data.
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
    """Mark a folder as results, so that it is never read as data.

    Raises:
        RequestError: it holds images of the data, or cannot be written.
    """
    inside = f"{printable(folder.resolve())}{os.sep}"
    if images := [name for part in splits[:2] for name in part.names if name.startswith(inside)]:
        raise RequestError(f"{folder} holds images, {images[0]}: choose another --workdir")
    mark_output(folder)


@contextmanager
def occupied(workdir: Path, splits: Splits) -> Iterator[None]:
    """Mark a folder as results, and lock it against other processes that train in it.

    Raises:
        RequestError: another process trains in the folder, it holds images of the data or files
            that a run would overwrite, or it cannot be written.
    """
    is_run = (workdir / MARKER).exists() or (workdir / "config.json").exists()
    if not is_run and (names := [name for name in _FILES if (workdir / name).exists()]):
        raise RequestError(
            f"{workdir} is not a run of tljax, which would overwrite its {names[0]}: choose "
            "another --workdir"
        )
    mark(workdir, splits)
    message = f"another process trains in {workdir}: wait for it or choose another --workdir"
    with locked(workdir / MARKER, message):
        yield


def open_run(
    workdir: Path,
    config: dict[str, Any],
    splits: Splits,
    weights: str,
    extension: str | None = None,
) -> bool:
    """Write the configuration, environment and split of a new run; check those of a resumed one.

    Args:
        workdir: run directory.
        config: options of the run, with absolute paths.
        splits: training and validation images.
        weights: `tree_digest` of the base weights.
        extension: SHA-256 of the extension's file, if there is one.

    Returns:
        Whether the run exists and is resumed.

    Raises:
        RequestError: the run's images, base weights or extension have changed, or it cannot be
            written.
    """
    path = workdir / "config.json"
    split = _split_csv(config["data"], splits)
    verify_content = config["verify_content"]
    fingerprint = {
        "weights": weights,
        "images": identify(splits, verify_content),
        "split.csv": sha256(split),
    }
    if extension:
        fingerprint["extension"] = extension
    resumed = path.exists()
    if resumed:
        saved = read_config(workdir)
        _compare_split(workdir, saved, config["data"], split)
        expected = saved.get("fingerprint", fingerprint)  # earlier versions saved none
        what = "contents" if verify_content else "paths, sizes or labels"
        changes = {
            "images": f"{what} of the images in {config['data']} have changed",
            "weights": f"base weights, {config['weights']}, have changed",
            "extension": f"functions of the extension {config.get('extension')} have changed",
        }
        for name, change in changes.items():
            if expected.get(name) != fingerprint.get(name):
                raise RequestError(f"{workdir}: the {change}: restore them or start a new run")
        paths = {name: config[name] for name in config.keys() & {"data", "weights", "extension"}}
        if saved != {**saved, **paths} and "fingerprint" in saved:
            write_json(path, {**saved, **paths})
    else:
        write_json(path, {**config, "fingerprint": fingerprint}, exclusive=True)
    if not (workdir / "split.csv").exists():
        write_json(workdir / "env.json", environment())
        write_json(workdir / "classes.json", list(splits.train.classes))
        _write(workdir / "split.csv", split)
    return resumed


def identify(splits: Splits, verify_content: bool) -> list[str]:
    """Return what identifies the training and validation images of a run.

    Args:
        splits: the images.
        verify_content: whether to read all images, so that a change of any byte changes it;
            otherwise see `Source.fingerprint`.
    """
    return [x.digest if verify_content else x.fingerprint for x in (splits.train, splits.val)]


@contextmanager
def attempt(workdir: Path, *, new: bool) -> Iterator[None]:
    """Delete the configuration of a new run that fails before its first checkpoint.

    The same folder then accepts a run with other settings.
    """
    try:
        yield
    except DivergenceError:
        raise
    except Exception:
        if new and is_main_process() and not any((workdir / "checkpoints").glob("[0-9]*")):
            for name in ("config.json", "split.csv"):
                (workdir / name).unlink(missing_ok=True)
        raise


def _split_csv(spec: str, splits: Splits) -> bytes:
    relative = partial(_within, _folder(spec), spec)
    # Packed photographs have the names of files that may lie elsewhere, or nowhere.
    sizes = (lambda source: [None] * len(source)) if is_packed(spec) else _sizes
    rows = (
        (part, relative(name), label, size)
        for part, source in (("train", splits.train), ("val", splits.val))
        for name, label, size in zip(
            source.names, format_labels(source, source.labels), sizes(source), strict=True
        )
    )
    return format_csv(("part", "name", "class", "size"), rows)


def _folder(spec: str) -> str:
    return printable(Path(spec).parent if is_table(Path(spec)) else Path(spec))


def _within(folder: str, spec: str, name: str) -> str:
    """Return the path of an example relative to the data, whose folder may be moved."""
    return name.removeprefix(folder).removeprefix(spec).lstrip("/ ")


def _sizes(source: Source) -> Sequence[int | None]:
    """Return the size in bytes of each example's file, None if it has no file of its own."""
    sizes = source.file_sizes
    return [*map(_size, source.names)] if sizes is None else sizes


def _size(name: str) -> int | None:
    with suppress(OSError, ValueError):
        return Path(name).stat().st_size
    return None


def _compare_split(workdir: Path, saved: dict[str, Any], spec: str, split: bytes) -> None:
    """Refuse images that differ from those the run was trained on."""
    path = workdir / "split.csv"
    if not path.exists():  # the run was stopped before it was written
        return
    saved_split = path.read_bytes()
    digest = sha256(saved_split)
    if saved_split == split and saved.get("fingerprint", {}).get("split.csv") == digest:
        return  # the usual case, without a dictionary for each of a million rows
    try:
        if saved.get("fingerprint", {}).get("split.csv", digest) != digest:
            raise ValueError("checksum mismatch")  # noqa: TRY301
        before, now = (_by_name(saved["data"], text) for text in (saved_split, split))
    except (KeyError, ValueError, csv.Error) as error:
        raise RequestError(f"{path} is damaged ({error}): restore it or start a new run") from error

    def differs(before: dict[str, str], now: dict[str, str]) -> bool:
        size = before.get("size")  # earlier versions saved none, or only those of some files
        columns = ("part", "class", "size") if size else ("part", "class")
        return any(before[name] != now[name] for name in columns)

    differences = {
        "added": now.keys() - before.keys(),
        "missing": before.keys() - now.keys(),
        "of another size, class or part": {
            name for name in before.keys() & now.keys() if differs(before[name], now[name])
        },
    }
    if changes := [f"{len(n)} {d} ({join_names(sorted(n))})" for d, n in differences.items() if n]:
        raise RequestError(
            f"{workdir}: the images of {spec} have changed: {'; '.join(changes)}: restore them or "
            "start a new run"
        )


def _by_name(spec: str, split: bytes) -> dict[str, dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(split.decode(), newline=""), strict=True))
    if any(None in row.values() for row in rows):
        raise ValueError("a line is truncated")
    relative = partial(_within, _folder(spec), spec)
    return {relative(row["name"]): row for row in rows}


class MetricsFile:
    """``metrics.jsonl``: one line per epoch, preceded by the lines of its logged steps.

    A resumed run overwrites the lines of steps after its checkpoint. In a bucket, where nothing can
    be appended, the whole file is uploaded with the line of an epoch, by `flush` and by `close`.
    """

    def __init__(self, workdir: Path) -> None:
        """Read the lines of an existing file."""
        self._path = workdir / "metrics.jsonl"
        self._epochs: list[str] = []
        self._steps: list[tuple[int, int, str]] = []  # number of earlier epochs, step, line
        self._is_behind = False
        for line in self._path.read_text("utf-8").splitlines() if self._path.exists() else ():
            with suppress(ValueError):  # the last line may be truncated
                step = json.loads(line).get("step")
                if step is None:
                    self._epochs.append(line)
                else:
                    self._steps.append((len(self._epochs), step, line))

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line, and remove what an interrupted process wrote of later steps and epochs."""
        if not is_main_process():
            return
        later = [entry for entry in self._steps if entry[1] >= step]
        if later:
            self._steps = self._steps[: -len(later)]
            self._epochs = self._epochs[: later[0][0]]
        line = to_json({"step": step, **metrics})
        self._steps.append((len(self._epochs), step, line))
        if in_bucket(self._path):
            self._is_behind = True
            return
        if later:
            self._write_all()
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise WriteError(f"{self._path} cannot be written ({error.strerror})") from error

    def on_epoch(self, history: Sequence[dict[str, Any]]) -> None:
        """Write the whole history and the lines of steps; it holds no times."""
        if is_main_process():
            self._epochs = [to_json(entry) for entry in history]
            self._write_all()

    def flush(self) -> None:
        """Upload the lines of steps that a bucket does not have yet."""
        if self._is_behind:
            self._write_all()

    def close(self) -> None:
        """Upload the last lines of steps, if the bucket can be reached."""
        with suppress(WriteError):  # the run may end because it cannot
            self.flush()

    def _write_all(self) -> None:
        lines = []
        for number, epoch in enumerate(self._epochs):
            lines += [line for before, _, line in self._steps if before == number] + [epoch]
        lines += [line for before, _, line in self._steps if before >= len(self._epochs)]
        _write(self._path, "".join(f"{line}\n" for line in lines).encode())
        self._is_behind = False


def skipped_rows(source: Source, skipped: dict[int, str]) -> list[tuple[str, str]]:
    """Return (name, reason) of every image of a source that could not be read."""
    return [(source.names[i], reason) for i, reason in sorted(skipped.items())]


def skipped_lines(source: Source, skipped: dict[int, str]) -> list[str]:
    """Return one line of text for every image of a source that could not be read."""
    return [f"not read: {name}: {reason}" for name, reason in skipped_rows(source, skipped)]


def refuse_missing(workdir: Path, config: Mapping[str, Any], *names: str) -> None:
    """Check that a run's inputs still exist.

    Args:
        workdir: run directory, for the message.
        config: options of the run.
        names: options to check: ``data``, ``weights`` or both.

    Raises:
        RequestError: one of them does not exist.
    """
    for name in names:
        path = Path(config[name])
        if path.is_absolute() and not path.exists() and not is_pattern(config[name]):
            raise RequestError(
                f"{workdir}: {path} with the {name} of the run does not exist: restore it or set "
                f"--{name} to its new place"
            )


def open_validation(workdir: Path) -> tuple[Source, tuple[str, ...]]:
    """Open the validation images of a run.

    Returns:
        The images, and notes on the data, one line of text each.

    Raises:
        RequestError: there is no run, or its data does not exist or has changed.
    """
    config = read_config(workdir)
    if not {"data", "val_fraction"} <= config.keys():
        raise RequestError(f"{workdir / 'config.json'} does not name the data of the run")
    refuse_missing(workdir, config, "data")
    splits = open_splits(
        config["data"], val_fraction=config["val_fraction"], labels=label_options(config)
    )
    _compare_split(workdir, config, config["data"], _split_csv(config["data"], splits))
    return splits.val, splits.notes


def label_options(config: Mapping[str, Any]) -> LabelOptions:
    """Return the options of labels in the configuration of a run."""
    values = config.get("labels", {})  # earlier versions had none
    root = values.get("root")
    return LabelOptions(**{**values, "root": Path(root) if root else None})


def environment() -> dict[str, str]:
    """Return the versions and devices that results depend on."""
    packages = ("tljax", "jax", "jaxlib", "flax", "optax", "grain", "numpy", "pillow")
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        **{package: version(package) for package in packages},
    }


def write_json(path: Path, value: Any, *, exclusive: bool = False) -> None:
    """Write a JSON file atomically."""
    _write(path, (to_json(value, indent=2, default=str) + "\n").encode(), exclusive=exclusive)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically."""
    _write(path, format_csv(header, rows))


def format_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Return the bytes of a CSV file."""
    content = io.BytesIO()  # text in memory takes four times as much
    with io.TextIOWrapper(content, "utf-8", newline="", write_through=True) as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
        return content.getvalue()


def _write(path: Path, content: bytes, *, exclusive: bool = False) -> None:
    with atomic_write(path, exclusive=exclusive) as temporary:
        temporary.write_bytes(content)
