# ruff: noqa: PLC0415 - matplotlib takes a second to import, so only _colored imports it
"""Rendering of explanations: maps and feature maps to uint8 RGB images."""

import jax
import numpy as np
from jaxtyping import Float, Integer, Num, UInt8

from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array

Maps = Float[Array, "batch height width"]
FeatureMap = Float[Array, "height width channels"]


def to_pixels(images: Num[Array, "..."]) -> UInt8[np.ndarray, "..."]:
    """Convert images in [0, 1] to uint8, rounding to the nearest level; uint8 stays unchanged."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def as_rgb(images: Num[Array, "*batch height width channels"]) -> UInt8[np.ndarray, "..."]:
    """Convert images of any channels to RGB, to be looked at.

    One channel is shown in gray, of more than three the first three, and of two the first.

    Args:
        images: ``[..., height, width, channels]``. uint8 stays as it is; the range of floating
            point numbers is not known, so each image is stretched from its smallest to its largest
            value.

    Returns:
        ``[..., height, width, 3]`` uint8.
    """
    shown = _first_three(np.asarray(images))
    if shown.dtype == np.uint8:
        return shown
    low, high = (f(shown, axis=(-3, -2, -1), keepdims=True) for f in (np.min, np.max))
    return to_pixels((shown - low) / np.where(high > low, high - low, 1))


def _first_three(images: np.ndarray) -> np.ndarray:
    return images[..., :3] if images.shape[-1] >= 3 else np.repeat(images[..., :1], 3, axis=-1)


def scale_maps(maps: Maps, *, percentile: float = 99.0) -> Float[np.ndarray, "batch height width"]:
    """Scale each map to [-1, 1] by a percentile of its absolute values.

    Args:
        maps: ``[batch, height, width]`` explanations.
        percentile: percentile of a map's absolute values that becomes 1, in percent; larger values
            are clipped. Below 100, a few outliers do not darken the rest of the map.

    Returns:
        ``[batch, height, width]`` in [-1, 1]. A map of zeros stays zero.
    """
    maps = np.asarray(maps, np.float32)
    largest = np.percentile(np.abs(maps), percentile, axis=(1, 2), keepdims=True)
    # The percentile of a map that is mostly zero is 0, but its maximum may not be.
    largest = np.where(largest > 0, largest, np.abs(maps).max((1, 2), keepdims=True))
    return np.clip(maps / np.where(largest > 0, largest, 1), -1, 1)


def heatmap(maps: Maps, *, percentile: float = 99.0) -> UInt8[np.ndarray, "batch height width 3"]:
    """Color maps: black, red, yellow; if any value is negative, blue, white, red around 0.

    Args:
        maps: ``[batch, height, width]``, for example from `saliency`, or from
            `integrated_gradients` summed over its channels.
        percentile: see `scale_maps`.

    Returns:
        ``[batch, height, width, 3]`` uint8.
    """
    scaled = scale_maps(maps, percentile=percentile)
    if (scaled < 0).any():
        return _colored((scaled + 1) / 2, "RdBu_r")
    return _colored(scaled, "inferno")


def overlay(
    images: Num[Array, "batch height width channels"],
    maps: Float[Array, "batch h w"],
    *,
    opacity: float = 0.6,
    percentile: float = 99.0,
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Blend heatmaps with the grayscale versions of their images.

    Args:
        images: ``[batch, height, width, channels]``, uint8 or in [0, 1]. Of more than three
            channels the first three are seen as RGB, of two the first as gray.
        maps: ``[batch, h, w]``, resized bilinearly to the images.
        opacity: opacity of the heatmap, 0 to 1.
        percentile: see `scale_maps`.

    Returns:
        ``[batch, height, width, 3]`` uint8.

    Raises:
        RequestError: the number of maps differs from the number of images.
    """
    pixels = _first_three(to_pixels(images))
    maps = np.asarray(maps, np.float32)
    if maps.ndim != 3 or len(maps) != len(pixels):
        raise RequestError(
            f"maps of shape {maps.shape} for {len(pixels)} images; pass [batch, height, width]"
        )
    if maps.shape[1:] != pixels.shape[1:3]:
        maps = np.asarray(jax.image.resize(maps, pixels.shape[:3], "bilinear"))
    gray = pixels @ np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601
    mixed = (1 - opacity) * gray[..., None] + opacity * heatmap(maps, percentile=percentile)
    return np.round(mixed).astype(np.uint8)


def strongest_channels(features: FeatureMap, count: int = 16) -> Integer[np.ndarray, " count"]:
    """Return the indices of the channels with the largest mean absolute activation.

    Args:
        features: ``[height, width, channels]``, the output of a stage for one image.
        count: number of channels to return; all if there are fewer.

    Returns:
        ``[count]`` indices, in descending order of mean absolute activation.
    """
    strength = np.abs(np.asarray(features, np.float32)).mean((0, 1))
    return np.argsort(-strength, kind="stable")[:count]


def channel_pictures(features: FeatureMap) -> UInt8[np.ndarray, "channels height width 3"]:
    """Render each channel of a feature map as an image, scaled to the channel's range.

    Args:
        features: ``[height, width, channels]``, the output of a stage for one image.

    Returns:
        ``[channels, height, width, 3]`` uint8, from dark blue for the smallest to yellow for the
        largest value.
    """
    channels = np.moveaxis(np.asarray(features, np.float32), -1, 0)
    low, high = (f(channels, (1, 2), keepdims=True) for f in (np.min, np.max))
    return _colored((channels - low) / np.where(high > low, high - low, 1), "viridis")


def _colored(values: np.ndarray, colormap: str) -> np.ndarray:
    import matplotlib as mpl

    return mpl.colormaps[colormap](values, bytes=True)[..., :3]
