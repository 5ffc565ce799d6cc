import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from tljax.explain import Transforms
from tljax.explain.transforms import warp

IMAGE = np.random.default_rng(0).uniform(0, 1, (11, 14, 3)).astype(np.float32)
IDENTITY = jnp.eye(2)


def test_the_identity_leaves_the_image_unchanged():
    np.testing.assert_allclose(warp(IMAGE, IDENTITY, jnp.zeros(2)), IMAGE, rtol=0, atol=1e-6)
    assert Transforms(0, 0, 0)(jax.random.key(0), jnp.asarray(IMAGE)) is not None
    np.testing.assert_array_equal(Transforms(0, 0, 0)(jax.random.key(0), IMAGE), IMAGE)


def test_a_shift_fills_uncovered_pixels_with_gray():
    moved = warp(IMAGE, IDENTITY, jnp.array([2, -3]))
    np.testing.assert_allclose(moved[:-2, 3:], IMAGE[2:, :-3], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(moved[-2:], np.full((2, 14, 3), 0.5, np.float32))
    np.testing.assert_array_equal(moved[:, :3], np.full((11, 3, 3), 0.5, np.float32))


@pytest.mark.parametrize("angle", [0.0, 0.3, -1.1])
@pytest.mark.parametrize("zoom", [0.8, 1.25])
def test_affine_transformations_match_scipy(angle, zoom):
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / zoom
    shift, center = np.array([1.3, -0.4]), np.array([5, 6.5])
    expected = np.stack(
        [
            scipy.ndimage.affine_transform(
                IMAGE[..., c], matrix, center + shift - matrix @ center, order=1,
                mode="grid-constant", cval=0.5,
            )
            for c in range(3)
        ],
        axis=-1,
    )  # fmt: skip
    actual = warp(IMAGE, jnp.asarray(matrix, jnp.float32), jnp.asarray(shift, jnp.float32))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def spot(row, column, size=41):
    return jnp.zeros((size, size, 1)).at[row, column].set(1)


def center_of(image):
    weight = np.asarray(image[..., 0])
    return (np.indices(weight.shape) * weight).sum((1, 2)) / weight.sum()


@pytest.mark.slow
def test_random_transformations_cover_their_ranges():
    keys = jax.random.split(jax.random.key(0), 200)
    middle = np.array([20, 20])
    # Subtract a transformed empty image, whose uncovered border is gray too.
    empty = jnp.zeros((41, 41, 1))

    def places(transforms, image):
        move = jax.jit(jax.vmap(transforms, (0, None)))
        result = jnp.maximum(move(keys, image) - move(keys, empty), 0)
        return np.array([center_of(x) for x in result]) - middle

    shifts = places(Transforms(5, 0, 0), spot(20, 20))
    assert 4.5 < np.abs(shifts).max() <= 5.01
    assert (np.abs(shifts.mean(0)) < 0.6).all()
    turned = places(Transforms(0, 0, 10), spot(20, 35))
    angles = np.rad2deg(np.arctan2(turned[:, 0], turned[:, 1]))
    assert 9 < np.abs(angles).max() <= 10.2
    assert angles.min() < -9
    zooms = places(Transforms(0, 0.1, 0), spot(20, 35))[:, 1] / 15
    assert 0.89 < zooms.min() < 0.92
    assert 1.08 < zooms.max() < 1.11
    flips = places(Transforms(0, 0, 0, flip=True), spot(20, 30))[:, 1] / 10
    np.testing.assert_allclose(np.abs(flips), 1, rtol=1e-5)
    assert 0.4 < (flips > 0).mean() < 0.6


def test_transformed_images_stay_within_the_bounds():
    move = jax.jit(jax.vmap(Transforms(flip=True), (0, None)))
    keys = jax.random.split(jax.random.key(3), 8)
    np.testing.assert_allclose(move(keys, jnp.full((9, 9, 3), 0.5)), 0.5, rtol=0, atol=1e-6)
    moved = move(keys, jnp.asarray(IMAGE))
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1 + 1e-6
