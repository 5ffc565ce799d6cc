from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax.explain import deep_dream, mean_square
from tljax.runtime.errors import RequestError

pytestmark = pytest.mark.slow

IMAGES = np.random.default_rng(0).uniform(0.2, 0.8, (2, 20, 31, 3)).astype(np.float32)


def test_dreaming_increases_the_objective_within_the_bounds(relu_twin):
    objective = mean_square(relu_twin.features)
    maps = relu_twin.features(IMAGES)
    np.testing.assert_allclose(objective(IMAGES), (maps**2).mean((1, 2, 3)), rtol=1e-6)
    dream = deep_dream(objective, IMAGES, num_octaves=2, num_steps=5)
    assert dream.shape == IMAGES.shape
    assert (np.asarray(objective(dream)) > 1.1 * np.asarray(objective(IMAGES))).all()
    assert float(dream.min()) >= 0
    assert float(dream.max()) <= 1


def test_without_steps_the_image_is_restored(relu_twin):
    dream = deep_dream(mean_square(relu_twin.features), IMAGES, num_octaves=4, num_steps=0)
    np.testing.assert_allclose(dream, IMAGES, rtol=0, atol=1e-5)


def test_the_mean_change_of_a_step_is_the_step_size():
    objective = lambda x: jnp.square(x).sum((1, 2, 3))  # noqa: E731
    dream = deep_dream(objective, IMAGES, num_octaves=1, num_steps=1, step_size=0.01)
    change = np.asarray(dream) - IMAGES
    np.testing.assert_allclose(np.abs(change).mean((1, 2, 3)), 0.01, rtol=1e-4)
    np.testing.assert_allclose(
        change, 0.01 * IMAGES / IMAGES.mean((1, 2, 3), keepdims=True), rtol=0, atol=1e-6
    )


def test_sizes_grow_by_the_octave_scale(relu_twin):
    sizes = []

    def objective(x):
        sizes.append(x.shape[1:3])
        return mean_square(relu_twin.features)(x)

    deep_dream(objective, IMAGES, num_steps=1)
    assert sorted(set(sizes)) == [(10, 15), (14, 22), (20, 31)]
    sizes.clear()
    deep_dream(objective, IMAGES, num_steps=1, multiple=4)
    assert sorted(set(sizes)) == [(8, 12), (12, 20), (20, 31)]


def test_the_result_depends_neither_on_the_batch_nor_on_jit(relu_twin):
    dreamt = partial(deep_dream, mean_square(relu_twin.features), num_octaves=2, num_steps=3)
    dream = jax.jit(dreamt)
    both = dream(IMAGES)
    plain = dreamt(IMAGES)
    np.testing.assert_allclose(plain, both, rtol=0, atol=1e-5)
    np.testing.assert_allclose(dream(IMAGES[1:])[0], both[1], rtol=0, atol=1e-5)


def test_a_zero_gradient_leaves_the_image_unchanged(relu_twin):
    dream = deep_dream(lambda x: jnp.ones(len(x)), IMAGES, num_steps=2)
    np.testing.assert_allclose(dream, IMAGES, rtol=0, atol=1e-5)


@pytest.mark.parametrize("octaves", [0, 20])
def test_impossible_numbers_of_octaves_are_rejected(octaves):
    with pytest.raises(
        RequestError, match=f"{octaves} octaves of scale 1.4 are impossible for 20 x 31"
    ):
        deep_dream(lambda x: x.sum((1, 2, 3)), IMAGES, num_octaves=octaves)
