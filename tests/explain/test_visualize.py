from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax.explain import (
    FOURIER,
    NO_TRANSFORMS,
    PIXELS,
    channel_mean,
    class_score,
    total_variation,
    visualize,
)
from tljax.explain.parametrization import correlate_colors, fourier_field

pytestmark = pytest.mark.slow

KEYS = jax.random.split(jax.random.key(0), 2)


def test_total_variation_matches_tensorflow():
    counted = np.arange(48, dtype=np.float32).reshape(2, 3, 4, 2)
    np.testing.assert_array_equal(total_variation(counted), [164, 164])
    impulse = np.zeros((1, 5, 5, 3), np.float32)
    impulse[:, 2, 2] = 1
    np.testing.assert_array_equal(total_variation(impulse), [12])
    checkerboard = np.indices((4, 4)).sum(0)[None, ..., None] % 2
    np.testing.assert_array_equal(total_variation(checkerboard.astype(np.float32)), [24])
    np.testing.assert_array_equal(total_variation(np.full((3, 4, 5, 3), 0.7)), [0, 0, 0])


def test_colors_match_lucid():
    axes = jnp.concatenate([jnp.zeros((1, 3)), jnp.eye(3)])
    colors = jax.nn.sigmoid(correlate_colors(axes))
    np.testing.assert_array_equal(colors[0], [0.5, 0.5, 0.5])
    np.testing.assert_allclose(colors[1], [0.637107, 0.642097, 0.642097], rtol=0, atol=1e-6)
    second = 1 / (1 + np.exp(-np.array([0.09, 0, -0.09]) / 0.46195))
    np.testing.assert_allclose(colors[2], second, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [8, 9])
