"""ConvNeXt: the networks of timm, torchvision and transformers. keras.py has those of Keras."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import oracles
import torch
from networks import from_torch, randomize_norms, to_torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
)

from references.contract import Build, Reference, Shapes
from tljax.models.convnext import VARIANTS
from tljax.pretrained.tables.keras import keras as keras_rules

LARGE = ("large", "xlarge", "huge")  # above 120 million parameters

STAGES = {
    "timm": {
        "stem": "stem",
        **{f"stage{i}": f"stages.{i - 1}" for i in range(1, 5)},
        "pool": "head.global_pool",
        "norm": "head.norm",
        "head": "head.fc",
    },
    "torchvision": {
        "stem": "features.0",
        **{f"stage{i}": f"features.{2 * i - 1}" for i in range(1, 5)},
        "pool": "avgpool",
        "norm": "classifier.0",
        "head": "classifier.2",
    },
    "huggingface": {
        "stem": "{}.embeddings",
        **{f"stage{i}": f"{{}}.encoder.stages.{i - 1}" for i in range(1, 5)},
        "norm": "{}.layernorm",
        "head": "classifier",
    },
    "dinov3": {
        "stem": "model.stages.0.downsample_layers.1",
        **{f"stage{i}": f"model.stages.{i - 1}" for i in range(1, 5)},
        "pool": "pool",
        "norm": "layer_norm",
    },
}
"""The module of each of our stages, where there is one."""


def _network(name: str, layout: str, num_classes: int = 7) -> nn.Module:
    torch.manual_seed(0)
    if layout in ("timm", "torchvision"):
        library: Any = oracles.load({"torchvision": "torchvision.models"}.get(layout, layout))
        create = library.create_model if layout == "timm" else library.get_model
        return create(name, num_classes=num_classes)
    variant = VARIANTS[name]
    sizes: dict[str, Any] = {
        "depths": list(variant.depths),
        "hidden_sizes": [variant.width * 2**i for i in range(4)],
    }
    if layout == "dinov3":
        return DINOv3ConvNextModel(DINOv3ConvNextConfig(**sizes))
    sizes["num_labels"] = num_classes
    if variant.response_norm:
        return ConvNextV2ForImageClassification(ConvNextV2Config(**sizes))
    return ConvNextForImageClassification(ConvNextConfig(**sizes))


@torch.no_grad()
def _randomize(network: nn.Module) -> None:
    """Draw all parameters, so that each affects the output, and branches are weak."""
    generator = torch.Generator().manual_seed(0)
    randomize_norms(network, generator)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.2, generator=generator)
    for key, parameter in network.named_parameters():
        if key.endswith(("gamma", "layer_scale", "layer_scale_parameter")):
            parameter.uniform_(0.1, 0.3, generator=generator)
        if ".grn." in key:
            parameter.normal_(0, 0.2, generator=generator)


def _stages(
    network: nn.Module, modules: dict[str, str], pixels: np.ndarray
) -> dict[str, np.ndarray]:
    outputs: dict[str, torch.Tensor] = {}
    hooks = [
        network.get_submodule(module).register_forward_hook(
            lambda _module, _inputs, output, stage=stage: outputs.update({stage: output})
        )
        for stage, module in modules.items()
    ]
    with torch.no_grad():
        network(to_torch(pixels))
    for hook in hooks:
        hook.remove()
    outputs.setdefault("pool", outputs["stage4"].mean((2, 3)))
    if outputs["norm"].ndim == 3:  # DINOv3: the pooled features before those of the patches
        outputs["norm"] = outputs["norm"][:, 0]
    outputs |= {stage: outputs[stage].flatten(1) for stage in ("pool", "norm")}
    outputs.setdefault("head", outputs["norm"])
    return {stage: from_torch(outputs[stage]) for stage in STAGES["timm"]}


def build(name: str, layout: str, folder: Path) -> Reference:
    network = _network(name, layout).eval()
    _randomize(network)
    base = str(getattr(network, "base_model_prefix", ""))
    modules = {stage: module.format(base) for stage, module in STAGES[layout].items()}
    # Odd maps before each downsampling.
    reference = Reference(
        folder, partial(_stages, network, modules), sizes=((128, 128), (151, 109))
    )
    if layout in ("huggingface", "dinov3"):
        network.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        return reference
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / "net.pth")
    return reference._replace(weights=folder / "net.pth")


def shapes(name: str, layout: str) -> Shapes:
    with torch.device("meta"):
        network = _network(name, layout)
    state = network.state_dict()
    if layout == "dinov3":  # what `save_pretrained` writes
        state = {key.removeprefix("model."): tensor for key, tensor in state.items()}
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def keras_shapes(name: str) -> Shapes:
    """Build the network without allocating anything; its weights are in the order of the table."""
    weights: list[Any] = []

    def trace() -> None:
        size = name.partition("_")[2].title().replace("Xl", "XL")
        build = getattr(keras.applications, f"ConvNeXt{size}")
        weights.extend(build(weights=None, classes=7).weights)

    jax.eval_shape(trace)
    keys = [rule.key for rule in keras_rules(name)]
    return {key: tuple(weight.shape) for key, weight in zip(keys, weights, strict=True)}


_TORCHVISION = [f"convnext_{size}" for size in ("tiny", "small", "base", "large")]
_PAIRS = [
    *((name, layout) for name in VARIANTS for layout in ("timm", "huggingface")),
    *((name, layout) for name in _TORCHVISION for layout in ("torchvision", "dinov3")),
]
REFERENCES: dict[tuple[str, str], Build] = {
    pair: partial(build, *pair) for pair in _PAIRS if not pair[0].endswith(LARGE)
}
SHAPES: dict[tuple[str, str], Callable[[], Shapes]] = {
    **{pair: partial(shapes, *pair) for pair in _PAIRS if pair[0].endswith(LARGE)},
    **{
        (name, "keras"): partial(keras_shapes, name)
        for name in ("convnext_large", "convnext_xlarge")
    },
}
