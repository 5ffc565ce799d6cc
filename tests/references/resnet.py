"""ResNet: the network of transformers; its relatives in plain torch, under torchvision's keys."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from networks import from_torch, randomize_norms, to_torch, torch_resnet, torchvision_key
from torch import nn

from references.contract import Build, Reference


def _transformers_stages(network: nn.Module, pixels: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        output = network(to_torch(pixels), output_hidden_states=True)
    names = ("stem", "layer1", "layer2", "layer3", "layer4")
    stages = dict(zip(names, map(from_torch, output.hidden_states), strict=True))
    return {**stages, "pool": stages["layer4"].mean((1, 2)), "head": output.logits.numpy()}


def _from_transformers(name: str, layout: str, folder: Path) -> Reference:
    network = torch_resnet(name)
    if layout == "huggingface":
        network.save_pretrained(folder)
        return Reference(folder, partial(_transformers_stages, network))
    folder.mkdir(parents=True)
    state = {torchvision_key(key): value for key, value in network.state_dict().items()}
    torch.save(state, folder / "net.pth")
    return Reference(folder / "net.pth", partial(_transformers_stages, network))


# --- ResNeXt, Wide ResNet and ResNet-D -----------------------------------------------------------


class Geometry(NamedTuple):
    """Depths; widths in layer1, inside a bottleneck (0: basic) and out; groups; a ResNet-D?"""

    depths: tuple[int, ...]
    inside: int
    out: int
    groups: int = 1
    d: bool = False


RELATIVES = {
    "resnext50_32x4d": Geometry((3, 4, 6, 3), 128, 256, 32),
    "resnext101_32x8d": Geometry((3, 4, 23, 3), 256, 256, 32),
    "resnext101_64x4d": Geometry((3, 4, 23, 3), 256, 256, 64),
    "wide_resnet50_2": Geometry((3, 4, 6, 3), 128, 256),
    "wide_resnet101_2": Geometry((3, 4, 23, 3), 128, 256),
    "resnet18d": Geometry((2, 2, 2, 2), 0, 64, d=True),
    "resnet34d": Geometry((3, 4, 6, 3), 0, 64, d=True),
    "resnet50d": Geometry((3, 4, 6, 3), 64, 256, d=True),
    "resnet101d": Geometry((3, 4, 23, 3), 64, 256, d=True),
    "resnet152d": Geometry((3, 8, 36, 3), 64, 256, d=True),
}


def _conv(inputs: int, out: int, k: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, out, k, stride, k // 2, groups=groups, bias=False)


class TorchBlock(nn.Module):
    def __init__(self, inputs: int, inside: int, out: int, stride: int, groups: int, d: bool):
        super().__init__()
        if not inside:
            convs = [_conv(inputs, out, 3, stride), _conv(out, out, 3)]
        else:
            spatial = _conv(inside, inside, 3, stride, groups)
            convs = [_conv(inputs, inside, 1), spatial, _conv(inside, out, 1)]
        for i, conv in enumerate(convs, start=1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(conv.out_channels))
        self.depth = len(convs)
        self.downsample = nn.Sequential()
        if inputs != out or stride > 1:
            if d:
                pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
                self.downsample.append(pool if stride > 1 else nn.Identity())
            self.downsample.append(_conv(inputs, out, 1, 1 if d else stride))
            self.downsample.append(nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = torch.relu(y) if i < self.depth else y
        return torch.relu(y + self.downsample(x))


class TorchResNet(nn.Module):
    """Residual branches are weak, as in `torch_resnet`."""

    def __init__(self, geometry: Geometry, num_classes: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        depths, inside, out, groups, d = geometry
        if d:
            first = (_conv(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU())
            second = (_conv(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
            self.conv1 = nn.Sequential(*first, *second, _conv(32, 64, 3))
        else:
            self.conv1 = _conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for layer, depth in enumerate(depths):
            blocks = nn.Sequential()
            for block in range(depth):
                stride = 2 if layer > 0 and block == 0 else 1
                widths = (inside << layer, out << layer)
                blocks.append(TorchBlock(inputs, *widths, stride, groups, d))
                inputs = out << layer
            self.add_module(f"layer{layer + 1}", blocks)
        self.fc = nn.Linear(inputs, num_classes)
        randomize_norms(self, torch.Generator().manual_seed(0))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, TorchBlock):
                nn.init.uniform_(getattr(module, f"bn{module.depth}").weight, 0.1, 0.3)
        self.eval()

    @torch.no_grad()
    def stages(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        x = torch.relu(self.bn1(self.conv1(to_torch(pixels))))
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        outputs = {"stem": x}
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = outputs[name] = self.get_submodule(name)(x)
        x = outputs["pool"] = x.mean((2, 3))
        return {key: from_torch(value) for key, value in {**outputs, "head": self.fc(x)}.items()}


def _from_torch(name: str, folder: Path) -> Reference:
    network = TorchResNet(RELATIVES[name])
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / "net.pth")
    return Reference(folder / "net.pth", network.stages)


REFERENCES: dict[tuple[str, str], Build] = {
    **{
        (name, layout): partial(_from_transformers, name, layout)
        for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
        for layout in ("torchvision", "huggingface")
    },
    **{
        (name, "timm" if geometry.d else "torchvision"): partial(_from_torch, name)
        for name, geometry in RELATIVES.items()
    },
}
