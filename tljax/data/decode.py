"""Bytes to pixels: any photograph becomes an RGB square, or a plain reason why it cannot."""

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
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from tljax.data.sources import open_images
from tljax.runtime.download import is_html
from tljax.runtime.errors import UnreadableImageError
from tljax.runtime.types import Preprocess

MAX_PIXELS = 2**27
"""The largest image that is decoded: 134 million pixels, 400 MB of RGB. Phones take 108 million."""

# What people photograph, scan and download. Left to itself Pillow also tries formats that call
# other programs (EPS starts Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

# EXIF orientation -> what puts the picture upright (Exif 2.32, tag 274; 1 is upright).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_END = b"\xff\xd9"  # of a JPEG

_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def decode(
    data: bytes | np.ndarray, preprocess: Preprocess, remarks: list[str] | None = None
) -> np.ndarray:
    """Decodes one example to the square that a network's preprocessing asks for.

    The short side is resized to ``preprocess.resize`` with an antialiasing Pillow filter and the
    central square is cut out; the result equals that of torchvision's ``Resize`` and ``CenterCrop``
    on a PIL image, pixel for pixel. A JPEG of eight times that size or more is decoded at a half, a
    quarter or an eighth of its own, but at no less than four times what is wanted: three times as
    fast for 12 megapixels, with pixels that differ by 0.1 to 0.4 of 255 in the mean.

    Args:
        data: an encoded image file, or RGB pixels, ``[height, width, 3]`` uint8.
        preprocess: the geometry; its normalisation is left to the model.
        remarks: where it is recorded that the end of the file is missing; see `open_image`.

    Returns:
        ``[size, size, 3]`` uint8, RGB.

    Raises:
        UnreadableImageError: the image cannot be used; the message is the reason.
    """
    image, box, turn, cut = _open(data, at_least=4 * preprocess.resize)
    if cut and remarks is not None:
        remarks.append("its end is missing; read as viewers show it")
    width, height = box[2:]
    short, long = sorted((width, height))
    long = int(preprocess.resize * long / short)
    if preprocess.resize * long > MAX_PIXELS:
        raise UnreadableImageError(
            f"too elongated: {image.width} x {image.height} pixels, which would be"
            f" {preprocess.resize} x {long} after the resize"
        )
    image = image.resize(
        (preprocess.resize, long) if width <= height else (long, preprocess.resize),
        _FILTERS[preprocess.interpolation],
        box,
    )
    image = image if turn is None else image.transpose(turn)
    left = round((image.width - preprocess.size) / 2)
    top = round((image.height - preprocess.size) / 2)
    return np.array(image.crop((left, top, left + preprocess.size, top + preprocess.size)))


