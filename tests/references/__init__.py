"""Reference implementations of the networks, with random weights, under the names of their files.

Batch-norm statistics are random throughout: with mean 0 and variance 1 a wrong norm goes unseen.
"""

from references import (
    bit,
    efficientnet,
    inception,
    keras,
    mobilenet,
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
    **keras.REFERENCES,
}
"""(model, layout) -> what writes a file as that project would, and the network behind it."""

FAST = {
    *resnet.FAST,
    *bit.FAST,
    *inception.FAST,
    *xception.FAST,
    *efficientnet.FAST,
    *vgg.FAST,
    *mobilenet.FAST,
    *keras.FAST,
}
"""The models that are tested by `make test`; the others take minutes."""
