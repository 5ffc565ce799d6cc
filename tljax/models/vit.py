"""Vision Transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) and its descendants.

Each is a line of `VARIANTS`: the original and AugReg (Steiner et al. 2021, arXiv 2106.10270), DeiT
(Touvron et al. 2020, arXiv 2012.12877) and DeiT III (2022, arXiv 2204.07118), MAE (He et al. 2021,
arXiv 2111.06377), CLIP (Radford et al. 2021, arXiv 2103.00020), SigLIP (Zhai et al. 2023, arXiv
2303.15343), DINOv2 (Oquab et al. 2023, arXiv 2304.07193), with registers (Darcet et al. 2023, arXiv
2309.16588), and DINOv3 (Siméoni et al. 2025, arXiv 2508.10104).

Names are those of timm. The prefix ``hf_`` marks networks that transformers computes differently
from the same tensors: another epsilon of the norms, or another GELU.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float

from tljax.models.attention import Attention, Mlp, Tokens
from tljax.models.layers import (
    Activation,
    Conv,
    GlobalAveragePool,
    LayerNorm,
    LayerScale,
    LinearHead,
    Mode,
    StochasticDepth,
    Vectors,
    gelu,
)
from tljax.models.model import Model, Stage
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import INCEPTION_PREPROCESS, Preprocess
from tljax.runtime.types import FeatureMap

gelu_tanh: Activation = partial(nn.gelu, approximate=True)
"""Approximation of GELU by a hyperbolic tangent."""


def quick_gelu(x: jax.Array) -> jax.Array:
    """Approximate GELU by a sigmoid, as CLIP does."""
    return x * nn.sigmoid(1.702 * x)


class Variant(NamedTuple):
    """Configuration of a Vision Transformer.

    Attributes:
        width: channels of every token.
        depth: number of blocks.
        heads: number of attention heads.
        patch: side of a patch in pixels.
        size: side in pixels of the images whose patches have the learned positions. Positions are
            resized for images of another size.
        mlp_ratio: ratio of inner to outer channels of the MLPs.
        class_token: whether a learned token stands before those of the patches.
        registers: number of further learned tokens between the two.
        positions: which tokens have a learned position: ``all``, ``class`` (that of the class and
            of the patches), ``patches``; or ``rotary`` for positions in the attention instead.
        layer_scale: whether residual branches are scaled.
        qk_norm: whether queries and keys are normalized.
        key_bias: whether keys have a bias.
        gated: whether the MLPs are gated.
        pre_norm: whether a norm precedes the blocks; the patches then have no bias.
        activation: activation of the MLPs.
        epsilon: epsilon of the layer norms.
        pool: what the head reads: the ``class`` token, the ``average`` of the patches, both
            (``class_average``), or an ``attention`` over the patches.
        preprocess: preprocessing of most published weights.
    """

    width: int
    depth: int
    heads: int
    patch: int = 16
    size: int = 224
    mlp_ratio: float = 4
    class_token: bool = True
    registers: int = 0
    positions: Literal["all", "class", "patches", "rotary"] = "all"
    layer_scale: bool = False
    qk_norm: bool = False
    key_bias: bool = True
    gated: bool = False
    pre_norm: bool = False
    activation: Activation = gelu
    epsilon: float = 1e-6
    pool: Literal["class", "average", "class_average", "attention"] = "class"
    preprocess: Preprocess = Preprocess()

    @property
    def prefix_tokens(self) -> int:
        """Return the number of tokens before those of the patches."""
        return self.class_token + self.registers

    @property
    def positioned_prefix(self) -> int:
        """Return how many of these tokens have a learned position."""
        return {"all": self.prefix_tokens, "class": 1}.get(self.positions, 0)

    @property
    def grid(self) -> tuple[int, int]:
        """Return the rows and columns of the learned positions."""
        return self.size // self.patch, self.size // self.patch

    @property
    def mlp_width(self) -> int:
        """Return the inner channels of the MLPs."""
        return int(self.width * self.mlp_ratio)


class Embed(nn.Module):
    """Patches and learned tokens, with positions."""

    variant: Variant

    @nn.compact
    def __call__(self, x: FeatureMap, mode: Mode) -> Tokens:  # noqa: ARG002 - a stage's signature
        """Map ``[b, h, w, 3]`` to ``[b, prefix + h/patch * w/patch, width]``.

        Images of the native size may have a rest to the right and below, which is left out.

        Raises:
            RequestError: the height or the width is no multiple of the patch.
        """
        variant = self.variant
        width, patch, kept = variant.width, variant.patch, variant.positioned_prefix
        native = x.shape[1] == x.shape[2] == variant.size
        if not native and (x.shape[1] % patch or x.shape[2] % patch):
            raise RequestError(
                f"images of {x.shape[1]} x {x.shape[2]} pixels cannot be divided into patches of "
                f"{patch} x {patch}; choose a multiple of {patch}"
            )
        # A general convolution: on CPUs it is faster than a matrix product of moved pixels.
        patches = Conv(width, patch, patch, use_bias=not variant.pre_norm, name="patches")(x)
        x = patches.reshape(len(x), -1, width)
        tokens = jnp.zeros((0, width))
        if variant.class_token:
            tokens = self.param("class_token", nn.initializers.zeros, (width,))[None]
        if variant.registers:
            shape = variant.registers, width
            registers = self.param("register_tokens", nn.initializers.zeros, shape)
            tokens = jnp.concatenate((tokens, registers))
        if variant.positions != "rotary":
            shape = kept + math.prod(variant.grid), width
            position = self.param("position", nn.initializers.normal(0.02), shape)
            # Parameters may be NumPy arrays, which have no `at`.
            tokens = jnp.asarray(tokens).at[:kept].add(position[:kept])
            x += resize_positions(position[kept:], variant.grid, patches.shape[1:3]).astype(x.dtype)
        prefix = jnp.broadcast_to(tokens.astype(x.dtype), (len(x), *tokens.shape))
        x = jnp.concatenate((prefix, x), axis=1)
        return LayerNorm(variant.epsilon, name="norm")(x) if variant.pre_norm else x


def resize_positions(
    positions: Float[jax.Array, "positions channels"], old: tuple[int, int], new: tuple[int, ...]
) -> Float[jax.Array, "new_positions channels"]:
    """Resize learned positions to another grid, as timm does: bicubic, with antialiasing.

    Args:
        positions: one per patch, row by row.
        old: rows and columns of the grid that they were learned on.
        new: rows and columns of the new grid.
    """
    if old == new:
        return positions
    width = positions.shape[-1]
    # Pillow's filter: a = -0.5, and wider when it reduces.
    resized = jax.image.resize(positions.reshape(*old, width), (*new, width), "bicubic")
    return resized.reshape(-1, width)


class Block(nn.Module):
    """Attention and MLP, each with a norm before it and a shortcut around it.

    ``depth`` is the position of the block; see `StochasticDepth`.
    """

    variant: Variant
    depth: float

    @nn.compact
    def __call__(self, x: Tokens, mode: Mode) -> Tokens:
        """Map ``[b, tokens, width]`` to the same shape.

        Raises:
            RequestError: positions are rotary, and the grid of the patches is not known.
        """
        variant, grid = self.variant, None
        norm = partial(LayerNorm, variant.epsilon)
        if variant.positions == "rotary":
            grid = mode.grid
            if grid is None or math.prod(grid) != x.shape[1] - variant.prefix_tokens:
                raise RequestError(
                    f"{x.shape[1]} tokens do not tell rows from columns, which rotary positions "
                    "need; run the network from the images on, or use square ones"
                )
        qk_norm = variant.epsilon if variant.qk_norm else None
        attention = Attention(variant.heads, variant.key_bias, qk_norm, name="attention")
        y = attention(norm(name="norm1")(x), grid=grid)
        y = LayerScale(name="layer_scale1")(y) if variant.layer_scale else y
        x += StochasticDepth(self.depth)(y, mode)
        mlp = Mlp(variant.mlp_width, variant.activation, variant.gated, name="mlp")
        y = mlp(norm(name="norm2")(x))
        y = LayerScale(name="layer_scale2")(y) if variant.layer_scale else y
        return x + StochasticDepth(self.depth)(y, mode)


class Norm(nn.Module):
    """Layer norm as a stage."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Tokens, mode: Mode) -> Tokens:  # noqa: ARG002 - a stage's signature
        """Map ``[b, tokens, c]`` to ``[b, tokens, c]``."""
        return LayerNorm(self.epsilon, name="norm")(x)


