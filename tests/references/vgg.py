"""VGG in plain torch, under torchvision's keys and timm's."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from networks import from_torch, randomize_norms, to_torch
from torch import nn

from references.contract import Build, Reference

# By the tables of the paper: width of every convolution, 0 for a pooling.
_ROWS = {
    "vgg11": "64 0 128 0 256 256 0 512 512 0 512 512 0",
    "vgg13": "64 64 0 128 128 0 256 256 0 512 512 0 512 512 0",
    "vgg16": "64 64 0 128 128 0 256 256 256 0 512 512 512 0 512 512 512 0",
    "vgg19": "64 64 0 128 128 0 256 256 256 256 0 512 512 512 512 0 512 512 512 512 0",
}


class TorchVgg(nn.Module):
    """VGG under torchvision's names."""

    def __init__(self, name: str, num_classes: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers, inputs = [], 3
        for width in map(int, _ROWS[name.removesuffix("_bn")].split()):
            if width:
                norm = [nn.BatchNorm2d(width)] if name.endswith("_bn") else []
                layers += [nn.Conv2d(inputs, width, 3, padding=1), *norm, nn.ReLU()]
                inputs = width
            else:
                layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        hidden = [nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096)]
        self.classifier = nn.Sequential(
            *hidden, nn.ReLU(), nn.Dropout(), nn.Linear(4096, num_classes)
        )
        randomize_norms(self, torch.Generator().manual_seed(0))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        self.eval()

    @torch.no_grad()
    def stages(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the output of every stage of ours."""
        outputs: dict[str, torch.Tensor] = {}
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                outputs[f"block{len(outputs) + 1}"] = x
        pooled = self.avgpool(x)
        outputs["pool"] = pooled.permute(0, 2, 3, 1).flatten(1)
        outputs["fc1"] = self.classifier[:3](pooled.flatten(1))
        outputs["fc2"] = self.classifier[3:6](outputs["fc1"])
        return outputs | {"head": self.classifier[6](outputs["fc2"])}


def timm_state(network: TorchVgg) -> dict[str, torch.Tensor]:
    """Return the same tensors under timm's names, the hidden layers as convolutions."""
    state = {}
    for key, value in network.state_dict().items():
        match key.split("."):
            case ["classifier", "0", tensor]:
                state[f"pre_logits.fc1.{tensor}"] = value
            case ["classifier", "3", tensor]:
                state[f"pre_logits.fc2.{tensor}"] = value
            case ["classifier", _, tensor]:
                state[f"head.fc.{tensor}"] = value
            case _:
                state[key] = value
    state["pre_logits.fc1.weight"] = state["pre_logits.fc1.weight"].reshape(4096, 512, 7, 7)
    state["pre_logits.fc2.weight"] = state["pre_logits.fc2.weight"].reshape(4096, 4096, 1, 1)
    return state


def _stages(network: TorchVgg, pixels: np.ndarray) -> dict[str, np.ndarray]:
    return {name: from_torch(value) for name, value in network.stages(to_torch(pixels)).items()}


def build(name: str, layout: str, folder: Path) -> Reference:
    network = TorchVgg(name)
    folder.mkdir(parents=True)
    state = network.state_dict() if layout == "torchvision" else timm_state(network)
    torch.save(state, folder / "net.pth")
    # Maps of less and of more than the 7x7 that they are pooled to.
    return Reference(folder / "net.pth", partial(_stages, network), ((129, 97), (289, 263)))


REFERENCES: dict[tuple[str, str], Build] = {
    (name, layout): partial(build, name, layout)
    for name in (*_ROWS, *(f"{row}_bn" for row in _ROWS))
    for layout in ("torchvision", "timm")
}
