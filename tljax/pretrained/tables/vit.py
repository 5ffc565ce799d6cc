"""Key tables of Vision Transformers in timm, transformers and the files of their authors."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax.models import vit
from tljax.models.attention import ROPE_PERIOD
from tljax.models.layers import gelu
from tljax.models.vit import VARIANTS, Variant
from tljax.pretrained.rules import CONV, DENSE, Config, Layout, Rule, Rules, dense
from tljax.runtime.types import Preprocess


class Keys(NamedTuple):
    """Keys of one publisher, without ``.weight`` and ``.bias``; empty for what it does not have.

    Attributes:
        first: the class token.
        blocks: prefix of the keys of a block, with ``{}`` for its index from 0.
        weights: kernels of query, key and value; or one key for all three.
        biases: their biases.
        scale: layer scale, with ``{}`` for 1 or 2.
        flat: whether tokens and positions are stored without an axis for the batch.
    """

    patches: str
    first: str
    registers: str
    position: str
    blocks: str
    norm1: str
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    out: str
    norm2: str
    fc1: str
    fc2: str
    norm: str
    head: str
    gate: str = ""
    scale: str = ""
    pre_norm: str = ""
    pool: Callable[[], Rules] = tuple
    flat: bool = False


_PARTS = ("query", "key", "value")


def _norm(key: str, path: str) -> Rules:
    return (
        Rule(f"{key}.weight", f"params/{path}/scale"),
        Rule(f"{key}.bias", f"params/{path}/bias"),
    )


def _split(keys: tuple[str, ...], paths: tuple[str, ...], axes: tuple[int, ...] = ()) -> Rules:
    """Return rules of one key for each path, or of one key for all."""
    if len(keys) == len(paths):
        return tuple(Rule(key, path, axes) for key, path in zip(keys, paths, strict=True))
    count = len(paths)
    return tuple(Rule(keys[0], path, axes, part=(i, count)) for i, path in enumerate(paths))


def _projections(
    weights: tuple[str, ...], biases: tuple[str, ...], path: str, names: tuple[str, ...] = _PARTS
) -> Rules:
    """Return the rules of an attention's first layers; an empty key of a bias stands for none."""
    kernels = tuple(f"params/{path}/{name}/kernel" for name in names)
    vectors = tuple(f"params/{path}/{name}/bias" for name in names)
    rules = _split(weights, kernels, DENSE) + _split(biases, vectors)
    return tuple(rule for rule in rules if rule.key)


def table(name: str, keys: Keys) -> Rules:
    """Return the key table of a variant under the keys of a publisher."""
    variant = VARIANTS[name]
    batch = () if keys.flat else (1,)
    rules: Rules = (Rule(f"{keys.patches}.weight", "params/embed/patches/kernel", CONV),)
    if variant.pre_norm:
        rules += _norm(keys.pre_norm, "embed/norm")
    else:
        rules += (Rule(f"{keys.patches}.bias", "params/embed/patches/bias"),)
    if variant.class_token:
        shape = () if keys.flat else (1, 1, -1)
        rules += (Rule(keys.first, "params/embed/class_token", shape=shape),)
    if variant.registers:
        shape = *batch, variant.registers, -1
        rules += (Rule(keys.registers, "params/embed/register_tokens", shape=shape),)
    if variant.positions != "rotary":
        shape = *batch, -1, variant.width
        rules += (Rule(keys.position, "params/embed/position", shape=shape),)
    for i in range(variant.depth):
        key, path = keys.blocks.format(i), f"block{i + 1}"
        rules += _norm(key + keys.norm1, f"{path}/norm1")
        weights, biases = (
            tuple(key + part if part else "" for part in parts)
            for parts in (keys.weights, keys.biases)
        )
        rules += _projections(weights, biases, f"{path}/attention")
        rules += dense(key + keys.out, f"{path}/attention/out")
        rules += _norm(key + keys.norm2, f"{path}/norm2")
        gated = {"gate": keys.gate} if variant.gated else {}
        for layer, part in {**gated, "fc1": keys.fc1, "fc2": keys.fc2}.items():
            rules += dense(key + part, f"{path}/mlp/{layer}")
        if variant.layer_scale:
            rules += tuple(
                Rule(key + keys.scale.format(j), f"params/{path}/layer_scale{j}/scale")
                for j in (1, 2)
            )
    rules += _norm(keys.norm, "norm/norm")
    if variant.pool == "attention":
        rules += keys.pool()
    return rules + dense(keys.head, "head")


