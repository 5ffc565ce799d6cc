"""Decoding: resize and crop equal torchvision, and unusual files look as in viewers."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
import simplejpeg
import skimage.data
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile, ImageOps

from tljax.data import decode as decode_module
from tljax.data.decode import MAX_PIXELS, decode, open_image
from tljax.data.folders import open_folder
from tljax.data.pictures import read_images
from tljax.runtime.errors import RequestError, UnreadableImageError
from tljax.runtime.preprocess import Preprocess

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "AVIF")


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def smooth(height: int = 48, width: int = 64) -> np.ndarray:
    """Return an image without symmetry that lossy compression changes little."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 97 + 60], axis=-1).astype(
        np.uint8
    )


def encode(image: Image.Image | np.ndarray, format: str, **options: Any) -> bytes:  # noqa: A002 - Pillow's name
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = open_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def torchvision_resize_and_crop(
    image: Image.Image, resize: int, size: int, resample: int
) -> Image.Image:
    """Compute ``Compose([Resize(resize), CenterCrop(size)])`` as torchvision 0.26 does."""
    width, height = image.size
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = resize, int(resize * long / short)
    new_w, new_h = (new_short, new_long) if width <= height else (new_long, new_short)
    if (width, height) != (new_w, new_h):
        image = image.resize((new_w, new_h), Image.Resampling(resample))
    crop_top = round((new_h - size) / 2.0)
    crop_left = round((new_w - size) / 2.0)
    return image.crop((crop_left, crop_top, crop_left + size, crop_top + size))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    size=st.integers(1, 64),
    margin=st.integers(0, 20),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
@example(height=33, width=48, size=32, margin=1, interpolation="bilinear")  # halves round to even
@example(height=37, width=51, size=30, margin=7, interpolation="bicubic")  # already of the size
def test_resize_and_crop_equal_torchvision(
    height: int, width: int, size: int, margin: int, interpolation: Literal["bilinear", "bicubic"]
):
    preprocess = Preprocess(size=size, resize=size + margin, interpolation=interpolation)
    image = Image.fromarray(noise(height, width))
    resample = {"bilinear": 2, "bicubic": 3}[interpolation]
    expected = np.asarray(torchvision_resize_and_crop(image, size + margin, size, resample))
    for data in (np.asarray(image), encode(image, "PNG")):
        decoded = decode(data, preprocess)
        assert decoded.dtype == np.uint8
        assert decoded.flags.writeable
        np.testing.assert_array_equal(decoded, expected)


def test_a_photograph_is_decoded_like_pillow(shared_data):
    path = min((shared_data / "cats_dogs" / "train" / "cats").iterdir())
    image = Image.open(path).convert("RGB")
    expected = torchvision_resize_and_crop(image, 256, 224, Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decode(path.read_bytes(), Preprocess()), np.asarray(expected))


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options",
    [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}],
    ids=str,
)
def test_plain_jpegs_are_decoded_without_pillow_to_its_pixels(options, mode, scale, monkeypatch):
    photograph = Image.fromarray(skimage.data.chelsea()).resize((331, 243)).convert(mode)
    data = encode(photograph, "JPEG", quality=80, **options)
    preprocess = Preprocess(16, 243 // scale // 4)
    direct = decode(data, preprocess)
    monkeypatch.setattr(decode_module, "decode_jpeg", None)
    np.testing.assert_array_equal(decode(data, preprocess), direct)


# Maps the upright image to the stored one for each orientation, from Exif 2.32 (tag 274).
STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format_", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_orientation_is_applied_once(format_, orientation):
    upright = smooth(40, 56)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright))
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    data = encode(stored, format_, exif=exif, **options.get(format_, {}))
    tolerance = 12 if format_ == "JPEG" else 0
    assert abs(pixels(data) - upright).max() <= tolerance
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels(data), np.asarray(reference.convert("RGB")))


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
@pytest.mark.parametrize(("width", "height"), [(1537, 1026), (1031, 1030), (700, 2049)])
def test_large_jpegs_are_decoded_at_a_lower_resolution_with_similar_pixels(
    width, height, orientation
):
    photograph = Image.fromarray(skimage.data.chelsea()).resize((width, height))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(photograph, "JPEG", quality=92, exif=exif)
    decoded = decode(data, Preprocess(72, 80, "bilinear")).astype(int)
    expected = torchvision_resize_and_crop(open_image(data), 80, 72, Image.Resampling.BILINEAR)
    error = np.abs(decoded - np.asarray(expected))
    assert 0 < error.max() <= 5
    assert error.mean() < 0.5


