"""Networks with proven or published robustness, as functions, and their images."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from safetensors.numpy import load_file

CIFAR_MEAN = np.array([125.3, 123.0, 113.9], np.float32) / 255
CIFAR_STD = np.array([63.0, 62.1, 66.7], np.float32) / 255


class Robust(NamedTuple):
    """Robustness of a network on 200 images, in the L-infinity norm.

    Attributes:
        data: name of the images.
        epsilon: radius of the attacks.
        clean: number of correctly classified images.
        proven: proven lower bound of the number of images that stay correct under any attack.
        known: number of images that stay correct under the best known attack.
    """

    data: str
    epsilon: float
    clean: int
    proven: int
    known: int


# Wang et al., "Beta-CROWN", 2021 (arXiv 2103.06624): the SDP benchmark.
PROVEN = {
    "mnist_cnn_a_adv": Robust("mnist_200", 0.3, 195, 152, 153),
    "cifar_cnn_a_adv": Robust("cifar_200", 2 / 255, 140, 97, 100),
    "cifar_cnn_a_mix": Robust("cifar_200", 2 / 255, 158, 96, 106),
}
TRADES = "trades_mnist_smallcnn"


def load_examples(name: str, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Load images ``[n, height, width, channels]`` in [0, 1] and labels ``[n]``."""
    with np.load(_path(f"{name}.npz")) as file:
        images, labels = file["images"][:count], file["labels"][:count]
    if images.dtype == np.uint8:
        images = images / np.float32(255)
    return images, labels.astype(np.int32)


def load_weights(name: str) -> dict[str, np.ndarray]:
    """Load weights by their torch names, in torch's layouts."""
    return load_file(_path(f"{name}.safetensors"))


def _path(file: str) -> Path:
    path = Path(__file__).resolve().parents[2] / "shared" / "robust" / file
    if not path.is_file():
        pytest.skip("needs the networks of ../shared/robust, which are not part of the repository")
    return path


@cache
def load_network(name: str) -> Partial:
    """Return a function from images ``[n, height, width, channels]`` to logits ``[n, 10]``."""
    return Partial(_trades if name == TRADES else _cnn_a, load_weights(name))


@jax.jit
def _cnn_a(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    x = (images - CIFAR_MEAN) / CIFAR_STD if images.shape[-1] == 3 else images
    for name in ("0", "2"):
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = jax.nn.relu(_convolution(weights, name, x, stride=2))
    x = jax.nn.relu(_linear(weights, "5", _flatten(x)))
    return _linear(weights, "7", x)


@jax.jit
def _trades(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    x = images
    for number in (1, 2, 3, 4):
        x = jax.nn.relu(_convolution(weights, f"feature_extractor.conv{number}", x))
        if number in (2, 4):
            n, height, width, channels = x.shape
            x = x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))
    x = _flatten(x)
    for number in (1, 2):
        x = jax.nn.relu(_linear(weights, f"classifier.fc{number}", x))
    return _linear(weights, "classifier.fc3", x)


def _convolution(weights, name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    """Convolve by a matrix product, because XLA is slow at convolutions in loops on CPUs."""
    kernel = weights[f"{name}.weight"]
    size = kernel.shape[-1]
    height, width = (side - size + 1 for side in x.shape[1:3])
    patches = [
        x[:, i : i + height : stride, j : j + width : stride]
        for i in range(size)
        for j in range(size)
    ]
    kernel = kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))
    return jnp.concatenate(patches, axis=-1) @ kernel + weights[f"{name}.bias"]


def _flatten(x: jax.Array) -> jax.Array:
    """Flatten in the order of torch: channels, then pixels."""
    return jnp.moveaxis(x, -1, 1).reshape(len(x), -1)


def _linear(weights, name: str, x: jax.Array) -> jax.Array:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
