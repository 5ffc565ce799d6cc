"""BiT: the network of transformers, in its own files and under timm's keys."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from networks import from_torch, randomize_norms, to_torch
from transformers import BitConfig, BitForImageClassification
from transformers.models.bit.modeling_bit import BitPreActivationBottleneckLayer

from references.contract import Build, Reference

VARIANTS = {
    "resnetv2_50x1_bit": ((3, 4, 6, 3), 1),
    "resnetv2_50x3_bit": ((3, 4, 6, 3), 3),
    "resnetv2_101x1_bit": ((3, 4, 23, 3), 1),
    "resnetv2_101x3_bit": ((3, 4, 23, 3), 3),
    "resnetv2_152x2_bit": ((3, 8, 36, 3), 2),
    "resnetv2_152x4_bit": ((3, 8, 36, 3), 4),
}
"""Depths, and the multiplier of the width."""


def torch_bit(name: str, num_classes: int = 7) -> BitForImageClassification:
    """Build a network with weak residual branches, as in `torch_resnet`."""
    depths, width = VARIANTS[name]
    torch.manual_seed(0)
    config = BitConfig(
        depths=depths,
        embedding_size=64 * width,
        hidden_sizes=[256 * width, 512 * width, 1024 * width, 2048 * width],
        num_labels=num_classes,  # pyright: ignore[reportCallIssue]
    )
    network = BitForImageClassification(config).eval()
    generator = torch.Generator().manual_seed(0)
    randomize_norms(network, generator)
    for module in network.modules():
        if isinstance(module, BitPreActivationBottleneckLayer):
            torch.nn.init.uniform_(module.norm3.weight, 0.1, 0.3, generator)
    return network


def timm_key(key: str) -> str:
    """Return timm's name of a tensor of transformers."""
    key = key.replace("bit.embedder.convolution", "stem.conv").replace("classifier.1", "head.fc")
    key = re.sub(r"bit\.encoder\.stages\.(\d)\.layers", r"stages.\1.blocks", key)
    return key.replace("bit.norm", "norm")


def _stages(network: BitForImageClassification, pixels: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        output = network.bit(to_torch(pixels), output_hidden_states=True)
        features = output.pooler_output.flatten(1)
        head = network.classifier(features)
    names = ("stem", "layer1", "layer2", "layer3", "layer4", "norm", "pool", "head")
    values = (*output.hidden_states, output.last_hidden_state, features, head)
    return dict(zip(names, map(from_torch, values), strict=True))


def build(name: str, layout: str, folder: Path) -> Reference:
    network = torch_bit(name)
    if layout == "huggingface":
        network.save_pretrained(folder)
        return Reference(folder, partial(_stages, network))
    folder.mkdir(parents=True)
    state = {timm_key(key): value for key, value in network.state_dict().items()}
    state["head.fc.weight"] = state["head.fc.weight"][:, :, None, None]
    torch.save(state, folder / "net.pth")
    return Reference(folder / "net.pth", partial(_stages, network))


REFERENCES: dict[tuple[str, str], Build] = {
    (name, layout): partial(build, name, layout)
    for name in VARIANTS
    for layout in ("timm", "huggingface")
}
