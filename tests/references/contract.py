"""What a reference implementation offers to the tests."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Reference(NamedTuple):
    """A reference implementation and the file of its weights.

    Attributes:
        weights: the file or folder that `load_pretrained` reads.
        stages: from ``[b, h, w, 3]`` float32 pixels, normalised as the model does it, to the output
            of every stage of ours by name, in order; maps are NHWC.
        sizes: heights and widths to compare at; odd and not square, where the source allows.
    """

    weights: Path
    stages: Callable[[np.ndarray], dict[str, np.ndarray]]
    sizes: tuple[tuple[int, int], ...] = ((128, 128), (129, 97))


Shapes = dict[str, tuple[int, ...]]
"""Shapes of the tensors of a network by their keys in its file."""

Build = Callable[[Path], Reference]
"""From an empty folder, to write the weights into, to the reference."""
