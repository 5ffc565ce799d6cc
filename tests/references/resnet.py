"""ResNet: the network of transformers, in its own files and under torchvision's keys."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from networks import from_torch, to_torch, torch_resnet, torchvision_key

from references.contract import Build, Reference
from tljax.models.resnet import DEPTHS

FAST = ("resnet18", "resnet50")


def _stages(network: torch.nn.Module, pixels: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        output = network(to_torch(pixels), output_hidden_states=True)
    names = ("stem", "layer1", "layer2", "layer3", "layer4")
    stages = dict(zip(names, map(from_torch, output.hidden_states), strict=True))
    return {**stages, "pool": stages["layer4"].mean((1, 2)), "head": output.logits.numpy()}


def build(name: str, layout: str, folder: Path) -> Reference:
    network = torch_resnet(name)
    if layout == "huggingface":
        network.save_pretrained(folder)
        return Reference(folder, partial(_stages, network))
    folder.mkdir(parents=True)
    state = {torchvision_key(key): value for key, value in network.state_dict().items()}
    torch.save(state, folder / "net.pth")
    return Reference(folder / "net.pth", partial(_stages, network))


REFERENCES: dict[tuple[str, str], Build] = {
    (name, layout): partial(build, name, layout)
    for name in DEPTHS
    for layout in ("torchvision", "huggingface")
}
