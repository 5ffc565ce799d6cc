"""Inception v3 in plain torch, under torchvision's keys."""

from pathlib import Path

import numpy as np
import torch
from networks import from_torch, randomize_norms, to_torch
from torch import nn
from torch.nn import functional

from references.contract import Build, Reference

A = """
    branch1x1 x 64 1x1
    branch5x5_1 x 48 1x1
    branch5x5_2 branch5x5_1 64 5x5
    branch3x3dbl_1 x 64 1x1
    branch3x3dbl_2 branch3x3dbl_1 96 3x3
    branch3x3dbl_3 branch3x3dbl_2 96 3x3
    branch_pool average {} 1x1
"""
B = """
    branch3x3 x 384 3x3/2
    branch3x3dbl_1 x 64 1x1
    branch3x3dbl_2 branch3x3dbl_1 96 3x3
    branch3x3dbl_3 branch3x3dbl_2 96 3x3/2
"""
C = """
    branch1x1 x 192 1x1
    branch7x7_1 x {0} 1x1
    branch7x7_2 branch7x7_1 {0} 1x7
    branch7x7_3 branch7x7_2 192 7x1
    branch7x7dbl_1 x {0} 1x1
    branch7x7dbl_2 branch7x7dbl_1 {0} 7x1
    branch7x7dbl_3 branch7x7dbl_2 {0} 1x7
    branch7x7dbl_4 branch7x7dbl_3 {0} 7x1
    branch7x7dbl_5 branch7x7dbl_4 192 1x7
    branch_pool average 192 1x1
"""
D = """
    branch3x3_1 x 192 1x1
    branch3x3_2 branch3x3_1 320 3x3/2
    branch7x7x3_1 x 192 1x1
    branch7x7x3_2 branch7x7x3_1 192 1x7
    branch7x7x3_3 branch7x7x3_2 192 7x1
    branch7x7x3_4 branch7x7x3_3 192 3x3/2
"""
E = """
    branch1x1 x 320 1x1
    branch3x3_1 x 384 1x1
    branch3x3_2a branch3x3_1 384 1x3
    branch3x3_2b branch3x3_1 384 3x1
    branch3x3dbl_1 x 448 1x1
    branch3x3dbl_2 branch3x3dbl_1 384 3x3
    branch3x3dbl_3a branch3x3dbl_2 384 1x3
    branch3x3dbl_3b branch3x3dbl_2 384 3x1
    branch_pool average 192 1x1
"""
MIXED = {
    "Mixed_5b": A.format(32),
    "Mixed_5c": A.format(64),
    "Mixed_5d": A.format(64),
    "Mixed_6a": B,
    "Mixed_6b": C.format(128),
    "Mixed_6c": C.format(160),
    "Mixed_6d": C.format(160),
    "Mixed_6e": C.format(192),
    "Mixed_7a": D,
    "Mixed_7b": E,
    "Mixed_7c": E,
}
"""Each line: a unit, what it reads, its channels and kernel; ``/2`` is an unpadded stride."""


class TorchUnit(nn.Module):
    def __init__(self, inputs: int, features: int, kernel: str) -> None:
        super().__init__()
        shape, _, stride = kernel.partition("/")
        height, width = map(int, shape.split("x"))
        padding = (0, 0) if stride else (height // 2, width // 2)
        step = int(stride or 1)
        self.conv = nn.Conv2d(inputs, features, (height, width), step, padding, bias=False)
        self.bn = nn.BatchNorm2d(features, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.conv(x)))


class TorchMixed(nn.Module):
    def __init__(self, inputs: int, lines: str) -> None:
        super().__init__()
        self.lines = [line.split() for line in lines.strip().splitlines()]
        channels = {"x": inputs, "average": inputs}
        for name, source, features, kernel in self.lines:
            channels[name] = int(features)
            self.add_module(name, TorchUnit(channels[source], channels[name], kernel))
        sources = {source for _, source, *_ in self.lines}
        self.ends = [name for name, *_ in self.lines if name not in sources]
        self.channels = sum(channels[name] for name in self.ends)
        if "average" not in sources:
            self.ends.append("maximum")
            self.channels += inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = {"x": x, "average": functional.avg_pool2d(x, 3, 1, 1)}
        if "maximum" in self.ends:
            values["maximum"] = functional.max_pool2d(x, 3, 2)
        for name, source, *_ in self.lines:
            values[name] = self.get_submodule(name)(values[source])
        return torch.cat([values[name] for name in self.ends], 1)


class TorchInception(nn.Module):
    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.Conv2d_1a_3x3 = TorchUnit(3, 32, "3x3/2")
        self.Conv2d_2a_3x3 = TorchUnit(32, 32, "3x3/1")
        self.Conv2d_2b_3x3 = TorchUnit(32, 64, "3x3")
        self.Conv2d_3b_1x1 = TorchUnit(64, 80, "1x1")
        self.Conv2d_4a_3x3 = TorchUnit(80, 192, "3x3/1")
        channels = 192
        for name, lines in MIXED.items():
            block = TorchMixed(channels, lines)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(channels, num_classes)
        auxiliary = {"conv0": TorchUnit(768, 128, "1x1"), "conv1": TorchUnit(128, 768, "5x5/1")}
        self.AuxLogits = nn.ModuleDict({**auxiliary, "fc": nn.Linear(768, num_classes)})
        randomize_norms(self, torch.Generator().manual_seed(0))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.eval()

    @torch.no_grad()
    def stages(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(to_torch(pixels)))
        x = functional.max_pool2d(self.Conv2d_2b_3x3(x), 3, 2)
        x = functional.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        outputs = {"stem": x}
        for name in MIXED:
            x = outputs[name.replace("Mixed_", "mixed")] = self.get_submodule(name)(x)
        x = outputs["pool"] = x.mean((2, 3))
        return {key: from_torch(value) for key, value in {**outputs, "head": self.fc(x)}.items()}


def build(folder: Path) -> Reference:
    network = TorchInception()
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / "net.pth")
    return Reference(folder / "net.pth", network.stages)


REFERENCES: dict[tuple[str, str], Build] = {("inception_v3", "torchvision"): build}
