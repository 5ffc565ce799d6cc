"""Key tables of Vision Transformers in timm, torchvision and open_clip, and all their layouts."""

import re
from collections.abc import Mapping
from functools import partial

import jax
import numpy as np

from tljax.models import vit
from tljax.models.vit import VARIANTS
from tljax.pretrained.rules import Arguments, Config, Layout, Rule, Rules, dense
from tljax.pretrained.tables.vit_big_vision import big_vision, vision_transformer, with_usual_names
from tljax.pretrained.tables.vit_huggingface import CLASSES as HUGGINGFACE
from tljax.pretrained.tables.vit_huggingface import huggingface_layout
from tljax.pretrained.tables.vit_keys import (
    NO_BIAS,
    PARTS,
    Keys,
    norm,
    projections,
    resize_positions,
    table,
    twins,
)
from tljax.runtime.preprocess import Preprocess


def _timm_pool() -> Rules:
    rules: Rules = (Rule("attn_pool.latent", "params/pool/probe", shape=(1, 1, -1)),)
    rules += dense("attn_pool.q", "pool/attention/query")
    keys = ("attn_pool.kv.weight",), ("attn_pool.kv.bias",)
    rules += projections(*keys, "pool/attention", PARTS[1:])
    rules += dense("attn_pool.proj", "pool/attention/out")
    rules += norm("attn_pool.norm", "pool/norm")
    return (
        rules
        + dense("attn_pool.mlp.fc1", "pool/mlp/fc1")
        + dense("attn_pool.mlp.fc2", "pool/mlp/fc2")
    )


_TIMM = Keys(
    patches="patch_embed.proj",
    first="cls_token",
    registers="reg_token",
    position="pos_embed",
    blocks="blocks.{}.",
    norm1="norm1",
    weights=("attn.qkv.weight",),
    biases=("attn.qkv.bias",),
    out="attn.proj",
    norm2="norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    scale="ls{}.gamma",
    norm="norm",
    head="head",
    pre_norm="norm_pre",
    pool=_timm_pool,
)
_TIMM_DINOV3 = _TIMM._replace(biases=("attn.q_bias", "", "attn.v_bias"), scale="gamma_{}")
_TIMM_GATED = _TIMM_DINOV3._replace(gate="mlp.fc1_g", fc1="mlp.fc1_x")


def timm(name: str) -> Rules:
    """Return timm's key table, with keys such as ``blocks.0.attn.qkv.weight``."""
    if name not in vit.DINOV3:
        return table(name, _TIMM)
    return table(name, _TIMM_GATED if VARIANTS[name].gated else _TIMM_DINOV3)


def timm_dinov3_config(name: str) -> Config:
    """Return timm's two names; networks ``qkvb`` have biases, which are zero when published."""
    return {"architecture": (name, f"{name}_qkvb")}


def timm_arguments(name: str) -> Arguments:
    """Return arguments of timm's constructor with their supported values.

    DINOv3 is published without a pooling. That timm averages its patches by default is accepted.
    """
    variant = VARIANTS[name]
    activations = {vit.quick_gelu: "quick_gelu", vit.gelu_tanh: "gelu_tanh", jax.nn.silu: "silu"}
    pool = {"class": "token", "attention": "map"}.get(variant.pool, "avg")
    return {
        "act_layer": (activations.get(variant.activation, "gelu"),),
        "global_pool": (pool, "avg") if name in vit.DINOV3 else (pool,),
        "norm_layer": ("layernorm",),
    }


_TORCHVISION = Keys(
    patches="conv_proj",
    first="class_token",
    registers="",
    position="encoder.pos_embedding",
    blocks="encoder.layers.encoder_layer_{}.",
    norm1="ln_1",
    weights=("self_attention.in_proj_weight",),
    biases=("self_attention.in_proj_bias",),
    out="self_attention.out_proj",
    norm2="ln_2",
    fc1="mlp.0",
    fc2="mlp.3",
    norm="encoder.ln",
    head="heads.head",
)

