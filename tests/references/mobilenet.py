"""MobileNets: transformers' own networks, and plain torch under torchvision's keys and timm's."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from networks import SameConv, from_torch, randomize_norms, to_torch
from torch import nn
from transformers import (
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
)
from transformers.models.mobilenet_v2.modeling_mobilenet_v2 import (
    MobileNetV2InvertedResidual,
    make_divisible,
)

from references.contract import Build, Reference


class Row(NamedTuple):
    """A block as the papers' tables list it; ``stage`` counts them as timm and we do."""

    stage: int
    kernel: int
    expansion: float
    width: int
    stride: int
    squeeze: bool = False
    activation: type[nn.Module] = nn.ReLU6


V1_WIDTHS = ((64,), (128, 128), (256, 256), (512,) * 6, (1024, 1024))
# Table 2 of Sandler et al.: expansion, width, number of blocks, stride of the first.
V2_TABLE = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
V2_ROWS = tuple(
    Row(stage, 3, expansion, width, 1 if i else stride)
    for stage, (expansion, width, depth, stride) in enumerate(V2_TABLE, start=1)
    for i in range(depth)
)
# Tables 1 and 2 of Howard et al. 2019: stage, kernel, width inside and out, SE, activation, stride.
V3_TABLES = {
    "large": """
        1 3  16  16 -  RE 1
        2 3  64  24 -  RE 2
        2 3  72  24 -  RE 1
        3 5  72  40 SE RE 2
        3 5 120  40 SE RE 1
        3 5 120  40 SE RE 1
        4 3 240  80 -  HS 2
        4 3 200  80 -  HS 1
        4 3 184  80 -  HS 1
        4 3 184  80 -  HS 1
        5 3 480 112 SE HS 1
        5 3 672 112 SE HS 1
        6 5 672 160 SE HS 2
        6 5 960 160 SE HS 1
        6 5 960 160 SE HS 1""",
    "small": """
        1 3  16  16 SE RE 2
        2 3  72  24 -  RE 2
        2 3  88  24 -  RE 1
        3 5  96  40 SE HS 2
        3 5 240  40 SE HS 1
        3 5 240  40 SE HS 1
        4 5 120  48 SE HS 1
        4 5 144  48 SE HS 1
        5 5 288  96 SE HS 2
        5 5 576  96 SE HS 1
        5 5 576  96 SE HS 1""",
}


def v3_rows(size: str) -> tuple[Row, ...]:
    rows, inputs = [], 16
    for line in V3_TABLES[size].split("\n")[1:]:
        stage, kernel, inside, out, squeeze, activation, stride = line.split()
        kind = nn.ReLU if activation == "RE" else nn.Hardswish
        expansion = int(inside) / inputs
        rows.append(
            Row(int(stage), int(kernel), expansion, int(out), int(stride), squeeze == "SE", kind)
        )
        inputs = int(out)
    return tuple(rows)


