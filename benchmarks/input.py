"""Measure the images per second that are read, decoded and resized; print JSON.

``Pillow`` decodes at full size, resizes and crops in one thread, as torchvision does; ``decode`` is
tljax in one thread. The loaders of tljax and torch use two threads or processes, or eight on the
same cores, which have started before. ``packed`` reads pixels that were decoded once, from the
page cache. ``--enlarge 12`` turns images of 256 pixels into the size of a phone's.

    python benchmarks/input.py FOLDER
"""

import io
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import tyro
from peers import environment, take_turns
from PIL import Image

from tljax.data import workers as decoding
from tljax.data.decode import decode, open_image
from tljax.data.examples import Source, Splits, select
from tljax.data.loader import load_batches
from tljax.data.pack import pack
from tljax.data.sources import open_labeled, open_splits
from tljax.runtime.preprocess import Preprocess


@dataclass(frozen=True)
class Config:
    """Images per second, from files to batches."""

    data: Annotated[str, tyro.conf.Positional]
    """A folder with one subfolder per class."""
    count: int = 4000
    """Number of images, drawn at random from the folder, several times each if it has fewer."""
    enlarge: int = 1
    """Factor by which height and width are enlarged first, stored as JPEG of quality 90."""
    batch_size: int = 32
    """Images per batch."""
    rounds: int = 3
    """Number of timed rounds."""


class Decoded(torch.utils.data.Dataset[tuple[np.ndarray, int]]):
    """A data set for the loader of torch that decodes with Pillow."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return decode_fully(self.source.read(index)), int(self.source.labels[index])


def decode_fully(data: Any) -> np.ndarray:
    """Decode, resize and crop as torchvision does."""
    preprocess = Preprocess()
    image = Image.open(io.BytesIO(data)).convert("RGB")
    side, resize = preprocess.size, preprocess.resize
    scale = resize / min(image.size)
    width, height = (max(resize, int(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return np.array(image.crop((left, top, left + side, top + side)))


def write_enlarged(folder: str, source: Source, times: int) -> None:
    """Write enlarged images into class folders."""
    for i in range(len(source)):
        data: Any = source.read(i)
        image = open_image(data)
        image = image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)
        path = Path(folder, source.classes[source.labels[i]], f"{i}.jpg")
        path.parent.mkdir(exist_ok=True)
        image.save(path, quality=90)


def exhaust(batches: Iterable[Any]) -> None:
    """Read all batches."""
    for _ in batches:
        pass


def main() -> None:
    config = tyro.cli(Config)
    source = open_labeled(config.data)
    indices = np.random.default_rng(0).permutation(len(source))
    source = select(source, np.sort(np.resize(indices, config.count)))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as packed:
        if config.enlarge > 1:
            write_enlarged(folder, source, config.enlarge)
            source = open_labeled(folder)
        pack(Splits(source, select(source, [0])), Path(packed))
        measure(config, source, packed)


def measure(config: Config, source: Source, packed: str) -> None:
    """Time every way to read the images, and print the report as JSON."""
    preprocess = Preprocess()
    read_packed = open_splits(f"packed:{packed}").train
    torch_loader = torch.utils.data.DataLoader(
        Decoded(source), config.batch_size, num_workers=2, persistent_workers=True
    )

    def load(source: Source, workers: int = 0, threads: int = 2, **options: Any) -> None:
        options |= {"batch_size": config.batch_size, "on_bad_image": "fail", "workers": workers}
        with mock.patch.object(decoding, "cores", return_value=threads):
            exhaust(load_batches(source, preprocess, **options))

    def each(function: Callable[[Any], np.ndarray], source: Source) -> None:
        exhaust(function(source.read(i)) for i in range(len(source)))

    ways: dict[str, Callable[[], None]] = {
        "Pillow": partial(each, decode_fully, source),
        "decode": partial(each, partial(decode, preprocess=preprocess), source),
        "loader, 2 threads": partial(load, source),
        "loader, 2 processes": partial(load, source, workers=2),
        "loader, 8 threads": partial(load, source, threads=8),
        "loader, 8 processes": partial(load, source, workers=8),
        "torch loader, 2 processes": lambda: exhaust(torch_loader),
        "packed, 1 thread": partial(load, read_packed, threads=1, seed=0),
        "packed, 2 threads": partial(load, read_packed, seed=0),
    }
    rows: dict[str, Any] = take_turns(ways, config.rounds)
    for row in rows.values():
        row["images_per_second"] = round(len(source) / row["seconds"], 1)
    report = {
        "environment": environment(),
        "data": Path(config.data).name,
        "count": len(source),
        "enlarge": config.enlarge,
        "batch_size": config.batch_size,
        "cores": decoding.cores(),
        "ways": rows,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