def resize_positions(name: str, positions: np.ndarray) -> np.ndarray | None:
    """Resize the positions in a file to the grid of a variant; None if they fit no square grid.

    Args:
        name: name of the variant.
        positions: ``[1, positions, width]`` or ``[positions, width]``.
    """
    variant = VARIANTS[name]
    kept = variant.positioned_prefix
    flat = positions.reshape(-1, positions.shape[-1]) if positions.ndim else positions
    side = math.isqrt(max(0, len(flat) - kept)) if flat.ndim else 0
    if side == 0 or side * side + kept != len(flat) or variant.positions == "rotary":
        return None
    values = jnp.asarray(flat[kept:], np.float32)
    resized = np.asarray(vit.resize_positions(values, (side, side), variant.grid))
    result = np.concatenate((flat[:kept].astype(np.float32), resized))
    return result.reshape(*positions.shape[:-2], *result.shape)


# --- timm ----------------------------------------------------------------------------------------


def _timm_pool() -> Rules:
    rules: Rules = (Rule("attn_pool.latent", "params/pool/probe", shape=(1, 1, -1)),)
    rules += dense("attn_pool.q", "pool/attention/query")
    keys = ("attn_pool.kv.weight",), ("attn_pool.kv.bias",)
    rules += _projections(*keys, "pool/attention", _PARTS[1:])
    rules += dense("attn_pool.proj", "pool/attention/out")
    rules += _norm("attn_pool.norm", "pool/norm")
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


# --- transformers --------------------------------------------------------------------------------


_SEPARATE = tuple(f"attention.attention.{name}" for name in _PARTS)
_VIT = Keys(
    patches="vit.embeddings.patch_embeddings.projection",
    first="vit.embeddings.cls_token",
    registers="vit.embeddings.distillation_token",
    position="vit.embeddings.position_embeddings",
    blocks="vit.encoder.layer.{}.",
    norm1="layernorm_before",
    weights=tuple(f"{key}.weight" for key in _SEPARATE),
    biases=tuple(f"{key}.bias" for key in _SEPARATE),
    out="attention.output.dense",
    norm2="layernorm_after",
    fc1="intermediate.dense",
    fc2="output.dense",
    norm="vit.layernorm",
    head="classifier",
)
_DINOV2 = _VIT._replace(
    registers="vit.embeddings.register_tokens",
    norm1="norm1",
    norm2="norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    scale="layer_scale{}.lambda1",
)


def _huggingface_pool() -> Rules:
    key = "vision_model.head"
    rules: Rules = (Rule(f"{key}.probe", "params/pool/probe", shape=(1, 1, -1)),)
    keys = (f"{key}.attention.in_proj_weight",), (f"{key}.attention.in_proj_bias",)
    rules += _projections(*keys, "pool/attention")
    rules += dense(f"{key}.attention.out_proj", "pool/attention/out")
    rules += _norm(f"{key}.layernorm", "pool/norm")
    return rules + dense(f"{key}.mlp.fc1", "pool/mlp/fc1") + dense(f"{key}.mlp.fc2", "pool/mlp/fc2")


_CLIP = Keys(
    patches="vision_model.embeddings.patch_embedding",
    first="vision_model.embeddings.class_embedding",
    registers="",
    position="vision_model.embeddings.position_embedding.weight",
    blocks="vision_model.encoder.layers.{}.",
    norm1="layer_norm1",
    weights=tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    biases=tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    out="self_attn.out_proj",
    norm2="layer_norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    norm="vision_model.post_layernorm",
    head="visual_projection",
    pre_norm="vision_model.pre_layrnorm",
    pool=_huggingface_pool,
    flat=True,
)
_SIGLIP = _CLIP._replace(head="classifier")
_DINOV3 = Keys(
    patches="embeddings.patch_embeddings",
    first="embeddings.cls_token",
    registers="embeddings.register_tokens",
    position="",
    blocks="layer.{}.",
    norm1="norm1",
    weights=tuple(f"attention.{x}_proj.weight" for x in "qkv"),
    biases=("attention.q_proj.bias", "", "attention.v_proj.bias"),
    out="attention.o_proj",
    norm2="norm2",
    fc1="mlp.up_proj",
    fc2="mlp.down_proj",
    gate="mlp.gate_proj",
    scale="layer_scale{}.lambda1",
    norm="norm",
    head="classifier",
)


def _under(keys: Keys, prefix: str) -> Keys:
    """Return the keys of a class of transformers that calls its network ``prefix``."""
    renamed = {
        field: value.replace("vit.", f"{prefix}.", 1)
        for field, value in keys._asdict().items()
        if isinstance(value, str) and value.startswith("vit.")
    }
    return keys._replace(**renamed)


