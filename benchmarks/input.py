"""Measure the images per second that are read, decoded and resized; print JSON.

``Pillow`` decodes at full size, resizes and crops in one thread; ``decode`` is tljax in one thread.
The loaders of tljax and torch use all cores, in threads or processes; the seconds include the start
of the processes. ``--enlarge 12`` turns images of 256 pixels into the size of a phone's.

    python benchmarks/input.py FOLDER --count 200
"""

import io
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from peers import environment, take_turns
from PIL import Image

from tljax.data.decode import decode, open_image
from tljax.data.examples import Source, select
from tljax.data.loader import load_batches
from tljax.data.sources import open_labeled
from tljax.runtime.preprocess import Preprocess


@dataclass(frozen=True)
class Config:
    """Images per second, from files to batches."""

    data: Annotated[str, tyro.conf.Positional]
    """A folder with one subfolder per class."""
    count: int = 500
    """Number of images, drawn at random from the folder."""
    enlarge: int = 1
    """Factor by which height and width are enlarged first, stored as JPEG of quality 90."""
    batch_size: int = 32
    """Images per batch."""
    rounds: int = 3
    """Number of timed rounds."""


class Decoded(torch.utils.data.Dataset[tuple[np.ndarray, int]]):
    """A data set for the loader of torch that decodes with Pillow."""

    def __init__(self, source: Source, decode_fully: Callable[[Any], np.ndarray]) -> None:
        self.source, self.decode_fully = source, decode_fully

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.decode_fully(self.source.read(index)), int(self.source.labels[index])


def write_enlarged(folder: str, source: Source, times: int) -> None:
    """Write enlarged images into class folders."""
    for i in range(len(source)):
        data: Any = source.read(i)
        image = open_image(data)
        image = image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)
        path = Path(folder, source.classes[source.labels[i]], f"{i}.jpg")
        path.parent.mkdir(exist_ok=True)
        image.save(path, quality=90)


def main() -> None:
    config = tyro.cli(Config)
    source = open_labeled(config.data)
    count = min(config.count, len(source))
    indices = np.random.default_rng(0).choice(len(source), count, replace=False)
    source = select(source, np.sort(indices))
    with tempfile.TemporaryDirectory() as folder:
        if config.enlarge > 1:
            write_enlarged(folder, source, config.enlarge)
            source = open_labeled(folder)
        measure(config, source)


def measure(config: Config, source: Source) -> None:
    """Time every way to read the images, and print the report as JSON."""
    preprocess, cores = Preprocess(), os.cpu_count() or 1

    def decode_fully(data: Any) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        side, resize = preprocess.size, preprocess.resize
        scale = resize / min(image.size)
        width, height = (max(resize, int(length * scale)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - side) // 2, (height - side) // 2
        return np.array(image.crop((left, top, left + side, top + side)))

    def each(function: Callable[[Any], np.ndarray]) -> None:
        for i in range(len(source)):
            function(source.read(i))

    def load(workers: int) -> None:
        batches = load_batches(
            source, preprocess, batch_size=config.batch_size, workers=workers, on_bad_image="fail"
        )
        for _ in batches:
            pass

    def load_in_torch() -> None:
        data = Decoded(source, decode_fully)
        for _ in torch.utils.data.DataLoader(data, config.batch_size, num_workers=cores):
            pass

    rows: dict[str, Any] = take_turns(
        {
            "Pillow": lambda: each(decode_fully),
            "decode": lambda: each(lambda data: decode(data, preprocess)),
            "loader, threads": lambda: load(0),
            "loader, processes": lambda: load(cores),
            "torch loader, processes": load_in_torch,
        },
        config.rounds,
    )
    for name, row in rows.items():
        row["images_per_second"] = round(len(source) / row["seconds"], 1)
        workers = cores if "loader" in name else 1
        row["images_per_second_and_core"] = round(len(source) / row["seconds"] / workers, 1)
    report = {
        "environment": environment(),
        "data": Path(config.data).name,
        "count": len(source),
        "enlarge": config.enlarge,
        "batch_size": config.batch_size,
        "cores": cores,
        "ways": rows,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
