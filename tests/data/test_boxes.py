"""Boxes of random crops: their distribution, and that they depend on seed, epoch and index only."""

import math
import subprocess
import sys

import numpy as np
import pytest

from tljax.data.boxes import Crops, _philox, in_central_part, pixel_boxes, random_boxes
from tljax.data.options import AugmentConfig
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import Preprocess

N = 4000
INDICES = np.arange(N)
SHAPES = {"square": (300, 300), "landscape": (375, 500), "portrait": (640, 427), "wide": (50, 100)}


def boxes_of(
    height: float, width: float, seed: int = 0, epoch: int = 1, share: float = 0.875, **rule: object
) -> np.ndarray:
    shapes = np.tile([height, width], (N, 1))
    return random_boxes(seed, epoch, INDICES, shapes, AugmentConfig(**rule), share)


def test_random_words_are_those_of_the_authors_of_philox():
    """Known answers of Random123 1.14, philox4x32 with 10 rounds."""
    ones = 2**32 - 1
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    for (counter, key), expected in (
        (((0,) * 4, (0,) * 2), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (((ones,) * 4, (ones,) * 2), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        assert _philox(counter, key) == expected
        arrays = tuple(np.full(3, word, np.uint64) for word in counter)
        assert [word.tolist() for word in _philox(arrays, key)] == [[word] * 3 for word in expected]


def test_a_box_never_changes_between_versions():
    """A run that is resumed with a later version must see the same crops."""
    box = random_boxes(3, 4, 5, (375, 500), AugmentConfig(), 0.875)
    np.testing.assert_allclose(box, EXPECTED, rtol=1e-12)


EXPECTED = [0.04390066805036298, 0.015226827490401605, 0.9210000322700933, 0.602349423176181]


def test_a_box_does_not_depend_on_the_others_drawn_with_it():
    crops, shapes = Crops(1, 2, AugmentConfig()), np.tile([30.0, 40.0], (N, 1))
    shapes[::3] = 50, 20
    whole = crops.boxes(INDICES, shapes, Preprocess())
    order = np.random.default_rng(0).permutation(N)
    np.testing.assert_array_equal(crops.boxes(order, shapes[order], Preprocess()), whole[order])
    for index in (0, 1, N - 1):
        np.testing.assert_array_equal(crops.of(index, Preprocess())(*shapes[index]), whole[index])


def test_seeds_epochs_and_examples_have_boxes_of_their_own():
    boxes = [boxes_of(3, 4, seed, epoch) for seed in (0, 1, 2**32, 2**40) for epoch in (0, 1)]
    assert len({box.tobytes() for part in boxes for box in part}) == 8 * N


@pytest.mark.parametrize(("height", "width"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.35, 1.0), (0.5, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.5, 1.0), (1.0, 1.0)])
def test_boxes_have_the_configured_area_and_ratio(height, width, scale, ratio):
    top, left, high, wide = boxes_of(height, width, scale=scale, ratio=ratio).T
    area, aspect = high * wide, wide * width / (high * height)
    assert min(top.min(), left.min()) >= 0
    assert max((top + high).max(), (left + wide).max()) <= 1 + 1e-12
    assert aspect.min() >= ratio[0] - 1e-9
    assert aspect.max() <= ratio[1] + 1e-9
    # The area is uniform among those for which a box of such a ratio fits.
    fits = min(1, ratio[1] * height / width, width / height / ratio[0])
    low, high_end = (min(bound, fits) for bound in scale)
    assert low - 1e-9 <= area.min() <= area.max() <= high_end + 1e-9
    for moment, expected in ((1, (low + high_end) / 2), (2, (high_end - low) ** 2 / 12)):
        values = area if moment == 1 else (area - (low + high_end) / 2) ** 2
        assert abs(values.mean() - expected) <= 5 * values.std() / math.sqrt(N) + 1e-9
    # So is the position among those at which the box fits.
    for start, length in ((top, high), (left, wide)):
        free = length < 0.99
        share = start[free] / (1 - length[free])
        if free.any():
            assert abs(share.mean() - 0.5) < 5 / math.sqrt(12 * free.sum())
    elongation = width / height
    every = (area < ratio[0] / elongation) & (area < elongation / ratio[1])  # any ratio fits
    if every.any():
        logs, spread = np.log(aspect[every]), math.log(ratio[1] / ratio[0])
        middle = math.log(ratio[0] * ratio[1]) / 2
        assert abs(logs.mean() - middle) <= 5 * spread / math.sqrt(12 * every.sum()) + 1e-9


@pytest.mark.parametrize("crop", ["random-resized", "random"])
@pytest.mark.parametrize(("height", "width"), SHAPES.values(), ids=SHAPES)
def test_crops_reach_all_corners_of_the_photograph(crop, height, width):
    top, left, high, wide = boxes_of(height, width, crop=crop).T
    assert max(top.min(), left.min()) < 0.01
    assert min((top + high).max(), (left + wide).max()) > 0.99


def test_random_crops_are_those_of_bit():
    """The photograph is squeezed into 256 pixels, of which 224 are cropped."""
    for height, width in SHAPES.values():
        top, left, high, wide = boxes_of(height, width, crop="random", share=224 / 256).T
        np.testing.assert_allclose([high, wide], 224 / 256)
        for start in (top, left):
            assert start.max() <= 32 / 256
            assert abs(start.mean() - 16 / 256) < 5 * (32 / 256) / math.sqrt(12 * N)


@pytest.mark.parametrize("crop", ["random-resized", "random"])
def test_only_the_middle_of_an_elongated_photograph_is_used(crop):
    boxes = boxes_of(100, 500, crop=crop)
    top, left, high, wide = boxes.T
    assert left.min() >= 0.3 - 1e-9
    assert (left + wide).max() <= 0.7 + 1e-9
    middle = boxes_of(100, 200, crop=crop).T
    np.testing.assert_allclose([top, (left - 0.3) / 0.4, high, wide / 0.4], middle, atol=1e-12)
    assert abs((high * wide / 0.4).mean() - (middle[2] * middle[3]).mean()) < 1e-9
    np.testing.assert_allclose(boxes_of(500, 100, crop=crop)[:, 1::2].sum(1).max(), 1, atol=0.01)


def test_boxes_in_pixels_are_followed_by_the_shape():
    box, shape = np.array([[0.1, 0.2, 0.5, 0.25]]), np.array([[30, 50]])
    boxes = pixel_boxes(box, shape)
    np.testing.assert_allclose(boxes, [[3, 10, 15, 12.5, 30, 50, 0]], rtol=1e-6)
    assert boxes.dtype == np.float32
    boxes = pixel_boxes(box, shape, np.array([True]))
    np.testing.assert_allclose(boxes, [[10, 3, 12.5, 15, 50, 30, 1]], rtol=1e-6)


def test_boxes_of_elongated_photographs_are_those_of_their_central_part():
    boxes = in_central_part(np.array([[0.1, 0.25, 0.5, 0.25]]), np.array([[30, 120]]))
    np.testing.assert_allclose(boxes, [[0.1, 0, 0.5, 0.5]], atol=1e-12)


def test_a_central_crop_is_not_random():
    with pytest.raises(RequestError, match="a central crop is not random"):
        Crops(0, 0, AugmentConfig(crop="center"))


def test_processes_that_draw_boxes_import_no_jax():
    program = "import sys, tljax.data.boxes, tljax.data.decode; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
