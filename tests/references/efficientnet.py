"""EfficientNet-Lite in plain torch, under the keys of both projects that publish it."""

from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from networks import LITE, TorchLite, from_torch, timm_state, to_torch

from references.contract import Build, Reference


def _stages(network: TorchLite, pixels: np.ndarray) -> dict[str, np.ndarray]:
    return {name: from_torch(value) for name, value in network.stages(to_torch(pixels)).items()}


def build(name: str, layout: str, folder: Path) -> Reference:
    network = TorchLite(name)
    folder.mkdir(parents=True)
    if layout == "timm":
        path = folder / "net.safetensors"
        safetensors.torch.save_file(dict(timm_state(network)), path)
    else:
        path = folder / "net.pth"
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
    return Reference(path, partial(_stages, network))


REFERENCES: dict[tuple[str, str], Build] = {
    (name, layout): partial(build, name, layout)
    for name in LITE
    for layout in ("efficientnet_pytorch", "timm")
}
