"""Xception in plain torch, under Cadene's keys, which timm has."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from networks import from_torch, randomize_norms, to_torch
from torch import nn

from references.contract import Build, Reference


class TorchSeparable(nn.Module):
    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, features, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pointwise(self.conv1(x))


class TorchBlock(nn.Module):
    """The first block has no ReLU in front."""

    def __init__(self, *channels: int, first: bool = False) -> None:
        super().__init__()
        self.rep = nn.Sequential()
        for inputs, features in pairwise(channels):
            if len(self.rep) > 0 or not first:
                self.rep.append(nn.ReLU())
            self.rep.append(TorchSeparable(inputs, features)).append(nn.BatchNorm2d(features))
        self.last_norm = len(self.rep) - 1
        self.strides = channels[0] != channels[-1]
        if self.strides:
            self.rep.append(nn.MaxPool2d(3, 2, 1))
            self.skip = nn.Conv2d(channels[0], channels[-1], 1, 2, bias=False)
            self.skipbn = nn.BatchNorm2d(channels[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rep(x) + (self.skipbn(self.skip(x)) if self.strides else x)


class TorchXception(nn.Module):
    """Residual branches are weak, as in `torch_resnet`."""

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 64, 3, bias=False), nn.BatchNorm2d(64)
        self.block1 = TorchBlock(64, 128, 128, first=True)
        self.block2 = TorchBlock(128, 256, 256)
        self.block3 = TorchBlock(256, 728, 728)
        for i in range(4, 12):
            self.add_module(f"block{i}", TorchBlock(728, 728, 728, 728))
        self.block12 = TorchBlock(728, 728, 1024)
        self.conv3, self.bn3 = TorchSeparable(1024, 1536), nn.BatchNorm2d(1536)
        self.conv4, self.bn4 = TorchSeparable(1536, 2048), nn.BatchNorm2d(2048)
        self.fc = nn.Linear(2048, num_classes)
        randomize_norms(self, torch.Generator().manual_seed(0))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, TorchBlock):
                nn.init.uniform_(module.rep[module.last_norm].get_parameter("weight"), 0.1, 0.3)
        self.eval()

    @torch.no_grad()
    def stages(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        x = torch.relu(self.bn1(self.conv1(to_torch(pixels))))
        x = torch.relu(self.bn2(self.conv2(x)))
        outputs = {"stem": x}
        for i in range(1, 13):
            x = outputs[f"block{i}"] = self.get_submodule(f"block{i}")(x)
        x = torch.relu(self.bn3(self.conv3(x)))
        x = outputs["conv_head"] = torch.relu(self.bn4(self.conv4(x)))
        x = outputs["pool"] = x.mean((2, 3))
        return {key: from_torch(value) for key, value in {**outputs, "head": self.fc(x)}.items()}


def build(folder: Path) -> Reference:
    network = TorchXception()
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / "net.pth")
    return Reference(folder / "net.pth", network.stages)


REFERENCES: dict[tuple[str, str], Build] = {("xception", "timm"): build}
