import captum.attr
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tljax.explain import (
    class_score,
    input_gradient,
    integrated_gradients,
    saliency,
    smooth_grad,
)
from tljax.runtime.errors import RequestError

KEY = jax.random.key(0)


def of_torch(value: torch.Tensor) -> np.ndarray:
    return value.permute(0, 2, 3, 1).detach().numpy()


def assert_close(actual, expected, scale: float = 1e-5) -> None:
    """Compare up to a fraction of the largest value, which must not be near 0."""
    expected = np.asarray(expected)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(actual, expected, rtol=0, atol=scale * np.abs(expected).max())


def constant(images):
    return jnp.zeros((len(images), 5)) + jnp.arange(5.0)


def methods(logits_fn):
    return {
        "saliency": lambda x, y: saliency(logits_fn, x, y),
        "smooth_grad": lambda x, y: smooth_grad(logits_fn, x, y, KEY, num_samples=4),
        "integrated_gradients": lambda x, y: integrated_gradients(logits_fn, x, y),
    }


METHODS = tuple(methods(constant))


def test_the_torch_and_jax_networks_agree(relu_twin, smooth_twin):
    for twin in (relu_twin, smooth_twin):
        expected = twin.network(twin.nchw).detach().numpy()
        assert_close(twin.logits(twin.images), expected, 1e-6)


@pytest.mark.parametrize("kind", ["relu_twin", "smooth_twin"])
def test_saliency_matches_captum(kind, request):
    twin = request.getfixturevalue(kind)
    target = torch.from_numpy(twin.labels)
    expected = captum.attr.Saliency(twin.network).attribute(
        twin.nchw.requires_grad_(), target, abs=False
    )
    assert_close(input_gradient(twin.logits, twin.images, twin.labels), of_torch(expected))
    actual = saliency(twin.logits, twin.images, twin.labels)
    assert_close(actual, np.abs(of_torch(expected)).max(-1))


@pytest.mark.parametrize("kind", ["relu_twin", "smooth_twin"])
@pytest.mark.parametrize("baseline", [0.0, 0.4])
def test_integrated_gradients_match_captum(kind, baseline, request):
    twin = request.getfixturevalue(kind)
    expected = captum.attr.IntegratedGradients(twin.network).attribute(
        twin.nchw, baseline, torch.from_numpy(twin.labels)
    )
    actual = integrated_gradients(twin.logits, twin.images, twin.labels, baselines=baseline)
    assert_close(actual, of_torch(expected))


def test_integrated_gradients_sum_to_the_difference_of_the_logits(smooth_twin):
    twin = smooth_twin
    baselines = np.random.default_rng(3).uniform(0, 0.4, twin.images.shape).astype(np.float32)
    score = class_score(twin.logits, twin.labels)
    difference = score(twin.images) - score(baselines)
    assert float(jnp.abs(difference).min()) > 1e-3
    shares = integrated_gradients(twin.logits, twin.images, twin.labels, baselines=baselines)
    np.testing.assert_allclose(shares.sum((1, 2, 3)), difference, rtol=0, atol=1e-5)
    coarse = integrated_gradients(
        twin.logits, twin.images, twin.labels, baselines=baselines, num_steps=1
    )
    assert np.abs(coarse.sum((1, 2, 3)) - difference).max() > 5e-5  # one point is inaccurate


def test_integrated_gradients_match_the_closed_form_of_a_linear_model(linear):
    logits_fn, weights = linear
    rng = np.random.default_rng(1)
    images, baselines = rng.uniform(0, 1, (2, 3, 13, 18, 3)).astype(np.float32)
    labels = np.array([4, 0, 2])
    weight = np.moveaxis(weights[..., labels], -1, 0)
    actual = integrated_gradients(logits_fn, images, labels, baselines=baselines)
    np.testing.assert_allclose(actual, weight * (images - baselines), rtol=0, atol=1e-6)
    np.testing.assert_allclose(input_gradient(logits_fn, images, labels), weight, atol=1e-6)


def test_smooth_grad_without_noise_equals_saliency(relu_twin):
    twin = relu_twin
    actual = smooth_grad(twin.logits, twin.images, twin.labels, KEY, noise_level=0, num_samples=3)
    assert_close(actual, saliency(twin.logits, twin.images, twin.labels), 1e-6)


def test_smooth_grad_averages_over_noise_scaled_to_each_image(smooth_twin):
    """The gradient of x^2 is linear, so noise changes it by twice the mean noise."""
    images = jnp.concatenate([jnp.zeros((1, 8, 9, 3)).at[:, 0].set(0.5), jnp.ones((1, 8, 9, 3))])

    def logits_fn(x):
        return jnp.stack([jnp.square(x).sum((1, 2, 3))] * 2, axis=1)

    labels = jnp.zeros(2, int)

    def noise(num_samples, key=KEY):
        # The first image has gradients 0 and 1; the second has range 0, so no noise.
        result = smooth_grad(
            logits_fn, images, labels, key, noise_level=0.2, num_samples=num_samples
        )
        np.testing.assert_allclose(result[1], 2.0, rtol=1e-6)
        return np.asarray(result[0, 1:]), np.asarray(result[0, 0])

    few, lit = noise(1)
    many, _ = noise(400)
    # The maximum of three absolute values of N(0, (2 * 0.2 * 0.5)^2) has mean 1.326 * 0.2.
    assert 0.22 < few.mean() < 0.32
    assert 0.7 * few.mean() < 20 * many.mean() < 1.4 * few.mean()
    assert abs(lit.mean() - 1) < 0.5
    assert not np.array_equal(noise(1, jax.random.key(1))[0], few)


@pytest.mark.parametrize("method", METHODS)
def test_maps_depend_neither_on_the_batch_nor_on_jit(method, relu_twin):
    explain = methods(relu_twin.logits)[method]
    plain = explain(relu_twin.images, relu_twin.labels)
    compiled = jax.jit(explain)
    assert_close(compiled(relu_twin.images, relu_twin.labels), plain, 1e-6)
    np.testing.assert_array_equal(
        compiled(relu_twin.images, relu_twin.labels), compiled(relu_twin.images, relu_twin.labels)
    )
    for i in (0, 2):
        alone = compiled(relu_twin.images[i : i + 1], relu_twin.labels[i : i + 1])
        assert_close(alone, plain[i : i + 1], 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_maps_of_a_constant_model_are_zero(method):
    images = np.random.default_rng(0).uniform(0, 1, (2, 6, 5, 3)).astype(np.float32)
    result = methods(constant)[method](images, np.array([0, 4]))
    np.testing.assert_array_equal(result, np.zeros_like(result))


@pytest.mark.parametrize("method", METHODS)
def test_invalid_images_and_labels_are_rejected(method, relu_twin):
    explain = methods(relu_twin.logits)[method]
    with pytest.raises(RequestError, match="uint8; pass floating point"):
        explain(np.zeros((4, 13, 18, 3), np.uint8), relu_twin.labels)
    with pytest.raises(RequestError, match=r"labels have shape \(3,\) for 4 images"):
        explain(relu_twin.images, relu_twin.labels[:3])
