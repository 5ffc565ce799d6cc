"""RegNet: the networks of torchvision, timm and transformers."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import oracles
import torch
from networks import randomize_norms
from torch import nn
from transformers import RegNetConfig, RegNetForImageClassification

from references.contract import Build, Reference, Shapes
from references.modules import outputs
from tljax.models.regnet import VARIANTS
from tljax.pretrained.catalog import TORCHVISION_NAMES

TORCHVISION = {ours: theirs for theirs, ours in TORCHVISION_NAMES.items() if "regnet" in ours}
LARGE = ("regnety_320", "regnety_640", "regnety_1280")  # above 120 million parameters

STAGES = {
    "torchvision": {
        "stem": "stem",
        **{f"stage{i}": f"trunk_output.block{i}" for i in range(1, 5)},
        "pool": "avgpool",
        "head": "fc",
    },
    "timm": {
        "stem": "stem",
        **{f"stage{i}": f"s{i}" for i in range(1, 5)},
        "pool": "head.global_pool",
        "head": "head.fc",
    },
    "huggingface": {
        "stem": "regnet.embedder",
        **{f"stage{i}": f"regnet.encoder.stages.{i - 1}" for i in range(1, 5)},
        "pool": "regnet.pooler",
        "head": "classifier",
    },
}
"""The module of each of our stages."""

_LAST_NORM = re.compile(r"(\.f\.c\.1|\.conv3\.bn|\.layer\.(2|3)\.normalization)$")
"""The norm at the end of a residual branch."""


def _torchvision(name: str, num_classes: int) -> nn.Module:
    regnet: Any = oracles.load("torchvision.models.regnet")
    from_init_params = regnet.BlockParams.from_init_params

    def computed_on_the_cpu(**parameters: Any) -> Any:
        with torch.device("cpu"):  # the widths cannot be computed on the meta device
            return from_init_params(**parameters)

    with mock.patch.object(regnet.BlockParams, "from_init_params", computed_on_the_cpu):
        return getattr(regnet, TORCHVISION[name])(num_classes=num_classes)


def _transformers(name: str, num_classes: int) -> nn.Module:
    depths, widths, group_width, *_ = VARIANTS[name]
    config = RegNetConfig(
        depths=depths,
        hidden_sizes=widths,
        groups_width=group_width,
        layer_type="x" if "regnetx" in name else "y",
        num_labels=num_classes,  # pyright: ignore[reportCallIssue]
    )
    return RegNetForImageClassification(config)


def _network(name: str, layout: str, num_classes: int = 7) -> nn.Module:
    torch.manual_seed(0)
    if layout == "torchvision":
        return _torchvision(name, num_classes)
    if layout == "huggingface":
        return _transformers(name, num_classes)
    timm: Any = oracles.load("timm")
    return timm.create_model(name, num_classes=num_classes)


def build(name: str, layout: str, folder: Path) -> Reference:
    network = _network(name, layout).eval()
    generator = torch.Generator().manual_seed(0)
    randomize_norms(network, generator)
    for key, module in network.named_modules():
        if _LAST_NORM.search(key):  # residual branches are weak, as in `torch_resnet`
            nn.init.uniform_(module.get_parameter("weight"), 0.1, 0.3, generator)
    stages = partial(outputs, network, STAGES[layout], vectors=("pool",))
    if isinstance(network, RegNetForImageClassification):
        network.save_pretrained(folder)
        return Reference(folder, stages)
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / "net.pth")
    return Reference(folder / "net.pth", stages)


def shapes(name: str, layout: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = _network(name, layout)
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


_PAIRS = [
    *((name, "torchvision") for name in TORCHVISION),
    *((name, layout) for name in VARIANTS for layout in ("timm", "huggingface")),
]
REFERENCES: dict[tuple[str, str], Build] = {
    pair: partial(build, *pair) for pair in _PAIRS if pair[0] not in LARGE
}
SHAPES: dict[tuple[str, str], Callable[[], Shapes]] = {
    pair: partial(shapes, *pair) for pair in _PAIRS if pair[0] in LARGE
}
