"""Attacks on tljax's networks, for any preprocessing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import lax
from jax.tree_util import Partial
from victims import CLASSES, images

from tljax.attack import fgsm, pgd
from tljax.models import apply, normalize
from tljax.runtime.preprocess import Preprocess

KEY = jax.random.key(0)
PREPROCESSES = {
    "mean and std": Preprocess(),
    "[-1, 1]": Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "caffe": Preprocess(
        mean=(0.485, 0.458, 0.408), std=(1 / 255, 1 / 255, 1 / 255), channel_order="bgr"
    ),
}


def network_behind(preprocess: Preprocess):
    """Return a network that computes the same function of the pixels for every preprocessing."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(0, 0.3, (3, 3, 3, 8))
    head = rng.normal(0, 0.2, (8 * 8 * 8, CLASSES)).astype("f")
    bias = (kernel * np.array(preprocess.mean)[:, None]).sum((0, 1, 2))
    kernel *= np.array(preprocess.std)[:, None]
    if preprocess.channel_order == "bgr":
        kernel = kernel[:, :, ::-1]
    kernel, bias = kernel.astype("f"), bias.astype("f")

    def logits_fn(images):
        x = lax.conv_general_dilated(
            normalize(images, preprocess), kernel, (1, 1), "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return jnp.tanh(x + bias).reshape(len(x), -1) @ head

    return jax.jit(logits_fn)


@pytest.mark.parametrize(
    "attack", [fgsm, pytest.param(partial(pgd, num_steps=5, norm="l2"), marks=pytest.mark.slow)]
)
def test_adversarial_images_do_not_depend_on_the_preprocessing(attack):
    x = images(4)
    networks = [network_behind(preprocess) for preprocess in PREPROCESSES.values()]
    labels = np.asarray(networks[0](x).argmax(-1))
    expected, *others = (attack(net, x, labels, KEY, epsilon=8 / 255) for net in networks)
    assert np.abs(np.asarray(expected) - x).max() > 1 / 255
    for result in others:
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


traces = []


def logits_of(variables, images):
    traces.append(images.shape)
    return forward(variables, images)


@jax.jit
def forward(variables, images):
    return apply(tiny.MODEL, variables, images).logits


def test_weights_are_arguments_of_the_program_and_stay_unchanged():
    variables = tiny.random_variables()
    before = jax.tree.map(np.copy, variables)
    x = np.random.default_rng(0).uniform(0, 1, (4, 16, 16, 3)).astype("f")
    labels = np.asarray(logits_of(variables, x).argmax(-1))
    attack = partial(pgd, num_steps=3)
    network = Partial(logits_of, variables)
    result = attack(network, x, labels, KEY, epsilon=0.1)
    jax.tree.map(np.testing.assert_array_equal, variables, before)

    # Weights as constants give the same image; other weights use the same program.
    closed = attack(lambda images: logits_of(variables, images), x, labels, KEY, epsilon=0.1)
    np.testing.assert_allclose(closed, result, rtol=0, atol=1e-6)
    others = jax.tree.map(lambda leaf: leaf * np.float32(1.1), variables)
    count = len(traces)
    another = attack(Partial(logits_of, others), x, labels, KEY, epsilon=0.1)
    assert len(traces) == count
    assert np.abs(np.asarray(another - result)).max() > 1e-3
