"""Networks in plain Flax, as its users write them, with random weights, as a reference."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from tljax.models import Model, efficientnet, mobilenet, normalize
from tljax.models.depthwise import Run


class Unit(nn.Module):
    """A convolution, batch norm, and ReLU6 if ``active``."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    active: bool = True
    running: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[b, h, w, c]`` to ``[b, h/stride, w/stride, features]``."""
        size, strides = (self.kernel_size,) * 2, (self.stride,) * 2
        x = nn.Conv(self.features, size, strides, feature_group_count=self.groups, use_bias=False)(
            x
        )
        x = nn.BatchNorm(use_running_average=self.running, epsilon=1e-3)(x)
        return nn.relu6(x) if self.active else x


class Network(nn.Module):
    """Inverted residuals between a stem and a linear head."""

    runs: tuple[Run, ...]
    num_classes: int
    running: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[b, h, w, 3]`` to logits ``[b, num_classes]``."""
        unit = partial(Unit, running=self.running)
        x = unit(32, 3, 2)(x)
        for run in self.runs:
            for i, expansion in enumerate(run.expansions):
                width = int(x.shape[-1] * expansion)
                y = unit(width)(x) if expansion > 1 else x
                y = unit(width, run.kernel_size, 1 if i else run.stride, groups=width)(y)
                y = unit(run.features, active=False)(y)
                x = x + y if i else y
        return nn.Dense(self.num_classes)(unit(1280)(x).mean((1, 2)))


class ResNet(nn.Module):
    """ResNet-50 with strides in the 3x3 convolutions; source: He et al. 2015, arXiv 1512.03385."""

    num_classes: int
    running: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[b, h, w, 3]`` to logits ``[b, num_classes]``."""
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=self.running, epsilon=1e-5)
        x = nn.relu(norm()(conv(64, (7, 7), (2, 2), padding=[(3, 3), (3, 3)])(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, depth in enumerate((3, 4, 6, 3)):
            width = 64 * 2**stage
            for block in range(depth):
                strides = (2, 2) if stage and not block else (1, 1)
                y = nn.relu(norm()(conv(width, (1, 1))(x)))
                y = nn.relu(norm()(conv(width, (3, 3), strides)(y)))
                y = norm()(conv(4 * width, (1, 1))(y))
                x = x if block else norm()(conv(4 * width, (1, 1), strides)(x))
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    """ConvNeXt-T; source: Liu et al., 2022 (arXiv 2201.03545)."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[b, h, w, 3]`` to logits ``[b, num_classes]``."""
        x = nn.LayerNorm(1e-6)(nn.Conv(96, (4, 4), (4, 4))(x))
        for stage, depth in enumerate((3, 3, 9, 3)):
            width = 96 * 2**stage
            if stage:
                x = nn.Conv(width, (2, 2), (2, 2))(nn.LayerNorm(1e-6)(x))
            for block in range(depth):
                y = nn.Conv(width, (7, 7), feature_group_count=width)(x)
                y = nn.Dense(4 * width)(nn.LayerNorm(1e-6)(y))
                y = nn.Dense(width)(nn.gelu(y, approximate=False))
                scale = self.param(
                    f"scale{stage}_{block}", nn.initializers.constant(1e-6), (width,)
                )
                x = x + scale * y
        return nn.Dense(self.num_classes)(nn.LayerNorm(1e-6)(x.mean((1, 2))))


class VisionTransformer(nn.Module):
    """ViT-S/16; source: Dosovitskiy et al., 2021 (arXiv 2010.11929)."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[b, h, w, 3]`` to logits ``[b, num_classes]``."""
        x = nn.Conv(384, (16, 16), (16, 16))(x).reshape(len(x), -1, 384)
        first = self.param("class", nn.initializers.zeros, (1, 1, 384))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, 384)), x], 1)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for _ in range(12):
            y = nn.LayerNorm(1e-6)(x)
            x = x + nn.MultiHeadDotProductAttention(6)(y, y)
            y = nn.gelu(nn.Dense(1536)(nn.LayerNorm(1e-6)(x)), approximate=False)
            x = x + nn.Dense(384)(y)
        return nn.Dense(self.num_classes)(nn.LayerNorm(1e-6)(x)[:, 0])


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "efficientnet_lite0": partial(Network, efficientnet.runs("efficientnet_lite0")),
    "tf_mobilenetv2_100": partial(Network, mobilenet.V2),
    "resnet50": ResNet,
    "convnext_tiny": ConvNeXt,
    "vit_small_patch16_224": VisionTransformer,
}


def in_flax(
    model: Model, images: np.ndarray, labels: np.ndarray
) -> tuple[Callable[[], jax.Array], Callable[[], jax.Array]]:
    """Return a forward pass, and a step of SGD with momentum that trains all parameters."""
    if model.name not in NETWORKS:
        raise SystemExit(
            f"--flax: no plain Flax network of {model.name}: use one of {', '.join(NETWORKS)}"
        )
    network = NETWORKS[model.name](model.num_classes)
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
