"""Reference implementations of the networks, with random weights, under the names of their files.

Of networks above 120 million parameters only the keys and shapes of the tensors are compared.
Batch-norm statistics are random throughout: with mean 0 and variance 1 a wrong norm goes unseen.
"""

from collections.abc import Callable

from references import (
    bit,
    convnext,
    efficientnet,
    inception,
    keras,
    mobilenet,
    mobilenetv4,
    regnet,
    resnet,
    vgg,
    vit,
    vit_files,
    xception,
)
from references.contract import Build, Reference, Shapes

__all__ = ["FAST", "REFERENCES", "SHAPES", "Build", "Reference", "Shapes"]

REFERENCES: dict[tuple[str, str], Build] = {
    **resnet.REFERENCES,
    **bit.REFERENCES,
    **inception.REFERENCES,
    **xception.REFERENCES,
    **efficientnet.REFERENCES,
    **vgg.REFERENCES,
    **mobilenet.REFERENCES,
    **regnet.REFERENCES,
    **convnext.REFERENCES,
    **mobilenetv4.REFERENCES,
    **vit.REFERENCES,
    **vit_files.REFERENCES,
    **keras.REFERENCES,
}
"""(model, layout) -> what writes a file as that project would, and the network behind it."""

SHAPES: dict[tuple[str, str], Callable[[], Shapes]] = {
    **regnet.SHAPES,
    **convnext.SHAPES,
    **vit.SHAPES,
    **vit_files.SHAPES,
}
"""(model, layout) -> the shapes of the tensors of a network that is too large to run."""

FAST = {
    ("resnet18", "torchvision"),
    ("resnet18", "huggingface"),
    ("efficientnet_lite0", "efficientnet_pytorch"),
    ("tf_efficientnet_b0", "huggingface"),
    ("mobilenetv4_conv_small", "timm"),
    ("tf_mobilenetv1_025", "huggingface"),
    ("keras_mobilenetv1_025", "keras"),
    ("tf_mobilenetv2_035", "huggingface"),
    ("tv_mobilenetv3_small_100", "torchvision"),
    ("regnetx_002", "timm"),
    ("regnety_002", "huggingface"),
    ("convnext_atto", "timm"),
    ("convnextv2_atto", "huggingface"),
    ("vit_tiny_patch16_224", "timm"),
    ("hf_deit_tiny_distilled_patch16_224", "huggingface"),
    ("vit_tiny_patch16_224", "vision_transformer"),
}
"""What `make test` runs of them: a small member of most families. All of them take an hour."""
