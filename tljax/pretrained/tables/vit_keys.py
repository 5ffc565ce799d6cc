"""Key table of Vision Transformers under the keys of any publisher."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from tljax.models import vit
from tljax.models.layers import gelu
from tljax.models.vit import VARIANTS, Variant
from tljax.pretrained.rules import CONV, DENSE, Rule, Rules, dense
from tljax.runtime.preprocess import Preprocess


class Keys(NamedTuple):
    """Keys of one publisher, without ``.weight`` and ``.bias``; empty for what it does not have.

    Attributes:
        first: the class token.
        blocks: prefix of the keys of a block, with ``{}`` for its index from 0.
        weights: kernels of query, key and value; or one key for all three.
        biases: their biases.
        scale: layer scale, with ``{}`` for 1 or 2.
        flat: whether tokens and positions are stored without an axis for the batch.
        projection: kernel of a head without a bias, [in, out]; then there is no ``head``.
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
    projection: str = ""


NO_BIAS = ".bias"
"""Ending of the key of a bias that no file has: it stands for zeros."""

PARTS = ("query", "key", "value")


def norm(key: str, path: str) -> Rules:
    """Return the rules of a layer norm."""
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


def projections(
    weights: tuple[str, ...], biases: tuple[str, ...], path: str, names: tuple[str, ...] = PARTS
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
        rules += norm(keys.pre_norm, "embed/norm")
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
        rules += norm(key + keys.norm1, f"{path}/norm1")
        weights, biases = (
            tuple(key + part if part else "" for part in parts)
            for parts in (keys.weights, keys.biases)
        )
        rules += projections(weights, biases, f"{path}/attention")
        rules += dense(key + keys.out, f"{path}/attention/out")
        rules += norm(key + keys.norm2, f"{path}/norm2")
        gated = {"gate": keys.gate} if variant.gated else {}
        for layer, part in {**gated, "fc1": keys.fc1, "fc2": keys.fc2}.items():
            rules += dense(key + part, f"{path}/mlp/{layer}")
        if variant.layer_scale:
            rules += tuple(
                Rule(key + keys.scale.format(j), f"params/{path}/layer_scale{j}/scale")
                for j in (1, 2)
            )
    rules += norm(keys.norm, "norm/norm")
    if variant.pool == "attention":
        rules += keys.pool()
    if keys.projection:
        return (
            *rules,
            Rule(keys.projection, "params/head/kernel"),
            Rule(keys.projection + NO_BIAS, "params/head/bias"),
        )
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


def twins(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Return the other networks that have the same tensors in a layout, out of ``names``."""

    def tensors(name: str) -> Variant:
        variant, any_size = VARIANTS[name], {"size": VARIANTS[name].grid[0]}
        return variant._replace(activation=gelu, epsilon=0, preprocess=Preprocess(), **any_size)

    return tuple(other for other in names if other != name and tensors(other) == tensors(name))
