"""Decode image files to squares, or raise an error that says why a file cannot be used."""

import codecs
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from simplejpeg import decode_jpeg, decode_jpeg_header

from tljax.data.pixels import NPY, check_array, is_tiff, read_npy, read_tiff, to_bands, to_values
from tljax.runtime.errors import RequestError, UnreadableImageError
from tljax.runtime.files import is_html
from tljax.runtime.preprocess import Preprocess

MAX_PIXELS = 2**27
"""Largest image that is decoded: 134 million pixels, 400 MB of RGB. Phones take 108 million."""

# The formats of photographs, scans and web images. By default Pillow also tries formats that call
# other programs: EPS starts Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")

_Orientation = tuple[bool, bool, bool]
"""How to put a stored image upright: reverse its columns, its rows, then exchange the two axes."""

_UPRIGHT = (False, False, False)

# EXIF orientation (Exif 2.32, tag 274; 1 is upright).
_ORIENTATIONS: dict[Any, _Orientation] = {
    2: (True, False, False),
    3: (True, True, False),
    4: (False, True, False),
    5: (False, False, True),
    6: (False, True, True),
    7: (True, True, True),
    8: (True, False, True),
}

_JPEG_BEGIN, _JPEG_END = b"\xff\xd8", b"\xff\xd9"  # the markers around an image

_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


Pixels = UInt8[np.ndarray, "size size channels"] | Float[np.ndarray, "size size channels"]
"""A square image: uint8, or float32 if it has more than 8 bits."""

Crop = Callable[[float, float], Sequence[float] | np.ndarray]
"""``(height, width) -> (top, left, height, width)``: a box of the upright image, as shares of its
height and width, which are given in any unit."""


def decode(
    data: bytes | np.ndarray,
    preprocess: Preprocess,
    remarks: list[str] | None = None,
    *,
    crop: Crop | None = None,
) -> Pixels:
    """Decode an image and resize and crop it for a network.

    The short side is resized to ``preprocess.resize`` with an antialiasing Pillow filter, and the
    central square is cropped. The pixels equal those of torchvision's ``Resize`` and ``CenterCrop``
    on a PIL image. A JPEG whose short side is at least eight times ``preprocess.resize`` is decoded
    at 1/2, 1/4 or 1/8 of its resolution, but at no less than four times ``preprocess.resize``: this
    is three times as fast for 12 megapixels and changes pixels by 0.1 to 0.4 of 255 on average.

    With ``crop``, that box of the image is resized to the square instead, as by Pillow's
    ``resize(box=...)``; a large JPEG is decoded at no less than four times the resolution needed.

    For three channels of 8 bits, every picture becomes RGB, as `open_image` says. Otherwise the
    bands of a file are kept, and each is resized by itself: their number must be
    ``preprocess.channels``, but color becomes gray for one channel and gray becomes color for
    three.

    Args:
        data: an encoded image file, a file of ``numpy.save``, or pixels ``[height, width,
            channels]`` uint8, uint16 or floating point.
        preprocess: the sizes, the filter, the number of channels and the dtype; normalization is
            left to the model.
        remarks: list that a remark is appended to if the end of the file is missing; see
            `open_image`.
        crop: the box to use in place of the central square, see `Crop`.

    Returns:
        ``[size, size, channels]``, where ``size`` is ``preprocess.size``; of ``uint8``, or of
        ``float32`` as `Preprocess` says.

    Raises:
        UnreadableImageError: the image cannot be used; the message is the reason.
        RequestError: the image needs tifffile, which is not installed.
    """
    exact = preprocess.dtype != "uint8" or preprocess.channels != 3
    pixels, has_range = decode_as_stored(data, preprocess, remarks, exact=exact, crop=crop)
    if preprocess.dtype == "uint8":
        return _require_8_bits(pixels, has_range)
    return pixels.astype(np.float32) / np.float32(255) if pixels.dtype == np.uint8 else pixels


class Whole(NamedTuple):
    """A whole photograph that was resized.

    Attributes:
        pixels: ``[height, width, 3]`` uint8, upright.
        height: height of the photograph before it was resized, in pixels.
        width: width of the photograph before it was resized, in pixels.
    """

    pixels: UInt8[np.ndarray, "height width 3"]
    height: int
    width: int


