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
from typing import Literal, NamedTuple

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
from tljax.runtime.types import INCEPTION_PREPROCESS, FeatureMap, Preprocess

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

        Raises:
            RequestError: the height or the width is no multiple of the patch.
        """
        variant = self.variant
        width, patch, kept = variant.width, variant.patch, variant.positioned_prefix
        if x.shape[1] % patch or x.shape[2] % patch:
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
            tokens = tokens.at[:kept].add(position[:kept])
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
    modules = {"embed": Embed(variant)}
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
    return Model(name, stages, variant.preprocess)


def vit(name: str, num_classes: int = 1000) -> Model:
    """Build one of `VARIANTS`, with stages ``embed, block1 ... blockN, norm, pool, head``."""
    return build(name, VARIANTS[name], num_classes)


# --- variants ------------------------------------------------------------------------------------


_TINY = Variant(192, 12, 3)
_SMALL = Variant(384, 12, 6)
_BASE = Variant(768, 12, 12)
_LARGE = Variant(1024, 24, 16)


def _at(variant: Variant, size: int, preprocess: Preprocess, crop: float = 1) -> Variant:
    """Return a variant for images of another size, cropped from a share of the short side."""
    sizes = replace(preprocess, size=size, resize=math.floor(size / crop), interpolation="bicubic")
    return variant._replace(size=size, preprocess=sizes)


_SIZES = {"tiny": _TINY, "small": _SMALL, "base": _BASE, "large": _LARGE}

AUGREG = {
    f"vit_{name}_patch{patch}_{size}": _at(
        _SIZES[name]._replace(patch=patch), size, INCEPTION_PREPROCESS, crop
    )
    for name, patch, sizes in (
        *((name, 16, (224, 384)) for name in _SIZES),
        ("base", 32, (224, 384)),
        ("base", 8, (224,)),
    )
    for size, crop in ((224, 0.9), (384, 1))
    if size in sizes
}
"""The original geometry, also that of MAE and DINO."""

VARIANTS: dict[str, Variant] = dict(AUGREG)
