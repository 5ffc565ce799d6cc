"""Vision Transformers of timm."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import safetensors.torch
import torch
from networks import randomize_norms, to_torch
from torch import nn

from references.contract import Build, Reference, Shapes
from tljax.models.vit import VARIANTS


@torch.no_grad()
def randomize(network: nn.Module) -> None:
    """Draw norms, layer scales, biases, tokens and positions; zeros and ones hide errors."""
    generator = torch.Generator().manual_seed(0)
    randomize_norms(network, generator)
    for name, tensor in network.named_parameters():
        if name.endswith(("gamma", "lambda1")):
            tensor.uniform_(0.2, 0.6, generator=generator)
        elif (tensor.ndim == 1 and "norm" not in name) or any(x in name for x in ("token", "pos")):
            tensor.normal_(0, 0.2, generator=generator)


def timm_network(name: str, num_classes: int = 7, **arguments: Any) -> Any:
    timm: Any = oracles.load("timm")
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=num_classes, dynamic_img_size=True, **arguments)


@torch.no_grad()
def _timm_stages(network: Any, pixels: np.ndarray) -> dict[str, np.ndarray]:
    x = network.norm_pre(network._pos_embed(network.patch_embed(to_torch(pixels))))
    outputs = {"embed": x}
    for i, block in enumerate(network.blocks):
        x = outputs[f"block{i + 1}"] = block(x)
    x = outputs["norm"] = network.norm(x)
    x = outputs["pool"] = network.fc_norm(network.pool(x))
    outputs["head"] = network.head(x)
    assert torch.equal(outputs["head"], network(to_torch(pixels)))
    return {stage: value.numpy() for stage, value in outputs.items()}


def sizes(name: str) -> tuple[tuple[int, int], ...]:
    """Return two sizes: one of the native grid, and one of another grid, odd and not square."""
    variant = VARIANTS[name]
    return (variant.size, variant.size), (7 * variant.patch, 5 * variant.patch)


def from_timm(name: str, folder: Path, **arguments: Any) -> Reference:
    network = timm_network(name, **arguments).eval()
    randomize(network)
    folder.mkdir(parents=True)
    safetensors.torch.save_file(network.state_dict(), folder / "net.safetensors")
    return Reference(folder / "net.safetensors", partial(_timm_stages, network), sizes(name))


def timm_shapes(name: str) -> Shapes:
    with torch.device("meta"):
        network = timm_network(name)
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def is_large(name: str) -> bool:
    """Return True for more than 120 million parameters."""
    variant = VARIANTS[name]
    return 12 * variant.depth * variant.width**2 > 120e6


REFERENCES: dict[tuple[str, str], Build] = {
    (name, "timm"): partial(from_timm, name) for name in VARIANTS if not is_large(name)
}
SHAPES: dict[tuple[str, str], Callable[[], Shapes]] = {
    (name, "timm"): partial(timm_shapes, name) for name in VARIANTS if is_large(name)
}
