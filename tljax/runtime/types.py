"""Data types that all packages share: arrays and batches."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int32, Integer, Shaped

Array = jax.Array | np.ndarray
"""An array on the host or on a device."""

Logits = Float[Array, "examples classes"]
"""Unnormalized log-probabilities, one row per example."""

Labels = Integer[Array, " examples"]
"""Class indices, one per example."""

FeatureMap = Float[jax.Array, "batch height width channels"]
"""Activations of a convolutional layer."""

Variables = dict[str, Any]
"""``{"params": {stage: ...}, "batch_stats": {stage: ...}}``: nested dicts with arrays as leaves."""


class Batch(NamedTuple):
    """A batch of a fixed number of examples; the last batch of a data set is padded and masked.

    Attributes:
        inputs: ``[batch, height, width, channels]`` images, uint8 or as `Preprocess` says, or the
            activations that enter a stage.
        targets: tree of arrays ``[batch, ...]``. For classification, ``[batch]`` int32 class
            indices, -1 for unlabeled examples, or ``[batch, classes]`` float probabilities if
            examples are mixed. Padding repeats the targets of the first example.
        mask: ``[batch]`` bool; False for padding and for unreadable images.
        indices: ``[batch]`` int32 position of each example in its source; -1 for padding.
        extra: further arrays ``[batch, ...]`` of the source, by name.
        boxes: ``[batch, 7]`` float32 if inputs are whole photographs, each at the upper left of a
            canvas, that `augment` is to crop: top, left, height and width of the crop, height and
            width of the photograph, in pixels, and whether it is transposed. Otherwise None.
    """

    inputs: Shaped[Array, "batch ..."]
    targets: Any
    mask: Bool[Array, " batch"]
    indices: Int32[Array, " batch"]
    extra: dict[str, Array] = {}  # noqa: RUF012 - a field of a tuple, never written to
    boxes: Float[Array, "batch 7"] | None = None

    @property
    def num_examples(self) -> int:
        """Return the number of examples, without padding."""
        return int((self.indices >= 0).sum())
