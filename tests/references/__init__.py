"""Reference implementations of the networks, with random weights, under the names of their files.

Batch-norm statistics are random throughout: with mean 0 and variance 1 a wrong norm goes unseen.
"""

from references import (
    bit,
    efficientnet,
    inception,
    keras,
    mobilenet,
    mobilenetv4,
    resnet,
    vgg,
    xception,
)
from references.contract import Build, Reference

__all__ = ["FAST", "REFERENCES", "Build", "Reference"]

REFERENCES: dict[tuple[str, str], Build] = {
    **resnet.REFERENCES,
    **bit.REFERENCES,
    **inception.REFERENCES,
    **xception.REFERENCES,
    **efficientnet.REFERENCES,
    **vgg.REFERENCES,
    **mobilenet.REFERENCES,
    **mobilenetv4.REFERENCES,
    **keras.REFERENCES,
}
"""(model, layout) -> what writes a file as that project would, and the network behind it."""

FAST = {
    ("resnet18", "torchvision"),
    ("resnet18", "huggingface"),
    ("resnet18d", "timm"),
    ("inception_v3", "torchvision"),
    ("efficientnet_lite0", "efficientnet_pytorch"),
    ("efficientnet_b0", "torchvision"),
    ("tf_efficientnet_b0", "huggingface"),
    ("tf_efficientnet_b0", "keras"),
    ("tf_efficientnetv2_b0", "timm"),
    ("mobilenetv4_conv_small", "timm"),
    ("tf_mobilenetv1_025", "huggingface"),
    ("keras_mobilenetv1_025", "keras"),
    ("tf_mobilenetv2_035", "huggingface"),
    ("tv_mobilenetv3_small_100", "torchvision"),
}
"""What `make test` runs of them: a small member of most families. All of them take an hour."""
