"""Key tables of ResNet: torchvision (timm's are the same) and Hugging Face transformers."""

from tljax.models.resnet import DEPTHS
from tljax.pretrained.rules import Config, Layout, Rules, conv_norm, dense


def _blocks(name: str) -> list[tuple[int, int]]:
    """Every (layer, block) of a network, both counted from 0."""
    return [(layer, block) for layer, depth in enumerate(DEPTHS[name]) for block in range(depth)]


def _convs(name: str) -> range:
    return range(2 if name in ("resnet18", "resnet34") else 3)


def _has_shortcut(name: str, layer: int, block: int) -> bool:
    """The first block of a layer changes stride or width; not so layer1 of the basic networks."""
    return block == 0 and (layer > 0 or len(_convs(name)) == 3)


def torchvision(name: str) -> Rules:
    """``layer1.0.conv1.weight``, ``layer1.0.downsample.0.weight``, ``fc.weight``."""
    rules = conv_norm("conv1", "bn1", "stem/conv1")
    for layer, block in _blocks(name):
        key, path = f"layer{layer + 1}.{block}", f"layer{layer + 1}/block{block}"
        for i in _convs(name):
            rules += conv_norm(f"{key}.conv{i + 1}", f"{key}.bn{i + 1}", f"{path}/conv{i + 1}")
        if _has_shortcut(name, layer, block):
            rules += conv_norm(f"{key}.downsample.0", f"{key}.downsample.1", f"{path}/shortcut")
    return rules + dense("fc", "head")


def huggingface(name: str) -> Rules:
    """``resnet.encoder.stages.0.layers.0.layer.0.convolution.weight``, ``classifier.1.weight``."""

    def unit(key: str, path: str) -> Rules:
        return conv_norm(f"resnet.{key}.convolution", f"resnet.{key}.normalization", path)

    rules = unit("embedder.embedder", "stem/conv1")
    for layer, block in _blocks(name):
        key, path = f"encoder.stages.{layer}.layers.{block}", f"layer{layer + 1}/block{block}"
        for i in _convs(name):
            rules += unit(f"{key}.layer.{i}", f"{path}/conv{i + 1}")
        if _has_shortcut(name, layer, block):
            rules += unit(f"{key}.shortcut", f"{path}/shortcut")
    return rules + dense("classifier.1", "head")


def huggingface_config(name: str) -> Config:
    """Of ``ResNetForImageClassification``; version 1 has its stride elsewhere."""
    basic = len(_convs(name)) == 2
    return {
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "depths": list(DEPTHS[name]),
        "hidden_sizes": [64, 128, 256, 512] if basic else [256, 512, 1024, 2048],
        "layer_type": "basic" if basic else "bottleneck",
        "downsample_in_bottleneck": False,
        "downsample_in_first_stage": False,
        "embedding_size": 64,
        "hidden_act": "relu",
        "num_channels": 3,
    }


_TORCHVISION = Layout(torchvision)

LAYOUTS: dict[str, dict[str, Layout]] = {
    name: {
        "torchvision": _TORCHVISION,
        "timm": _TORCHVISION,  # the same keys
        "huggingface": Layout(huggingface, config=huggingface_config),
    }
    for name in DEPTHS
}
