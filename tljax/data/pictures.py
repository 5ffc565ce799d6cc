"""Image files to be looked at or handed to a network one by one, without a loader."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from os import PathLike

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from tljax.data.decode import decode, open_as_stored, open_image
from tljax.data.folders import open_images
from tljax.explain.pictures import as_rgb
from tljax.runtime.errors import UnreadableImageError
from tljax.runtime.preprocess import Preprocess


def decode_picture(data: bytes | np.ndarray, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Decode an image to be looked at: what is no picture shows its first three channels.

    Args:
        data: as for `decode`.
        size: side of the central square, in pixels.

    Returns:
        ``[size, size, 3]`` uint8 RGB; see `tljax.explain.pictures.as_rgb`.

    Raises:
        UnreadableImageError: the image cannot be used.
    """
    return decode(np.asarray(open_picture(data)), Preprocess(size, size))


def open_picture(data: bytes | np.ndarray) -> Image.Image:
    """Decode an image to be looked at, in full: as `open_image` if it is a picture.

    Raises:
        UnreadableImageError: the image cannot be used.
    """
    if not isinstance(data, np.ndarray):
        with suppress(UnreadableImageError):
            return open_image(data)
    return Image.fromarray(as_rgb(open_as_stored(data)))


def read_images(
    paths: Sequence[str | PathLike[str]], preprocess: Preprocess
) -> Shaped[np.ndarray, "images size size channels"]:
    """Decode a short list of image files in one thread.

    Args:
        paths: files, folders (every file below them is read) or URLs, as for `open_images`.
        preprocess: the sizes, the filter, the number of channels and the dtype; see `decode`.

    Returns:
        ``[images, size, size, channels]``, RGB for three channels.

    Raises:
        RequestError: a path does not exist, a folder has no file, or a URL cannot be fetched.
        UnreadableImageError: a file is not a usable image; the message names it.
    """
    source = open_images(paths)
    images = np.empty((len(source), *preprocess.shape), preprocess.dtype)
    for index, name in enumerate(source.names):
        try:
            remarks: list[str] = []
            images[index] = decode(source.read(index), preprocess, remarks)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"{name}: {error}") from error
        print_remarks(name, *remarks)
    return images


@cache
def print_remarks(name: str, *remarks: str) -> None:
    """Print remarks about an image to stderr, once per process."""
    for remark in remarks:
        print(f"note: {name}: {remark}", file=sys.stderr)
