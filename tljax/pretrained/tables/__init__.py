"""Key tables of the networks, one module per family, and the rules that they share."""

from collections.abc import Iterable

from tljax.pretrained.rules import DENSE, Rule, Rules, conv_norm


def block_indices(depths: Iterable[int]) -> list[tuple[int, int]]:
    """Return the (stage, block) indices of a network, both counted from 0."""
    return [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]


def huggingface_conv_norm(key: str, path: str) -> Rules:
    """Return the rules of a convolution and its norm in transformers' ``...ConvLayer`` modules."""
    return conv_norm(f"{key}.convolution", f"{key}.normalization", path)


def dense_as_conv(key: str, path: str, inputs: int, outputs: int) -> Rules:
    """Return the rules of a linear layer that is stored as a 1x1 convolution in torch.

    Args:
        key: prefix of the keys in the source file.
        path: path of the layer in tljax.
        inputs: number of input features; -1 if unknown.
        outputs: number of output features; -1 for the number of classes.
    """
    view = (outputs, inputs)
    kernel = Rule(f"{key}.weight", f"params/{path}/kernel", DENSE, (*view, 1, 1), view)
    return kernel, Rule(f"{key}.bias", f"params/{path}/bias")
