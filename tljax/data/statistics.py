"""Mean and standard deviation of the channels of images, and whether these have 8 bits."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from tljax.data.decode import decode_as_stored
from tljax.data.examples import Source
from tljax.runtime.errors import RequestError, UnreadableImageError
from tljax.runtime.preprocess import Preprocess

MOST_IMAGES = 4096
"""Number of images that are read at most."""


def measure_channels(source: Source, preprocess: Preprocess) -> Preprocess:
    """Measure the channels of images after resizing and cropping.

    Of a larger source, `MOST_IMAGES` images are read, evenly spaced.

    Args:
        source: the images.
        preprocess: the sizes, the filter and the number of channels.

    Returns:
        The preprocessing with the mean and the standard deviation of each channel, rounded to six
        digits, and the dtype ``uint8`` if all images have 8 bits, else ``float32``. The standard
        deviation of a channel that is the same everywhere is set to 1.

    Raises:
        RequestError: no image can be read, or one needs tifffile, which is not installed.
    """
    count = min(len(source), MOST_IMAGES)
    indices = np.linspace(0, len(source) - 1, count).round().astype(int).tolist()
    skipped: dict[int, str] = {}

    def moments(index: int) -> tuple[np.ndarray, np.ndarray, bool] | None:
        try:
            pixels, _ = decode_as_stored(source.read(index), preprocess)
        except UnreadableImageError as error:
            skipped[index] = str(error)
            return None
        is_8_bit = pixels.dtype == np.uint8
        values = pixels.reshape(-1, preprocess.channels) / np.float64(255 if is_8_bit else 1)
        return values.mean(0), values.var(0), is_8_bit

    with ThreadPoolExecutor() as pool:
        measured = [part for part in pool.map(moments, indices) if part is not None]
    if not measured:
        index, reason = min(skipped.items())
        raise RequestError(f"no image can be read; {source.names[index]}: {reason}")
    means, variances, are_8_bit = (np.asarray(part) for part in zip(*measured, strict=True))
    std = np.sqrt(variances.mean(0) + means.var(0))
    return replace(
        preprocess,
        mean=_round(means.mean(0)),
        std=_round(np.where(std > 0, std, 1.0)),
        channel_order="rgb",
        dtype="uint8" if are_8_bit.all() else "float32",
    )


def _round(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)