class Geometry(NamedTuple):
    same: bool
    epsilon: float

    def unit(
        self,
        inputs: int,
        outputs: int,
        k: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] = nn.Identity,
    ) -> nn.Sequential:
        size = {"stride": stride, "groups": groups, "bias": False}
        if self.same:
            conv = SameConv(inputs, outputs, k, **size)
        else:
            conv = nn.Conv2d(inputs, outputs, k, padding=k // 2, **size)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=self.epsilon), activation())


class Squeeze(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        squeezed = make_divisible(width / 4)  # pyright: ignore[reportArgumentType]
        self.fc1, self.fc2 = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * nn.functional.hardsigmoid(self.fc2(self.fc1(mean).relu()))


class Block(nn.Module):
    """An inverted residual; ``block`` is as torchvision's version 3 has it."""

    def __init__(self, inputs: int, outputs: int, row: Row, geometry: Geometry) -> None:
        super().__init__()
        width = make_divisible(inputs * row.expansion)  # pyright: ignore[reportArgumentType]
        self.row, self.residual = row, row.stride == 1 and inputs == outputs
        act = row.activation
        parts: dict[str, nn.Module] = {}
        if row.expansion > 1:
            parts["expand"] = geometry.unit(inputs, width, activation=act)
        parts["depthwise"] = geometry.unit(width, width, row.kernel, row.stride, width, act)
        if row.squeeze:
            parts["squeeze"] = Squeeze(width)
        parts["project"] = geometry.unit(width, outputs)
        self.parts, self.block = tuple(parts), nn.Sequential(*parts.values())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class Separable(nn.Module):
    """A block of version 1."""

    def __init__(self, inputs: int, outputs: int, row: Row, geometry: Geometry) -> None:
        super().__init__()
        self.row, self.parts = row, ("depthwise", "pointwise")
        self.block = nn.Sequential(
            geometry.unit(inputs, inputs, 3, row.stride, inputs, nn.ReLU6),
            geometry.unit(inputs, outputs, activation=nn.ReLU6),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


class TorchMobileNet(nn.Module):
    """Any of them; the attributes are named as torchvision's version 3."""

    def __init__(self, name: str, num_classes: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = int(name[-3:]) / 100
        version = int(name.partition("mobilenetv")[2][0])
        same = name.startswith("tf_")
        geometry = Geometry(same, 1e-3 if same or name.startswith("tv_") else 1e-5)

        def scaled(features: float) -> int:
            return make_divisible(features * width)  # pyright: ignore[reportArgumentType]

        size = "large" if "large" in name else "small"
        rows = {
            1: tuple(
                Row(stage, 3, 1, out, 2 if i == 0 and stage > 1 else 1)
                for stage, widths in enumerate(V1_WIDTHS, start=1)
                for i, out in enumerate(widths)
            ),
            2: V2_ROWS,
            3: v3_rows(size),
        }[version]
        act = nn.Hardswish if version == 3 else nn.ReLU6
        inputs = 16 if version == 3 else scaled(32)
        self.features = nn.Sequential(geometry.unit(3, inputs, 3, 2, activation=act))
        for row in rows:
            block = Separable if version == 1 else Block
            self.features.append(block(inputs, scaled(row.width), row, geometry))
            inputs = scaled(row.width)
        if version > 1:
            last = {"large": scaled(960), "small": scaled(576)}[size]
            last = max(1280, scaled(1280)) if version == 2 else last
            self.features.append(geometry.unit(inputs, last, activation=act))
            inputs = last
        hidden = []
        if version == 3:
            outputs = {"large": 1280, "small": 1024}[size]
            hidden = [nn.Linear(inputs, outputs), nn.Hardswish(), nn.Dropout(0.2)]
            inputs = outputs
        self.classifier = nn.Sequential(*hidden, nn.Linear(inputs, num_classes))
        randomize_norms(self, torch.Generator().manual_seed(0))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, Block) and module.residual:
                # as in `torch_resnet`
                last = module.block[-1].get_submodule("1")
                nn.init.uniform_(last.get_parameter("weight"), 0.1, 0.3)
        self.eval()

    @torch.no_grad()
    def stages(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the output of every stage of ours."""
        outputs = {}
        for i, layer in enumerate(self.features):
            x = layer(x)
            if isinstance(layer, Block | Separable):
                outputs[f"stage{layer.row.stage}"] = x
            else:
                outputs["conv_head" if i else "stem"] = x
        x = outputs["pool"] = x.mean((2, 3))
        if len(self.classifier) > 1:
            x = outputs["hidden"] = self.classifier[:3](x)
        return outputs | {"head": self.classifier[-1](x)}


def torchvision_state(network: TorchMobileNet) -> dict[str, torch.Tensor]:
    """Version 3 as it is; version 2 has no unit for the projection, and a dropout at the end."""
    state = network.state_dict()
    if len(network.classifier) > 1:
        return state
    renamed = {}
    for key, value in state.items():
        match key.split("."):
            case ["features", i, "block", part, *unit]:
                block = network.features.get_submodule(f"{i}.block")
                if int(part) == sum(1 for _ in block.children()) - 1:
                    part, unit = str(int(part) + int(unit[0])), unit[1:]
                renamed[".".join(["features", i, "conv", part, *unit])] = value
            case ["classifier", _, tensor]:
                renamed[f"classifier.1.{tensor}"] = value
            case _:
                renamed[key] = value
    return renamed


def timm_state(network: TorchMobileNet) -> dict[str, torch.Tensor]:
    """Under timm's names, the hidden layer as a convolution."""
    names = {"features.0.0": "conv_stem", "features.0.1": "bn1"}
    stage = position = 0
    blocks = [layer for layer in network.features if isinstance(layer, Block | Separable)]
    for i, block in enumerate(blocks, start=1):
        position = position + 1 if block.row.stage == stage else 0
        stage = block.row.stage
        inner = _timm_block(block).items()
        names |= {f"features.{i}.{k}": f"blocks.{stage - 1}.{position}.{v}" for k, v in inner}
    has_hidden = len(network.classifier) > 1
    last = f"features.{len(blocks) + 1}"
    if has_hidden:
        names |= {f"{last}.0": f"blocks.{stage}.0.conv", f"{last}.1": f"blocks.{stage}.0.bn1"}
        names |= {"classifier.0": "conv_head", "classifier.3": "classifier"}
    else:
        names |= {f"{last}.0": "conv_head", f"{last}.1": "bn2", "classifier.0": "classifier"}
    state = {}
    for key, value in network.state_dict().items():
        ours, _, tensor = key.rpartition(".")
        state[f"{names[ours]}.{tensor}"] = value
    if has_hidden:
        state["conv_head.weight"] = state["conv_head.weight"][..., None, None]
    return state


def _timm_block(block: Block | Separable) -> dict[str, str]:
    last = "conv_pwl" if "expand" in block.parts else "conv_pw"
    convs = {"expand": "conv_pw", "depthwise": "conv_dw", "project": last, "pointwise": last}
    names, norms = {}, 0
    for i, part in enumerate(block.parts):
        if part == "squeeze":
            names |= {f"block.{i}.fc1": "se.conv_reduce", f"block.{i}.fc2": "se.conv_expand"}
        else:
            norms += 1
            names |= {f"block.{i}.0": convs[part], f"block.{i}.1": f"bn{norms}"}
    return names


def _stages(network: TorchMobileNet, pixels: np.ndarray) -> dict[str, np.ndarray]:
    return {name: from_torch(value) for name, value in network.stages(to_torch(pixels)).items()}


def build(name: str, layout: str, folder: Path) -> Reference:
    network = TorchMobileNet(name)
    folder.mkdir(parents=True)
    state = timm_state(network) if layout == "timm" else torchvision_state(network)
    torch.save(state, folder / "net.pth")
    return Reference(folder / "net.pth", partial(_stages, network))


# --- transformers --------------------------------------------------------------------------------

Transformer = MobileNetV1ForImageClassification | MobileNetV2ForImageClassification


def transformer(name: str, num_classes: int = 7) -> Transformer:
    """Build the network of transformers with random weights."""
    torch.manual_seed(0)
    width = int(name[-3:]) / 100
    settings = {"depth_multiplier": width, "num_labels": num_classes}
    if "v1" in name:
        network = MobileNetV1ForImageClassification(MobileNetV1Config(**settings))
    else:
        network = MobileNetV2ForImageClassification(MobileNetV2Config(**settings))
    generator = torch.Generator().manual_seed(0)
    randomize_norms(network, generator)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, MobileNetV2InvertedResidual) and module.use_residual:
            last = module.reduce_1x1.get_submodule("normalization")
            nn.init.uniform_(last.get_parameter("weight"), 0.1, 0.3)
    return network.eval()


def _transformer_stages(network: Transformer, pixels: np.ndarray) -> dict[str, np.ndarray]:
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, module: nn.Module) -> None:
        module.register_forward_hook(
            lambda _module, _inputs, output: outputs.update({name: output})
        )

    base = network.base_model
    if isinstance(network, MobileNetV1ForImageClassification):
        keep("stem", base.conv_stem)
        ends = np.cumsum([len(widths) for widths in V1_WIDTHS]) * 2
    else:
        keep("stem", base.conv_stem.first_conv)
        keep("stage1", base.conv_stem)
        ends = np.cumsum([depth for _, _, depth, _ in V2_TABLE])[1:] - 1
        keep("conv_head", base.conv_1x1)
    first = 1 if "v1" in network.config.model_type else 2
    for stage, end in enumerate(ends, start=first):
        keep(f"stage{stage}", base.layer[end - 1])
    with torch.no_grad():
        outputs["head"] = network(to_torch(pixels)).logits
    last = outputs.get("conv_head", outputs.get("stage5"))
    assert last is not None
    outputs["pool"] = last.mean((2, 3))
    order = sorted(outputs, key=lambda name: _ORDER.index(name.rstrip("0123456789")))
    return {name: from_torch(outputs[name]) for name in order}


_ORDER = ("stem", "stage", "conv_head", "pool", "head")


def build_transformer(name: str, folder: Path) -> Reference:
    network = transformer(name)
    network.save_pretrained(folder)
    return Reference(folder, partial(_transformer_stages, network))


_TIMM = (
    "mobilenetv1_100",
    *(f"mobilenetv2_{width}" for width in ("050", "100", "140")),
    *(f"{tf}mobilenetv3_large_{width}" for tf in ("", "tf_") for width in ("075", "100")),
    *(f"{tf}mobilenetv3_small_{width}" for tf in ("", "tf_") for width in ("075", "100")),
    "mobilenetv3_small_050",
)
_TORCHVISION = (
    *(f"mobilenetv2_{width}" for width in ("050", "100", "140")),
    "tv_mobilenetv3_large_100",
    "tv_mobilenetv3_small_100",
)
_HUGGINGFACE = (
    *(f"tf_mobilenetv1_{width}" for width in ("025", "050", "075", "100")),
    *(f"tf_mobilenetv2_{width}" for width in ("035", "050", "075", "100", "130", "140")),
)

REFERENCES: dict[tuple[str, str], Build] = {
    **{(name, "timm"): partial(build, name, "timm") for name in _TIMM},
    **{(name, "torchvision"): partial(build, name, "torchvision") for name in _TORCHVISION},
    **{(name, "huggingface"): partial(build_transformer, name) for name in _HUGGINGFACE},
}
