"""Networks with random weights: ours and the reference implementations to compare them with.

All batch norms are random: with mean 0 and variance 1 an error in the norm would not show.
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer

from tljax.models import Model, abstract_variables, apply, build_model
from tljax.models.resnet import VARIANTS
from tljax.pretrained import Card, Pretrained
from tljax.runtime.trees import flatten, unflatten
from tljax.runtime.types import Variables

run = jax.jit(
    apply, static_argnames=("model", "start", "stop", "batch_statistics", "noise", "capture")
)
"""Compiled `apply`; uncompiled it takes several times as long."""


def random_variables(model: Model, seed: int = 0) -> Variables:
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        match path.rpartition("/")[2]:
            case "kernel":
                fan_in = np.prod(shape[:-1])
                return rng.standard_normal(shape, np.float32) * np.sqrt(2 / fan_in, dtype="f")
            case "scale":
                return rng.uniform(0.5, 1.5, shape).astype(np.float32)
            case "var":
                return rng.uniform(0.5, 2, shape).astype(np.float32)
            case _:
                return rng.normal(0, 0.2, shape).astype(np.float32)

    skeleton = flatten(abstract_variables(model))
    drawn = unflatten({path: draw(path, leaf.shape) for path, leaf in skeleton.items()})
    return {"params": {}, "batch_stats": {}, **drawn}


def random_pretrained(name: str, num_classes: int = 7, seed: int = 0) -> Pretrained:
    model = build_model(name, num_classes)
    classes = tuple(f"kind {i}" for i in range(num_classes))
    card = Card(classes, "somewhere", "MIT", "0" * 64, "torchvision")
    return Pretrained(model, random_variables(model, seed), card)


def assert_same_variables(actual: Variables, expected: Variables) -> None:
    """Check that all variables are equal bit for bit."""
    left, right = flatten(actual), flatten(expected)
    assert left.keys() == right.keys()
    for path, leaf in right.items():
        np.testing.assert_array_equal(left[path], leaf, strict=True, err_msg=path)


def difference(actual: object, expected: object) -> float:
    """Return the largest absolute difference, relative to the largest expected value unless 0."""
    left, right = np.asarray(actual), np.asarray(expected)
    assert left.shape == right.shape
    return float(np.abs(left - right).max() / (np.abs(right).max() or 1))


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


def to_torch(pixels: object) -> torch.Tensor:
    """Convert NHWC to NCHW."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).contiguous()


def from_torch(value: torch.Tensor) -> np.ndarray:
    """Convert NCHW to NHWC, and leave vectors unchanged."""
    return (value.permute(0, 2, 3, 1) if value.ndim == 4 else value).detach().numpy()


@torch.no_grad()
def randomize_norms(network: nn.Module, generator: torch.Generator) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.2, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)  # pyright: ignore[reportCallIssue, reportOptionalMemberAccess]
            module.running_var.uniform_(0.5, 2, generator=generator)  # pyright: ignore[reportCallIssue, reportOptionalMemberAccess]