def test_a_fourier_coefficient_gives_a_wave_scaled_by_its_wavelength(size):
    """In lucid, the inverse FFT of sqrt(w h) / max(f, 1 / max(w, h)) times the spectrum, over 4."""
    row, column = np.indices((size, size)) / size
    for fy, fx in ((0, 1), (2, 3), (size - 1, 2)):
        params = np.zeros((2, size, size // 2 + 1, 3), np.float32)
        params[:, fy, fx] = np.array([[1, 0, 2], [0, 0.5, 3]])
        frequency = np.hypot(min(fy, size - fy), fx) / size
        amplitude = size / max(frequency, 1 / size) / size**2 / 4
        amplitude *= 2  # for the implicit conjugate
        phase = np.exp(2j * np.pi * (fy * row + fx * column))
        wave = [(amplitude * c * phase).real for c in (1, 0.5j, 2 + 3j)]
        actual = fourier_field(jnp.asarray(params), size)
        np.testing.assert_allclose(actual, np.stack(wave, -1), rtol=0, atol=1e-5)
    flat = jnp.zeros((2, size, size // 2 + 1, 3)).at[0, 0, 0].set(1)
    np.testing.assert_allclose(fourier_field(flat, size), 0.25, rtol=0, atol=1e-6)


def test_the_random_initialization_has_the_spectrum_of_lucid():
    params = FOURIER.init(jax.random.key(1), 64)
    assert params.shape == (2, 64, 33, 3)
    assert abs(float(params.std()) - 0.01) < 2e-4
    pixels = PIXELS.init(jax.random.key(1), 64)
    assert abs(float(pixels.std()) - 0.01) < 3e-4
    for parametrization in (FOURIER, PIXELS):
        image = parametrization.image(parametrization.init(KEYS[0], 33), 33)
        assert image.shape == (33, 33, 3)
        assert 0.3 < float(image.min()) < 0.5 < float(image.max()) < 0.7
        gray = parametrization.image(0 * parametrization.init(KEYS[0], 33), 33)
        np.testing.assert_allclose(gray, 0.5, rtol=0, atol=1e-7)


def seen(images):
    """Wants the left half white and the right half black: convex, so that it can be reached."""
    half = images.shape[2] // 2
    return images[:, :, :half].mean((1, 2, 3)) - images[:, :, half:].mean((1, 2, 3))


@pytest.mark.parametrize("parametrization", [FOURIER, PIXELS], ids=["fourier", "pixels"])
def test_the_objective_increases_within_the_bounds(parametrization):
    options = {"size": 16, "parametrization": parametrization, "transforms": NO_TRANSFORMS}
    start = visualize(seen, KEYS, num_steps=0, **options)
    np.testing.assert_array_equal(
        start, [parametrization.image(parametrization.init(key, 16), 16) for key in KEYS]
    )
    top = visualize(seen, KEYS, num_steps=200, learning_rate=0.5, **options)
    assert float(seen(start).max()) < 0.1
    assert float(seen(top).min()) > 0.8  # of 1
    assert float(top.min()) >= 0
    assert float(top.max()) <= 1


def test_one_step_matches_adam():
    """Adam's first step is the learning rate along the sign of the gradient."""
    start = PIXELS.init(KEYS[0], 6)
    result = visualize(
        seen, KEYS[:1], size=6, parametrization=PIXELS, transforms=NO_TRANSFORMS, num_steps=1,
        learning_rate=0.25,
    )  # fmt: skip
    sign = np.where(np.arange(6) < 3, 1, -1)[:, None]
    np.testing.assert_allclose(result[0], jax.nn.sigmoid(start + 0.25 * sign), rtol=0, atol=1e-6)


def adam_plainly(params, objective, tv_weight, steps, rate):
    """Kingma and Ba, Algorithm 1, in float64."""
    mean = square = np.zeros_like(params, np.float64)
    gradient = jax.grad(
        lambda x: (tv_weight * total_variation(jax.nn.sigmoid(x)) - objective(jax.nn.sigmoid(x)))[0]
    )
    params = np.asarray(params, np.float64)
    for t in range(1, steps + 1):
        g = np.asarray(gradient(jnp.asarray(params, jnp.float32)), np.float64)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        params -= rate * (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
    return 1 / (1 + np.exp(-params))


def test_many_steps_match_adam():
    def smooth(images):
        return -jnp.square(images - 0.8).sum((1, 2, 3))

    options = {
        "parametrization": PIXELS,
        "transforms": NO_TRANSFORMS,
        "num_steps": 12,
        "tv_weight": 0.01,
    }
    result = visualize(smooth, KEYS[:1], size=5, learning_rate=0.1, **options)
    plain = adam_plainly(PIXELS.init(KEYS[0], 5)[None], smooth, 0.01, 12, 0.1)
    np.testing.assert_allclose(result, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("parametrization", [FOURIER, PIXELS], ids=["fourier", "pixels"])
def test_the_total_variation_weight_smooths_the_image(parametrization, relu_twin):
    objective = class_score(relu_twin.logits, np.array([1, 1]))
    pictures = visualize(
        objective, jnp.stack([KEYS[0]] * 2), size=24, parametrization=parametrization,
        num_steps=40, tv_weight=jnp.array([0, 1e-3]),
    )  # fmt: skip
    rough, smooth = total_variation(pictures)
    assert float(smooth) < 0.8 * float(rough)


def test_an_image_depends_on_its_key_alone(relu_twin):
    def ideal(keys, labels):
        return visualize(class_score(relu_twin.logits, labels), keys, size=17, num_steps=5)

    labels = np.array([2, 4])
    compiled = jax.jit(ideal)
    both = compiled(KEYS, labels)
    np.testing.assert_array_equal(both, compiled(KEYS, labels))
    np.testing.assert_allclose(ideal(KEYS, labels), both, rtol=0, atol=1e-5)
    alone = compiled(KEYS[1:], labels[1:])
    np.testing.assert_allclose(alone[0], both[1], rtol=0, atol=1e-5)
    assert np.abs(both[0] - compiled(KEYS[::-1], labels)[0]).max() > 1e-2


def test_a_constant_objective_gives_a_finite_image():
    pictures = visualize(lambda x: jnp.zeros(len(x)), KEYS, size=9, num_steps=3)
    start = jax.vmap(lambda key: FOURIER.image(FOURIER.init(key, 9), 9))(KEYS)
    np.testing.assert_allclose(pictures, start, rtol=0, atol=1e-6)


def test_channels_are_visualized_like_classes(relu_twin):
    channels = np.array([1, 6])
    objective = class_score(channel_mean(relu_twin.features), channels)
    images = jnp.asarray(relu_twin.images[:2])
    maps = relu_twin.features(images)
    np.testing.assert_allclose(
        objective(images), [maps[0, ..., 1].mean(), maps[1, ..., 6].mean()], rtol=1e-5
    )
    draw = partial(visualize, objective, KEYS, size=24, transforms=NO_TRANSFORMS, num_steps=60)
    before, after = (objective(draw(learning_rate=rate)) for rate in (0.0, 0.1))
    assert (np.asarray(after) > 1.3 * np.asarray(before)).all()
