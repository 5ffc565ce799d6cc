"""The same networks in torch, and turns for all that is compared."""

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

# EfficientNet-Lite is not in transformers; the tests have it in plain torch.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from networks import TorchLite, random_pretrained, to_torch

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
    """Pixels ``[n, 3, height, width]`` in [0, 1] to logits, normalised like ours.

    Evaluation mode, channels last, on a GPU if there is one. Its parameters ask for no gradient.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, pretrained: Pretrained) -> None:
        super().__init__()
        preprocess = pretrained.model.preprocess
        if preprocess.channel_order != "rgb":
            raise SystemExit("only of networks that take RGB")
        self.register_buffer("mean", torch.tensor(preprocess.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(preprocess.std)[:, None, None])
        self.network = _same_weights(pretrained)
        self.eval().requires_grad_(requires_grad=False)
        self.to(device(), memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The logits ``[n, classes]``."""
        output = self.network((pixels - self.mean) / self.std)
        return output if isinstance(output, torch.Tensor) else output.logits

    def new_head(self, classes: int) -> torch.nn.Linear:
        """Puts a linear head of ``classes`` in the place of the last layer; to be trained."""
        *_, (where, old) = (
            (name, part) for name, part in self.named_modules() if isinstance(part, torch.nn.Linear)
        )
        head = torch.nn.Linear(old.in_features, classes).to(device())
        self.set_submodule(where, head)
        return head


def stages_by_key(model: Model) -> dict[str, str]:
    """The stage of every tensor of the torch network, by its key."""
    rules = layout_rules(model.name, _layout(model.name))
    return {rule.key: rule.path.split("/")[1] for rule in rules}


def _layout(name: str) -> str:
    for layout in ("huggingface", "efficientnet_pytorch"):
        if layout in LAYOUTS[name]:
            return layout
    raise SystemExit(f"there is no {name} in torch here")


def _same_weights(pretrained: Pretrained) -> torch.nn.Module:
    layout = _layout(pretrained.model.name)
    with tempfile.TemporaryDirectory() as folder:
        if layout == "huggingface":
            export(Path(folder), pretrained, layout)
            return AutoModelForImageClassification.from_pretrained(folder)
        network = TorchLite(pretrained.model.name, pretrained.model.num_classes)
        export(Path(folder, "net.pth"), pretrained, layout)
        network.load_state_dict(torch.load(Path(folder, "net.pth")))
        return network


def device() -> torch.device:
    """Where torch computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def torch_pixels(images: np.ndarray) -> torch.Tensor:
    """Images ``[n, height, width, 3]`` as torch takes them, where it computes."""
    return to_torch(images).to(device(), memory_format=torch.channels_last)


def torch_batches(batches: Any) -> Iterator[list[torch.Tensor]]:
    """Batches ``([n, height, width, 3], [n])`` read by torch's processes, put where it computes."""
    cores = os.cpu_count() or 1
    for images, labels in torch.utils.data.DataLoader(batches, batch_size=None, num_workers=cores):
        pixels = images.permute(0, 3, 1, 2)
        yield [pixels.to(device(), memory_format=torch.channels_last), labels.to(device())]


def environment() -> dict[str, str]:
    """Versions and devices of both sides."""
    return {
        **run_directory.environment(),
        "torch": torch.__version__,
        "torch_device": str(device()),
    }


def finish() -> None:
    """Waits for what a GPU still does."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(work: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each: the first call, which compiles, and the median of the others.

    One after the other, round by round, so that a noisy machine is noisy for all. Each must return
    only when its work is done.
    """
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for i in range(rounds + 1):
        for name, call in work.items():
            began = time.perf_counter()
            call()
            took = time.perf_counter() - began
            print(f"{name}: {took:.2f} s", file=sys.stderr, flush=True)
            if i:
                seconds[name].append(took)
            else:
                first[name] = round(took, 3)
    return {
        name: {
            "first_call_seconds": first[name],
            "seconds": round(statistics.median(times), 4),
            "fastest_seconds": round(min(times), 4),
        }
        for name, times in seconds.items()
    }
