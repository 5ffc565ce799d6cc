"""Key tables of Vision Transformers in transformers."""

from functools import partial
from typing import NamedTuple

import jax

from tljax.models import vit
from tljax.models.attention import ROPE_PERIOD
from tljax.models.layers import gelu
from tljax.models.vit import VARIANTS
from tljax.pretrained.rules import Config, Layout, Rule, Rules, dense
from tljax.pretrained.tables.vit_keys import PARTS, Keys, norm, projections, table, twins

_SEPARATE = tuple(f"attention.attention.{name}" for name in PARTS)
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
    rules += projections(*keys, "pool/attention")
    rules += dense(f"{key}.attention.out_proj", "pool/attention/out")
    rules += norm(f"{key}.layernorm", "pool/norm")
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
CLASSES = {
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
    return table(name, CLASSES[name].keys)


def huggingface_config(name: str) -> Config:
    """Return the config.json of a class of transformers, which holds heads and activation."""
    variant, published = VARIANTS[name], CLASSES[name]
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


def huggingface_layout(name: str) -> Layout:
    """Return the layout of a variant that transformers has."""
    _, _, _, ignore, drop, optional = CLASSES[name]
    return Layout(
        huggingface,
        config=huggingface_config,
        ignore=ignore,
        drop=drop,
        optional=optional,
        twins=partial(twins, tuple(CLASSES)),
    )
