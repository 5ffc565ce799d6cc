"""Images of one, two, four and thirteen channels, of 8, 16 and more bits."""

import io
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from tljax.data.decode import decode, open_image
from tljax.data.examples import Source
from tljax.data.loader import load_batches
from tljax.data.pictures import decode_picture, open_picture
from tljax.data.statistics import measure_channels
from tljax.runtime.errors import RequestError, UnreadableImageError
from tljax.runtime.preprocess import Preprocess

HEIGHT, WIDTH = 50, 37
RGB = Preprocess(24, 31, "bicubic")


def preprocess(channels: int, dtype: str = "float32") -> Preprocess:
    return replace(RGB.with_channels(channels), dtype=dtype)


def pixels(*channels: int, dtype: str = "uint8") -> np.ndarray:
    top = {"uint8": 256, "uint16": 65536}.get(dtype)
    rng = np.random.default_rng(0)
    shape = (HEIGHT, WIDTH, *channels)
    return (
        rng.integers(0, top, shape).astype(dtype) if top else rng.normal(2, 3, shape).astype(dtype)
    )


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def npy(array: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def png16(array: np.ndarray) -> bytes:
    """Encode ``[height, width, 3]`` uint16 as a PNG of 16 bits, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def resized(band: np.ndarray) -> np.ndarray:
    """Resize and crop one band as `RGB` says, with Pillow, by hand."""
    image = Image.fromarray(band).resize((31, int(31 * HEIGHT / WIDTH)), Image.Resampling.BICUBIC)
    left, top = (round((side - 24) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + 24, top + 24)))


def each_band(array: np.ndarray) -> np.ndarray:
    return np.stack([resized(np.ascontiguousarray(band)) for band in np.moveaxis(array, -1, 0)], -1)


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_every_band_of_8_bits_is_resized_as_pillow_resizes_it_alone(channels: int):
    array = pixels(channels)
    decoded = decode(array, preprocess(channels, "uint8"))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, each_band(array))
    in_float = decode(array, preprocess(channels))
    np.testing.assert_array_equal(in_float, decoded / np.float32(255), strict=True)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_numbers_of_16_bits_keep_their_precision(channels: int):
    array = pixels(channels, dtype="uint16")
    decoded = decode(npy(array), preprocess(channels))
    expected = each_band(array.astype(np.float32) / np.float32(65535)).clip(0, 1)
    np.testing.assert_array_equal(decoded, expected, strict=True)
    assert len(np.unique(decoded)) > 1000 / (8 if channels == 1 else 1)
    in_8_bits = decode(npy(array), preprocess(channels, "uint8"))
    np.testing.assert_array_equal(in_8_bits, np.rint(expected * 255).astype(np.uint8), strict=True)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("channels", [3, 13])
def test_floating_point_numbers_are_taken_as_they_are(dtype: str, channels: int):
    array = pixels(channels, dtype="float32").astype(dtype)
    expected = each_band(array.astype(np.float32))
    for data in (npy(array), npy(np.asfortranarray(array)), array):
        np.testing.assert_array_equal(decode(data, preprocess(channels)), expected, strict=True)
    with pytest.raises(
        UnreadableImageError, match="floating point pixels, but the network takes 8"
    ):
        decode(npy(array), preprocess(channels, "uint8"))


def test_a_file_of_numbers_may_have_no_axis_of_channels():
    array = pixels(dtype="float32")
    expected = decode(array[..., None], preprocess(1))
    np.testing.assert_array_equal(decode(npy(array), preprocess(1)), expected)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(pixels(13)), "it has 13 channels instead of 4"),
        (npy(np.moveaxis(pixels(4), -1, 0)), "its first axis looks like channels: save it as [h"),
        (
            npy(pixels(4).astype(np.int32)),
            "int32 of shape [50, 37, 4]: save uint8, uint16 or float",
        ),
        (npy(pixels(2, 2)), "uint8 of shape [50, 37, 2, 2]: save one image [height, width, chann"),
        (npy(np.zeros((0, 5, 4), np.uint8)), "uint8 of shape [0, 5, 4]: choose from 1 to"),
        (npy(np.full((5, 5, 4), np.nan)), "a pixel is NaN or infinite: replace it by a number"),
        (npy(np.full((5, 5, 4), 1e300)), "a pixel is NaN or infinite: replace it by a number"),
        (npy(np.array([{}]), allow_pickle=True), "object of shape [1]: save uint8, uint16 or flo"),
        (npy(pixels(4))[:-1], "cut short: the .npy file has not the size its header says"),
        (npy(pixels(4))[:40], "damaged: the header of the .npy file is broken"),
        (npy(pixels(4)).replace(b"37", b"99"), "cut short: the .npy file has not the size its"),
        (npy(pixels(4)).replace(b"|u1", b"|Q1"), "damaged: the header of the .npy file is broken"),
        (encoded(Image.fromarray(pixels(3)), "PNG"), "it has 3 channels instead of 4"),
        (encoded(Image.fromarray(pixels()), "JPEG"), "it has 1 channels instead of 4"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_reason(data: bytes, reason: str):
    with pytest.raises(UnreadableImageError) as error:
        decode(data, preprocess(4))
    assert reason in str(error.value)


# --- pictures ---------------------------------------------------------------------------------


def pictures() -> dict[str, bytes]:
    rgb = Image.fromarray(pixels(3))
    found = {
        "RGB": encoded(rgb, "PNG"),
        "RGBA": encoded(Image.fromarray(pixels(4)), "PNG"),
        "LA": encoded(Image.fromarray(pixels(2)), "PNG"),
        "L": encoded(Image.fromarray(pixels()), "PNG"),
        "P": encoded(rgb.quantize(40), "PNG"),
        "1": encoded(Image.fromarray(pixels()).convert("1"), "PNG"),
        "CMYK": encoded(rgb.convert("CMYK"), "JPEG"),
        "JPEG": encoded(rgb, "JPEG", exif=orientation(6)),
        "TIFF": encoded(rgb, "TIFF"),
    }
    if features.check("webp"):
        found["WebP"] = encoded(rgb, "WEBP", lossless=True)
    return found


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = value
    return exif


@pytest.mark.parametrize("mode", pictures())
def test_pictures_of_8_bits_have_the_same_pixels_when_bits_and_bands_are_kept(mode: str):
    data = pictures()[mode]
    usual = decode(data, RGB)
    assert usual.shape == (24, 24, 3)
    exact = decode(data, replace(RGB, dtype="float32"))
    np.testing.assert_array_equal(exact, usual / np.float32(255), strict=True)


@pytest.mark.parametrize("mode", pictures())
def test_pictures_become_gray_for_one_channel(mode: str):
    data = pictures()[mode]
    gray = np.asarray(open_image(data).convert("L"))
    if mode == "JPEG":  # turned after it is resized
        expected = decode(gray[..., None], preprocess(1, "uint8"))
        assert np.abs(decode(data, preprocess(1, "uint8")) - expected.astype(int)).max() <= 1
    else:
        decoded = decode(data, preprocess(1, "uint8"))
        np.testing.assert_array_equal(decoded[..., 0], resized(gray))


def test_transparent_pixels_keep_their_color_where_the_fourth_band_is_a_channel():
    array = pixels(4)
    array[..., 3] = 0
    decoded = decode(encoded(Image.fromarray(array), "PNG"), preprocess(4, "uint8"))
    np.testing.assert_array_equal(decoded, each_band(array))
    array = pixels(2)
    decoded = decode(encoded(Image.fromarray(array), "PNG"), preprocess(2, "uint8"))
    np.testing.assert_array_equal(decoded, each_band(array))


def test_gray_png_of_16_bits_keeps_them():
    array = pixels(dtype="uint16")
    data = encoded(Image.fromarray(array), "PNG")
    expected = resized(array / np.float32(65535))[..., None].clip(0, 1)
    np.testing.assert_array_equal(decode(data, preprocess(1)), expected)
    np.testing.assert_array_equal(decode(data, preprocess(3)), expected.repeat(3, -1))
    assert decode(data, RGB).dtype == np.uint8  # as ever


def test_a_png_whose_bits_pillow_drops_is_refused():
    data = png16(pixels(3, dtype="uint16"))
    assert decode(data, RGB).shape == (24, 24, 3)  # as ever
    with pytest.raises(UnreadableImageError, match="16 bits, which Pillow reduces to 8: save it"):
        decode(data, preprocess(3))


def test_a_turned_photograph_is_upright_in_every_channel():
    image = Image.fromarray(pixels())
    turned = encoded(image, "JPEG", exif=orientation(6))
    expected = decode(turned, RGB)
    np.testing.assert_array_equal(decode(turned, preprocess(1, "uint8")), expected[..., :1])


# --- TIFF -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("form", ["interleaved", "planes", "pages", "rows", "deflate"])
def test_a_tiff_of_bands_has_the_pixels_of_its_array(dtype: str, channels: int, form: str):
    array = pixels(channels, dtype=dtype)
    first = np.ascontiguousarray(np.moveaxis(array, -1, 0))
    gray = {"photometric": "minisblack", "metadata": None}
    data = {
        "interleaved": lambda: tiff(array, planarconfig="contig", **gray),
        "deflate": lambda: tiff(array, planarconfig="contig", compression="zlib", **gray),
        "planes": lambda: tiff(first, planarconfig="separate", **gray),
        "pages": lambda: tiff(first, **gray),
        "rows": lambda: tiff(array, photometric="minisblack"),  # a page for each row
    }[form if channels > 1 else "pages"]()
    expected = decode(array, preprocess(channels))
    np.testing.assert_array_equal(decode(data, preprocess(channels)), expected)


def test_a_band_that_pillow_drops_is_kept():
    array = pixels(4)
    data = tiff(array, photometric="rgb", extrasamples=["unspecified"])
    np.testing.assert_array_equal(decode(data, RGB)[..., :3], decode(array[..., :3].copy(), RGB))
    np.testing.assert_array_equal(decode(data, preprocess(4, "uint8")), each_band(array))


PACKED = {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: tiff(pixels(13)[:2]), "it has 2 channels instead of 4"),
        (
            lambda: tiff(pixels(4).astype(np.int32), photometric="rgb"),
            "save uint8, uint16 or floating point",
        ),
        (lambda: tiff(pixels(2, 4)), "save one image [height, width, channels]"),
        (lambda: tiff(pixels(13), **PACKED)[:-300], "its TIFF bands cannot be read"),
    ],
)
def test_a_tiff_that_does_not_fit_is_refused_with_its_reason(
    data: Callable[[], bytes], reason: str
):
    with pytest.raises(UnreadableImageError) as error:
        decode(data(), preprocess(4))
    assert reason in str(error.value)


def test_without_tifffile_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    data = tiff(pixels(13), photometric="minisblack", planarconfig="contig")
    gray = encoded(Image.fromarray(pixels(dtype="uint16")), "TIFF")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(RequestError, match=r"8 bits need tifffile: pip install tifffile$"):
        decode(data, preprocess(13))
    assert decode(gray, preprocess(1)).shape == (24, 24, 1)


# --- statistics, batches and pictures ---------------------------------------------------------


def source(*images: bytes | np.ndarray) -> Source:
    class Examples(list):
        pass

    names = [f"image {i}" for i in range(len(images))]
    return Source(Examples(images), np.zeros(len(images), np.int32), ("one",), names)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_the_mean_and_deviation_are_those_of_the_pixels(dtype: str, channels: int):
    rng = np.random.default_rng(1)
    arrays = [pixels(channels, dtype=dtype) // (i + 1) for i in range(5)]
    arrays = [a.astype(dtype) for a in arrays]
    images = [npy(array) if rng.random() < 0.5 else array for array in arrays]
    measured = measure_channels(source(*images, b"", b"no image"), preprocess(channels))
    fed = np.stack([decode(image, measured) for image in images]).astype(np.float64)
    fed = fed.reshape(-1, channels) / (255 if dtype == "uint8" else 1)
    assert measured.dtype == ("uint8" if dtype == "uint8" else "float32")
    # Six digits are kept.
    np.testing.assert_allclose(measured.mean, fed.mean(0), rtol=5e-6)
    np.testing.assert_allclose(measured.std, fed.std(0), rtol=5e-6)


def test_one_image_of_more_than_8_bits_makes_all_float32():
    images = source(pixels(2), pixels(2, dtype="uint16"))
    measured = measure_channels(images, preprocess(2, "uint8"))
    assert measured.dtype == "float32"
    (batch,) = load_batches(images, measured, batch_size=3)
    assert batch.inputs.shape == (3, 24, 24, 2)
    assert batch.inputs.dtype == np.float32
    assert batch.inputs[:2].max() <= 1 < 255 * batch.inputs[0].max()
    assert batch.mask.tolist() == [True, True, False]


def test_a_constant_channel_is_only_centered():
    array = pixels(2, dtype="float32")
    array[..., 1] = 7
    measured = measure_channels(source(array), preprocess(2))
    assert measured.mean[1] == 7
    assert measured.std[1] == 1


def test_a_source_without_a_readable_image_is_refused():
    with pytest.raises(RequestError, match=r"no image can be read; image 0: .* instead of 2"):
        measure_channels(source(pixels(4), pixels(5)), preprocess(2))


def test_what_is_looked_at_is_gray_the_first_three_channels_or_the_picture(tmp_path: Path):
    picture = pictures()["RGBA"]
    np.testing.assert_array_equal(decode_picture(picture, 24), decode(picture, Preprocess(24, 24)))
    for channels, shown in ((1, [0, 0, 0]), (2, [0, 0, 0]), (4, [0, 1, 2]), (13, [0, 1, 2])):
        array = pixels(channels)
        np.testing.assert_array_equal(open_picture(npy(array)), array[..., shown])
        values = array.astype(np.float32) * 3 - 5
        stretched = np.asarray(open_picture(npy(values)), float)
        low, high = values[..., shown].min(), values[..., shown].max()
        expected = (values[..., shown] - low) / (high - low) * 255
        np.testing.assert_allclose(stretched, expected, atol=0.51)
    with pytest.raises(UnreadableImageError, match="text, not an image"):
        decode_picture(b"hello", 24)
