"""MobileNetV4 in timm."""

from functools import partial
from pathlib import Path

import oracles
import safetensors.torch
import torch

from references.contract import Build, Reference
from references.modules import outputs, randomize


def build(name: str, folder: Path) -> Reference:
    torch.manual_seed(0)
    network = oracles.load("timm").create_model(name, num_classes=7)
    randomize(network)
    folder.mkdir(parents=True)
    safetensors.torch.save_file(network.state_dict(), folder / "net.safetensors")
    modules = {"stem": "bn1"} | {f"stage{i + 1}": f"blocks.{i}" for i in range(4)}
    modules |= {"conv_head": "blocks.4", "pool": "global_pool", "hidden": "norm_head"}
    stages = partial(
        outputs, network, modules | {"head": "classifier"}, vectors=("pool", "hidden", "head")
    )
    return Reference(folder / "net.safetensors", stages)


REFERENCES: dict[tuple[str, str], Build] = {
    (f"mobilenetv4_conv_{size}", "timm"): partial(build, f"mobilenetv4_conv_{size}")
    for size in ("small", "medium", "large")
}
