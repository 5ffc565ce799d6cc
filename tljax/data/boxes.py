"""Boxes of random crops, in whole photographs, determined by seed, epoch and example index.

Imports no JAX: processes that decode draw boxes, too. Generator and arithmetic are our own, so that
boxes stay the same with every version of the packages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from tljax.data.options import AugmentConfig
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import Preprocess

MAX_ELONGATION = 2
"""Ratio of the long to the short side above which only the central part of a photograph is used."""

Boxes = Float[np.ndarray, "*n 4"]
"""Top, left, height and width as shares of a photograph's height and width."""

_MASK = 2**32 - 1
_CROP = 0x63726F70  # "crop" in ASCII, so that no other use of a seed draws the same numbers


@dataclass(frozen=True)
class Crops:
    """The random crops of one epoch, for `load_batches`.

    Attributes:
        seed: seed of the run, 0 or more.
        epoch: number of the epoch.
        config: the rule, ``random-resized`` or ``random``, and its ranges.

    Raises:
        RequestError: the rule is ``center``.
    """

    seed: int
    epoch: int
    config: AugmentConfig

    def __post_init__(self) -> None:
        if self.config.crop == "center":
            raise RequestError("a central crop is not random: load batches without crops")

    def boxes(
        self,
        indices: Int[np.ndarray, "*n"] | int,
        shapes: Float[np.ndarray, "*n 2"] | tuple[float, float],
        preprocess: Preprocess,
    ) -> Boxes:
        """Draw the box of each photograph; see `random_boxes`."""
        share = preprocess.size / preprocess.resize
        return random_boxes(self.seed, self.epoch, indices, shapes, self.config, share)

    def of(self, index: int, preprocess: Preprocess) -> Callable[[float, float], Boxes]:
        """Return the box of one photograph as a function of its height and width, for `decode`."""
        return lambda height, width: self.boxes(index, (height, width), preprocess)


def random_crops(config: AugmentConfig, seed: int, epoch: int) -> Crops | None:
    """Return the random crops of an epoch; None for central crops."""
    return None if config.crop == "center" else Crops(seed, epoch, config)


def random_boxes(
    seed: int,
    epoch: int,
    indices: Int[np.ndarray, "*n"] | int,
    shapes: Float[np.ndarray, "*n 2"] | tuple[float, float],
    config: AugmentConfig,
    share: float,
) -> Boxes:
    """Draw the box that each photograph is cropped to.

    A box depends on the seed, the epoch, the index and the ratio of width to height alone. Of a
    photograph of more than two to one, it covers a part of the central two to one.

    Torchvision draws area and aspect ratio up to ten times until the box fits. Here the area is
    drawn among those for which a ratio fits, and the ratio among those that fit, so both keep their
    distributions. The position is uniform.

    Args:
        seed: seed of the run, 0 or more.
        epoch: number of the epoch.
        indices: position of each example in its source; or one integer.
        shapes: height and width of each photograph as shown, in any unit.
        config: the rule and its ranges.
        share: height and width of a ``random`` crop as shares of those of the photograph:
            ``preprocess.size / preprocess.resize``.

    Returns:
        Top, left, height and width as shares, float64 in [0, 1], ``[n, 4]``, or ``[4]`` for one.
    """
    draws = _uniform_draws(seed, epoch, indices)
    sides = np.asarray(shapes, np.float64)
    part = _central_part(sides)
    used = part * sides
    if config.crop == "random":
        box = np.full(sides.shape, share)
    else:
        box = _random_shape(draws[..., 0], draws[..., 1], used[..., 1] / used[..., 0], config)
    corner = (1 - part) / 2 + draws[..., 2:] * (1 - box) * part
    return np.concatenate([corner, box * part], axis=-1)


