"""Files of Vision Transformers in formats that timm converts: of open_clip and of Google."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import torch
from torch import nn

from references.contract import Reference, Shapes
from references.vit import (
    by_size,
    randomize,
    shapes_of,
    timm_network,
    timm_shapes,
    timm_stages,
    two_sizes,
)
from tljax.models.vit import AUGREG, CLIP, VARIANTS


def open_clip_arrays(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors of timm under the keys of open_clip."""
    names = {
        "patch_embed.proj": "conv1",
        "norm_pre": "ln_pre",
        "norm": "ln_post",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    arrays = {
        "visual.class_embedding": state["cls_token"][0, 0],
        "visual.positional_embedding": state["pos_embed"][0],
        "visual.proj": state["head.weight"].T,
    }
    for key, array in state.items():
        module, _, leaf = key.rpartition(".")
        start, layer = "visual.", module
        if module.startswith("blocks."):
            _, block, layer = module.split(".", 2)
            start = f"visual.transformer.resblocks.{block}."
        if layer == "attn.qkv":
            arrays[f"{start}attn.in_proj_{leaf}"] = array
        elif layer in names:
            arrays[f"{start}{names[layer]}.{leaf}"] = array
    return arrays


def newer_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors of an older file of Google under the keys of big_vision."""
    modules = {
        "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
        "LayerNorm_2": "LayerNorm_1",
        "MlpBlock_3": "MlpBlock_0",
        "Transformer/posembed_input/": "",
    }
    renamed = {}
    for key, array in arrays.items():
        for old, new in modules.items():
            key = key.replace(old, new)  # noqa: PLW2901
        renamed[key] = array
    return renamed


def big_vision_arrays(state: dict[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    """Return the tensors of timm's SigLIP under the keys of big_vision."""
    body = {key: x for key, x in state.items() if not key.startswith("attn_pool.")}
    arrays = newer_names(flax_arrays(body, heads))
    pool, start = "attn_pool", "MAPHead_0"
    width = state["pos_embed"].shape[-1]
    arrays[f"{start}/probe"] = state[f"{pool}.latent"]
    attention = f"{start}/MultiHeadDotProductAttention_0"
    for leaf in ("weight", "bias"):
        parts = state[f"{pool}.q.{leaf}"], *np.split(state[f"{pool}.kv.{leaf}"], 2)
        for part, x in zip(("query", "key", "value"), parts, strict=True):
            kernel = leaf == "weight"
            shape = (width, heads, -1) if kernel else (heads, -1)
            name = f"{attention}/{part}/{'kernel' if kernel else 'bias'}"
            arrays[name] = (x.T if kernel else x).reshape(shape)
    out = state[f"{pool}.proj.weight"].T.reshape(heads, -1, width)
    arrays |= {f"{attention}/out/kernel": out, f"{attention}/out/bias": state[f"{pool}.proj.bias"]}
    for leaf, key in (("scale", "weight"), ("bias", "bias")):
        arrays[f"{start}/LayerNorm_0/{leaf}"] = state[f"{pool}.norm.{key}"]
    for j in (0, 1):
        layer, dense = f"{pool}.mlp.fc{j + 1}", f"{start}/MlpBlock_0/Dense_{j}"
        arrays[f"{dense}/kernel"] = state[f"{layer}.weight"].T
        arrays[f"{dense}/bias"] = state[f"{layer}.bias"]
    return arrays


def siglip_network(name: str) -> Any:
    """Build the network of timm with the GELU of a variant; the authors' is that of tanh."""
    theirs = "hf_vit_so400m_patch14_siglip_384"
    timm_name = "vit_so400m_patch14_siglip_384" if name == theirs else name.removeprefix("hf_")
    return timm_network(timm_name, act_layer="gelu_tanh" if name.startswith("hf_") else None)


def from_open_clip(name: str, folder: Path) -> Reference:
    """Compare with what timm reads from the file."""
    network, written = timm_network(name).eval(), timm_network(name)
    randomize(written)
    written.head.bias.data.zero_()
    folder.mkdir(parents=True)
    arrays = open_clip_arrays({key: x.numpy() for key, x in written.state_dict().items()})
    state = {key: torch.from_numpy(np.ascontiguousarray(x)) for key, x in arrays.items()}
    torch.save(state, folder / "net.pt")
    convert = oracles.load("timm.models.vision_transformer").checkpoint_filter_fn
    network.load_state_dict(convert(state, network))
    return Reference(folder / "net.pt", partial(timm_stages, network), two_sizes(name))


def without_memory(shapes: Shapes) -> dict[str, np.ndarray]:
    """Return arrays of these shapes; the elements of each share their memory."""
    zero = np.zeros((), np.float32)
    return {key: np.broadcast_to(zero, shape) for key, shape in shapes.items()}


def open_clip_shapes(name: str) -> Shapes:
    arrays = open_clip_arrays(without_memory(timm_shapes(name)))
    return {key: array.shape for key, array in arrays.items()}


def read_by_timm(
    name: str, network: Any, written: nn.Module, arrays: Callable[..., Any], folder: Path
) -> Reference:
    """Write the tensors of a network of timm to an .npz, and compare with what timm reads from it.

    Args:
        name: name of the variant.
        network: network that reads the file.
        written: network of the same kind, whose tensors are randomized and written.
        arrays: function of tensors and the number of heads that renames them for the file.
        folder: new folder of the file.
    """
    randomize(written)
    folder.mkdir(parents=True)
    state = {key: tensor.numpy() for key, tensor in written.state_dict().items()}
    np.savez(folder / "net.npz", **arrays(state, VARIANTS[name].heads))
    with torch.no_grad():
        network.eval().load_pretrained(str(folder / "net.npz"))
    return Reference(folder / "net.npz", partial(timm_stages, network), two_sizes(name))


def from_big_vision(name: str, folder: Path) -> Reference:
    """Compare with what timm reads from the file."""

    def arrays(state: dict[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
        return {f"params/img/{key}": x for key, x in big_vision_arrays(state, heads).items()}

    return read_by_timm(name, siglip_network(name), siglip_network(name), arrays, folder)


def big_vision_shapes(name: str) -> Shapes:
    with torch.device("meta"):
        shapes = shapes_of(siglip_network(name))
    arrays = big_vision_arrays(without_memory(shapes), VARIANTS[name].heads)
    return {key: array.shape for key, array in arrays.items()}


def flax_arrays(state: dict[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    """Return the tensors of timm under the keys of Flax, which timm's own reader understands."""
    width = state["pos_embed"].shape[-1]
    arrays = {
        **({"cls": state["cls_token"]} if "cls_token" in state else {}),
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    norms = {"norm": "Transformer/encoder_norm"}
    for i in range(sum(key.endswith("norm1.bias") for key in state)):
        key, block = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        norms |= {f"{block}.norm1": f"{key}/LayerNorm_0", f"{block}.norm2": f"{key}/LayerNorm_2"}
        attention = f"{key}/MultiHeadDotProductAttention_1"
        kernels = np.split(state[f"{block}.attn.qkv.weight"], 3)
        biases = np.split(state[f"{block}.attn.qkv.bias"], 3)
        for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            arrays[f"{attention}/{part}/kernel"] = kernel.T.reshape(width, heads, -1)
            arrays[f"{attention}/{part}/bias"] = bias.reshape(heads, -1)
        out = state[f"{block}.attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}/out/kernel"] = out
        arrays[f"{attention}/out/bias"] = state[f"{block}.attn.proj.bias"]
        for j in (0, 1):
            dense, layer = f"{key}/MlpBlock_3/Dense_{j}", f"{block}.mlp.fc{j + 1}"
            arrays[f"{dense}/kernel"] = state[f"{layer}.weight"].T
            arrays[f"{dense}/bias"] = state[f"{layer}.bias"]
    for norm, key in norms.items():
        arrays[f"{key}/scale"] = state[f"{norm}.weight"]
        arrays[f"{key}/bias"] = state[f"{norm}.bias"]
    return arrays


def from_npz(name: str, folder: Path) -> Reference:
    """Compare with what timm reads from the file."""
    return read_by_timm(name, timm_network(name), timm_network(name), flax_arrays, folder)


def flax_shapes(name: str) -> Shapes:
    arrays = flax_arrays(without_memory(timm_shapes(name)), VARIANTS[name].heads)
    return {key: array.shape for key, array in arrays.items()}


SIGLIP = [name for name, variant in VARIANTS.items() if variant.pool == "attention"]
REFERENCES, SHAPES = by_size(
    {
        "open_clip": (CLIP, from_open_clip, open_clip_shapes),
        "vision_transformer": (AUGREG, from_npz, flax_shapes),
        "big_vision": (SIGLIP, from_big_vision, big_vision_shapes),
    }
)
