"""Networks in Keras on JAX, with random weights, as a reference."""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

os.environ["KERAS_BACKEND"] = "jax"  # read when keras is imported

import keras
import numpy as np
from keras import layers

from tljax.models import Model, build_model
from tljax.runtime.preprocess import Preprocess


def resnet18(size: int) -> keras.Model:
    """Build a ResNet-18 without head (He et al. 2015)."""

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
    """Build an EfficientNet-Lite0 without head: no squeeze-and-excitation, ReLU6."""

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
    """Return a function that builds a backbone of keras.applications."""
    build = getattr(keras.applications, name)
    return lambda size: build(include_top=False, weights=None, input_shape=(size, size, 3))


BUILDERS: dict[str, Callable[[int], keras.Model]] = {
    "resnet18": resnet18,
    "resnet50": application("ResNet50"),
    "tf_mobilenetv2_100": application("MobileNetV2"),
    "efficientnet_lite0": efficientnet_lite0,
}


def classifier(name: str, preprocess: Preprocess, num_classes: int) -> keras.Model:
    """Build a classifier of images in [0, 1], with running batch-norm statistics."""
    base = BUILDERS[name](preprocess.size)
    inputs = keras.Input((preprocess.size, preprocess.size, 3))
    variance = [std**2 for std in preprocess.std]
    x = layers.Normalization(mean=preprocess.mean, variance=variance)(inputs)
    x = layers.GlobalAveragePooling2D()(base(x, training=False))
    return keras.Model(inputs, layers.Dense(num_classes)(x))


def compiled(network: keras.Model, optimizer: keras.Optimizer) -> keras.Model:
    """Compile a classifier with its loss."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(optimizer, loss, metrics=["accuracy"])
    return network


def in_its_own_process(
    question: Literal["forward", "step"], model: Model, batch_size: int
) -> Callable[[], str]:
    """Return a function that processes a batch in a process without the flags of tljax.configure.

    Args:
        question: ``forward``, or ``step`` for SGD with momentum that trains all parameters.
        model: one of `BUILDERS`.
        batch_size: images per batch.
    """
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    numbers = model.preprocess.size, model.num_classes, batch_size
    arguments = [__file__, question, model.name, *map(str, numbers)]
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    requests, answers = process.stdin, process.stdout
    assert requests is not None
    assert answers is not None

    def call() -> str:
        print("run", file=requests, flush=True)
        if not (answer := answers.readline()):
            raise SystemExit("the process of Keras has ended: see its error above")
        return answer

    return call


def serve(question: str, name: str, size: int, num_classes: int, batch_size: int) -> None:
    """Process a batch for every line on stdin, and print a line when it is done."""
    preprocess = build_model(name).preprocess.with_size(size)
    network = classifier(name, preprocess, num_classes)
    network = compiled(network, keras.optimizers.SGD(1e-6, momentum=0.9))
    rng = np.random.default_rng(0)
    images = rng.random((batch_size, size, size, 3), np.float32)
    labels = rng.integers(0, num_classes, batch_size)
    for _ in sys.stdin:
        if question == "forward":
            network.predict_on_batch(images)
        else:
            network.train_on_batch(images, labels)
        print("done", flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
