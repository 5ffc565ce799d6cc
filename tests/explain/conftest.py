"""The same small network in torch, for captum, and in JAX, with odd, non-square images."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

CLASSES = 5


class Twin(NamedTuple):
    network: nn.Module
    """Torch: ``features`` and ``head``."""
    features: object
    """``[b, h, w, 3] -> [b, h', w', 8]``, in JAX."""
    head: object
    """``[b, h', w', 8] -> [b, 5]``, in JAX."""
    images: np.ndarray
    """``[4, 13, 18, 3]`` float32 in [0, 1]."""
    labels: np.ndarray
    """``[4]``."""

    def logits(self, x):
        return self.head(self.features(x))

    @property
    def nchw(self) -> torch.Tensor:
        return torch.from_numpy(self.images).permute(0, 3, 1, 2)


class Network(nn.Module):
    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            activation(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            activation(),
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


def make_twin(activation: str) -> Twin:
    torch.manual_seed(1)
    in_torch, in_jax = {
        "relu": (nn.ReLU, jax.nn.relu),
        "softplus": (nn.Softplus, jax.nn.softplus),
    }[activation]
    network = Network(in_torch).eval()
    with torch.no_grad():
        network.head.weight *= 10
    state = {name: jnp.asarray(value.numpy()) for name, value in network.state_dict().items()}

    def conv(x, name, stride):
        kernel = state[f"features.{name}.weight"].transpose(2, 3, 1, 0)
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return in_jax(x + state[f"features.{name}.bias"])

    def features(x):
        return conv(conv(x, "0", 1), "2", 2)

    def head(x):
        return x.mean((1, 2)) @ state["head.weight"].T + state["head.bias"]

    rng = np.random.default_rng(0)
    images = rng.uniform(0, 1, (4, 13, 18, 3)).astype(np.float32)
    return Twin(network, features, head, images, np.array([0, 3, 3, 4]))


@pytest.fixture(scope="package", autouse=True)
def quick_compilation():
    """Disable optimizations, which take long to compile and do not help small networks."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def relu_twin() -> Twin:
    return make_twin("relu")


@pytest.fixture(scope="session")
def smooth_twin() -> Twin:
    return make_twin("softplus")


@pytest.fixture(scope="session")
def linear():
    """(logits_fn, weights ``[13, 18, 3, 5]``): no bias, so that closed forms are exact."""
    weights = np.random.default_rng(2).normal(0, 1, (13, 18, 3, CLASSES)).astype(np.float32)
    return lambda x: jnp.einsum("bhwc,hwck->bk", x, weights), weights
