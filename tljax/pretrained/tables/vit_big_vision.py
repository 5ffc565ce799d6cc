"""Key tables of Vision Transformers in the files of big_vision, which are written in Flax."""

from tljax.models.vit import VARIANTS
from tljax.pretrained.rules import Rule, Rules
from tljax.pretrained.tables.vit_keys import PARTS


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
        for part in PARTS:
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
