"""Vision Transformers of timm, transformers and torchvision, and files that timm reads."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import safetensors.torch
import torch
import transformers
from networks import randomize_norms, to_torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from references.contract import Build, Reference, Shapes
from tljax.models.vit import VARIANTS


@torch.no_grad()
def randomize(network: nn.Module) -> None:
    """Draw norms, layer scales, biases, tokens and positions; zeros and ones hide errors."""
    generator = torch.Generator().manual_seed(0)
    randomize_norms(network, generator)
    for name, tensor in network.named_parameters():
        if name.endswith(("gamma", "lambda1", "gamma_1", "gamma_2")):
            tensor.uniform_(0.2, 0.6, generator=generator)
        elif (tensor.ndim == 1 and "norm" not in name and "ln" not in name) or re.search(
            r"token|pos|probe|latent|class_embedding", name
        ):
            tensor.normal_(0, 0.2, generator=generator)
    for name, tensor in network.named_parameters():
        if name.endswith("visual_projection.bias"):
            tensor.zero_()


def is_large(name: str) -> bool:
    """Return True for more than 120 million parameters."""
    variant = VARIANTS[name]
    return 12 * variant.depth * variant.width**2 > 120e6


def two_sizes(name: str) -> tuple[tuple[int, int], ...]:
    """Return the native size, and that of another grid, which is not square."""
    variant = VARIANTS[name]
    return (variant.size, variant.size), (7 * variant.patch, 5 * variant.patch)


def shapes_of(network: nn.Module) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


# --- timm ----------------------------------------------------------------------------------------


def timm_network(name: str, num_classes: int = 7, **arguments: Any) -> Any:
    timm: Any = oracles.load("timm")
    torch.manual_seed(0)
    if "dinov3" in name:
        arguments |= {"global_pool": "token"}
    return timm.create_model(name, num_classes=num_classes, dynamic_img_size=True, **arguments)


@torch.no_grad()
def timm_stages(network: Any, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Return the outputs of the stages of a network of timm."""
    rotary: dict[str, Any] = {}
    x = network._pos_embed(network.patch_embed(to_torch(pixels)))
    if isinstance(x, tuple):
        x, rotary["rope"] = x
    x = network.norm_pre(x)
    outputs = {"embed": x}
    for i, block in enumerate(network.blocks):
        x = outputs[f"block{i + 1}"] = block(x, **rotary)
    x = outputs["norm"] = network.norm(x)
    x = outputs["pool"] = network.fc_norm(network.pool(x))
    outputs["head"] = network.head(x)
    assert torch.equal(outputs["head"], network(to_torch(pixels)))
    return {stage: value.numpy() for stage, value in outputs.items()}


def from_timm(name: str, folder: Path) -> Reference:
    """Compare at the native size, and on another grid, which is not square."""
    network = timm_network(name).eval()
    randomize(network)
    folder.mkdir(parents=True)
    safetensors.torch.save_file(network.state_dict(), folder / "net.safetensors")
    return Reference(folder / "net.safetensors", partial(timm_stages, network), two_sizes(name))


def timm_shapes(name: str) -> Shapes:
    with torch.device("meta"):
        return shapes_of(timm_network(name))


TIMM = [name for name in VARIANTS if not name.startswith("hf_") and not name.endswith("_lc")]


# --- transformers --------------------------------------------------------------------------------


def _class_of(name: str) -> tuple[type[Any], type[Any], dict[str, Any]]:
    """Return the network and the configuration of transformers, and its settings."""
    variant = VARIANTS[name]
    sizes: dict[str, Any] = {
        "hidden_size": variant.width,
        "num_hidden_layers": variant.depth,
        "num_attention_heads": variant.heads,
        "image_size": variant.size,
        "patch_size": variant.patch,
        "num_labels": 7,
    }
    inner = {"intermediate_size": int(variant.width * variant.mlp_ratio)}
    t: Any = transformers
    if "dinov3" in name:
        gated = {"use_gated_mlp": True, "hidden_act": "silu"} if "plus" in name else {}
        settings = {**sizes, **inner, **gated, "num_register_tokens": 4}
        return t.DINOv3ViTModel, t.DINOv3ViTConfig, settings
    if "dinov2" in name:
        kind = "Dinov2WithRegisters" if "reg4" in name else "Dinov2"
        suffix = "ForImageClassification" if name.endswith("_lc") else "Model"
        return getattr(t, kind + suffix), getattr(t, f"{kind}Config"), sizes
    if "clip" in name:
        activation = {} if "quickgelu" in name else {"hidden_act": "gelu"}
        settings = {**sizes, **inner, **activation, "projection_dim": 7}
        return t.CLIPVisionModelWithProjection, t.CLIPVisionConfig, settings
    if "siglip" in name:
        tanh = name.startswith("hf_") or "so400m_patch16" in name
        activation = {} if tanh else {"hidden_act": "gelu"}
        return t.SiglipVisionModel, t.SiglipVisionConfig, {**sizes, **inner, **activation}
    if "distilled" in name:
        return t.DeiTForImageClassification, t.DeiTConfig, {**sizes, **inner}
    epsilon = {} if name.startswith("hf_") else {"layer_norm_eps": 1e-6}
    return t.ViTForImageClassification, t.ViTConfig, {**sizes, **inner, **epsilon}


def transformers_network(name: str) -> Any:
    network, config, settings = _class_of(name)
    torch.manual_seed(0)
    return network(config(**settings))


