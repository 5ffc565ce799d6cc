"""Key tables of Vision Transformers in timm."""

from tljax.models.vit import VARIANTS
from tljax.pretrained.rules import DENSE, Layout, Rule, Rules, conv, dense

_PARTS = ("query", "key", "value")


def norm(key: str, path: str) -> Rules:
    """Return the rules of a torch layer norm."""
    return (
        Rule(f"{key}.weight", f"params/{path}/scale"),
        Rule(f"{key}.bias", f"params/{path}/bias"),
    )


def timm(name: str) -> Rules:
    """Return timm's key table, with keys such as ``blocks.0.attn.qkv.weight``."""
    variant = VARIANTS[name]
    rules = conv("patch_embed.proj", "embed/patches")[: 1 if variant.pre_norm else 2]
    if variant.class_token:
        rules += (Rule("cls_token", "params/embed/class_token", shape=(1, 1, -1)),)
    if variant.registers:
        shape = (1, variant.registers, -1)
        rules += (Rule("reg_token", "params/embed/register_tokens", shape=shape),)
    rules += (Rule("pos_embed", "params/embed/position", shape=(1, -1, variant.width)),)
    if variant.pre_norm:
        rules += norm("norm_pre", "embed/norm")
    for i in range(variant.depth):
        key, path = f"blocks.{i}", f"block{i + 1}"
        rules += norm(f"{key}.norm1", f"{path}/norm1")
        rules += fused(f"{key}.attn.qkv.weight", f"{key}.attn.qkv.bias", f"{path}/attention")
        rules += dense(f"{key}.attn.proj", f"{path}/attention/out")
        rules += norm(f"{key}.norm2", f"{path}/norm2")
        rules += dense(f"{key}.mlp.fc1", f"{path}/mlp/fc1")
        rules += dense(f"{key}.mlp.fc2", f"{path}/mlp/fc2")
        if variant.layer_scale:
            rules += tuple(
                Rule(f"{key}.ls{j}.gamma", f"params/{path}/layer_scale{j}/scale") for j in (1, 2)
            )
    rules += norm("norm", "norm/norm")
    if variant.pool == "attention":
        rules += (Rule("attn_pool.latent", "params/pool/probe", shape=(1, 1, -1)),)
        rules += dense("attn_pool.q", "pool/attention/query")
        rules += fused("attn_pool.kv.weight", "attn_pool.kv.bias", "pool/attention", _PARTS[1:])
        rules += dense("attn_pool.proj", "pool/attention/out")
        rules += norm("attn_pool.norm", "pool/norm")
        rules += dense("attn_pool.mlp.fc1", "pool/mlp/fc1")
        rules += dense("attn_pool.mlp.fc2", "pool/mlp/fc2")
    return rules + dense("head", "head")


def fused(kernel: str, bias: str, path: str, names: tuple[str, ...] = _PARTS) -> Rules:
    """Return the rules of the projections of an attention that the source stores in one."""
    return tuple(
        rule
        for i, name in enumerate(names)
        for rule in (
            Rule(kernel, f"params/{path}/{name}/kernel", DENSE, part=(i, len(names))),
            Rule(bias, f"params/{path}/{name}/bias", part=(i, len(names))),
        )
    )


LAYOUTS: dict[str, dict[str, Layout]] = {name: {"timm": Layout(timm)} for name in VARIANTS}
