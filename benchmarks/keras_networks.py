"""Our networks as one has them in Keras on JAX, some written out; random weights."""

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"  # it is read when keras is imported

import keras
from keras import layers

from tljax.types import Preprocess


def resnet18(size: int) -> keras.Model:
    """He et al., 2015."""

    def conv(x: Any, width: int, k: int, stride: int = 1) -> Any:
        x = layers.ZeroPadding2D(k // 2)(x)
        x = layers.Conv2D(width, k, stride, use_bias=False)(x)
        return layers.BatchNormalization()(x)

    x = inputs = keras.Input((size, size, 3))
    x = layers.ReLU()(conv(x, 64, 7, 2))
    x = layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1)(x))
    for stage in range(4):
        width = 64 * 2**stage
        for block in range(2):
            stride = 2 if stage and not block else 1
            y = layers.ReLU()(conv(x, width, 3, stride))
            y = conv(y, width, 3)
            shortcut = x if stride == 1 else conv(x, width, 1, 2)
            x = layers.ReLU()(layers.Add()([y, shortcut]))
    return keras.Model(inputs, x)


def efficientnet_lite0(size: int) -> keras.Model:
    """Google's EfficientNet-Lite: no squeeze-and-excitation, ReLU6."""

    def norm(x: Any, *, active: bool = True) -> Any:
        x = layers.BatchNormalization(epsilon=1e-3)(x)
        return layers.ReLU(6)(x) if active else x

    def conv(x: Any, width: int, k: int = 1, stride: int = 1, *, active: bool = True) -> Any:
        x = layers.Conv2D(width, k, stride, "same", use_bias=False)(x)
        return norm(x, active=active)

    x = inputs = keras.Input((size, size, 3))
    x = conv(x, 32, 3, 2)
    depths, widths = (1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)
    kernels, strides = (3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1)
    stages = zip(depths, pairwise((32, *widths)), kernels, strides, strict=True)
    for stage, (depth, (_, width), k, stride) in enumerate(stages):
        for block in range(depth):
            y = conv(x, 6 * x.shape[-1]) if stage else x
            y = layers.DepthwiseConv2D(k, 1 if block else stride, "same", use_bias=False)(y)
            y = conv(norm(y), width, active=False)
            x = layers.Add()([x, y]) if block else y
    return keras.Model(inputs, conv(x, 1280))


def application(name: str) -> Callable[[int], keras.Model]:
    """A backbone of keras.applications."""
    build = getattr(keras.applications, name)
    return lambda size: build(include_top=False, weights=None, input_shape=(size, size, 3))


BUILDERS: dict[str, Callable[[int], keras.Model]] = {
    "resnet18": resnet18,
    "resnet50": application("ResNet50"),
    "tf_mobilenetv2_100": application("MobileNetV2"),
    "efficientnet_lite0": efficientnet_lite0,
}


def classifier(name: str, preprocess: Preprocess, num_classes: int) -> keras.Model:
    """Images in [0, 1] to logits; batch norm on its running statistics."""
    base = BUILDERS[name](preprocess.size)
    inputs = keras.Input((preprocess.size, preprocess.size, 3))
    variance = [std**2 for std in preprocess.std]
    x = layers.Normalization(mean=preprocess.mean, variance=variance)(inputs)
    x = layers.GlobalAveragePooling2D()(base(x, training=False))
    return keras.Model(inputs, layers.Dense(num_classes)(x))


def compiled(network: keras.Model, optimizer: keras.Optimizer) -> keras.Model:
    """With the loss of a classifier."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(optimizer, loss, metrics=["accuracy"])
    return network
