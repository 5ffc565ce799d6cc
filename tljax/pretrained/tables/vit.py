"""Key tables of Vision Transformers in timm, and all layouts of them."""

from functools import partial

import jax

from tljax.models import vit
from tljax.models.vit import VARIANTS
from tljax.pretrained.rules import Config, Layout, Rule, Rules, dense
from tljax.pretrained.tables.vit_big_vision import vision_transformer
from tljax.pretrained.tables.vit_huggingface import CLASSES as HUGGINGFACE
from tljax.pretrained.tables.vit_huggingface import huggingface_layout
from tljax.pretrained.tables.vit_keys import PARTS, Keys, norm, projections, table, twins


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


def timm_arguments(name: str) -> dict[str, tuple[object, ...]]:
    """Return arguments of timm's constructor with their supported values; none if it is no ViT.

    DINOv3 is published without a pooling. That timm averages its patches by default is accepted.
    """
    name = name.removesuffix("_qkvb")
    if name not in VARIANTS:
        return {}
    variant = VARIANTS[name]
    activations = {vit.quick_gelu: "quick_gelu", vit.gelu_tanh: "gelu_tanh", jax.nn.silu: "silu"}
    pool = {"class": "token", "attention": "map"}.get(variant.pool, "avg")
    return {
        "act_layer": (activations.get(variant.activation, "gelu"),),
        "global_pool": (pool, "avg") if name in vit.DINOV3 else (pool,),
        "norm_layer": ("layernorm",),
    }


_TIMM_NAMES = tuple(
    name for name in VARIANTS if not name.startswith("hf_") and not name.endswith("_lc")
)


def _timm_layout(name: str) -> Layout:
    same = partial(twins, _TIMM_NAMES)
    if name in vit.DINOV3:
        optional = (".q_bias", ".v_bias")
        return Layout(timm, config=timm_dinov3_config, optional=optional, twins=same)
    return Layout(timm, twins=same)


LAYOUTS: dict[str, dict[str, Layout]] = {
    name: {
        **({"timm": _timm_layout(name)} if name in _TIMM_NAMES else {}),
        **({"huggingface": huggingface_layout(name)} if name in HUGGINGFACE else {}),
        **({"vision_transformer": Layout(vision_transformer)} if name in vit.AUGREG else {}),
    }
    for name in VARIANTS
}
