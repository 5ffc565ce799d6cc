import captum.attr
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tljax.explain import grad_cam, occlusion
from tljax.runtime.errors import RequestError


def test_grad_cam_matches_captum(relu_twin):
    twin = relu_twin
    expected = captum.attr.LayerGradCam(twin.network, twin.network.features).attribute(
        twin.nchw, torch.from_numpy(twin.labels), relu_attributions=True
    )
    expected = expected[:, 0].detach().numpy()
    assert expected.max() > 1e-2
    assert (expected == 0).any()
    actual = grad_cam(twin.features, twin.head, twin.images, twin.labels)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.max())


def test_grad_cam_is_zero_without_positive_evidence(relu_twin):
    actual = grad_cam(
        relu_twin.features, lambda x: -x.sum((1, 2)), relu_twin.images, relu_twin.labels
    )
    np.testing.assert_array_equal(actual, np.zeros_like(actual))
    dead = grad_cam(
        lambda x: 0 * relu_twin.features(x), relu_twin.head, relu_twin.images, relu_twin.labels
    )
    np.testing.assert_array_equal(dead, np.zeros_like(dead))


def occlude_plainly(logits_fn, image, label, window, stride, fill):
    """Cover one square at a time, in numpy."""
    height, width, _ = image.shape
    before = logits_fn(image[None])[0, label]
    total, count = np.zeros((2, height, width))
    top = 0
    while True:
        left = 0
        while True:
            covered = image.copy()
            covered[top : top + window, left : left + window] = fill
            decrease = before - logits_fn(covered[None])[0, label]
            total[top : top + window, left : left + window] += decrease
            count[top : top + window, left : left + window] += 1
            if left + window >= width:
                break
            left += stride
        if top + window >= height:
            break
        top += stride
    assert count.min() >= 1
    return total / count


@pytest.mark.parametrize(
    ("window", "stride", "fill"),
    [(4, 4, 0.5), (5, 3, (0.1, 0.5, 0.9)), (13, 2, 0.0), (40, 7, 1.0)],
)
def test_occlusion_matches_a_plain_loop(window, stride, fill, relu_twin):
    twin, fill = relu_twin, np.asarray(fill, np.float32)
    actual = occlusion(
        twin.logits, twin.images, twin.labels, window=window, stride=stride, fill=fill
    )
    logits_fn = jax.jit(twin.logits)
    for i in (0, 3):
        plain = occlude_plainly(logits_fn, twin.images[i], twin.labels[i], window, stride, fill)
        assert np.abs(plain).max() > 1e-3
        np.testing.assert_allclose(actual[i], plain, rtol=0, atol=1e-5)


def test_occlusion_matches_captum(relu_twin):
    twin = relu_twin
    expected = captum.attr.Occlusion(twin.network).attribute(
        twin.nchw, (3, 5, 5), (3, 3, 3), 0.5, torch.from_numpy(twin.labels)
    )
    actual = occlusion(twin.logits, twin.images, twin.labels, window=5, stride=3)
    np.testing.assert_allclose(actual, expected[:, 0].detach().numpy(), rtol=0, atol=1e-5)


def methods(twin):
    return {
        "grad_cam": lambda x, y: grad_cam(twin.features, twin.head, x, y),
        "occlusion": lambda x, y: occlusion(twin.logits, x, y, window=5, stride=3),
    }


@pytest.mark.parametrize("method", ["grad_cam", "occlusion"])
def test_maps_depend_neither_on_the_batch_nor_on_jit(method, relu_twin):
    explain = methods(relu_twin)[method]
    plain = np.asarray(explain(relu_twin.images, relu_twin.labels))
    # Occlusion is a difference of logits, with their rounding errors.
    scale = np.abs(relu_twin.logits(relu_twin.images)).max()
    close = {"rtol": 0, "atol": 1e-6 * (scale if method == "occlusion" else plain.max())}
    compiled = jax.jit(explain)
    np.testing.assert_allclose(compiled(relu_twin.images, relu_twin.labels), plain, **close)
    for i in (0, 2):
        alone = compiled(relu_twin.images[i : i + 1], relu_twin.labels[i : i + 1])
        np.testing.assert_allclose(alone[0], plain[i], **close)


def test_occlusion_of_a_constant_model_is_zero():
    images = np.full((2, 9, 9, 3), 0.3, np.float32)
    result = occlusion(
        lambda x: jnp.ones((len(x), 3)), images, np.array([0, 2]), window=4, stride=2
    )
    np.testing.assert_array_equal(result, np.zeros((2, 9, 9)))


def test_invalid_arguments_are_rejected(relu_twin):
    twin = relu_twin
    with pytest.raises(
        RequestError, match=r"not \(4, 8\): split the network before its global.*as_map for tokens"
    ):
        grad_cam(lambda x: twin.features(x).mean((1, 2)), lambda x: x, twin.images, twin.labels)
    for stride in (0, 6):
        with pytest.raises(RequestError, match=r"stride \d must lie between 1 and the window 5"):
            occlusion(twin.logits, twin.images, twin.labels, window=5, stride=stride)
    with pytest.raises(RequestError, match="images are uint8"):
        occlusion(twin.logits, (twin.images * 255).astype(np.uint8), twin.labels)