class Publication(NamedTuple):
    """A class of transformers.

    Attributes:
        keys: keys of its tensors.
        architecture: its name; without ``ForImageClassification`` or ``WithProjection`` it has no
            head.
        config: settings in config.json, besides the sizes of `huggingface_config`. A tuple holds
            alternatives; export writes the first.
        ignore: see `Layout`.
        drop: see `Layout`.
        optional: see `Layout`.
    """

    keys: Keys
    architecture: str
    config: Config
    ignore: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


_TEXT = ("text_model.", "text_projection.", "logit_scale", "logit_bias")
_MASK = "embeddings.mask_token"
_VIT_CLASS = Publication(
    _VIT,
    "ViTForImageClassification",
    {"model_type": ("vit", "vit_mae"), "qkv_bias": True},
    ignore=("pooler.", "vit.pooler.", _MASK, f"vit.{_MASK}"),
)
_DEIT_CLASS = Publication(
    _under(_VIT, "deit"),
    "DeiTForImageClassification",
    {"model_type": "deit", "qkv_bias": True},
    ignore=("pooler.", "deit.pooler.", _MASK, f"deit.{_MASK}"),
)
_DINOV2_CLASS = Publication(
    _under(_DINOV2, "dinov2"),
    "Dinov2ForImageClassification",
    {
        "model_type": "dinov2",
        "mlp_ratio": 4,
        "qkv_bias": True,
        "use_mask_token": (False, True),
        "use_swiglu_ffn": False,
    },
    ignore=(_MASK, f"dinov2.{_MASK}"),
)
_REGISTERS_CLASS = Publication(
    _under(_DINOV2, "dinov2_with_registers"),
    "Dinov2WithRegistersForImageClassification",
    {
        "model_type": "dinov2_with_registers",
        "mlp_ratio": 4,
        "num_register_tokens": 4,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
    },
    ignore=(_MASK, f"dinov2_with_registers.{_MASK}"),
)
_CLIP_CLASS = Publication(
    _CLIP,
    "CLIPVisionModelWithProjection",
    {"model_type": "clip_vision_model"},
    ignore=("vision_model.embeddings.position_ids", "embeddings.position_ids"),
    drop=_TEXT,
    optional=("visual_projection.bias",),
)
_SIGLIP_CLASS = Publication(
    _SIGLIP,
    "SiglipVisionModel",
    {"model_type": "siglip_vision_model", "vision_use_head": True},
    ignore=("vision_model.embeddings.position_ids", "embeddings.position_ids"),
    drop=_TEXT,
)
_DINOV3_CLASS = Publication(
    _DINOV3,
    "DINOv3ViTModel",
    {
        "model_type": "dinov3_vit",
        "key_bias": False,
        "mlp_bias": True,
        "num_register_tokens": 4,
        "proj_bias": True,
        "query_bias": True,
        "rope_theta": ROPE_PERIOD,
        "value_bias": True,
    },
    ignore=(_MASK,),
)
_CLASSES = {
    **dict.fromkeys((*vit.AUGREG, *vit.HF_VIT, *vit.DEIT), _VIT_CLASS),
    **dict.fromkeys(vit.DISTILLED, _DEIT_CLASS),
    **dict.fromkeys(vit.DINOV2, _DINOV2_CLASS),
    **dict.fromkeys(vit.HF_DINOV2_REGISTERS, _REGISTERS_CLASS),
    **dict.fromkeys(vit.CLIP, _CLIP_CLASS),
    **dict.fromkeys((*vit.SIGLIP, *vit.SIGLIP_TANH), _SIGLIP_CLASS),
    **dict.fromkeys(vit.DINOV3, _DINOV3_CLASS),
}
_ACTIVATIONS = {
    gelu: "gelu",
    vit.gelu_tanh: "gelu_pytorch_tanh",
    vit.quick_gelu: "quick_gelu",
    jax.nn.silu: "silu",
}


def huggingface(name: str) -> Rules:
    """Return transformers' key table, such as ``vit.encoder.layer.0.layernorm_before.weight``."""
    return table(name, _CLASSES[name].keys)