def torch_resnet(name: str, num_classes: int = 7, **config: bool) -> ResNetForImageClassification:
    """Build a ResNet of transformers, with weak residual branches, so that depth 152 is stable."""
    basic = name in ("resnet18", "resnet34")
    torch.manual_seed(0)
    network = ResNetForImageClassification(
        ResNetConfig(
            depths=list(VARIANTS[name].depths),
            hidden_sizes=[64, 128, 256, 512] if basic else [256, 512, 1024, 2048],
            layer_type="basic" if basic else "bottleneck",
            num_labels=num_classes,  # pyright: ignore[reportCallIssue]
            **config,  # pyright: ignore[reportArgumentType]
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    randomize_norms(network, generator)
    for module in network.modules():
        if isinstance(module, ResNetBasicLayer | ResNetBottleNeckLayer):
            last = module.layer[-1].get_submodule("normalization")  # pyright: ignore[reportCallIssue]
            nn.init.uniform_(last.get_parameter("weight"), 0.1, 0.3, generator)
    return network


def save_resnet(folder: Path, name: str, num_classes: int = 7, **config: bool) -> Path:
    """Save a network with random weights as transformers does."""
    torch_resnet(name, num_classes, **config).save_pretrained(folder)
    return folder


def torchvision_key(key: str) -> str:
    """Return torchvision's name of a tensor of a ResNet of transformers."""
    key = key.replace("classifier.1.", "fc.")
    key = key.replace("resnet.embedder.embedder.convolution", "conv1")
    key = key.replace("resnet.embedder.embedder.normalization", "bn1")
    key = re.sub(
        r"resnet\.encoder\.stages\.(\d)\.layers\.",
        lambda match: f"layer{int(match[1]) + 1}.",
        key,
    )
    key = re.sub(r"shortcut\.convolution", "downsample.0", key)
    key = re.sub(r"shortcut\.normalization", "downsample.1", key)
    key = re.sub(r"layer\.(\d)\.convolution", lambda match: f"conv{int(match[1]) + 1}", key)
    return re.sub(r"layer\.(\d)\.normalization", lambda match: f"bn{int(match[1]) + 1}", key)


LITE = {
    "efficientnet_lite0": ((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
    "efficientnet_lite1": ((1, 3, 3, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320)),
    "efficientnet_lite2": ((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
    "efficientnet_lite3": ((1, 3, 3, 5, 5, 6, 1), (24, 32, 48, 96, 136, 232, 384)),
    "efficientnet_lite4": ((1, 4, 4, 6, 6, 8, 1), (24, 32, 56, 112, 160, 272, 448)),
}
"""Depths and widths of the seven stages, as timm prints them."""


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: an odd zero comes last."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
        pads: list[int] = []
        for size in (input.shape[3], input.shape[2]):
            total = max((-(-size // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0], 0)
            total = max(total - size, 0)
            pads += [total // 2, total - total // 2]
        left, right, top, bottom = pads
        if left == right and top == bottom:  # saves a copy
            sides = (top, left)
            rest = (self.stride, sides, self.dilation, self.groups)
            return functional.conv2d(input, self.weight, self.bias, *rest)
        return super().forward(functional.pad(input, pads))


def _norm(features: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(features, eps=1e-3)


class TorchLiteBlock(nn.Module):
    def __init__(self, inputs: int, features: int, k: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.residual = stride == 1 and inputs == features
        if expansion > 1:
            self._expand_conv = SameConv(inputs, width, 1, bias=False)
            self._bn0 = _norm(width)
        self._depthwise_conv = SameConv(width, width, k, stride, groups=width, bias=False)
        self._bn1 = _norm(width)
        self._project_conv = SameConv(width, features, 1, bias=False)
        self._bn2 = _norm(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        if hasattr(self, "_expand_conv"):
            y = functional.relu6(self._bn0(self._expand_conv(y)))
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class TorchLite(nn.Module):
    """EfficientNet-Lite in torch, with the names of ``efficientnet_pytorch``."""

    def __init__(self, name: str, num_classes: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.depths, widths = LITE[name]
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2, bias=False), _norm(32)
        geometry = zip((3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1), strict=True)
        self._blocks = nn.ModuleList()
        for depth, (inputs, features), (k, stride) in zip(
            self.depths, pairwise((32, *widths)), geometry, strict=True
        ):
            expansion = 6 if len(self._blocks) else 1
            for i in range(depth):
                channels = features if i else inputs
                step = 1 if i else stride
                self._blocks.append(TorchLiteBlock(channels, features, k, step, expansion))
        self._conv_head, self._bn1 = SameConv(widths[-1], 1280, 1, bias=False), _norm(1280)
        self._fc = nn.Linear(1280, num_classes)
        randomize_norms(self, torch.Generator().manual_seed(0))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, TorchLiteBlock) and module.residual:
                nn.init.uniform_(module._bn2.weight, 0.1, 0.3)  # as in `torch_resnet`
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outputs(x)["head"]

    @torch.no_grad()
    def stages(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the outputs that correspond to the stages of our model."""
        return self.outputs(x)

    def outputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        outputs, blocks = {"stem": x}, iter(self._blocks)
        for stage, depth in enumerate(self.depths, start=1):
            for _ in range(depth):
                x = next(blocks)(x)
            outputs[f"stage{stage}"] = x
        x = outputs["conv_head"] = functional.relu6(self._bn1(self._conv_head(x)))
        x = outputs["pool"] = x.mean((2, 3))
        return outputs | {"head": self._fc(x)}


def timm_state(network: TorchLite) -> Mapping[str, torch.Tensor]:
    """Return the state with timm's names."""
    position = [
        (stage, block) for stage, depth in enumerate(network.depths) for block in range(depth)
    ]
    top = {"_conv_stem": "conv_stem", "_conv_head": "conv_head", "_fc": "classifier"}
    top |= {"_bn0": "bn1", "_bn1": "bn2"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    other = {"_expand_conv": "conv_pw", "_depthwise_conv": "conv_dw", "_project_conv": "conv_pwl"}
    other |= {"_bn0": "bn1", "_bn1": "bn2", "_bn2": "bn3"}
    state = {}
    for key, value in network.state_dict().items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            stage, block = position[int(match[1])]
            unit = (first if stage == 0 else other)[match[2]]
            state[f"blocks.{stage}.{block}.{unit}.{match[3]}"] = value
        else:
            unit, _, tensor = key.partition(".")
            state[f"{top[unit]}.{tensor}"] = value
    return state
