"""The few types that every room shares. Arrays and plain data only; no behaviour."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import jax
import numpy as np

from tljax.runtime.settings import Normalization

Array = jax.Array | np.ndarray
"""An array on the host or on a device."""

Variables = dict[str, Any]
"""``{"params": {stage: ...}, "batch_stats": {stage: ...}}``: nested dicts with arrays as leaves."""


@dataclass(frozen=True)
class Preprocess:
    """How a photograph becomes what a set of weights expects to see. Travels with the weights.

    Geometry happens on the host, on uint8 pixels: the short side is resized to ``resize`` and the
    central ``size`` x ``size`` square is cut out. Normalisation is the model's first act, on the
    device: ``(x - mean) / std`` for RGB ``x`` in [0, 1], then the channel order is reversed for
    networks that were trained on BGR. Caffe's ``x * 255 - mean_bgr`` is ``std = 1/255``; [-1, 1] is
    ``mean = std = 0.5``.

    Attributes:
        size: side of the square that the network sees, in pixels.
        resize: length of the short side before the crop, in pixels; at least ``size``.
        interpolation: the Pillow filter of the resize.
        mean: per-channel mean, RGB order, for values in [0, 1].
        std: per-channel standard deviation, RGB order, for values in [0, 1].
        channel_order: what the first convolution's input channels mean.
    """

    size: int = 224
    resize: int = 256
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    channel_order: Literal["rgb", "bgr"] = "rgb"

    def with_size(self, size: int) -> Self:
        """The same preprocessing for another input size; the crop keeps its share of the photo."""
        return replace(self, size=size, resize=max(size, round(size * self.resize / self.size)))

    def with_normalization(self, name: Normalization) -> Self:
        """The same geometry, and one of `NORMALIZATIONS`."""
        other = NORMALIZATIONS[name]
        return replace(self, mean=other.mean, std=other.std, channel_order=other.channel_order)

    @property
    def normalization(self) -> Normalization | None:
        """Its name, if it is one of `NORMALIZATIONS`."""
        return next(
            (name for name in NORMALIZATIONS if self.with_normalization(name) == self), None
        )


HALF = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""Of networks that expect values in [-1, 1]."""

CAFFE = Preprocess(
    mean=(123.68 / 255, 116.779 / 255, 103.939 / 255),
    std=(1 / 255, 1 / 255, 1 / 255),
    channel_order="bgr",
)
"""Of networks that were trained with Caffe, or as there: BGR in [0, 255], less the mean."""


NORMALIZATIONS: dict[Normalization, Preprocess] = {
    "torch": Preprocess(),
    "tf": HALF,
    "caffe": CAFFE,
}
"""The field's three, by the names that keras.applications has for them; of each only the
normalisation and the order of channels matter."""


class Batch(NamedTuple):
    """A fixed number of examples; the tail of a data set is padded and masked.

    Attributes:
        inputs: ``[batch, height, width, 3]`` uint8 RGB photographs; or activations that enter a
            stage.
        targets: what is to be learned, a tree of arrays ``[batch, ...]``: of a classification
            ``[batch]`` int32 class indices, -1 where there is no label, or ``[batch, classes]``
            float shares once examples are mixed. Padding repeats those of the first example.
        mask: ``[batch]`` bool; False for padding and for images that could not be read.
        indices: ``[batch]`` int32 position of the example in its source; -1 for padding.
        extra: by name, further arrays ``[batch, ...]`` of the source.
    """

    inputs: Array
    targets: Any
    mask: Array
    indices: Array
    extra: dict[str, Array] = {}  # noqa: RUF012 - a field of a tuple, never written to
