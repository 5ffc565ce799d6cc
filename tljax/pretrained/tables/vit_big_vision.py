"""Key tables of Vision Transformers in the files of Google, which are written in Flax.

Older files are those of the repository vision_transformer, newer ones those of big_vision.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tljax.models.vit import VARIANTS
from tljax.pretrained.rules import Rule, Rules
from tljax.pretrained.tables.vit_keys import PARTS


class _Modules(NamedTuple):
    """Names that Flax has given to the modules of a network, by their order in its code."""

    position: str
    attention: str
    norm2: str
    mlp: str


_OLD = _Modules(
    "Transformer/posembed_input/pos_embedding",
    "MultiHeadDotProductAttention_1",
    "LayerNorm_2",
    "MlpBlock_3",
)
_NEW = _Modules("pos_embedding", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")


def vision_transformer(name: str) -> Rules:
    """Return the key table of older files, with kernels [in, heads, out].

    Keys such as ``Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel``.
    """
    return _table(name, _OLD)


def big_vision(name: str) -> Rules:
    """Return the key table of newer files: ``MAPHead_0/probe``, ``pos_embedding``."""
    return _table(name, _NEW)


def _layer(key: str, path: str, *leaves: str) -> Rules:
    return tuple(Rule(f"{key}/{leaf}", f"params/{path}/{leaf}") for leaf in leaves)


def _norm(key: str, path: str) -> Rules:
    return _layer(key, path, "scale", "bias")


def _attention(key: str, path: str, heads: tuple[int, int]) -> Rules:
    width, rules = heads[0] * heads[1], ()
    for part in PARTS:
        to = f"params/{path}/{part}"
        rules += (Rule(f"{key}/{part}/kernel", f"{to}/kernel", shape=(width, *heads)),)
        rules += (Rule(f"{key}/{part}/bias", f"{to}/bias", shape=heads),)
    rules += (Rule(f"{key}/out/kernel", f"params/{path}/out/kernel", shape=(*heads, width)),)
    return rules + _layer(f"{key}/out", f"{path}/out", "bias")


def _mlp(key: str, path: str) -> Rules:
    return tuple(
        rule
        for j in (0, 1)
        for rule in _layer(f"{key}/Dense_{j}", f"{path}/fc{j + 1}", "kernel", "bias")
    )


def _table(name: str, modules: _Modules) -> Rules:
    variant = VARIANTS[name]
    heads = variant.heads, variant.width // variant.heads
    rules = _layer("embedding", "embed/patches", "kernel", "bias")
    if variant.class_token:
        rules += (Rule("cls", "params/embed/class_token", shape=(1, 1, -1)),)
    shape = 1, -1, variant.width
    rules += (Rule(modules.position, "params/embed/position", shape=shape),)
    for i in range(variant.depth):
        key, path = f"Transformer/encoderblock_{i}", f"block{i + 1}"
        rules += _norm(f"{key}/LayerNorm_0", f"{path}/norm1")
        rules += _attention(f"{key}/{modules.attention}", f"{path}/attention", heads)
        rules += _norm(f"{key}/{modules.norm2}", f"{path}/norm2")
        rules += _mlp(f"{key}/{modules.mlp}", f"{path}/mlp")
    rules += _norm("Transformer/encoder_norm", "norm/norm")
    if variant.pool == "attention":
        key = "MAPHead_0"
        rules += (Rule(f"{key}/probe", "params/pool/probe", shape=(1, 1, -1)),)
        rules += _attention(f"{key}/MultiHeadDotProductAttention_0", "pool/attention", heads)
        rules += _norm(f"{key}/LayerNorm_0", "pool/norm")
        rules += _mlp(f"{key}/MlpBlock_0", "pool/mlp")
    return rules + _layer("head", "head", "kernel", "bias")


_STACKED = re.compile(r"(.*\bTransformer/encoderblock)(/.*)")


def with_usual_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors of a newer file under the keys of the tables above.

    Blocks that are stacked along a first axis are separated, and a network with a class token and
    without a pooling of its own has the names of older files. Other files are left as they are.
    """
    separate: dict[str, np.ndarray] = {}
    for key, array in arrays.items():
        if (match := _STACKED.fullmatch(key)) and array.ndim:
            separate |= {f"{match[1]}_{i}{match[2]}": part for i, part in enumerate(array)}
        else:
            separate[key] = array
    embedding = next((key for key in separate if f"/{key}".endswith("/embedding/kernel")), "")
    prefix = embedding.removesuffix("embedding/kernel")
    if f"{prefix}pos_embedding" not in separate or f"{prefix}cls" not in separate:
        return separate
    renamed = {f"{prefix}{_NEW.position}": f"{prefix}{_OLD.position}"}
    return {renamed.get(key, _with_old_modules(key, prefix)): x for key, x in separate.items()}


def _with_old_modules(key: str, prefix: str) -> str:
    start = f"{prefix}Transformer/encoderblock_"
    if not key.startswith(start):
        return key
    block, _, rest = key.removeprefix(start).partition("/")
    module, slash, leaf = rest.partition("/")
    return f"{start}{block}/{dict(zip(_NEW, _OLD, strict=True)).get(module, module)}{slash}{leaf}"
