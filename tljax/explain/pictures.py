# ruff: noqa: PLC0415 - matplotlib takes a second to import: only what draws should wait for it
"""Explanations as pictures: arrays in, uint8 RGB arrays out."""

import jax
import numpy as np

from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array


def to_pixels(images: Array) -> np.ndarray:
    """Images in [0, 1] as uint8, rounded to the nearest level; uint8 stays what it is."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def scale_maps(maps: Array, *, percentile: float = 99.0) -> np.ndarray:
    """Each map divided by its largest absolute value, or nearly so.

    Args:
        maps: ``[batch, height, width]`` explanations.
        percentile: of the absolute values of a map, what becomes 1: a few outliers shall not leave
            all the rest dark.

    Returns:
        ``[batch, height, width]`` in [-1, 1]. A map of zeros stays zero.
    """
    maps = np.asarray(maps, np.float32)
    largest = np.percentile(np.abs(maps), percentile, axis=(1, 2), keepdims=True)
    # A map that is zero nearly everywhere: its percentile is 0, its maximum may not be.
    largest = np.where(largest > 0, largest, np.abs(maps).max((1, 2), keepdims=True))
    return np.clip(maps / np.where(largest > 0, largest, 1), -1, 1)


def heatmap(maps: Array, *, percentile: float = 99.0) -> np.ndarray:
    """Explanations in colour: from black over red to yellow; signed ones blue, white and red.

    Args:
        maps: ``[batch, height, width]``, e.g. of `saliency`, or of `integrated_gradients` summed
            over its channels.
        percentile: see `scale_maps`.

    Returns:
        ``[batch, height, width, 3]`` uint8.
    """
    scaled = scale_maps(maps, percentile=percentile)
    if (scaled < 0).any():
        return _coloured((scaled + 1) / 2, "RdBu_r")
    return _coloured(scaled, "inferno")


def overlay(
    images: Array, maps: Array, *, opacity: float = 0.6, percentile: float = 99.0
) -> np.ndarray:
    """Explanations laid over their photographs, which turn grey so that colour means the map alone.

    Args:
        images: ``[batch, height, width, 3]`` RGB, uint8 or in [0, 1].
        maps: ``[batch, h, w]``; enlarged bilinearly to the images where they are smaller.
        opacity: of the map, 0 to 1.
        percentile: see `scale_maps`.

    Returns:
        ``[batch, height, width, 3]`` uint8.

    Raises:
        RequestError: not as many maps as images.
    """
    pixels = to_pixels(images)
    maps = np.asarray(maps, np.float32)
    if maps.ndim != 3 or len(maps) != len(pixels):
        raise RequestError(
            f"maps of shape {maps.shape} for {len(pixels)} images; pass [batch, height, width]"
        )
    if maps.shape[1:] != pixels.shape[1:3]:
        maps = np.asarray(jax.image.resize(maps, pixels.shape[:3], "bilinear"))
    grey = pixels @ np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601
    mixed = (1 - opacity) * grey[..., None] + opacity * heatmap(maps, percentile=percentile)
    return np.round(mixed).astype(np.uint8)


def strongest_channels(features: Array, count: int = 16) -> np.ndarray:
    """The channels of a feature map that answer most.

    Args:
        features: ``[height, width, channels]``, one image's output of a stage.
        count: how many; all if there are fewer.

    Returns:
        ``[count]`` indices, from the largest mean absolute value down.
    """
    strength = np.abs(np.asarray(features, np.float32)).mean((0, 1))
    return np.argsort(-strength, kind="stable")[:count]


def channel_pictures(features: Array) -> np.ndarray:
    """The channels of a feature map, one picture each, scaled to its own range.

    Args:
        features: ``[height, width, channels]``, one image's output of a stage.

    Returns:
        ``[channels, height, width, 3]`` uint8, from blue for the smallest to yellow for the
        largest value.
    """
    channels = np.moveaxis(np.asarray(features, np.float32), -1, 0)
    low, high = (f(channels, (1, 2), keepdims=True) for f in (np.min, np.max))
    return _coloured((channels - low) / np.where(high > low, high - low, 1), "viridis")


def _coloured(values: np.ndarray, colours: str) -> np.ndarray:
    import matplotlib as mpl

    return mpl.colormaps[colours](values, bytes=True)[..., :3]