def pixel_boxes(
    boxes: Boxes,
    shapes: Float[np.ndarray, "n 2"],
    transposed: Bool[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, "n 7"]:
    """Convert boxes to pixels of photographs at the upper left of a canvas, for ``Batch.boxes``.

    Args:
        boxes: ``[n, 4]`` shares of what is on the canvas, from `random_boxes`; of a photograph of
            more than two to one, only the central part may be there, see `in_central_part`.
        shapes: ``[n, 2]`` height and width of each photograph on the canvas, upright, in pixels.
        transposed: ``[n]`` whether the two axes are exchanged on the canvas; by default none.

    Returns:
        ``[n, 7]`` float32: top, left, height and width of the box on the canvas, height and width
        of the photograph there, and 1 if it is transposed.
    """
    transposed = np.zeros(len(boxes), bool) if transposed is None else transposed
    pixels = np.concatenate([boxes * np.tile(shapes, 2), shapes], axis=-1)
    pixels = np.where(transposed[:, None], pixels[:, [1, 0, 3, 2, 5, 4]], pixels)
    return np.concatenate([pixels, transposed[:, None]], axis=-1).astype(np.float32)


def in_central_part(boxes: Boxes, shapes: Float[np.ndarray, "*n 2"]) -> Boxes:
    """Convert shares of photographs to shares of the central part of two to one that is used."""
    part = _central_part(shapes)
    size = boxes[..., 2:] / part
    corner = np.clip((boxes[..., :2] - (1 - part) / 2) / part, 0, 1 - size)
    return np.concatenate([corner, size], axis=-1)


def _central_part(shapes: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 2"]:
    """Return the shares of height and width that are used of each photograph."""
    return np.minimum(1, MAX_ELONGATION * shapes[..., ::-1] / shapes)


def _random_shape(
    area_draw: np.ndarray, ratio_draw: np.ndarray, elongation: np.ndarray, config: AugmentConfig
) -> Float[np.ndarray, "*n 2"]:
    """Compute height and width of a box, as shares, from two uniform draws.

    Args:
        area_draw: decides the share of the area.
        ratio_draw: decides the aspect ratio, given the area.
        elongation: width over height of the photograph.
        config: the ranges of both.
    """
    # The ratio of two shares is that of two lengths over the elongation, and a box of this area
    # fits if it is between the area and its inverse.
    low, high = config.ratio[0] / elongation, config.ratio[1] / elongation
    largest = np.minimum(1, np.minimum(high, 1 / low))
    smallest, largest = (np.minimum(bound, largest) for bound in config.scale)
    area = smallest + area_draw * (largest - smallest)
    low, high = np.log(np.maximum(area, low)), np.log(np.minimum(1 / area, high))
    ratio = np.exp(low + ratio_draw * (high - low))
    return np.minimum(np.sqrt(np.stack([area / ratio, area * ratio], axis=-1)), 1)


def _uniform_draws(
    seed: int, epoch: int, indices: Int[np.ndarray, "*n"] | int
) -> Float[np.ndarray, "*n 4"]:
    """Draw four numbers from [0, 1) for each index."""
    many = isinstance(indices, np.ndarray)
    index = indices.astype(np.uint64) & np.uint64(_MASK) if many else int(indices) & _MASK
    seed, epoch = int(seed), int(epoch)
    key = seed & _MASK, seed >> 32 & _MASK
    words = _philox((index, epoch & _MASK, _CROP, 0), key)
    return np.stack(words, axis=-1) / 2.0**32


def _philox(counter: tuple[Any, ...], key: tuple[int, int]) -> tuple[Any, ...]:
    """Return four random words of 32 bits: Philox4x32 with ten rounds.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

    Args:
        counter: four words, each a Python integer or an array of uint64.
        key: two words.
    """
    a, b, c, d = counter
    for i in range(10):
        low, high = (key[0] + i * 0x9E3779B9) & _MASK, (key[1] + i * 0xBB67AE85) & _MASK
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = y >> 32 ^ b ^ low, y & _MASK, x >> 32 ^ d ^ high, x & _MASK
    return a, b, c, d
