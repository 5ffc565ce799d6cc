"""Measure the time from a folder of images to a classifier, against usual loops; print JSON.

Each side is a process of its own, timed from its start to its end, including imports and
compilation. tljax runs `tljax train --recipe probe`, including the report. The loops in torch and
Keras freeze the same network, add a linear head and run every image through both for ten epochs of
Adam. Two of the ten epochs are run; the others are assumed to take as long as the second.

    python benchmarks/job.py FOLDER --weights resnet18.tv_in1k
"""

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from processes import python

from tljax.data.decode import decode
from tljax.data.examples import Source
from tljax.data.sources import open_splits
from tljax.pretrained import load_pretrained
from tljax.runtime.preprocess import Preprocess
from tljax.train.run_directory import environment

Peer = Literal["torch", "keras"]

EPOCHS_RUN = 2
"""Number of epochs of the loops that are run."""


@dataclass(frozen=True)
class Config:
    """Seconds from folder to classifier, and the accuracy reached."""

    data: Annotated[str, tyro.conf.Positional]
    """The data set, as in tljax train."""
    weights: str = "efficientnet_lite0.in1k"
    """Pretrained weights of an EfficientNet-Lite0 or a ResNet-18."""
    epochs: int = 10
    """Number of epochs of the loops."""
    batch_size: int = 32
    """Images per step."""
    learning_rate: float = 1e-3
    """Learning rate of Adam in the loops."""
    peers: tuple[Peer, ...] = ("torch", "keras")
    """The frameworks to compare with."""
    alone: Peer | None = None
    """Run only this side, in this process; set by the benchmark itself."""


class Images:
    """Batches of images in [0, 1], decoded every time they are read, as the loops do it."""

    def __init__(self, source: Source, preprocess: Preprocess, batch_size: int) -> None:
        self.source, self.preprocess, self.batch_size = source, preprocess, batch_size
        self.order = np.arange(len(source))

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.order[number * self.batch_size :][: self.batch_size]
        images = np.stack([decode(self.source.read(int(i)), self.preprocess) for i in rows])
        return images.astype(np.float32) / 255, self.source.labels[rows].astype(np.int64)


def in_tljax(config: Config) -> dict[str, Any]:
    """Run tljax as at a first start: without compiled programs or cached features."""
    script = Path(__file__).parents[1] / "scripts" / "train.py"
    options = ["--data", config.data, "--weights", config.weights, "--recipe", "probe"]
    options += ["--cache", "memory", "--json"]
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"}
        row = python(script, *options, "--workdir", f"{folder}/run", **cache)
    return {"val_top1": row["val_top1"], "ended": time.time()}


def in_torch(config: Config) -> dict[str, Any]:
    """Run the loop of torch's tutorial on transfer learning: the whole network in every epoch."""
    import torch
    from peers import TorchNetwork, torch_batches

    torch.manual_seed(0)
    pretrained = load_pretrained(config.weights)
    splits = open_splits(config.data)
    network = TorchNetwork(pretrained)
    head = network.new_head(len(splits.train.classes))
    features: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].detach()))

    def batches(source: Source) -> Iterator[list[torch.Tensor]]:
        images = Images(source, pretrained.model.preprocess, config.batch_size)
        if source is splits.train:
            np.random.default_rng().shuffle(images.order)
        return torch_batches(images)

    optimizer = torch.optim.Adam(head.parameters(), config.learning_rate)

    def train(run: Callable[[torch.Tensor], torch.Tensor], parts: Any) -> None:
        for inputs, labels in parts:
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(run(inputs), labels).backward()
            optimizer.step()

    @torch.inference_mode()
    def accuracy(run: Callable[[torch.Tensor], torch.Tensor], parts: Any) -> float:
        correct = [(run(inputs).argmax(1) == labels).float() for inputs, labels in parts]
        return float(torch.cat(correct).mean())

    @torch.no_grad()
    def extract(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        network(inputs)
        return labels

    seconds, top1 = [], 0.0
    for _ in range(EPOCHS_RUN):
        began = time.perf_counter()
        train(network, batches(splits.train))
        top1 = accuracy(network, batches(splits.val))
        seconds.append(time.perf_counter() - began)
    ended = time.time()
    # The other epochs have the same features: they are cached, to know the accuracy.
    cached = []
    for source in (splits.train, splits.val):
        features.clear()
        labels = torch.cat([extract(*batch) for batch in batches(source)])
        cached.append((torch.cat(features), labels))
    (inputs, labels), val = cached
    for _ in range(EPOCHS_RUN, config.epochs):
        parts = torch.randperm(len(labels), device=labels.device).split(config.batch_size)
        train(head, [(inputs[rows], labels[rows]) for rows in parts])
        top1 = accuracy(head, [val])
    return {"val_top1": round(top1, 4), "epochs": seconds, "ended": ended}


def in_keras(config: Config) -> dict[str, Any]:
    """Run the loop with Keras' `fit`, with random weights, so that no accuracy is reported."""
    from keras_networks import classifier, compiled, keras

    pretrained = load_pretrained(config.weights)
    preprocess = pretrained.model.preprocess
    splits = open_splits(config.data)
    network = classifier(pretrained.model.name, preprocess, len(splits.train.classes))
    for layer in network.layers[:-1]:
        layer.trainable = False
    network = compiled(network, keras.optimizers.Adam(config.learning_rate))

    class Data(Images, keras.utils.PyDataset):
        def __init__(self, source: Source) -> None:
            keras.utils.PyDataset.__init__(self, workers=os.cpu_count() or 1)
            Images.__init__(self, source, preprocess, config.batch_size)

    times: list[float] = []

    def record_time(*_: Any) -> None:
        times.append(time.perf_counter())

    network.fit(
        Data(splits.train),
        validation_data=Data(splits.val),
        epochs=EPOCHS_RUN,
        callbacks=[
            keras.callbacks.LambdaCallback(on_epoch_begin=record_time, on_epoch_end=record_time)
        ],
        verbose=0,  # pyright: ignore[reportArgumentType]
    )
    return {"val_top1": None, "epochs": np.diff(times)[::2].tolist(), "ended": time.time()}


def timed(config: Config, side: Literal["tljax"] | Peer) -> dict[str, Any]:
    """Run one side and return its accuracy and seconds."""
    began = time.time()
    alone = [__file__, *sys.argv[1:], "--alone", side]
    row = in_tljax(config) if side == "tljax" else python(*alone)
    seconds = row.pop("ended") - began
    if epochs := row.pop("epochs", None):
        row |= {"measured_seconds": round(seconds, 1), "second_epoch": round(epochs[1], 1)}
        seconds += (config.epochs - EPOCHS_RUN) * epochs[1]
    return row | {"seconds": round(seconds, 1)}


def main() -> None:
    config = tyro.cli(Config)
    if config.alone:
        print(json.dumps({"torch": in_torch, "keras": in_keras}[config.alone](config)))
        return
    rows: dict[str, dict[str, Any]] = {}
    for side in ("tljax", *config.peers):
        rows[side] = timed(config, side)
        print(f"{side}: {rows[side]}", file=sys.stderr, flush=True)
    for row in rows.values():
        row["tljax_is_times_as_fast"] = round(row["seconds"] / rows["tljax"]["seconds"], 2)
    report = {
        "environment": environment(),
        "data": Path(config.data).name,
        "weights": Path(config.weights).name,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "sides": rows,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
