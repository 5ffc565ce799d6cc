"""Crops of boxes equal Pillow's, on the host and on devices."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tljax.data.boxes import Crops, pixel_boxes
from tljax.data.crop import Interpolation, _gather, _multiply, _resize, crop_and_resize
from tljax.data.decode import decode
from tljax.data.options import AugmentConfig
from tljax.runtime.preprocess import Preprocess

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@partial(jax.jit, static_argnums=(0, 3, 4))
def cropped(
    along: Callable, images: np.ndarray, boxes: np.ndarray, size: int, interpolation: Interpolation
) -> jax.Array:
    """Crop as one kind of platform does: by products, or by gathers."""
    return jax.vmap(partial(_resize, along, size, interpolation))(images, boxes)


crop_on_device = jax.jit(crop_and_resize, static_argnums=(2, 3))


def canvas(photographs: list[np.ndarray]) -> np.ndarray:
    """Put each photograph at the upper left of a canvas of white noise."""
    height, width = (max(photograph.shape[k] for photograph in photographs) for k in (0, 1))
    shape = (len(photographs), height, width, photographs[0].shape[2])
    images = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    images = images.astype(photographs[0].dtype)
    for image, photograph in zip(images, photographs, strict=True):
        image[: photograph.shape[0], : photograph.shape[1]] = photograph
    return images


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, channels), np.uint8)


def pillow(image: np.ndarray, box: np.ndarray, size: int, interpolation: str) -> np.ndarray:
    top, left, high, wide = map(float, box[:4])
    right, bottom = min(left + wide, image.shape[1]), min(top + high, image.shape[0])
    resample = Image.Resampling[interpolation.upper()]
    bands = [Image.fromarray(image[..., k]) for k in range(image.shape[2])]
    region = left, top, right, bottom
    return np.dstack([np.asarray(band.resize((size, size), resample, region)) for band in bands])


# Pillow 13 resizes height before width where it shrinks the height alone; these it does not.
SHAPES = [(30, 40), (41, 29), (17, 34), (40, 40), (8, 8), (1, 1), (1, 2), (40, 1)]


@pytest.mark.parametrize("along", [_multiply, _gather])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [5, 16, 45])
def test_crops_equal_pillow(along, interpolation, size):
    photographs = [noise(*shape) for shape in SHAPES * 8]
    shapes = np.array([photograph.shape[:2] for photograph in photographs])
    crops = Crops(0, 0, AugmentConfig(scale=(0.05, 1), ratio=(0.5, 2)))
    boxes = pixel_boxes(crops.boxes(np.arange(len(shapes)), shapes, Preprocess()), shapes)
    result = np.asarray(cropped(along, canvas(photographs), boxes, size, interpolation), int)
    expected = [
        pillow(image, box, size, interpolation)
        for image, box in zip(photographs, boxes, strict=True)
    ]
    difference = np.abs(result - np.array(expected, int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_the_program_of_an_accelerator_gathers_nothing():
    arguments = jax.ShapeDtypeStruct((4, 30, 40, 3), "uint8"), jax.ShapeDtypeStruct((4, 7), "f4")
    traced = jax.jit(partial(crop_and_resize, size=16)).trace(*arguments)
    for platform in ("tpu", "cuda", "rocm"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "gather" not in text
        assert text.count("dot_general") == 2
        assert text.count("HIGH") == 4  # of both operands of both products
    assert "dot_general" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("along", [_multiply, _gather])
def test_numbers_are_resized_without_rounding_band_by_band(along):
    photograph = np.random.default_rng(0).normal(3, 7, (20, 30, 5)).astype(np.float32)
    box = np.array([[2.5, 3.25, 12, 20, 20, 30, 0]], np.float32)
    result = cropped(along, photograph[None], box, 9, "bilinear")
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[0], pillow(photograph, box[0], 9, "bilinear"), atol=1e-4)


@pytest.mark.parametrize("along", [_multiply, _gather])
def test_padding_without_a_box_is_finite(along):
    result = cropped(along, np.ones((2, 6, 7, 3), np.float32), np.zeros((2, 7), "f"), 4, "bicubic")
    assert np.isfinite(result).all()


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)).map(sorted),  # see SHAPES
    index=st.integers(0, 2**31),
    crop=st.sampled_from(["random-resized", "random"]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_the_host_and_the_device_make_the_same_crop(shape, index, crop, interpolation):
    preprocess = Preprocess(size=16, resize=20, interpolation=interpolation)
    crops, photograph = Crops(0, 3, AugmentConfig(crop=crop)), noise(*shape)
    shapes = np.array([shape])
    boxes = pixel_boxes(crops.boxes(np.array([index]), shapes, preprocess), shapes)
    images = np.zeros((1, 60, 60, 3), np.uint8)
    images[0, : shape[0], : shape[1]] = photograph
    on_device = np.asarray(crop_on_device(images, boxes, 16, interpolation), int)[0]
    on_host = decode(photograph, preprocess, crop=crops.of(index, preprocess))
    assert np.abs(on_device - on_host).max() <= 1
