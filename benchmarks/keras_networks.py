"""Backbones that keras.applications lacks, as one writes them in Keras; random weights."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import keras
from keras import layers


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


BUILDERS: dict[str, Callable[[int], keras.Model]] = {
    "resnet18": resnet18,
    "efficientnet_lite0": efficientnet_lite0,
}