class ClassPool(nn.Module):
    """Class token; with ``average``, followed by the mean of the patches.

    ``prefix_tokens`` is the number of tokens before the patches.
    """

    prefix_tokens: int
    average: bool = False

    @nn.compact
    def __call__(self, x: Tokens, mode: Mode) -> Vectors:
        """Map ``[b, tokens, c]`` to ``[b, c]`` or ``[b, 2 c]``, in at least float32."""
        token = x[:, 0].astype(jnp.promote_types(x.dtype, jnp.float32))
        if not self.average:
            return token
        mean = GlobalAveragePool(self.prefix_tokens)(x, mode)
        return jnp.concatenate((token, mean), axis=-1)


class AttentionPool(nn.Module):
    """Attention of a learned token to the patches, and an MLP (Zhai et al. 2021)."""

    variant: Variant

    @nn.compact
    def __call__(self, x: Tokens, mode: Mode) -> Vectors:  # noqa: ARG002 - a stage's signature
        """Map ``[b, tokens, c]`` to ``[b, c]``, in at least float32."""
        variant = self.variant
        probe = self.param("probe", nn.initializers.lecun_normal(), (1, variant.width))
        query = jnp.broadcast_to(probe.astype(x.dtype), (len(x), *probe.shape))
        patches = x[:, variant.prefix_tokens :]
        y = Attention(variant.heads, name="attention")(query, patches)
        mlp = Mlp(variant.mlp_width, variant.activation, name="mlp")
        y += mlp(LayerNorm(variant.epsilon, name="norm")(y))
        return y[:, 0].astype(jnp.promote_types(y.dtype, jnp.float32))


