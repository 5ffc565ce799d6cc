"""Key tables of BiT in timm and Hugging Face transformers."""

from tljax.models.bit import VARIANTS
from tljax.pretrained.rules import CONV, Config, Layout, Rule, Rules, dense
from tljax.pretrained.tables import block_indices, dense_as_conv


def _norm(key: str, path: str) -> Rules:
    return Rule(f"{key}.weight", f"params/{path}/scale"), Rule(f"{key}.bias", f"params/{path}/bias")


def _conv(key: str, path: str) -> Rules:
    return (Rule(f"{key}.weight", f"params/{path}/kernel", CONV),)


def _body(name: str, stem: str, block_key: str, norm: str) -> Rules:
    """Return the rules of all stages but the head; ``block_key`` is a format string."""
    rules = _conv(stem, "stem/conv")
    for layer, block in block_indices(VARIANTS[name].depths):
        key, path = block_key.format(layer=layer, block=block), f"layer{layer + 1}/block{block}"
        for i in (1, 2, 3):
            rules += _norm(f"{key}.norm{i}", f"{path}/norm{i}")
            rules += _conv(f"{key}.conv{i}", f"{path}/conv{i}")
        if block == 0:
            rules += _conv(f"{key}.downsample.conv", f"{path}/shortcut")
    return rules + _norm(norm, "norm/norm")


def timm(name: str) -> Rules:
    """Return timm's key table, with keys such as ``stages.0.blocks.0.conv1.weight``.

    The head is a 1x1 convolution, ``head.fc.weight``.
    """
    body = _body(name, "stem.conv", "stages.{layer}.blocks.{block}", "norm")
    return body + dense_as_conv("head.fc", "head", 2048 * VARIANTS[name].width, -1)


def huggingface(name: str) -> Rules:
    """Return the key table with ``bit.encoder.stages.0.layers.0.conv1.weight``."""
    block = "bit.encoder.stages.{layer}.layers.{block}"
    body = _body(name, "bit.embedder.convolution", block, "bit.norm")
    return body + dense("classifier.1", "head")


def huggingface_config(name: str) -> Config:
    """Return the config.json of ``BitForImageClassification``, whose geometry it determines."""
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
    name: {"timm": Layout(timm), "huggingface": Layout(huggingface, config=huggingface_config)}
    for name in VARIANTS
}
