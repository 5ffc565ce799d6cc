"""EfficientNet in timm, torchvision and transformers; Lite in plain torch, for the wheels."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import safetensors.torch
import torch
from networks import LITE, TorchLite, from_torch, to_torch
from transformers import EfficientNetConfig, EfficientNetForImageClassification

from references.contract import Build, Reference
from references.modules import outputs, randomize

VECTORS = ("pool", "head")


def _lite_stages(network: TorchLite, pixels: np.ndarray) -> dict[str, np.ndarray]:
    return {name: from_torch(value) for name, value in network.stages(to_torch(pixels)).items()}


def build_lite(name: str, folder: Path) -> Reference:
    network, path = TorchLite(name), folder / "net.pth"
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
    return Reference(path, partial(_lite_stages, network))


# --- timm ----------------------------------------------------------------------------------------


def timm(name: str, num_classes: int = 7) -> Any:
    """Build the network of timm, untouched."""
    if name.startswith("efficientnet_lite"):
        name = f"tf_{name}"
    name = name.removeprefix("timm_")
    return oracles.load("timm").create_model(name, num_classes=num_classes)


def build_timm(name: str, folder: Path) -> Reference:
    torch.manual_seed(0)
    network = timm(name)
    randomize(network)
    folder.mkdir(parents=True)
    safetensors.torch.save_file(network.state_dict(), folder / "net.safetensors")
    modules = {"stem": "bn1"}
    modules |= {f"stage{i + 1}": f"blocks.{i}" for i in range(len(network.blocks))}
    modules |= {"conv_head": "bn2", "pool": "global_pool", "head": "classifier"}
    return Reference(
        folder / "net.safetensors", partial(outputs, network, modules, vectors=VECTORS)
    )


# --- torchvision ---------------------------------------------------------------------------------


def torchvision(name: str, num_classes: int = 7) -> Any:
    """Build the network of torchvision, untouched."""
    name = name.removeprefix("tv_").replace("netv2", "net_v2")
    return getattr(oracles.load("torchvision").models, name)(num_classes=num_classes)


def build_torchvision(name: str, folder: Path) -> Reference:
    torch.manual_seed(0)
    network = torchvision(name)
    randomize(network)
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / "net.pth")
    last = len(network.features) - 1
    modules = {"stem": "features.0"}
    modules |= {f"stage{i}": f"features.{i}" for i in range(1, last)}
    modules |= {"conv_head": f"features.{last}", "pool": "avgpool", "head": "classifier"}
    return Reference(folder / "net.pth", partial(outputs, network, modules, vectors=VECTORS))


# --- transformers --------------------------------------------------------------------------------

# As google/efficientnet-b0 to b7 have them: width, depth, number of features, blocks that pad all
# sides because their input is odd at the size of the published weights.
TRANSFORMERS: dict[str, tuple[float, float, int, list[int]]] = {
    "tf_efficientnet_b0": (1.0, 1.0, 1280, []),
    "tf_efficientnet_b1": (1.0, 1.1, 1280, [16]),
    "tf_efficientnet_b2": (1.1, 1.2, 1408, [5, 8, 16]),
    "tf_efficientnet_b3": (1.2, 1.4, 1536, [5, 18]),
    "tf_efficientnet_b4": (1.4, 1.8, 1792, [6]),
    "tf_efficientnet_b5": (1.6, 2.2, 2048, [13, 27]),
    "tf_efficientnet_b6": (1.8, 2.6, 2304, [31]),
    "tf_efficientnet_b7": (2.0, 3.1, 2560, [18]),
}

# The padding of transformers is SAME only where the same blocks have odd inputs.
_SIZES = {
    "tf_efficientnet_b0": ((128, 128), (160, 96)),
    "tf_efficientnet_b1": ((80, 80), (112, 80)),
    "tf_efficientnet_b2": ((100, 100), (132, 68)),
    "tf_efficientnet_b3": ((108, 108), (140, 76)),
    "tf_efficientnet_b4": ((124, 124), (124, 92)),
    "tf_efficientnet_b5": ((104, 104), (136, 104)),
    "tf_efficientnet_b6": ((80, 80), (112, 80)),
    "tf_efficientnet_b7": ((88, 88), (120, 88)),
}


def transformer(name: str, num_classes: int = 7) -> EfficientNetForImageClassification:
    """Build the network of transformers, untouched."""
    width, depth, features, padding = TRANSFORMERS[name]
    config = EfficientNetConfig(
        width_coefficient=width,
        depth_coefficient=depth,
        hidden_dim=features,
        depthwise_padding=padding,
        num_labels=num_classes,  # pyright: ignore[reportCallIssue]
    )
    return EfficientNetForImageClassification(config)


def build_transformer(name: str, folder: Path) -> Reference:
    torch.manual_seed(0)
    network = transformer(name)
    randomize(network)
    network.save_pretrained(folder)
    _, depth, *_ = TRANSFORMERS[name]
    ends = np.cumsum([np.ceil(repeats * depth) for repeats in (1, 2, 2, 3, 3, 4, 1)]).astype(int)
    encoder = "efficientnet.encoder"
    modules = {"stem": "efficientnet.embeddings"}
    modules |= {f"stage{i}": f"{encoder}.blocks.{end - 1}" for i, end in enumerate(ends, start=1)}
    modules |= {"conv_head": f"{encoder}.top_activation"}
    modules |= {"pool": "efficientnet.pooler", "head": "classifier"}
    stages = partial(outputs, network, modules, vectors=VECTORS)
    return Reference(folder, stages, _SIZES[name])


# --- the table -----------------------------------------------------------------------------------


def _references(
    build: Callable[[str, Path], Reference], layout: str, *names: str
) -> dict[tuple[str, str], Build]:
    return {(name, layout): partial(build, name) for name in names}


TIMM = (
    *LITE,
    *(f"timm_efficientnet_lite{i}" for i in range(5)),
    *(f"efficientnet_b{i}" for i in range(6)),
    *(f"tf_efficientnet_b{i}" for i in range(8)),
    *(f"tf_efficientnetv2_{size}" for size in ("b0", "b1", "b2", "b3", "s", "m", "l")),
)
TORCHVISION = (
    *(f"efficientnet_b{i}" for i in range(5)),
    *(f"tv_efficientnet_b{i}" for i in range(5, 8)),
    *(f"tv_efficientnetv2_{size}" for size in ("s", "m", "l")),
)
REFERENCES: dict[tuple[str, str], Build] = {
    **_references(build_lite, "efficientnet_pytorch", *LITE),
    **_references(build_timm, "timm", *TIMM),
    **_references(build_torchvision, "torchvision", *TORCHVISION),
    **_references(build_transformer, "huggingface", *TRANSFORMERS),
}
