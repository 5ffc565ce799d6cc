"""Readers of images that are not pictures: ``.npy`` files and TIFF files of any bands."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Num, UInt8
from numpy.lib import format as npy
from PIL import Image

from tljax.runtime.errors import RequestError, UnreadableImageError
from tljax.runtime.packages import install_command

MAX_VALUES = 3 * 2**27
"""Largest number of values that are decoded: those of the largest RGB image, see `decode`."""

NPY = b"\x93NUMPY"
"""First bytes of a file of ``numpy.save``."""

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF


def is_tiff(data: bytes) -> bool:
    """Return True if a file begins as a TIFF file."""
    return data.startswith(_TIFF)


def read_npy(data: bytes) -> Num[np.ndarray, "height width channels"]:
    """Read the image in a file of ``numpy.save``: numbers ``[height, width]`` or with channels.

    The header is checked against the size of the file; pickled objects are refused.

    Raises:
        UnreadableImageError: the file is damaged or holds something else.
    """
    file = io.BytesIO(data)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        version = npy.read_magic(file)
        shape, fortran, dtype = readers[version](file)
    except (KeyError, ValueError, TypeError, SyntaxError, RecursionError) as error:
        raise UnreadableImageError("damaged: the header of the .npy file is broken") from error
    check_array(shape, dtype)
    values = int(np.prod(shape, dtype=np.int64))
    if len(data) - file.tell() != values * dtype.itemsize:
        raise UnreadableImageError("cut short: the .npy file has not the size its header says")
    array = np.ndarray(shape, dtype, data, file.tell(), order="F" if fortran else "C")
    return _with_channels(array)


def read_tiff(data: bytes, channels: int | None) -> Num[np.ndarray, "height width channels"]:
    """Read the first image of a TIFF file with all its bands, as tifffile finds them.

    Bands may be interleaved, in planes or in pages of their own.

    Args:
        data: the file.
        channels: expected number of bands. ``tifffile.imwrite`` without a color space writes one
            page for each row of an array ``[height, width, channels]``: if only the last axis has
            this length, it is the channels.

    Raises:
        UnreadableImageError: the file is damaged, or holds something else than one image.
        RequestError: tifffile is not installed.
    """
    try:
        import tifffile  # noqa: PLC0415 - optional
    except ImportError as error:
        raise RequestError(
            "TIFF images of several bands or more than 8 bits need tifffile: "
            + install_command("tifffile")
        ) from error
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            series: Any = file.series[0]
            axes, shape = series.axes, series.shape
            check_array(shape, series.dtype, axes)
            array = series.asarray()
    except UnreadableImageError:
        raise
    except Exception as error:  # tifffile raises many types on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(f"its TIFF bands cannot be read: {reason:.200}") from error
    if axes == "QYX" and shape[-1] == channels != shape[0]:
        return array
    return _with_channels(np.moveaxis(array, (axes.index("Y"), axes.index("X")), (0, 1)))


def check_array(shape: tuple[int, ...], dtype: Any, axes: str | None = None) -> None:
    """Check the shape and type of an image before it is read.

    Args:
        shape: shape of the array.
        dtype: its type; a file may hold anything.
        axes: letter of each axis, as tifffile names them.

    Raises:
        UnreadableImageError: it is not one image of uint8, uint16 or floating point numbers.
    """
    described = f"{dtype} of shape {list(shape)}"
    if not isinstance(dtype, np.dtype) or dtype not in _DTYPES:
        raise UnreadableImageError(f"{described}: save uint8, uint16 or floating point numbers")
    if len(shape) not in (2, 3) or (axes is not None and not {"Y", "X"} <= set(axes)):
        raise UnreadableImageError(f"{described}: save one image [height, width, channels]")
    if not 0 < np.prod(shape, dtype=np.float64) <= MAX_VALUES:
        raise UnreadableImageError(f"{described}: choose from 1 to {MAX_VALUES:,} numbers")


_DTYPES = tuple(np.dtype(order + name) for name in ("u1", "u2", "f2", "f4", "f8") for order in "<>")


def _with_channels(array: np.ndarray) -> np.ndarray:
    return array[..., None] if array.ndim == 2 else array


def to_values(
    array: Num[np.ndarray, "height width channels"],
) -> UInt8[np.ndarray, "height width channels"] | Float[np.ndarray, "height width channels"]:
    """Keep 8 bits; divide 16 bits by 65,535; take floating point numbers as they are, in float32.

    Raises:
        UnreadableImageError: a number is NaN or infinite.
    """
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind == "u":
        return np.asarray(array, np.float32) / np.float32(65535)
    with np.errstate(over="ignore"):
        array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
        raise UnreadableImageError("a pixel is NaN or infinite: replace it by a number")
    return array


def to_bands(
    array: UInt8[np.ndarray, "height width channels"] | Float[np.ndarray, "height width channels"],
) -> Iterator[Image.Image]:
    """Yield an image of mode RGB, L or F for each part that Pillow resizes at once."""
    if array.dtype == np.uint8 and array.shape[-1] == 3:
        yield Image.fromarray(np.ascontiguousarray(array))
        return
    for k in range(array.shape[-1]):
        yield Image.fromarray(np.ascontiguousarray(array[..., k]))