def decode_whole(
    data: bytes | np.ndarray,
    size: int,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    remarks: list[str] | None = None,
) -> Whole:
    """Decode a photograph and resize it so that its short side has ``size`` pixels.

    Its pixels are those from which `decode` crops the central square if ``preprocess.resize`` is
    ``size``. Of a photograph that is longer than twice its short side only the central part is
    kept, of at most ``2 * size`` pixels: a multiple of two pixels is cropped from each end, so that
    all central squares are those of `decode`.

    Args:
        data: as for `decode`.
        size: the short side of the result, in pixels; 4 or more.
        interpolation: the Pillow filter to resize with.
        remarks: as for `decode`.

    Raises:
        UnreadableImageError: the image cannot be used, for the reasons of `decode`.
    """
    preprocess = Preprocess(size, size, interpolation)
    opened = _open(data, lambda _: 4 * size)
    height, width = shape = _resized_shape(opened.shape, size)
    top, left = (2 * max(0, -(-(side - 2 * size) // 4)) for side in shape)
    window = top, left, height - 2 * top, width - 2 * left
    _remark(opened, remarks)
    pixels = _resize_and_crop(opened, shape, window, preprocess)
    return Whole(_require_8_bits(pixels, opened.has_range), *opened.full_shape)


def decode_as_stored(
    data: bytes | np.ndarray,
    preprocess: Preprocess,
    remarks: list[str] | None = None,
    *,
    exact: bool = True,
    crop: Crop | None = None,
) -> tuple[Pixels, bool]:
    """Decode an image like `decode`, but in uint8 if it has 8 bits, and otherwise in float32.

    Args:
        data: as for `decode`.
        preprocess: as for `decode`; the dtype does not matter.
        remarks: as for `decode`.
        exact: keep more than 8 bits, and do not read other bands as a picture.
        crop: as for `decode`.

    Returns:
        The pixels, and whether they were integers, whose range is known: float32 is in [0, 1] then.

    Raises:
        UnreadableImageError: the image cannot be used.
        RequestError: the image needs tifffile, which is not installed.
    """
    side = partial(_sufficient_side, preprocess, crop)
    opened = _open(data, side, preprocess.channels, exact=exact)
    _remark(opened, remarks)
    shape = _resized_shape(opened.shape, preprocess.resize)
    if crop is None:
        window = _central_square(shape, preprocess.size)
        return _resize_and_crop(opened, shape, window, preprocess), opened.has_range
    box = _scaled(crop(*opened.shape), opened.shape)
    box, _ = _as_stored(box, opened.shape, opened.orientation)
    parts = [_resize_part(band, opened.size, box, preprocess) for band in opened.bands]
    return _join(opened, parts), opened.has_range


_Window = tuple[int, int, int, int]
"""Top, left, height and width of a part of an image, in pixels."""

_Box = tuple[float, float, float, float]
"""Likewise, in parts of pixels."""

_Number = TypeVar("_Number", int, float)


def _sufficient_side(preprocess: Preprocess, crop: Crop | None, shape: tuple[float, float]) -> int:
    """Return the short side at which an image has four times the resolution of the result.

    Args:
        preprocess: the size of the result.
        crop: the part that becomes the result; None for the central square.
        shape: height and width of the upright image.
    """
    if crop is None or min(shape) < 8 * preprocess.size:  # too small to be reduced
        return 4 * preprocess.resize
    *_, height, width = _scaled(crop(*shape), shape)
    return math.ceil(4 * preprocess.size * min(shape) / min(height, width))


def _scaled(box: Sequence[float] | np.ndarray, shape: tuple[float, float]) -> _Box:
    """Convert a box from shares to the unit of ``shape``."""
    (top, left, height, width), (rows, columns) = box, shape
    return top * rows, left * columns, height * rows, width * columns


def _remark(opened: "_Opened", remarks: list[str] | None) -> None:
    if opened.truncated and remarks is not None:
        remarks.append("the end of the file is missing; the decoded part is used")


def _resize_and_crop(
    opened: "_Opened", shape: tuple[int, int], window: _Window, preprocess: Preprocess
) -> Pixels:
    """Resize an image to the height and width ``shape``, and crop it; both hold upright."""
    window, size = _as_stored(window, shape, opened.orientation)
    parts = [_resize(band, opened.size, size, window, preprocess) for band in opened.bands]
    return _join(opened, parts)


def _join(opened: "_Opened", parts: Sequence[np.ndarray]) -> Pixels:
    """Join the bands of an image, put it upright, and keep the range of integers."""
    pixels = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    pixels = np.ascontiguousarray(_put_upright(pixels, opened.orientation))
    if opened.has_range and pixels.dtype != np.uint8:
        pixels = np.clip(pixels, 0, 1)  # bicubic filters overshoot
    return pixels


def _resized_shape(shape: tuple[float, float], resize: int) -> tuple[int, int]:
    """Return the height and width of an image whose short side is resized."""
    short, long = sorted(shape)
    long = int(resize * long / short)
    if resize * long > MAX_PIXELS:
        raise UnreadableImageError(f"too elongated: {shape[1]:.0f} x {shape[0]:.0f} pixels")
    return (resize, long) if shape[0] <= shape[1] else (long, resize)


def _central_square(shape: tuple[int, int], size: int) -> _Window:
    top, left = (round((side - size) / 2) for side in shape)
    return top, left, size, size


def _as_stored(
    window: tuple[_Number, _Number, _Number, _Number],
    shape: tuple[_Number, _Number],
    orientation: _Orientation,
) -> tuple[tuple[_Number, _Number, _Number, _Number], tuple[_Number, _Number]]:
    """Find a part of an upright image in the image as it is stored, and the width and height."""
    (top, left, height, width), (rows, columns) = window, shape
    mirror, flip, swap = orientation
    if swap:
        top, left, height, width, rows, columns = left, top, width, height, columns, rows
    left = columns - left - width if mirror else left
    top = rows - top - height if flip else top
    return (top, left, height, width), (columns, rows)


def _resize(
    band: "_Band",
    used: tuple[float, float],
    size: tuple[int, int],
    window: _Window,
    preprocess: Preprocess,
) -> Pixels:
    """Resize the ``used`` width and height of a band to ``size``, and crop it."""
    top, left, height, width = window
    if isinstance(band, np.ndarray) and used == size:
        return np.array(band[top : top + height, left : left + width])
    image = Image.fromarray(band) if isinstance(band, np.ndarray) else band
    if used != size:
        resample = Image.Resampling[preprocess.interpolation.upper()]
        image = image.resize(size, resample, (0, 0, *used))
    image = image.crop((left, top, left + width, top + height))
    return np.array(image).reshape(height, width, -1)


def _resize_part(
    band: "_Band", used: tuple[float, float], box: _Box, preprocess: Preprocess
) -> Pixels:
    """Resize a part of a band, within its ``used`` width and height, to the square."""
    top, left, height, width = box
    right, bottom = min(left + width, used[0]), min(top + height, used[1])
    image = Image.fromarray(band) if isinstance(band, np.ndarray) else band
    resample, size = Image.Resampling[preprocess.interpolation.upper()], preprocess.size
    image = image.resize((size, size), resample, (max(left, 0), max(top, 0), right, bottom))
    return np.array(image).reshape(size, size, -1)


def _put_upright(pixels: np.ndarray, orientation: _Orientation) -> np.ndarray:
    mirror, flip, swap = orientation
    pixels = pixels[:: -1 if flip else 1, :: -1 if mirror else 1]
    return pixels.swapaxes(0, 1) if swap else pixels


def open_as_stored(data: bytes | np.ndarray) -> Shaped[np.ndarray, "height width channels"]:
    """Decode an image in full, upright, with all its bands: uint8, or float32 for more bits.

    Raises:
        UnreadableImageError: the image cannot be used.
    """
    opened = _open(data, channels=None, exact=True)
    return _put_upright(_stack(opened.bands), opened.orientation)


def _require_8_bits(pixels: np.ndarray, has_range: bool) -> np.ndarray:
    """Convert pixels to uint8.

    Raises:
        UnreadableImageError: they are floating point numbers, whose range is not known.
    """
    if pixels.dtype != np.uint8 and not has_range:
        raise UnreadableImageError(
            "floating point pixels, but the network takes 8 bits: train one with --channels"
        )
    return _to_8_bits(pixels)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Convert values in [0, 1] to uint8; uint8 stays unchanged."""
    return values if values.dtype == np.uint8 else np.rint(values * 255).astype(np.uint8)


def _stack(bands: Sequence["_Band"]) -> np.ndarray:
    """Return bands as an array ``[height, width, channels]``."""
    return np.dstack([np.asarray(band) for band in bands])


def open_image(data: bytes) -> Image.Image:
    """Decode an image file as viewers show it: upright, RGB, 8 bits, first frame.

    The format is detected from the content, not the file name. Transparent images are composited
    over white. CMYK JPEGs are taken to be stored inverted, as Adobe's are and as Pillow and
    browsers assume. 16-bit grayscale is scaled to 8 bits. Color profiles are ignored. A JPEG whose
    end is missing is accepted if at most 5% of its pixels are missing or, if it is progressive,
    only details.

    Args:
        data: a complete image file: JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, PPM or AVIF; or a
            file of ``numpy.save`` with gray or RGB integers.

    Returns:
        An image of mode RGB with at least one pixel.

    Raises:
        UnreadableImageError: the bytes are not a usable image; the message is the reason.
    """
    opened = _open(data)
    if not opened.has_range:
        raise UnreadableImageError("floating point pixels of unknown range")
    band, *others = opened.bands
    if isinstance(band, Image.Image) and not others and opened.orientation == _UPRIGHT:
        return band
    pixels = _put_upright(_to_8_bits(_stack(opened.bands)), opened.orientation)
    return Image.fromarray(np.ascontiguousarray(pixels))


_Band = Image.Image | UInt8[np.ndarray, "height width 3"]
"""A part of an image: of mode RGB, L or F, or the pixels of RGB."""


class _Opened(NamedTuple):
    """A decoded image in the orientation in which it is stored.

    Attributes:
        bands: the pixels: one image of mode RGB, or one of mode L or F for each channel.
        size: width and height of the region at the left and top of each image to use, in pixels. A
            JPEG that is decoded at a fraction of its size may end within a pixel.
        orientation: how to put the image upright.
        has_range: whether pixels were integers; floating point ones are in [0, 1] then.
        truncated: whether the end of the file is missing.
        full_size: width and height in the file, in pixels, if they are not ``size``.
    """

    bands: tuple[_Band, ...]
    size: tuple[float, float]
    orientation: _Orientation
    has_range: bool
    truncated: bool = False
    full_size: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[float, float]:
        """Return the height and width of the upright image, in pixels."""
        return _shape(self.size, self.orientation)

    @property
    def full_shape(self) -> tuple[int, int]:
        """Return the height and width of the upright image in the file, in pixels."""
        height, width = _shape(self.full_size or self.size, self.orientation)
        return int(height), int(width)


def _shape(size: tuple[float, float], orientation: _Orientation) -> tuple[float, float]:
    """Return the height and width of an upright image, of the width and height as stored."""
    width, height = size
    return (width, height) if orientation[2] else (height, width)


_MinSide = Callable[[tuple[float, float]], int]
"""Height and width of an upright image -> the short side that is needed, in pixels."""


def _open(
    data: bytes | np.ndarray,
    min_side: _MinSide | None = None,
    channels: int | None = 3,
    *,
    exact: bool = False,
) -> _Opened:
    """Decode a whole image, or a large JPEG at a lower resolution of at least ``min_side``.

    Args:
        data: a file or pixels.
        min_side: returns the lower bound of the short side of a JPEG, in pixels; by default it is
            decoded at its own resolution.
        channels: number of channels of the result; None keeps that of the file.
        exact: keep more than 8 bits, and do not read other bands as a picture.
    """
    if isinstance(data, np.ndarray):
        return _from_array(data, channels)
    if not data:
        raise UnreadableImageError("the file is empty")
    if data.startswith(_JPEG_BEGIN) and data.endswith(bytes(8)):
        # An interrupted transfer can leave zeros at the end, which libjpeg would decode as pixels.
        data = data.rstrip(b"\0")
    # warnings.catch_warnings is not thread-safe: threads that decode at the same time would undo
    # each other's filters. One permanent filter for Pillow's own modules is safe.
    if _PILLOW_WARNINGS not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        return _read(data, min_side, channels, exact=exact)
    except (UnreadableImageError, RequestError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(_identify(data)) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"more than the limit of {MAX_PIXELS:,} pixels") from error
    except Exception as error:
        if not data.endswith(_JPEG_END) and _is_nearly_complete(data):
            whole = data + _JPEG_END
            return _open(whole, min_side, channels, exact=exact)._replace(truncated=True)
        reason = str(error) or type(error).__name__
        raise UnreadableImageError(f"damaged or cut short: {reason}") from error


def _read(data: bytes, min_side: _MinSide | None, channels: int | None, *, exact: bool) -> _Opened:
    """Decode a file of NumPy, Pillow or tifffile."""
    if data.startswith(NPY):
        return _from_array(read_npy(data), channels)
    if data.startswith(_JPEG_BEGIN) and min_side and channels == 3 and not exact:
        jpeg = _read_jpeg(data, min_side)
        if jpeg is not None:
            return jpeg
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        if exact and is_tiff(data):
            return _from_array(read_tiff(data, channels), channels)
        raise
    _check_size(image)
    if exact and _loses_bands(image):
        return _from_array(read_tiff(data, channels), channels)
    # Only JPEG decodes at a lower resolution, by leaving out high frequencies. The reduced width
    # and height are rounded up; the box is exact.
    full_size = image.size
    drafted = None
    if min_side and isinstance(image, JpegImageFile):
        side = min_side(_shape(image.size, _orientation(image)))
        drafted = image.draft(None, (side, side))
    image.load()
    width, height = drafted[1][2:] if drafted else image.size
    bands, has_range = _to_bands(image, channels) if exact else ((_to_rgb(image),), True)
    opened = _Opened(bands, (width, height), _orientation(image), has_range)
    return opened._replace(full_size=full_size) if drafted else opened


def _read_jpeg(data: bytes, min_side: _MinSide) -> _Opened | None:
    """Decode a JPEG without Pillow: the same pixels in 0.6 of the time.

    Returns:
        The image; None if it is not a plain photograph, or something is wrong with it, which Pillow
        then says.
    """
    try:
        header: Any = decode_jpeg_header(data)
        height, width, color, _ = header
        if color not in ("YCbCr", "Gray") or height * width > MAX_PIXELS:
            return None
        # Metadata may turn the image. They stand before the scan.
        turned = data.find(b"\xff\xe1", 0, data.find(b"\xff\xda")) >= 0
        orientation = _orientation(Image.open(io.BytesIO(data))) if turned else _UPRIGHT
        side = min_side(_shape((width, height), orientation))
        scale = next((k for k in (8, 4, 2) if min(height, width) // side >= k), 1)
        least = -(-height // scale), -(-width // scale)
        pixels = decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
    except Exception:  # noqa: BLE001 - Pillow decides about damaged files
        return None
    size = width / scale, height / scale
    return _Opened((pixels,), size, orientation, has_range=True, full_size=(width, height))


def _is_nearly_complete(data: bytes) -> bool:
    """Return True if a JPEG lacks at most 5% of its pixels, or only details if progressive."""
    try:
        image = JpegImageFile(io.BytesIO(data))
        if "progressive" in image.info:
            return _all_scans_begun(data, len(image.getbands()))
        # Decode with and without noise at the end: only the missing blocks differ, and JPEG stores
        # blocks row by row.
        noise = np.random.default_rng(0).bytes(1000).replace(b"\xff", b"")
        parts = (data.rstrip(b"\xff") + fill + _JPEG_END for fill in (b"", noise))
        difference = ImageChops.difference(*(JpegImageFile(io.BytesIO(part)) for part in parts))
    except Exception:  # noqa: BLE001 - Pillow raises many types on damaged files
        return False
    width, height = image.size
    block = 8 * max(layer[2] for layer in image.layer)
    _, top, *_ = difference.getbbox() or (0, height)
    bottom = min(top + block, height)
    left, *_ = difference.crop((0, top, width, bottom)).getbbox() or (width,)
    return top * width + left * (bottom - top) >= 0.95 * width * height


def _all_scans_begun(data: bytes, bands: int) -> bool:
    """Return True if a progressive JPEG's scans reach the last bit of all 64 frequencies."""
    reached = set()
    for scan in re.finditer(rb"\xff\xda..(.)", data, re.DOTALL):
        end = scan.end() + 2 * scan[1][0]
        first, last, bits = data[end : end + 3].ljust(3, b"\xff")
        if not bits & 15 and (first, last) != (0, 63):  # a baseline scan belongs to a thumbnail
            bands_of_scan = data[scan.end() : end : 2]
            reached |= {(band, k) for band in bands_of_scan for k in range(first, last + 1)}
    return len(reached) == 64 * bands


def _check_size(image: Image.Image) -> None:
    if not 0 < image.width * image.height <= MAX_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise UnreadableImageError(f"{size}, outside of the limits of 1 and {MAX_PIXELS:,}")


def _orientation(image: Image.Image) -> _Orientation:
    """Look up how an image is put upright; call after ``load``, which turns TIFFs."""
    try:
        return _ORIENTATIONS.get(image.getexif()[ExifTags.Base.Orientation], _UPRIGHT)
    except Exception:  # noqa: BLE001 - the pixels are usable even if the metadata are broken
        return _UPRIGHT


def _from_array(array: np.ndarray, channels: int | None) -> _Opened:
    """Convert numbers ``[height, width, channels]`` to bands."""
    check_array(array.shape, array.dtype)
    size = array.shape[1], array.shape[0]
    if array.dtype == np.uint8 and array.shape[2:] == (3,) and channels in (None, 3):
        return _Opened((array,), size, _UPRIGHT, has_range=True)
    array = array[..., None] if array.ndim == 2 else array
    has_range, values = array.dtype.kind == "u", to_values(array)
    bands = tuple(to_bands(values))
    if channels not in (None, values.shape[-1]):
        bands = _convert(bands, values.shape, channels or 0)
    return _Opened(bands, size, _UPRIGHT, has_range)


def _convert(
    bands: tuple[Image.Image, ...], shape: tuple[int, ...], channels: int
) -> tuple[Image.Image, ...]:
    """Convert gray to three channels, or RGB of 8 bits to gray."""
    if shape[-1] == 1 and channels == 3:
        return (bands[0].convert("RGB"),) if bands[0].mode == "L" else bands * 3
    if channels == 1 and bands[0].mode == "RGB":
        return (bands[0].convert("L"),)
    count, advice = shape[-1], ""
    if shape[0] == channels:
        advice = "; its first axis looks like channels: save it as [height, width, channels]"
    raise UnreadableImageError(f"it has {count} channels instead of {channels}{advice}")


def _loses_bands(image: Image.Image) -> bool:
    """Return True for a TIFF that Pillow would reduce to 8 bits, or to some bands or pages.

    Raises:
        UnreadableImageError: a PNG file is such an image.
    """
    if image.format == "PNG":
        tiles = getattr(image, "tile", [])  # the last item of a tile is the format of its pixels
        if tiles and str(tiles[0][3]).endswith(";16B") and not image.mode.startswith("I"):
            raise UnreadableImageError(
                "a PNG of several channels of 16 bits, which Pillow reduces to 8: save it as TIFF "
                "or .npy"
            )
        return False
    if image.format != "TIFF":
        return False
    bits = image.getexif().get(ExifTags.Base.BitsPerSample, (1,))
    bits = bits if isinstance(bits, tuple) else (bits,)
    if getattr(image, "n_frames", 1) > 1 or len(bits) != len(image.getbands()):
        return True
    return max(bits) > 8 and image.mode not in ("F", "I") and not image.mode.startswith("I;16")


def _to_bands(image: Image.Image, channels: int | None) -> tuple[tuple[_Band, ...], bool]:
    """Return the bands of an image that Pillow has read, and whether they were integers."""
    if _is_gray16(image) or image.mode == "F":
        array = np.asarray(image, "float32" if image.mode == "F" else "uint16")
        opened = _from_array(array, channels)
        return opened.bands, opened.has_range
    if channels in (1, 3):
        rgb = _to_rgb(image)
        return (rgb.convert("L") if channels == 1 else rgb,), True
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode in ("1", "I"):
        image = _to_rgb(image).convert("L")  # refuses mode I
    return _from_array(np.asarray(image), channels).bands, True


def _is_gray16(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_gray16(image):
        # Pillow's own conversion of 16-bit grayscale clips at 255.
        image = Image.fromarray(((np.asarray(image, np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnreadableImageError("32-bit grayscale of unknown range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _identify(data: bytes) -> str:
    """Explain from a file's first bytes why Pillow cannot identify it."""
    head = data[:1024].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if is_html(data):
        return "an HTML page, not an image"
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
        return "a HEIC photo, which Pillow cannot read: convert it to JPEG"
    if data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8")) or data[8:12] == b"WEBP":
        return "damaged or cut short: the header is broken"
    if is_tiff(data):
        return "a TIFF file that Pillow cannot read: images of several bands need --channels"
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return "not an image"
    return "not an image" if "\0" in text else "text, not an image"