def test_only_large_jpegs_are_decoded_at_a_lower_resolution():
    photograph = Image.fromarray(skimage.data.chelsea()).resize((639, 700))
    for format_, times in (("JPEG", 1), ("PNG", 3)):
        data = encode(photograph.resize((639 * times, 700 * times)), format_)
        expected = torchvision_resize_and_crop(open_image(data), 80, 72, Image.Resampling.BILINEAR)
        decoded = decode(data, Preprocess(72, 80, "bilinear"))
        np.testing.assert_array_equal(decoded, np.asarray(expected))


@pytest.mark.parametrize("format_", ["JPEG", "TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_images_are_resized_in_their_upright_orientation(format_, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(Image.fromarray(skimage.data.chelsea()), format_, exif=exif)
    expected = torchvision_resize_and_crop(open_image(data), 128, 100, Image.Resampling.BILINEAR)
    decoded = decode(data, Preprocess(100, 128, "bilinear")).astype(int)
    assert np.abs(decoded - np.asarray(expected)).max() <= 1


def cut_of(box: tuple[float, float, float, float]) -> Callable[[float, float], Sequence[float]]:
    return lambda height, width: box if height < width else (0, 0, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF"])
def test_a_crop_is_a_box_of_the_upright_image(format_, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    shape = (48, 64) if orientation < 5 else (64, 48)
    data = encode(smooth(*shape), format_, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == (64, 48)
    result = decode(data, Preprocess(size=20, resize=24), crop=cut_of((0.25, 0.5, 0.625, 0.375)))
    expected = upright.resize((20, 20), Image.Resampling.BILINEAR, (32, 12, 56, 42))
    assert np.abs(result.astype(int) - np.asarray(expected)).max() <= 1  # of the order of passes


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_crop_of_a_large_jpeg_is_decoded_at_four_times_its_resolution(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = smooth(400, 512) if orientation == 1 else smooth(512, 400)
    data, preprocess = encode(image, "JPEG", quality=95, exif=exif), Preprocess(size=8, resize=10)
    sides = []

    def decode_jpeg(*arguments: Any, **options: Any) -> np.ndarray:
        pixels = simplejpeg.decode_jpeg(*arguments, **options)
        sides.append(min(pixels.shape[:2]))
        return pixels

    with mock.patch("tljax.data.decode.decode_jpeg", decode_jpeg):
        results = [
            decode(data, preprocess, crop=cut_of((0.1, 0.2, share, share)))
            for share in (0.75, 0.5, 0.15)
        ]
    assert sides == [50, 100, 400]
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    for share, result in zip((0.75, 0.5, 0.15), results, strict=True):
        box = (0.2 * 512, 0.1 * 400, (0.2 + share) * 512, (0.1 + share) * 400)
        expected = np.asarray(upright.resize((8, 8), Image.Resampling.BILINEAR, box), int)
        assert np.abs(result - expected).mean() < 1


def test_a_crop_of_one_pixel_is_that_pixel():
    image = noise(1, 1)
    result = decode(image, Preprocess(size=4, resize=4), crop=lambda *_: (0.3, 0.2, 0.4, 0.5))
    assert (result == image).all()


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_broken_metadata_does_not_change_the_pixels(exif):
    plain = encode(smooth(), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    np.testing.assert_array_equal(pixels(plain[:2] + segment + plain[2:]), pixels(plain))


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_invalid_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    np.testing.assert_array_equal(pixels(encode(smooth(), "PNG", exif=exif)), smooth())


def test_cmyk_jpeg():
    rgb = smooth()
    data = encode(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data  # so the values are inverted
    assert abs(pixels(data) - rgb).max() <= 12


def test_ycck_jpeg():
    # Pillow writes CMYK only: store luma, chroma and black in its planes and mark them as YCCK,
    # which is transform 2 of the Adobe segment. Decoders convert YCC to the inverse of RGB.
    rgb = smooth()
    inverse = np.asarray(Image.fromarray(255 - rgb).convert("YCbCr"))
    black = np.full((*rgb.shape[:2], 1), 255, np.uint8)
    planes = 255 - np.concatenate([inverse, black], axis=2)
    data = encode(Image.fromarray(planes, mode="CMYK"), "JPEG", quality=95)
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    ycck = data[:transform] + b"\2" + data[transform + 1 :]
    assert abs(pixels(ycck) - rgb).max() <= 12


@pytest.mark.parametrize("format_", ["PNG", "TIFF", "PPM"])
def test_16_bit_grayscale_is_scaled(format_):
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    decoded = pixels(encode(values, format_))
    assert (decoded == np.rint(values / 257)[:, :, None]).all()


def test_grayscale_and_one_bit():
    gray = smooth()[:, :, 0]
    np.testing.assert_array_equal(pixels(encode(gray, "PNG")), np.repeat(gray[:, :, None], 3, 2))
    np.testing.assert_array_equal(
        pixels(encode(Image.fromarray(gray > 99), "PNG")),
        np.repeat(np.where(gray > 99, 255, 0)[:, :, None], 3, 2),
    )


@pytest.mark.parametrize("format_", ["PNG", "WEBP", "TIFF"])
def test_transparent_images_are_composited_over_white(format_):
    rgba = noise(32, 32, 4)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    options = {"lossless": True, "exact": True} if format_ == "WEBP" else {}
    decoded = pixels(encode(rgba, format_, **options))
    alpha = rgba[:, :, 3:] / 255
    assert abs(decoded - (rgba[:, :, :3] * alpha + 255 * (1 - alpha))).max() <= 1
    assert (decoded[0] == 255).all()
    np.testing.assert_array_equal(decoded[1], rgba[1, :, :3])


def test_grayscale_with_alpha_is_composited_over_white():
    gray_alpha = np.dstack([smooth()[:, :, 0], smooth()[:, :, 1]])
    alpha = gray_alpha[:, :, 1:] / 255
    expected = gray_alpha[:, :, :1] * alpha + 255 * (1 - alpha)
    assert abs(pixels(encode(Image.fromarray(gray_alpha), "PNG")) - expected).max() <= 1


@pytest.mark.parametrize("format_", ["PNG", "GIF"])
def test_palette_with_a_transparent_color(format_):
    indices = noise(16, 16, 1) % 4
    image = Image.fromarray(indices).convert("P")
    colors = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
    image.putpalette(colors.tobytes())
    expected = np.where(indices[:, :, None] == 2, 255, colors[indices])
    np.testing.assert_array_equal(pixels(encode(image, format_, transparency=2)), expected)
    np.testing.assert_array_equal(pixels(encode(image, format_)), colors[indices])


def test_palette_with_an_opacity_for_each_color():
    indices = noise(16, 16, 1) % 3
    image = Image.fromarray(indices).convert("P")
    colors = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0]], np.uint8)
    image.putpalette(colors.tobytes())
    opacity = np.array([0, 128, 255])
    alpha = (opacity / 255)[indices][:, :, None]
    expected = colors[indices] * alpha + 255 * (1 - alpha)
    data = encode(image, "PNG", transparency=bytes(opacity.tolist()))
    assert abs(pixels(data) - expected).max() <= 1


def test_a_transparent_color_without_a_palette():
    gray = noise(16, 16, 1) % 8
    data = encode(gray, "PNG", transparency=5)
    expected = np.where(gray == 5, 255, gray)[:, :, None]
    np.testing.assert_array_equal(pixels(data), np.repeat(expected, 3, 2))


@pytest.mark.parametrize(
    ("format_", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})]
)
def test_first_frame(format_, options):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "lime", "blue")]
    data = encode(frames[0], format_, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined] - not on all
    np.testing.assert_array_equal(pixels(data), np.asarray(frames[0]))


@pytest.mark.parametrize("format_", FORMATS)
def test_common_formats(format_):
    tolerance = {"JPEG": 60, "WEBP": 60, "GIF": 60, "AVIF": 60}.get(format_, 0)
    assert abs(pixels(encode(smooth(), format_)) - smooth()).max() <= tolerance


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """Build a one-bit PNG with a given size in its header, whatever the data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def cut(format_: str, share: float) -> bytes:
    data = encode(smooth(), format_)
    return data[: int(len(data) * share)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"just some words\n", "text, not an image"),
        ("naïve café".encode() * 400, "text, not an image"),
        (b"\n <!DOCTYPE html><p>404", "an HTML page, not an image"),
        (b"\xef\xbb\xbf<html><p>404", "an HTML page, not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "text, not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "text, not an image"),
        (bytes(100), "not an image"),
        (b"\0\xff\xfe\1" * 99, "not an image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC photo, which Pillow cannot read: convert"),
        (b"\xff\xd8\xff", "damaged or cut short: the header is broken"),
        (b"RIFF\x04\1\0\0WEBPVP8 ", "damaged or cut short"),
        (cut("JPEG", 0.6), "damaged or cut short"),
        (cut("JPEG", 0.98), r"damaged or cut short: image file is truncated \(\d+ bytes"),
        (cut("PNG", 0.6), "damaged or cut short"),
        (cut("GIF", 0.6), "damaged or cut short"),
        (cut("WEBP", 0.6), "damaged or cut short"),
        (cut("TIFF", 0.6), "damaged or cut short"),
        (cut("BMP", 0.6), "damaged or cut short"),
        (cut("JPEG2000", 0.6), "damaged or cut short"),
        (png(100_000, 100_000), f"more than the limit of {MAX_PIXELS:,} pixels"),
        (
            png(12_000, 12_000),
            f"12000 x 12000 pixels, outside of the limits of 1 and {MAX_PIXELS:,}",
        ),
        (png(10_000, 10_000), "damaged or cut short"),  # large enough to make Pillow warn
        (encode(Image.new("F", (4, 4)), "TIFF"), "32-bit grayscale of unknown range"),
        (encode(Image.new("I", (4, 4)), "TIFF"), "32-bit grayscale of unknown range"),
    ],
)
def test_unusable_files_are_refused_with_a_reason(data, reason):
    with pytest.raises(UnreadableImageError, match=reason) as error:
        decode(data, Preprocess())
    assert "\n" not in str(error.value)


ONE_SCAN = ({}, {"subsampling": 0}, {"restart_marker_rows": 1})


def jpegs(*options: dict[str, Any]) -> list[bytes]:
    photograph = Image.fromarray(skimage.data.chelsea())
    return [
        encode(photograph.convert(mode), "JPEG", **each)
        for mode in ("RGB", "L", "CMYK")
        for each in options
    ]


@pytest.mark.parametrize("resize", [400, 36])  # whole, and at a half
def test_a_jpeg_without_its_end_marker_has_all_its_pixels(resize):
    preprocess = Preprocess(32, resize)
    for data in jpegs(*ONE_SCAN, {"progressive": True}):
        whole = decode(data, preprocess)
        for missing in (1, 2):
            remarks = []
            np.testing.assert_array_equal(decode(data[:-missing], preprocess, remarks), whole)
            assert remarks == ["the end of the file is missing; the decoded part is used"]
    decode(encode(smooth(), "JPEG"), preprocess, remarks := [])
    assert remarks == []


def test_a_jpeg_is_read_if_only_a_small_part_of_its_end_is_missing():
    for data in jpegs(*ONE_SCAN):
        whole = pixels(data)
        for share, readable in ((0.98, True), (0.9, False), (0.8, False), (0.5, False)):
            part = data[: int(len(data) * share)]
            for rest in (b"", bytes(3000)):  # a file system may have reserved space for the rest
                if readable:
                    assert abs(pixels(part + rest) - whole).mean() < 2.5
                else:
                    with pytest.raises(UnreadableImageError, match="damaged or cut short"):
                        open_image(part + rest)


def test_a_progressive_jpeg_is_read_if_its_last_scan_has_begun():
    data = encode(Image.fromarray(skimage.data.chelsea()), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    begun, not_begun = data[: last + 30], data[:last]
    assert abs(pixels(begun) - pixels(data)).mean() < 3
    with pytest.raises(UnreadableImageError, match="damaged or cut short"):
        open_image(not_begun)
    thumbnail = encode(smooth(), "JPEG")  # its scan does not belong to the image
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    with pytest.raises(UnreadableImageError, match="damaged or cut short"):
        open_image(not_begun[:2] + segment + not_begun[2:])


@pytest.mark.parametrize(("format_", "trailer"), [("PNG", 12), ("GIF", 1)])
def test_other_formats_without_their_trailer_have_all_their_pixels(format_, trailer):
    data = encode(smooth(), format_)
    np.testing.assert_array_equal(pixels(data[:-trailer]), pixels(data))


def test_images_without_pixels_are_refused():
    empty = encode(Image.new("RGB", (1, 1)), "GIF")
    with pytest.raises(UnreadableImageError):
        decode(empty[:6] + bytes(4) + empty[10:24] + bytes(4) + empty[28:], Preprocess())
    with pytest.raises(UnreadableImageError):
        decode(png(0, 5), Preprocess())


def test_an_elongated_image_is_refused_before_it_is_resized():
    sliver = encode(Image.new("L", (3, 60_000)), "PNG")
    with pytest.raises(UnreadableImageError, match="too elongated: 3 x 60000 pixels"):
        decode(sliver, Preprocess())


SEEDS = [encode(smooth(12, 16), format_) for format_ in FORMATS]


def assert_decodes_or_is_refused(data: bytes) -> None:
    try:
        decoded = decode(data, Preprocess(size=8, resize=9))
    except UnreadableImageError:
        return
    assert decoded.shape == (8, 8, 3)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_decoded_or_refused(data):
    assert_decodes_or_is_refused(data)


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_mutated_images_are_decoded_or_refused(data):
    image = bytearray(data.draw(st.sampled_from(SEEDS)))
    position = st.integers(0, len(image) - 1)
    for where in data.draw(st.lists(position | st.integers(0, 64), min_size=1, max_size=6)):
        image[where : where + 1] = data.draw(st.binary(max_size=4))
    assert_decodes_or_is_refused(bytes(image[: data.draw(st.integers(1, len(image)))]))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SEEDS), st.integers(2, 40), st.binary(max_size=200))
def test_headers_followed_by_any_bytes_are_decoded_or_refused(seed, length, tail):
    assert_decodes_or_is_refused(seed[:length] + tail)


def test_threads_affect_neither_each_other_nor_the_warning_filters():
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"  # Pillow warns about it
    plain = encode(smooth(), "JPEG")
    noisy = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    with pytest.warns(UserWarning, match="."):
        Image.open(io.BytesIO(noisy)).getexif()
    open_image(noisy)
    filters = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(pixels, [noisy] * 200))
    assert all((image == images[0]).all() for image in images)
    assert list(warnings.filters) == filters
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.warns(UserWarning, match="mine"):
        warnings.warn("mine", stacklevel=1)


def test_read_images_detects_the_format_from_the_content(tmp_path):
    preprocess = Preprocess(size=20, resize=24)
    (tmp_path / "a.txt").write_bytes(encode(smooth(), "PNG"))
    (tmp_path / "b.PNG").write_bytes(encode(smooth(), "JPEG"))
    images = read_images([tmp_path / "b.PNG", str(tmp_path / "a.txt")], preprocess)
    assert images.shape == (2, 20, 20, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images[0], decode(encode(smooth(), "JPEG"), preprocess))
    np.testing.assert_array_equal(images[1], decode(smooth(), preprocess))
    assert read_images([], preprocess).shape == (0, 20, 20, 3)


def test_read_images_names_a_file_it_cannot_read(tmp_path):
    (tmp_path / "page.jpg").write_bytes(b"<html>not found</html>")
    with pytest.raises(UnreadableImageError, match=r"page\.jpg: an HTML page, not an image"):
        read_images([tmp_path / "page.jpg"], Preprocess())
    with pytest.raises(RequestError, match=r"pag\.jpg does not exist; did you mean .*page\.jpg\?"):
        read_images([tmp_path / "pag.jpg"], Preprocess())


def test_the_placeholder_among_the_ants_is_decoded(shared_data):
    # A web site served this GIF, text on a light background, in place of a missing photograph.
    source = open_folder(shared_data / "hymenoptera" / "train")
    (index,) = (i for i, name in enumerate(source.names) if name.endswith("imageNotFound.gif"))
    image = decode(source.read(index), Preprocess())
    assert image.shape == (224, 224, 3)
    assert np.median(image) > 240
    assert image.min() < 100
