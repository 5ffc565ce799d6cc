"""The networks of tljax in torch, and the function that times both in turns."""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageClassification

from tljax.models import Model
from tljax.pretrained import Pretrained, export
from tljax.pretrained.tables.layouts import LAYOUTS, layout_rules
from tljax.train import run_directory

# The tests import timm beside the CPU build of torch.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
import oracles
from networks import random_pretrained, to_torch

__all__ = [
    "TorchNetwork",
    "device",
    "environment",
    "finish",
    "random_pretrained",
    "stages_by_key",
    "take_turns",
    "torch_batches",
    "torch_pixels",
]


class TorchNetwork(torch.nn.Module):
    """The network of tljax in torch: pixels ``[n, 3, height, width]`` in [0, 1] to logits.

    In evaluation mode, channels last, on a GPU if there is one. No parameter requires a gradient.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, pretrained: Pretrained) -> None:
        super().__init__()
        preprocess = pretrained.model.preprocess
        if preprocess.channel_order != "rgb":
            raise SystemExit(
                f"{pretrained.model.name} takes BGR images: use a network that takes RGB"
            )
        self.register_buffer("mean", torch.tensor(preprocess.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(preprocess.std)[:, None, None])
        self.network = _same_weights(pretrained)
        self.eval().requires_grad_(requires_grad=False)
        self.to(device(), memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute the logits ``[n, classes]``."""
        output = self.network((pixels - self.mean) / self.std)
        return output if isinstance(output, torch.Tensor) else output.logits

    def new_head(self, classes: int) -> torch.nn.Linear:
        """Replace the last linear layer by a new one for ``classes``, and return the new one."""
        *_, (name, last) = (
            (name, part) for name, part in self.named_modules() if isinstance(part, torch.nn.Linear)
        )
        head = torch.nn.Linear(last.in_features, classes).to(device())
        self.set_submodule(name, head)
        return head


def stages_by_key(model: Model) -> dict[str, str]:
    """Return the stage of every tensor of the torch network, by its key."""
    rules = layout_rules(model.name, _layout(model.name))
    return {rule.key: rule.path.split("/")[1] for rule in rules}


def _layout(name: str) -> str:
    for layout in ("timm", "huggingface"):
        if layout in LAYOUTS[name]:
            return layout
    raise SystemExit(f"no torch network of {name}: use one with weights of timm or transformers")


def _same_weights(pretrained: Pretrained) -> torch.nn.Module:
    layout = _layout(pretrained.model.name)
    with tempfile.TemporaryDirectory() as folder:
        if layout == "huggingface":
            export(Path(folder), pretrained, layout)
            return AutoModelForImageClassification.from_pretrained(folder)
        export(Path(folder, "net.pth"), pretrained, layout)
        config = LAYOUTS[pretrained.model.name][layout].config
        assert config is not None
        network = oracles.load("timm").create_model(
            config(pretrained.model.name)["architecture"], num_classes=pretrained.model.num_classes
        )
        network.load_state_dict(torch.load(Path(folder, "net.pth")))
        return network


def device() -> torch.device:
    """Return the device of torch."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def torch_pixels(images: np.ndarray) -> torch.Tensor:
    """Convert images ``[n, height, width, 3]`` to the layout and device of torch."""
    return to_torch(images).to(device(), memory_format=torch.channels_last)


def torch_batches(batches: Any) -> Iterator[list[torch.Tensor]]:
    """Read batches ``([n, height, width, 3], [n])`` in processes of torch, and move them to it."""
    cores = os.cpu_count() or 1
    for images, labels in torch.utils.data.DataLoader(batches, batch_size=None, num_workers=cores):
        pixels = images.permute(0, 3, 1, 2)
        yield [pixels.to(device(), memory_format=torch.channels_last), labels.to(device())]


def environment() -> dict[str, str]:
    """Return the versions and devices of both sides."""
    return {
        **run_directory.environment(),
        "torch": torch.__version__,
        "torch_device": str(device()),
    }


def finish() -> None:
    """Wait until the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(work: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Time functions in turns, so that noise on the machine affects all of them alike.

    Args:
        work: functions that return when their work is done.
        rounds: number of timed calls of each, after a first call that compiles.

    Returns:
        For each function the seconds of the first call, and the median and minimum of the others.
    """
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for i in range(rounds + 1):
        for name, call in work.items():
            began = time.perf_counter()
            call()
            elapsed = time.perf_counter() - began
            print(f"{name}: {elapsed:.2f} s", file=sys.stderr, flush=True)
            if i:
                seconds[name].append(elapsed)
            else:
                first[name] = round(elapsed, 3)
    return {
        name: {
            "first_call_seconds": first[name],
            "seconds": round(statistics.median(times), 4),
            "fastest_seconds": round(min(times), 4),
        }
        for name, times in seconds.items()
    }
