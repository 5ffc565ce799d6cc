"""Networks of depthwise convolutions in plain Flax, with random weights, as a reference."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

from tljax.models import Model, efficientnet, mobilenet, normalize
from tljax.models.depthwise import Run

RUNS: dict[str, tuple[Run, ...]] = {
    "efficientnet_lite0": efficientnet.runs("efficientnet_lite0"),
    "tf_mobilenetv2_100": mobilenet.V2,
}


class Unit(nn.Module):
    """A convolution, batch norm with running statistics, and ReLU6 if ``active``."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    active: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features]``."""
        size, strides = (self.kernel_size,) * 2, (self.stride,) * 2
        x = nn.Conv(self.features, size, strides, feature_group_count=self.groups, use_bias=False)(
            x
        )
        x = nn.BatchNorm(use_running_average=True, epsilon=1e-3)(x)
        return nn.relu6(x) if self.active else x


class Network(nn.Module):
    """Inverted residuals between a stem and a linear head."""

    runs: tuple[Run, ...]
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[b, h, w, 3]`` to logits ``[b, num_classes]``."""
        x = Unit(32, 3, 2)(x)
        for run in self.runs:
            for i, expansion in enumerate(run.expansions):
                width = int(x.shape[-1] * expansion)
                y = Unit(width)(x) if expansion > 1 else x
                y = Unit(width, run.kernel_size, 1 if i else run.stride, groups=width)(y)
                y = Unit(run.features, active=False)(y)
                x = x + y if i else y
        return nn.Dense(self.num_classes)(Unit(1280)(x).mean((1, 2)))


def in_flax(
    model: Model, images: np.ndarray, labels: np.ndarray
) -> tuple[Callable[[], jax.Array], Callable[[], jax.Array]]:
    """Return a forward pass, and a step of SGD with momentum that trains all parameters."""
    if model.name not in RUNS:
        raise SystemExit(
            f"--flax: no plain Flax network of {model.name}: use one of {', '.join(RUNS)}"
        )
    network = Network(RUNS[model.name], model.num_classes)
    x, y = jax.device_put((images, labels))
    variables: Any = jax.jit(network.init)(jax.random.key(0), x[:1])
    optimizer = optax.sgd(1e-6, momentum=0.9)

    @jax.jit
    def forward(variables: Any) -> jax.Array:
        return network.apply(variables, normalize(x, model.preprocess))  # pyright: ignore[reportReturnType]

    @jax.jit
    def step(variables: Any, state: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = forward({**variables, "params": params})
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(variables["params"]), state)
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, "params": params}, state

    state = variables, optimizer.init(variables["params"])

    def call() -> jax.Array:
        nonlocal state
        state = step(*state)
        return state

    return lambda: forward(variables), call
