"""Key tables of BiT: timm, and Hugging Face transformers."""

from tljax.models.bit import VARIANTS
from tljax.pretrained.rules import CONV, DENSE, Config, Layout, Rule, Rules, dense


def _norm(key: str, path: str) -> Rules:
    return Rule(f"{key}.weight", f"params/{path}/scale"), Rule(f"{key}.bias", f"params/{path}/bias")


def _conv(key: str, path: str) -> Rules:
    return (Rule(f"{key}.weight", f"params/{path}/kernel", CONV),)


def _body(name: str, stem: str, block_key: str, norm: str) -> Rules:
    """All but the head; ``block_key`` names a block by its layer and number."""
    rules = _conv(stem, "stem/conv")
    for layer, depth in enumerate(VARIANTS[name].depths):
        for block in range(depth):
            key = block_key.format(layer=layer, block=block)
            path = f"layer{layer + 1}/block{block}"
            for i in (1, 2, 3):
                rules += _norm(f"{key}.norm{i}", f"{path}/norm{i}")
                rules += _conv(f"{key}.conv{i}", f"{path}/conv{i}")
            if block == 0:
                rules += _conv(f"{key}.downsample.conv", f"{path}/shortcut")
    return rules + _norm(norm, "norm/norm")


def timm(name: str) -> Rules:
    """``stages.0.blocks.0.conv1.weight``; the head is a 1x1 convolution, ``head.fc.weight``."""
    features = 2048 * VARIANTS[name].width
    return (
        *_body(name, "stem.conv", "stages.{layer}.blocks.{block}", "norm"),
        Rule(
            "head.fc.weight",
            "params/head/kernel",
            DENSE,
            shape=(-1, features, 1, 1),
            view=(-1, features),
        ),
        Rule("head.fc.bias", "params/head/bias"),
    )


def huggingface(name: str) -> Rules:
    """``bit.encoder.stages.0.layers.0.conv1.weight``, ``classifier.1.weight``."""
    block = "bit.encoder.stages.{layer}.layers.{block}"
    body = _body(name, "bit.embedder.convolution", block, "bit.norm")
    return body + dense("classifier.1", "head")


def huggingface_config(name: str) -> Config:
    """Of ``BitForImageClassification``, which builds other networks of these tensors too."""
    depths, width, _ = VARIANTS[name]
    return {
        "architectures": ["BitForImageClassification"],
        "model_type": "bit",
        "depths": list(depths),
        "hidden_sizes": [256 * width, 512 * width, 1024 * width, 2048 * width],
        "embedding_size": 64 * width,
        "hidden_act": "relu",
        "num_channels": 3,
        "layer_type": "preactivation",
        "global_padding": None,
        "embedding_dynamic_padding": False,
        "num_groups": 32,
        "output_stride": 32,
        "width_factor": 1,
    }


LAYOUTS: dict[str, dict[str, Layout]] = {
    name: {
        "timm": Layout(timm),
        "huggingface": Layout(huggingface, config=huggingface_config),
    }
    for name in VARIANTS
}