def read_images(paths: Sequence[str | PathLike[str]], preprocess: Preprocess) -> np.ndarray:
    """Decodes a short list of image files, in one thread.

    Args:
        paths: the files.
        preprocess: the geometry of ``decode``.

    Returns:
        ``[len(paths), size, size, 3]`` uint8, RGB.

    Raises:
        RequestError: a path is missing or is a folder.
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
        say(name, *remarks)
    return images


@cache
def say(name: str, *remarks: str) -> None:
    """Print remarks on an image on stderr, once, however often the image is read."""
    for remark in remarks:
        print(f"note: {name}: {remark}", file=sys.stderr)


def open_image(data: bytes) -> Image.Image:
    """Decodes an image file as a viewer shows it: upright, RGB, 8 bits, the first frame.

    The content decides the format, not a file name. Transparent images are laid on white. A CMYK
    JPEG is taken to be stored inverted, as Adobe's are and as Pillow and browsers assume. 16-bit
    greyscale is scaled to 8 bits. Colour profiles are ignored. A JPEG whose end is missing is read
    if no more than 5% of its pixels are, or only details of a progressive one.

    Args:
        data: a whole image file of any common format.

    Returns:
        An image of mode RGB with at least one pixel.

    Raises:
        UnreadableImageError: for any other byte string; the message is a short reason.
    """
    image, _, turn, _ = _open(data)
    return image if turn is None else image.transpose(turn)


class _Opened(NamedTuple):
    """Pixels as they are stored, and what is known of them.

    Attributes:
        image: the pixels.
        box: the part of them that is the image.
        turn: what puts it upright.
        cut: whether the end of the file is missing.
    """

    image: Image.Image
    box: tuple[float, float, float, float]
    turn: Image.Transpose | None
    cut: bool = False


def _open(data: bytes | np.ndarray, at_least: int | None = None) -> _Opened:
    """The whole image; or a large JPEG reduced, with a short side of ``at_least`` that."""
    if isinstance(data, np.ndarray):
        image = Image.fromarray(data)
        return _Opened(image, (0, 0, *image.size), None)
    if not data:
        raise UnreadableImageError("the file is empty")
    if data.startswith(b"\xff\xd8") and data.endswith(bytes(8)):
        data = data.rstrip(b"\0")  # a hole, of a transfer that was cut: libjpeg would paint it
    # warnings.catch_warnings swaps one list for all threads, so threads that decode at the same
    # time would undo each other's; one lasting filter for Pillow's own modules is safe.
    if _PILLOW_WARNINGS not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_size(image)
        # libjpeg leaves out the high frequencies; no other format knows how. The reduced width and
        # height are rounded up, the box is not.
        drafted = image.draft(None, (at_least, at_least)) if at_least else None
        image.load()
        box = drafted[1] if drafted else (0, 0, *image.size)
        return _Opened(_to_rgb(image), box, _turn(image))
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(_what_it_is(data)) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"more than the limit of {MAX_PIXELS:,} pixels") from error
    except Exception as error:
        if not data.endswith(_END) and _shows_its_picture(data):
            return _open(data + _END, at_least)._replace(cut=True)
        reason = str(error) or type(error).__name__
        raise UnreadableImageError(f"damaged or cut short: {reason}") from error


def _shows_its_picture(data: bytes) -> bool:
    """Whether a JPEG lacks its end only, as a viewer would have it."""
    try:
        image = JpegImageFile(io.BytesIO(data))
        if "progressive" in image.info:
            return _all_scans_begun(data, len(image.getbands()))
        # Noise changes what is missing; whoever writes a JPEG writes rows of blocks.
        noise = np.random.default_rng(0).bytes(1000).replace(b"\xff", b"")
        parts = (data.rstrip(b"\xff") + fill + _END for fill in (b"", noise))
        difference = ImageChops.difference(*(JpegImageFile(io.BytesIO(part)) for part in parts))
    except Exception:  # noqa: BLE001 - as above
        return False
    width, height = image.size
    block = 8 * max(layer[2] for layer in image.layer)
    _, top, *_ = difference.getbbox() or (0, height)
    bottom = min(top + block, height)
    left, *_ = difference.crop((0, top, width, bottom)).getbbox() or (width,)
    return top * width + left * (bottom - top) >= 0.95 * width * height


def _all_scans_begun(data: bytes, bands: int) -> bool:
    """Whether the scans of a progressive JPEG reach the last bit of all 64 frequencies."""
    reached = set()
    for scan in re.finditer(rb"\xff\xda..(.)", data, re.DOTALL):
        end = scan.end() + 2 * scan[1][0]
        first, last, bits = data[end : end + 3].ljust(3, b"\xff")
        if not bits & 15 and (first, last) != (0, 63):  # that would be of a thumbnail
            of = data[scan.end() : end : 2]
            reached |= {(band, k) for band in of for k in range(first, last + 1)}
    return len(reached) == 64 * bands


def _check_size(image: Image.Image) -> None:
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise UnreadableImageError(
            f"{image.width} x {image.height} pixels, which is not between 1 and {MAX_PIXELS:,}"
        )


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What puts the picture upright. Ask after ``load``, which turns a TIFF by itself."""
    try:
        return _UPRIGHT.get(image.getexif()[ExifTags.Base.Orientation])
    except Exception:  # noqa: BLE001 - as above; broken metadata does not spoil the pixels
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow's own conversion of 16-bit grey clips at 255.
        image = Image.fromarray(((np.asarray(image, np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnreadableImageError("32-bit grey of unknown range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _what_it_is(data: bytes) -> str:
    """Says why Pillow does not know a file, from its first bytes."""
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