_TORCHVISION_PREPROCESS = {
    "vit_base_patch16_224": Preprocess(224, 256),
    "vit_base_patch16_384": Preprocess(384, 384, "bicubic"),
    "vit_base_patch32_224": Preprocess(224, 256),
    "vit_large_patch16_224": Preprocess(224, 242),
}
"""That of the first weights of each network; of ``384`` there are those of SWAG alone."""


def torchvision(name: str) -> Rules:
    """Return torchvision's key table: ``encoder.layers.encoder_layer_0.ln_1.weight``."""
    return table(name, _TORCHVISION)


_OLD_MLP = re.compile(r"(\bencoder_layer_\d+\.mlp\.)linear_([12])\.")


def _rename_torchvision(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Return keys with numbers for the layers of MLPs, which torchvision named in the beginning."""

    def newest(match: re.Match[str]) -> str:
        return f"{match[1]}{3 * (int(match[2]) - 1)}."

    return {_OLD_MLP.sub(newest, key): array for key, array in arrays.items()}


_OPEN_CLIP = Keys(
    patches="visual.conv1",
    first="visual.class_embedding",
    registers="",
    position="visual.positional_embedding",
    blocks="visual.transformer.resblocks.{}.",
    norm1="ln_1",
    weights=("attn.in_proj_weight",),
    biases=("attn.in_proj_bias",),
    out="attn.out_proj",
    norm2="ln_2",
    fc1="mlp.c_fc",
    fc2="mlp.c_proj",
    norm="visual.ln_post",
    head="",
    pre_norm="visual.ln_pre",
    flat=True,
    projection="visual.proj",
)


def open_clip(name: str) -> Rules:
    """Return the key table of open_clip: ``visual.transformer.resblocks.0.ln_1.weight``."""
    return table(name, _OPEN_CLIP)


_OPEN_CLIP_LAYOUT = Layout(
    open_clip,
    drop=(
        *("text.", "transformer.", "token_embedding.", "positional_embedding", "ln_final."),
        *("text_projection", "logit_scale", "logit_bias", "attn_mask"),
        *("input_resolution", "context_length", "vocab_size"),
    ),
    optional=(f"visual.proj{NO_BIAS}",),
    twins=partial(twins, tuple(vit.CLIP)),
)


_BIG_VISION_NAMES = tuple(name for name, variant in VARIANTS.items() if variant.pool == "attention")
_BIG_VISION = Layout(big_vision, twins=partial(twins, _BIG_VISION_NAMES), rename=with_usual_names)
_VISION_TRANSFORMER = Layout(vision_transformer, rename=with_usual_names)


_TIMM_NAMES = tuple(
    name for name in VARIANTS if not name.startswith("hf_") and not name.endswith("_lc")
)


def _timm_layout(name: str) -> Layout:
    layout = Layout(timm, twins=partial(twins, _TIMM_NAMES), arguments=timm_arguments)
    if name in vit.DINOV3:
        return layout._replace(config=timm_dinov3_config, optional=(".q_bias", ".v_bias"))
    return layout


def _layouts(name: str) -> dict[str, Layout]:
    layouts: dict[str, Layout] = {}
    if name in _TIMM_NAMES:
        layouts["timm"] = _timm_layout(name)
    if name in _TORCHVISION_PREPROCESS:
        preprocess = _TORCHVISION_PREPROCESS[name]
        layouts["torchvision"] = Layout(torchvision, preprocess, rename=_rename_torchvision)
    if name in HUGGINGFACE:
        layouts["huggingface"] = huggingface_layout(name)
    if name in vit.AUGREG:
        layouts["vision_transformer"] = _VISION_TRANSFORMER
    if name in vit.CLIP:
        layouts["open_clip"] = _OPEN_CLIP_LAYOUT
    if name in _BIG_VISION_NAMES:
        layouts["big_vision"] = _BIG_VISION
    return {key: x._replace(resize_positions=resize_positions) for key, x in layouts.items()}


LAYOUTS: dict[str, dict[str, Layout]] = {name: _layouts(name) for name in VARIANTS}