@torch.no_grad()
def _transformers_stages(network: Any, pixels: np.ndarray) -> dict[str, np.ndarray]:
    whole = hasattr(network, "embeddings")
    base = network if whole else getattr(network, network.base_model_prefix)
    modules = dict(base.named_modules())
    blocks = [m for key, m in modules.items() if re.fullmatch(r".*\blayers?\.\d+", key)]
    norm = next(modules[x] for x in ("layernorm", "post_layernorm", "norm") if x in modules)
    embed = modules.get("pre_layrnorm", modules["embeddings"])
    outputs: dict[str, torch.Tensor] = {}

    def keep(stage: str, _: Any, __: Any, output: Any) -> None:
        outputs[stage] = output[0] if isinstance(output, tuple) else output

    stages = {"embed": embed, **{f"block{i + 1}": block for i, block in enumerate(blocks)}}
    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in stages.items()]
    result = network(to_torch(pixels))
    for hook in hooks:
        hook.remove()
    tokens = outputs["norm"] = norm(outputs[f"block{len(blocks)}"])
    head = getattr(network, "classifier", getattr(network, "visual_projection", None))
    if type(network).__name__.startswith("Siglip"):
        outputs["pool"] = result.pooler_output
    elif isinstance(head, nn.Linear) and head.in_features > tokens.shape[-1]:
        prefix = 1 + getattr(network.config, "num_register_tokens", 0)
        outputs["pool"] = torch.cat((tokens[:, 0], tokens[:, prefix:].mean(1)), 1)
    else:
        outputs["pool"] = tokens[:, 0]
    outputs["head"] = outputs["pool"]
    if isinstance(head, nn.Linear):
        outputs["head"] = result.logits if "logits" in result else result.image_embeds
    elif "pooler_output" in result:
        torch.testing.assert_close(outputs["pool"], result.pooler_output)
    return {stage: value.numpy() for stage, value in outputs.items()}


def from_transformers(name: str, folder: Path) -> Reference:
    """Compare at the native size; for others transformers resizes positions in another way."""
    network = transformers_network(name).eval()
    randomize(network)
    network.save_pretrained(folder)
    sizes = two_sizes(name) if VARIANTS[name].positions == "rotary" else two_sizes(name)[:1]
    return Reference(folder, partial(_transformers_stages, network), sizes)


def transformers_shapes(name: str) -> Shapes:
    """Return the keys of files, which are older than those of the classes."""
    with torch.device("meta"):
        network = transformers_network(name)
    state = revert_weight_conversion(network, network.state_dict())
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


_ONLY_TIMM = re.compile(r"deit3|vit_.*reg4")
TRANSFORMERS = [name for name in VARIANTS if not _ONLY_TIMM.match(name)]

# --- torchvision ---------------------------------------------------------------------------------

TORCHVISION = {
    "vit_base_patch16_224": "vit_b_16",
    "vit_base_patch16_384": "vit_b_16",
    "vit_base_patch32_224": "vit_b_32",
    "vit_large_patch16_224": "vit_l_16",
}


def torchvision_network(name: str) -> Any:
    models: Any = oracles.load("torchvision.models")
    torch.manual_seed(0)
    return models.get_model(TORCHVISION[name], num_classes=7, image_size=VARIANTS[name].size)


@torch.no_grad()
def _torchvision_stages(network: Any, pixels: np.ndarray) -> dict[str, np.ndarray]:
    encoder, images = network.encoder, to_torch(pixels)
    tokens = network._process_input(images)
    tokens = torch.cat((network.class_token.expand(len(tokens), -1, -1), tokens), 1)
    x = tokens + encoder.pos_embedding
    outputs = {"embed": x}
    for i, layer in enumerate(encoder.layers):
        x = outputs[f"block{i + 1}"] = layer(x)
    outputs["norm"] = encoder.ln(x)
    outputs["pool"] = outputs["norm"][:, 0]
    outputs["head"] = network.heads(outputs["pool"])
    assert torch.equal(outputs["head"], network(images))
    return {stage: value.numpy() for stage, value in outputs.items()}


def from_torchvision(name: str, folder: Path) -> Reference:
    """Compare at the native size, the only one that torchvision allows."""
    network = torchvision_network(name).eval()
    randomize(network)
    torch.nn.init.normal_(network.heads.head.weight, std=0.05)
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / "net.pth")
    stages = partial(_torchvision_stages, network)
    return Reference(folder / "net.pth", stages, two_sizes(name)[:1])


def torchvision_shapes(name: str) -> Shapes:
    with torch.device("meta"):
        return shapes_of(torchvision_network(name))


def by_size(
    layouts: dict[str, tuple[Iterable[str], Callable[..., Reference], Callable[[str], Shapes]]],
) -> tuple[dict[tuple[str, str], Build], dict[tuple[str, str], Callable[[], Shapes]]]:
    """Return references for the networks that are small enough to run, and shapes for the others.

    Args:
        layouts: for each layout the names of its networks, and functions of a name.
    """
    references: dict[tuple[str, str], Build] = {}
    others: dict[tuple[str, str], Callable[[], Shapes]] = {}
    for layout, (names, build, shapes) in layouts.items():
        for name in names:
            if is_large(name):
                others[name, layout] = partial(shapes, name)
            else:
                references[name, layout] = partial(build, name)
    return references, others


REFERENCES, SHAPES = by_size(
    {
        "timm": (TIMM, from_timm, timm_shapes),
        "huggingface": (TRANSFORMERS, from_transformers, transformers_shapes),
        "torchvision": (TORCHVISION, from_torchvision, torchvision_shapes),
    }
)
