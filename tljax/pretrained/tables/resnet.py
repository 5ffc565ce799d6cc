"""Key tables of ResNet in torchvision, timm (the same keys) and Hugging Face transformers."""

from tljax.models.resnet import VARIANTS, Bottleneck
from tljax.pretrained.rules import Config, Layout, Rules, conv_norm, dense
from tljax.pretrained.tables import block_indices, huggingface_conv_norm


def _has_shortcut(name: str, layer: int, block: int) -> bool:
    """Return True for first blocks, except in layer1 of networks with basic blocks."""
    return block == 0 and (layer > 0 or VARIANTS[name].block is Bottleneck)


def torchvision(name: str) -> Rules:
    """Return the key table, with keys such as ``layer1.0.conv1.weight``.

    It also serves timm. In timm's ResNet-D the pooling of a shortcut and the activations of the
    stem take numbers too (``downsample.1.weight``, ``conv1.3.weight``).
    """
    variant = VARIANTS[name]
    if variant.deep_stem:
        rules = conv_norm("conv1.0", "conv1.1", "stem/conv1")
        rules += conv_norm("conv1.3", "conv1.4", "stem/conv2")
        rules += conv_norm("conv1.6", "bn1", "stem/conv3")
    else:
        rules = conv_norm("conv1", "bn1", "stem/conv1")
    conv, norm = (1, 2) if variant.pooled_shortcut else (0, 1)
    for layer, block in block_indices(variant.depths):
        key, path = f"layer{layer + 1}.{block}", f"layer{layer + 1}/block{block}"
        for i in range(variant.block.convolutions):
            rules += conv_norm(f"{key}.conv{i + 1}", f"{key}.bn{i + 1}", f"{path}/conv{i + 1}")
        if _has_shortcut(name, layer, block):
            shortcut = f"{key}.downsample"
            rules += conv_norm(f"{shortcut}.{conv}", f"{shortcut}.{norm}", f"{path}/shortcut")
    return rules + dense("fc", "head")


def huggingface(name: str) -> Rules:
    """Return the key table with ``resnet.encoder.stages.0.layers.0.layer.0.convolution.weight``."""
    unit = huggingface_conv_norm
    rules = unit("resnet.embedder.embedder", "stem/conv1")
    for layer, block in block_indices(VARIANTS[name].depths):
        key = f"resnet.encoder.stages.{layer}.layers.{block}"
        path = f"layer{layer + 1}/block{block}"
        for i in range(VARIANTS[name].block.convolutions):
            rules += unit(f"{key}.layer.{i}", f"{path}/conv{i + 1}")
        if _has_shortcut(name, layer, block):
            rules += unit(f"{key}.shortcut", f"{path}/shortcut")
    return rules + dense("classifier.1", "head")


def huggingface_config(name: str) -> Config:
    """Return the config.json of ``ResNetForImageClassification``, which places the strides."""
    basic = VARIANTS[name].block.convolutions == 2
    return {
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "depths": list(VARIANTS[name].depths),
        "hidden_sizes": [64, 128, 256, 512] if basic else [256, 512, 1024, 2048],
        "layer_type": "basic" if basic else "bottleneck",
        "downsample_in_bottleneck": False,
        "downsample_in_first_stage": False,
        "embedding_size": 64,
        "hidden_act": "relu",
        "num_channels": 3,
    }


_PLAIN = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_TORCHVISION = Layout(torchvision)


def _layouts(name: str) -> dict[str, Layout]:
    if VARIANTS[name].deep_stem:
        return {"timm": _TORCHVISION}
    both = {"torchvision": _TORCHVISION, "timm": _TORCHVISION}  # the same keys
    if name not in _PLAIN:
        return both
    return {**both, "huggingface": Layout(huggingface, config=huggingface_config)}


LAYOUTS: dict[str, dict[str, Layout]] = {
    # keras.py has the tables of Keras
    name: _layouts(name)
    for name in VARIANTS
    if not name.startswith("keras_")
}
