import numpy as np
import pytest

from tljax.explain import (
    channel_pictures,
    heatmap,
    overlay,
    scale_maps,
    strongest_channels,
    to_pixels,
)
from tljax.runtime.errors import RequestError

RNG = np.random.default_rng(0)
PHOTOGRAPHS = RNG.integers(0, 256, (2, 10, 12, 3)).astype(np.uint8)


def test_to_pixels_rounds_floats_and_returns_uint8_unchanged():
    result = to_pixels(np.array([-0.1, 0, 0.5 / 255 - 1e-4, 0.5 / 255 + 1e-4, 1, 2], np.float32))
    np.testing.assert_array_equal(result, [0, 0, 0, 1, 255, 255])
    assert result.dtype == np.uint8
    assert to_pixels(PHOTOGRAPHS) is PHOTOGRAPHS


def test_maps_of_zeros_stay_zero_and_finite():
    zeros = np.zeros((1, 4, 4), np.float32)
    np.testing.assert_array_equal(scale_maps(zeros), zeros)
    assert heatmap(zeros).shape == (1, 4, 4, 3)
    assert heatmap(zeros).max() <= 5  # black
    assert overlay(PHOTOGRAPHS[:1], zeros).shape == (1, 10, 12, 3)


def test_each_map_is_scaled_by_its_own_percentile():
    maps = np.stack([np.arange(101.0).reshape(1, 101), -7 * np.arange(101.0).reshape(1, 101)])
    result = scale_maps(maps, percentile=50)
    np.testing.assert_allclose(result[0, 0, :51], np.arange(51) / 50, atol=1e-6)
    np.testing.assert_array_equal(result[0, 0, 51:], np.ones(50))
    np.testing.assert_allclose(result[1], -result[0], atol=1e-6)
    spike = np.zeros((1, 20, 20))
    spike[0, 3, 4] = 5  # its 99th percentile is 0
    np.testing.assert_array_equal(scale_maps(spike), spike / 5)


def test_heatmaps_color_signs_differently():
    red, white, blue = heatmap(np.array([[[1.0, 0.0, -1.0]]]), percentile=100)[0, 0].astype(int)
    assert red[0] > red[2] + 50
    assert blue[2] > blue[0] + 50
    assert white.min() > 240
    black, yellow = heatmap(np.array([[[0.0, 1.0]]]), percentile=100)[0, 0].astype(int)
    assert black.max() < 10
    assert yellow[:2].min() > 200


def test_an_overlay_blends_grayscale_image_and_heatmap():
    maps = RNG.uniform(0, 1, (2, 10, 12))
    hidden = overlay(PHOTOGRAPHS, maps, opacity=0)
    np.testing.assert_array_equal(hidden[..., 0], hidden[..., 2])
    luma = PHOTOGRAPHS @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_array_equal(hidden[..., 1], np.round(luma))
    np.testing.assert_array_equal(overlay(PHOTOGRAPHS, maps, opacity=1), heatmap(maps))
    same = overlay(PHOTOGRAPHS.astype(np.float32) / 255, maps)
    np.testing.assert_array_equal(same, overlay(PHOTOGRAPHS, maps))


def test_a_small_map_is_resized_to_the_image():
    maps = np.zeros((2, 2, 2), np.float32)
    maps[0, 0, 1] = maps[1, 1, 0] = 1
    result = overlay(PHOTOGRAPHS, maps, opacity=1).astype(int).sum(-1)
    assert result.shape == (2, 10, 12)
    assert result[0, 0, -1] == result[0].max()
    assert result[1, -1, 0] == result[1].max()
    assert result[0, -1, 0] == result[0].min()


@pytest.mark.parametrize("shape", [(1, 10, 12), (10, 12), (2, 10, 12, 3)])
def test_maps_of_the_wrong_shape_are_rejected(shape):
    with pytest.raises(RequestError, match="for 2 images; pass"):
        overlay(PHOTOGRAPHS, np.zeros(shape))


def test_the_strongest_channels_come_first_and_each_is_scaled_to_its_range():
    features = np.zeros((3, 4, 5), np.float32)
    features[..., 2] = -10
    features[..., 4] = np.arange(12).reshape(3, 4)
    features[1, 1, 0] = 3
    np.testing.assert_array_equal(strongest_channels(features, 3), [2, 4, 0])
    assert len(strongest_channels(features, 16)) == 5
    pictures = channel_pictures(features)
    assert pictures.shape == (5, 3, 4, 3)
    assert pictures.dtype == np.uint8
    np.testing.assert_array_equal(pictures[2], pictures[1])  # flat, and finite
    assert pictures[4].astype(int).sum(-1).argmax() == 11
