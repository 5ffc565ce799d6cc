"""Duplicates: copies are found, and different images are not taken for copies."""

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.ndimage import gaussian_filter

import tljax.studies.duplicates as duplicates_module
from tljax.data.decode import open_image
from tljax.data.sources import open_splits
from tljax.runtime.errors import UnreadableImageError
from tljax.studies.duplicates import Duplicate, find_duplicates

MIRROR = Image.Transpose.FLIP_LEFT_RIGHT


def picture(seed: int, height: int = 90, width: int = 120) -> np.ndarray:
    """Return an image of clouds of several sizes, smooth like a photograph, different per seed."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    clouds = sum(s * gaussian_filter(noise, (s, s, 0)) for s in (2, 6, 15))
    low, high = np.min(clouds), np.max(clouds)
    return ((clouds - low) / (high - low) * 255).astype(np.uint8)


def jpeg(image: Image.Image, quality: int = 80) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def crop(image: Image.Image, keep: float, seed: int) -> Image.Image:
    """Crop at random, to at least the share ``keep`` of each side."""
    draw = random.Random(seed)
    width, height = (round(side * draw.uniform(keep, 1)) for side in image.size)
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


COPIES = {
    "saved again": lambda image: jpeg(image, 40),
    "resized": lambda image: jpeg(image.resize((image.width // 2, image.height // 2))),
    "squeezed": lambda image: jpeg(image.resize((100, 100))),
    "cropped": lambda image: jpeg(crop(image, 0.85, image.width)),
    "square": lambda image: png(image.crop((15, 0, 105, 90))),
    "grey": lambda image: png(image.convert("L")),
    "brighter": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(1.2)),
    "pale": lambda image: jpeg(ImageEnhance.Contrast(image).enhance(0.6)),
    "mirrored": lambda image: jpeg(image.transpose(MIRROR)),
    "mirrored and cropped": lambda image: jpeg(crop(image.transpose(MIRROR), 0.9, 5)),
}


@pytest.fixture(scope="module")
def train() -> np.ndarray:
    return np.stack([picture(seed) for seed in range(30)])


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found_whichever_side_was_changed(train: np.ndarray, name: str):
    val = [COPIES[name](Image.fromarray(train[i])) for i in (3, 17)]
    val.insert(1, jpeg(Image.fromarray(picture(99))))
    actual = find_duplicates(train, val)
    assert [(one.train, one.val) for one in actual] == [(3, 0), (17, 2)]
    assert {one.kind for one in actual} == {"mirrored" if "mirrored" in name else "near"}
    assert all(0.9 <= one.similarity <= 1 for one in actual)
    back = find_duplicates(val, train)
    assert [(one.train, one.val) for one in back] == [(0, 3), (2, 17)]


def test_different_images_are_not_duplicates(train: np.ndarray):
    others = np.stack([picture(seed) for seed in range(100, 130)])
    assert find_duplicates(train, others) == []
    upside_down = train[:, ::-1]  # not a mirror image
    assert find_duplicates(train, upside_down) == []


def test_the_same_pixels_are_exact_duplicates_in_any_format(train: np.ndarray):
    val = [png(Image.fromarray(train[4])), train[9], jpeg(Image.fromarray(train[4]))]
    first, second, third = find_duplicates([*train, train[9]], val)
    assert first == Duplicate(4, 0, "exact", 1.0)
    assert second == Duplicate(9, 1, "exact", 1.0)
    assert (third.train, third.kind) == (4, "near")


def test_the_same_bytes_in_another_shape_are_not_duplicates():
    wide = np.zeros((1, 4, 4, 3), np.uint8)
    assert find_duplicates(wide, wide.reshape(1, 2, 8, 3)) == []
    assert len(find_duplicates(wide, wide)) == 1


def test_small_images_are_duplicates_only_if_equal():
    small = picture(0, 24, 40)
    assert find_duplicates([small], [small + (small < 255)]) == []
    assert find_duplicates([small], [small])[0].kind == "exact"


def test_blank_images_are_duplicates_only_if_equal():
    rng = np.random.default_rng(0)
    blank = [jpeg(Image.fromarray(rng.integers(250, 253, (64, 64, 3), np.uint8))) for _ in "ab"]
    assert find_duplicates(blank[:1], blank[1:]) == []


def test_the_most_similar_training_image_is_returned(train: np.ndarray):
    image = Image.fromarray(train[5])
    rows = [jpeg(crop(image, 0.85, 1)), jpeg(image, 95), png(Image.fromarray(train[6]))]
    (one,) = find_duplicates(rows, [jpeg(image, 60)])
    assert (one.train, one.kind) == (1, "near")


def test_the_block_size_does_not_change_the_result(
    train: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    val = [COPIES["cropped"](Image.fromarray(image)) for image in train]
    whole = find_duplicates(train, val)
    assert len(whole) == 30
    monkeypatch.setattr(duplicates_module, "_BLOCK", 7)
    assert find_duplicates(train, val) == whole


def test_the_threshold_separates_duplicates(train: np.ndarray):
    val = [COPIES["saved again"](Image.fromarray(train[0]))]
    (one,) = find_duplicates(train, val)
    assert find_duplicates(train, val, threshold=one.similarity) == [one]
    assert find_duplicates(train, val, threshold=one.similarity + 1e-6) == []


class Unreadable(list):
    def __getitem__(self, index):
        if index == 1:
            raise UnreadableImageError("cannot be read: gone")
        return super().__getitem__(index)


def test_unreadable_images_are_left_out(train: np.ndarray):
    bad = Unreadable([b"", b"", b"<html>", png(Image.fromarray(train[2]))])
    assert find_duplicates(train, bad) == [Duplicate(2, 3, "exact", 1.0)]
    assert find_duplicates(bad, bad) == [Duplicate(3, 3, "exact", 1.0)]


def test_empty_sources_have_no_duplicates(train: np.ndarray):
    assert find_duplicates([], train) == find_duplicates(train, []) == []


def test_duplicates_of_real_photographs(shared_data):
    """Training and validation images of hymenoptera differ, and every copy is found."""
    splits = open_splits(str(shared_data / "hymenoptera"))
    originals = splits.val.examples
    assert find_duplicates(splits.train.examples, originals) == []
    copies = []
    for i in range(0, len(splits.val), 3):
        image = crop(open_image(originals[i]), 0.85, i)  # pyright: ignore[reportArgumentType]
        image = image.transpose(MIRROR) if i % 2 else image
        copies.append(jpeg(image.resize((image.width // 2, image.height // 2)), 50))
    actual = find_duplicates(originals, copies)
    assert [(one.train, one.val) for one in actual] == [(3 * k, k) for k in range(len(copies))]
    assert [one.kind for one in actual] == ["mirrored" if k % 2 else "near" for k in range(51)]