def huggingface_config(name: str) -> Config:
    """Return the config.json of a class of transformers, which holds heads and activation."""
    variant, published = VARIANTS[name], _CLASSES[name]
    architecture = published.architecture
    if variant.pool == "class" and variant.patch == 14 and not variant.pre_norm:
        # The classifiers of DINOv2 read the average of the patches as well.
        architecture = architecture.replace("ForImageClassification", "Model")
    config = {
        "architectures": [architecture],
        "hidden_act": _ACTIVATIONS[variant.activation],
        "hidden_size": variant.width,
        "image_size": variant.size,
        "intermediate_size": variant.mlp_width,
        "layer_norm_eps": variant.epsilon,
        "num_attention_heads": variant.heads,
        "num_channels": 3,
        "num_hidden_layers": variant.depth,
        "patch_size": variant.patch,
        **published.config,
    }
    if "mlp_ratio" in config:
        del config["intermediate_size"]
    if name in vit.DINOV3:
        config["use_gated_mlp"] = variant.gated
    return config


def _huggingface_layout(name: str) -> Layout:
    _, _, _, ignore, drop, optional = _CLASSES[name]
    return Layout(
        huggingface,
        config=huggingface_config,
        ignore=ignore,
        drop=drop,
        optional=optional,
        twins=partial(_twins, tuple(_CLASSES)),
    )


# --- big_vision ----------------------------------------------------------------------------------


def vision_transformer(name: str) -> Rules:
    """Return the key table of the authors' ``.npz`` files, in Flax: kernels are [in, heads, out].

    Keys such as ``Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel``.
    """
    variant = VARIANTS[name]
    heads = variant.heads, variant.width // variant.heads
    rules: Rules = (
        Rule("embedding/kernel", "params/embed/patches/kernel"),
        Rule("embedding/bias", "params/embed/patches/bias"),
        Rule("cls", "params/embed/class_token", shape=(1, 1, -1)),
        Rule(
            "Transformer/posembed_input/pos_embedding",
            "params/embed/position",
            shape=(1, -1, variant.width),
        ),
    )

    def layer(key: str, path: str, *leaves: str) -> Rules:
        return tuple(Rule(f"{key}/{leaf}", f"params/{path}/{leaf}") for leaf in leaves)

    for i in range(variant.depth):
        key, path = f"Transformer/encoderblock_{i}", f"block{i + 1}"
        attention = f"{key}/MultiHeadDotProductAttention_1"
        rules += layer(f"{key}/LayerNorm_0", f"{path}/norm1", "scale", "bias")
        for part in _PARTS:
            to = f"params/{path}/attention/{part}"
            shape = variant.width, *heads
            rules += (Rule(f"{attention}/{part}/kernel", f"{to}/kernel", shape=shape),)
            rules += (Rule(f"{attention}/{part}/bias", f"{to}/bias", shape=heads),)
        out, shape = f"{path}/attention/out", (*heads, variant.width)
        rules += (Rule(f"{attention}/out/kernel", f"params/{out}/kernel", shape=shape),)
        rules += layer(f"{attention}/out", out, "bias")
        rules += layer(f"{key}/LayerNorm_2", f"{path}/norm2", "scale", "bias")
        for j in (0, 1):
            mlp = f"{key}/MlpBlock_3/Dense_{j}", f"{path}/mlp/fc{j + 1}"
            rules += layer(*mlp, "kernel", "bias")
    rules += layer("Transformer/encoder_norm", "norm/norm", "scale", "bias")
    return rules + layer("head", "head", "kernel", "bias")


# --- twins and layouts ---------------------------------------------------------------------------


def _twins(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Return the other networks that have the same tensors in a layout, out of ``names``."""

    def tensors(name: str) -> Variant:
        variant, any_size = VARIANTS[name], {"size": VARIANTS[name].grid[0]}
        return variant._replace(activation=gelu, epsilon=0, preprocess=Preprocess(), **any_size)

    return tuple(other for other in names if other != name and tensors(other) == tensors(name))


_TIMM_NAMES = tuple(
    name for name in VARIANTS if not name.startswith("hf_") and not name.endswith("_lc")
)


def _timm_layout(name: str) -> Layout:
    twins = partial(_twins, _TIMM_NAMES)
    if name in vit.DINOV3:
        optional = (".q_bias", ".v_bias")
        return Layout(timm, config=timm_dinov3_config, optional=optional, twins=twins)
    return Layout(timm, twins=twins)


LAYOUTS: dict[str, dict[str, Layout]] = {
    name: {
        **({"timm": _timm_layout(name)} if name in _TIMM_NAMES else {}),
        **({"huggingface": _huggingface_layout(name)} if name in _CLASSES else {}),
        **({"vision_transformer": Layout(vision_transformer)} if name in vit.AUGREG else {}),
    }
    for name in VARIANTS
}