def _pool(variant: Variant) -> nn.Module:
    match variant.pool:
        case "average":
            return GlobalAveragePool(variant.prefix_tokens)
        case "attention":
            return AttentionPool(variant)
        case _:
            return ClassPool(variant.prefix_tokens, average=variant.pool == "class_average")


def build(name: str, variant: Variant, num_classes: int = 1000) -> Model:
    """Build a Vision Transformer, with stages ``embed, block1 ... blockN, norm, pool, head``."""
    preprocess, variant = variant.preprocess, variant._replace(preprocess=Preprocess())
    modules: dict[str, nn.Module] = {"embed": Embed(variant)}
    for i in range(variant.depth):
        modules[f"block{i + 1}"] = Block(variant, i / max(1, variant.depth - 1))
    modules["norm"] = Norm(variant.epsilon)
    stages = (
        *(
            Stage(stage, module, "tokens", variant.prefix_tokens, variant.patch)
            for stage, module in modules.items()
        ),
        Stage("pool", _pool(variant), "vector"),
        Stage("head", LinearHead(num_classes), "vector"),
    )
    return Model(name, stages, preprocess)


def vit(name: str, num_classes: int = 1000) -> Model:
    """Build one of `VARIANTS`, with stages ``embed, block1 ... blockN, norm, pool, head``."""
    return build(name, VARIANTS[name], num_classes)


# --- variants ------------------------------------------------------------------------------------


_SIZES = {
    "tiny": Variant(192, 12, 3),
    "small": Variant(384, 12, 6),
    "medium": Variant(512, 12, 8),
    "base": Variant(768, 12, 12),
    "large": Variant(1024, 24, 16),
    "huge": Variant(1280, 32, 20),
    "so400m": Variant(1152, 27, 16, mlp_ratio=3.7362),
}


def _variants(
    pattern: str, names: str, patch: int, sizes: dict[int, float], base: Preprocess, **options: Any
) -> dict[str, Variant]:
    """Return variants by name.

    Args:
        pattern: name of a variant, with ``{name}``, ``{patch}`` and ``{size}``.
        names: keys of `_SIZES`.
        patch: side of a patch in pixels.
        sizes: side of the images in pixels, with the share of the short side that they show.
        base: mean and standard deviation.
        **options: other settings of the variants.
    """
    variants = {}
    for name in names.split():
        for size, share in sizes.items():
            resize = math.floor(size / share)
            preprocess = replace(base, size=size, resize=resize, interpolation="bicubic")
            settings = {"patch": patch, "size": size, "preprocess": preprocess, **options}
            key = pattern.format(name=name, patch=patch, size=size)
            variants[key] = _SIZES[name]._replace(**settings)
    return variants


_IMAGENET = Preprocess()
_CLIP_PREPROCESS = Preprocess(
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)
_FULL = 1.0

_PLAIN = "vit_{name}_patch{patch}_{size}"
AUGREG = {
    **_variants(_PLAIN, "tiny small base large", 16, {224: 0.9, 384: _FULL}, INCEPTION_PREPROCESS),
    **_variants(_PLAIN, "base", 32, {224: 0.9, 384: _FULL}, INCEPTION_PREPROCESS),
    **_variants(_PLAIN, "base", 8, {224: 0.9}, INCEPTION_PREPROCESS),
}
"""The original geometry, which DINO and MAE have as well."""

_DEIT = "deit_{name}_patch{patch}_{size}"
DEIT = {
    **_variants(_DEIT, "tiny small base", 16, {224: 0.9}, _IMAGENET),
    **_variants(_DEIT, "base", 16, {384: _FULL}, _IMAGENET),
}
"""The same networks as those of `AUGREG`, with another preprocessing."""

DISTILLED = _variants(
    "hf_deit_{name}_distilled_patch{patch}_{size}",
    *("tiny small base", 16, {224: 0.9}, _IMAGENET),
    registers=1,
    epsilon=1e-12,
)
"""DeiT with a distillation token. Its head reads the class token; timm has two heads, not here."""

