"""Decode image files to RGB squares, or raise an error that says why a file cannot be used."""

import codecs
import io
import re
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from os import PathLike
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from tljax.data.folders import open_images
from tljax.runtime.download import is_html
from tljax.runtime.errors import UnreadableImageError
from tljax.runtime.types import Preprocess

MAX_PIXELS = 2**27
"""Largest image that is decoded: 134 million pixels, 400 MB of RGB. Phones take 108 million."""

# The formats of photographs, scans and web images. By default Pillow also tries formats that call
# other programs: EPS starts Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")

# EXIF orientation -> the transpose that puts the image upright (Exif 2.32, tag 274; 1 is upright).
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_JPEG_END = b"\xff\xd9"  # the end-of-image marker

_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def decode(
    data: bytes | UInt8[np.ndarray, "height width 3"],
    preprocess: Preprocess,
    remarks: list[str] | None = None,
) -> UInt8[np.ndarray, "size size 3"]:
    """Decode an image and resize and crop it for a network.

    The short side is resized to ``preprocess.resize`` with an antialiasing Pillow filter, and the
    central square is cropped. The pixels equal those of torchvision's ``Resize`` and ``CenterCrop``
    on a PIL image. A JPEG whose short side is at least eight times ``preprocess.resize`` is decoded
    at 1/2, 1/4 or 1/8 of its resolution, but at no less than four times ``preprocess.resize``: this
    is three times as fast for 12 megapixels and changes pixels by 0.1 to 0.4 of 255 on average.

    Args:
        data: an encoded image file, or RGB pixels ``[height, width, 3]`` uint8.
        preprocess: the sizes and the filter; normalization is left to the model.
        remarks: list that a remark is appended to if the end of the file is missing; see
            `open_image`.

    Returns:
        ``[size, size, 3]`` uint8 RGB, where ``size`` is ``preprocess.size``.

    Raises:
        UnreadableImageError: the image cannot be used; the message is the reason.
    """
    image, box, transpose, truncated = _open(data, min_side=4 * preprocess.resize)
    if truncated and remarks is not None:
        remarks.append("the end of the file is missing; the decoded part is used")
    width, height = box[2:]
    short, long = sorted((width, height))
    long = int(preprocess.resize * long / short)
    if preprocess.resize * long > MAX_PIXELS:
        raise UnreadableImageError(f"too elongated: {image.width} x {image.height} pixels")
    image = image.resize(
        (preprocess.resize, long) if width <= height else (long, preprocess.resize),
        Image.Resampling[preprocess.interpolation.upper()],
        box,
    )
    image = image if transpose is None else image.transpose(transpose)
    left = round((image.width - preprocess.size) / 2)
    top = round((image.height - preprocess.size) / 2)
    return np.array(image.crop((left, top, left + preprocess.size, top + preprocess.size)))


def read_images(
    paths: Sequence[str | PathLike[str]], preprocess: Preprocess
) -> UInt8[np.ndarray, "images size size 3"]:
    """Decode a short list of image files in one thread.

    Args:
        paths: files, folders (every file below them is read) or URLs, as for `open_images`.
        preprocess: the sizes and the filter; see `decode`.

    Returns:
        ``[images, size, size, 3]`` uint8 RGB.

    Raises:
        RequestError: a path does not exist, a folder has no file, or a URL cannot be fetched.
        UnreadableImageError: a file is not a usable image; the message names it.
    """
    source = open_images(paths)
    images = np.empty((len(source), preprocess.size, preprocess.size, 3), np.uint8)
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


def open_image(data: bytes) -> Image.Image:
    """Decode an image file as viewers show it: upright, RGB, 8 bits, first frame.

    The format is detected from the content, not the file name. Transparent images are composited
    over white. CMYK JPEGs are taken to be stored inverted, as Adobe's are and as Pillow and
    browsers assume. 16-bit grayscale is scaled to 8 bits. Color profiles are ignored. A JPEG whose
    end is missing is accepted if at most 5% of its pixels are missing or, if it is progressive,
    only details.

    Args:
        data: a complete image file: JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, PPM or AVIF.

    Returns:
        An image of mode RGB with at least one pixel.

    Raises:
        UnreadableImageError: the bytes are not a usable image; the message is the reason.
    """
    image, _, transpose, _ = _open(data)
    return image if transpose is None else image.transpose(transpose)


class _Opened(NamedTuple):
    """A decoded image in the orientation in which it is stored.

    Attributes:
        image: the pixels, RGB.
        box: the region of ``image`` to use: left, top, right, bottom.
        transpose: the transpose that puts the image upright; None if it is.
        truncated: whether the end of the file is missing.
    """

    image: Image.Image
    box: tuple[float, float, float, float]
    transpose: Image.Transpose | None
    truncated: bool = False


def _open(data: bytes | np.ndarray, min_side: int | None = None) -> _Opened:
    """Decode a whole image, or a large JPEG at a lower resolution of at least ``min_side``."""
    if isinstance(data, np.ndarray):
        image = Image.fromarray(data)
        return _Opened(image, (0, 0, *image.size), None)
    if not data:
        raise UnreadableImageError("the file is empty")
    if data.startswith(b"\xff\xd8") and data.endswith(bytes(8)):
        # An interrupted transfer can leave zeros at the end, which libjpeg would decode as pixels.
        data = data.rstrip(b"\0")
    # warnings.catch_warnings is not thread-safe: threads that decode at the same time would undo
    # each other's filters. One permanent filter for Pillow's own modules is safe.
    if _PILLOW_WARNINGS not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_size(image)
        # Only JPEG decodes at a lower resolution, by leaving out high frequencies. The reduced
        # width and height are rounded up; the box is exact.
        drafted = image.draft(None, (min_side, min_side)) if min_side else None
        image.load()
        box = drafted[1] if drafted else (0, 0, *image.size)
        return _Opened(_to_rgb(image), box, _upright_transpose(image))
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(_identify(data)) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"more than the limit of {MAX_PIXELS:,} pixels") from error
    except Exception as error:
        if not data.endswith(_JPEG_END) and _is_nearly_complete(data):
            return _open(data + _JPEG_END, min_side)._replace(truncated=True)
        reason = str(error) or type(error).__name__
        raise UnreadableImageError(f"damaged or cut short: {reason}") from error


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


def _upright_transpose(image: Image.Image) -> Image.Transpose | None:
    """Look up the transpose that puts an image upright; call after ``load``, which turns TIFFs."""
    try:
        return _TRANSPOSES.get(image.getexif()[ExifTags.Base.Orientation])
    except Exception:  # noqa: BLE001 - the pixels are usable even if the metadata are broken
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
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
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return "not an image"
    return "not an image" if "\0" in text else "text, not an image"
