"""A run directory: what was asked, what it ran on, what came out. It alone is enough to go on.

config.json  env.json  classes.json  split.csv  skipped.csv  metrics.jsonl
checkpoints/  best/model.safetensors  report.html  README.md  eval/
"""

import csv
import io
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from tljax.data.sources import Source, Splits, open_splits
from tljax.errors import RequestError
from tljax.files import read_config, to_json, written_whole
from tljax.parallel import is_writer

BEST = Path("best") / "model.safetensors"
"""The network of the best epoch, in tljax's own format: `load_pretrained` reads it."""


def create_run(workdir: Path, config: dict[str, Any], splits: Splits) -> None:
    """Makes the directory and writes down what the run starts from.

    Raises:
        RequestError: it cannot be written, or already holds a run.
    """
    if (workdir / "config.json").exists():
        raise RequestError(f"{workdir} already holds a run; choose another --workdir")
    write_json(workdir / "config.json", config)
    write_json(workdir / "env.json", environment())
    write_json(workdir / "classes.json", list(splits.train.classes))
    rows = (
        (part, name, source.classes[label])
        for part, source in (("train", splits.train), ("val", splits.val))
        for name, label in zip(source.names, source.labels, strict=True)
    )
    write_csv(workdir / "split.csv", ("part", "name", "class"), rows)


def write_metrics(workdir: Path, history: Sequence[dict[str, Any]]) -> None:
    """Writes the whole history to ``metrics.jsonl``, one line an epoch, nothing of the clock."""
    if is_writer():
        lines = (to_json(entry) + "\n" for entry in history)
        _write(workdir / "metrics.jsonl", "".join(lines))


def skipped_rows(source: Source, skipped: dict[int, str]) -> list[tuple[str, str]]:
    """(name, reason) of every image of a source that could not be read."""
    return [(source.names[i], reason) for i, reason in sorted(skipped.items())]


def skipped_lines(source: Source, skipped: dict[int, str]) -> list[str]:
    """The same for a person, one line each."""
    return [f"not read: {name}: {reason}" for name, reason in skipped_rows(source, skipped)]


def open_validation(workdir: Path) -> tuple[Source, tuple[str, ...]]:
    """Opens the validation part of a run's data; notes for a person beside it.

    Raises:
        RequestError: there is no run, or its data has gone.
    """
    asked = read_config(workdir)
    return open_splits(asked["data"], val_fraction=asked["val_fraction"])[1:]


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


def write_json(path: Path, value: Any) -> None:
    """Writes a whole JSON file or none."""
    _write(path, to_json(value, indent=2, default=str) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a whole CSV file or none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    _write(path, text.getvalue())


def _write(path: Path, text: str) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(text, "utf-8")