_DEIT3 = "deit3_{name}_patch{patch}_{size}"
_DEIT3_OPTIONS = {"positions": "patches", "layer_scale": True}
DEIT3 = {
    **_variants(_DEIT3, "small medium base large", 16, {224: _FULL}, _IMAGENET, **_DEIT3_OPTIONS),
    **_variants(_DEIT3, "small base large", 16, {384: _FULL}, _IMAGENET, **_DEIT3_OPTIONS),
}

_DINO_SIZES = "small base large", 14, {518: _FULL}, _IMAGENET
DINOV2 = {
    **_variants("vit_{name}_patch{patch}_dinov2", *_DINO_SIZES, layer_scale=True),
    **_variants(
        "vit_{name}_patch{patch}_dinov2_lc", *_DINO_SIZES, layer_scale=True, pool="class_average"
    ),
}
"""DINOv2. The linear classifiers (``lc``) read the class token and the average of the patches."""

_REGISTERS = {"registers": 4, "layer_scale": True}
DINOV2_REGISTERS = _variants(
    "vit_{name}_patch{patch}_reg4_dinov2", *_DINO_SIZES, **_REGISTERS, positions="patches"
)
"""DINOv2 with registers in timm, which adds the position of the class token to that token."""

HF_DINOV2_REGISTERS = {
    **_variants(
        "hf_vit_{name}_patch{patch}_reg4_dinov2", *_DINO_SIZES, **_REGISTERS, positions="class"
    ),
    **_variants(
        "hf_vit_{name}_patch{patch}_reg4_dinov2_lc",
        *_DINO_SIZES,
        **_REGISTERS,
        positions="class",
        pool="class_average",
    ),
}

CLIP = {
    name: variant
    for kind, activation in (("clip", gelu), ("clip_quickgelu", quick_gelu))
    for names, patch, sizes in (
        ("base", 32, (224,)),
        ("base", 16, (224,)),
        ("large", 14, (224, 336)),
    )
    for name, variant in _variants(
        f"vit_{{name}}_patch{{patch}}_{kind}_{{size}}",
        names,
        patch,
        dict.fromkeys(sizes, _FULL),
        _CLIP_PREPROCESS,
        pre_norm=True,
        epsilon=1e-5,
        activation=activation,
    ).items()
}

_SIGLIP = "vit_{name}_patch{patch}_siglip_{size}"
_SIGLIP_OPTIONS = {"class_token": False, "pool": "attention"}
SIGLIP = {
    name: variant
    for names, patch, sizes in (
        ("base", 16, (224, 256, 384, 512)),
        ("large", 16, (256, 384)),
        ("so400m", 14, (224, 378)),
    )
    for name, variant in _variants(
        _SIGLIP, names, patch, dict.fromkeys(sizes, 0.9), INCEPTION_PREPROCESS, **_SIGLIP_OPTIONS
    ).items()
}
"""SigLIP and SigLIP 2 of fixed resolution in timm, with the exact GELU."""

SIGLIP_TANH = {
    **_variants(
        _SIGLIP,
        "so400m",
        16,
        dict.fromkeys((256, 384, 512), 0.9),
        INCEPTION_PREPROCESS,
        activation=gelu_tanh,
        **_SIGLIP_OPTIONS,
    ),
    **{
        f"hf_{name}": variant._replace(activation=gelu_tanh)
        for name, variant in SIGLIP.items()
        if variant.size != 378
    },
    **_variants(  # 27 patches of 14 pixels, and a rest
        f"hf_{_SIGLIP}",
        *("so400m", 14, {384: 0.9}, INCEPTION_PREPROCESS),
        activation=gelu_tanh,
        **_SIGLIP_OPTIONS,
    ),
}

_DINOV3 = {
    "registers": 4,
    "positions": "rotary",
    "layer_scale": True,
    "key_bias": False,
    "epsilon": 1e-5,
}
DINOV3 = {
    **_variants(
        "vit_{name}_patch{patch}_dinov3", "small base large", 16, {256: _FULL}, _IMAGENET, **_DINOV3
    ),
    **_variants(
        "vit_{name}_plus_patch{patch}_dinov3",
        "small huge",
        16,
        {256: _FULL},
        _IMAGENET,
        **_DINOV3,
        gated=True,
        activation=nn.silu,
    ),
}
"""DINOv3. The head reads the class token, as in the paper; timm averages the patches instead."""

HF_VIT = {f"hf_{name}": variant._replace(epsilon=1e-12) for name, variant in AUGREG.items()}
"""ViT and MAE in transformers."""

VARIANTS: dict[str, Variant] = {
    **AUGREG,
    **HF_VIT,
    **DEIT,
    **DISTILLED,
    **DEIT3,
    **DINOV2,
    **DINOV2_REGISTERS,
    **HF_DINOV2_REGISTERS,
    **CLIP,
    **SIGLIP,
    **SIGLIP_TANH,
    **DINOV3,
}
