"""Inception v3 (Szegedy et al. 2015, Rethinking the Inception Architecture, arXiv 1512.00567).

Versions of torchvision and of Keras, whose batch norms have no scale and whose average pools do not
count padding. In the blocks, strided layers are not padded and all other layers keep the size. The
auxiliary head, which is only used in training from scratch, is omitted.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from tljax.models.convolution import Kernel, avg_pool, max_pool
from tljax.models.layers import ConvNorm, Mode
from tljax.models.model import Model, Stage, pooled_classifier
from tljax.runtime.preprocess import INCEPTION_PREPROCESS


class Variant(NamedTuple):
    """Differences between the versions.

    Attributes:
        conv_norm: creates every convolution.
        count_padding: whether average pools count padding; see `avg_pool`.
    """

    conv_norm: Callable[..., ConvNorm]
    count_padding: bool


class Unit(NamedTuple):
    """Convolution with batch norm and ReLU, named as in torchvision."""

    name: str
    features: int
    kernel_size: Kernel = 1


Branch = tuple[tuple[Unit, ...], ...]
"""Consecutive steps; the outputs of the units of a step are concatenated."""


class Block(NamedTuple):
    """Parallel branches, whose outputs are concatenated; the last one begins with a pool.

    Attributes:
        branches: branches that begin with a convolution.
        pool: 1x1 convolution after the average pool. If it is empty, the block halves the
            resolution: the last convolution of every branch and a max pool have stride 2 and no
            padding.
    """

    branches: tuple[Branch, ...]
    pool: tuple[Unit, ...] = ()

    @property
    def units(self) -> tuple[Unit, ...]:
        """Return all convolutions, in order."""
        steps = (unit for branch in self.branches for step in branch for unit in step)
        return (*steps, *self.pool)


def _sequence(*units: Unit) -> Branch:
    return tuple((unit,) for unit in units)


def _grid35(pool: int) -> Block:
    """Return a block at stride 8, figure 5 of the paper."""
    return Block(
        (
            _sequence(Unit("branch1x1", 64)),
            _sequence(Unit("branch5x5_1", 48), Unit("branch5x5_2", 64, 5)),
            _sequence(
                Unit("branch3x3dbl_1", 64),
                Unit("branch3x3dbl_2", 96, 3),
                Unit("branch3x3dbl_3", 96, 3),
            ),
        ),
        (Unit("branch_pool", pool),),
    )


def _grid17(width: int) -> Block:
    """Return a block at stride 16, figure 6: 1x7 and 7x1 instead of 7x7 convolutions."""
    return Block(
        (
            _sequence(Unit("branch1x1", 192)),
            _sequence(
                Unit("branch7x7_1", width),
                Unit("branch7x7_2", width, (1, 7)),
                Unit("branch7x7_3", 192, (7, 1)),
            ),
            _sequence(
                Unit("branch7x7dbl_1", width),
                Unit("branch7x7dbl_2", width, (7, 1)),
                Unit("branch7x7dbl_3", width, (1, 7)),
                Unit("branch7x7dbl_4", width, (7, 1)),
                Unit("branch7x7dbl_5", 192, (1, 7)),
            ),
        ),
        (Unit("branch_pool", 192),),
    )


_GRID8 = Block(  # at stride 32, figure 7: branches that end in two parallel convolutions
    (
        _sequence(Unit("branch1x1", 320)),
        (
            *_sequence(Unit("branch3x3_1", 384)),
            (Unit("branch3x3_2a", 384, (1, 3)), Unit("branch3x3_2b", 384, (3, 1))),
        ),
        (
            *_sequence(Unit("branch3x3dbl_1", 448), Unit("branch3x3dbl_2", 384, 3)),
            (Unit("branch3x3dbl_3a", 384, (1, 3)), Unit("branch3x3dbl_3b", 384, (3, 1))),
        ),
    ),
    (Unit("branch_pool", 192),),
)

BLOCKS = {
    "mixed5b": _grid35(pool=32),
    "mixed5c": _grid35(pool=64),
    "mixed5d": _grid35(pool=64),
    "mixed6a": Block(
        (
            _sequence(Unit("branch3x3", 384, 3)),
            _sequence(
                Unit("branch3x3dbl_1", 64),
                Unit("branch3x3dbl_2", 96, 3),
                Unit("branch3x3dbl_3", 96, 3),
            ),
        )
    ),
    "mixed6b": _grid17(128),
    "mixed6c": _grid17(160),
    "mixed6d": _grid17(160),
    "mixed6e": _grid17(192),
    "mixed7a": Block(
        (
            _sequence(Unit("branch3x3_1", 192), Unit("branch3x3_2", 320, 3)),
            _sequence(
                Unit("branch7x7x3_1", 192),
                Unit("branch7x7x3_2", 192, (1, 7)),
                Unit("branch7x7x3_3", 192, (7, 1)),
                Unit("branch7x7x3_4", 192, 3),
            ),
        )
    ),
    "mixed7b": _GRID8,
    "mixed7c": _GRID8,
}
"""Inception blocks by stage."""


class Stem(nn.Module):
    """Five convolutions and two max pools."""

    variant: Variant

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, 3]`` to ``[b, h/8, w/8, 192]``."""
        conv_norm = self.variant.conv_norm
        x = nn.relu(conv_norm(32, 3, stride=2, name="conv1a")(x, mode))
        x = nn.relu(conv_norm(32, 3, name="conv2a")(x, mode))
        x = nn.relu(conv_norm(64, 3, padding=1, name="conv2b")(x, mode))
        x = max_pool(x, 3, stride=2)
        x = nn.relu(conv_norm(80, 1, name="conv3b")(x, mode))
        x = nn.relu(conv_norm(192, 3, name="conv4a")(x, mode))
        return max_pool(x, 3, stride=2)


class Mixed(nn.Module):
    """Stage of one of `BLOCKS`."""

    variant: Variant
    block: Block

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """Map ``[b, h, w, c]`` to ``[b, h, w, c']`` or half the resolution; see `Block`."""
        branches, pool = self.block
        outputs = []
        for *steps, last in branches:
            y = x
            for step in steps:
                y = self._run(step, y, mode)
            outputs.append(self._run(last, y, mode, halve=not pool))
        if pool:
            count_padding = self.variant.count_padding
            y = avg_pool(x, 3, stride=1, padding=1, count_padding=count_padding)
            outputs.append(self._run(pool, y, mode))
        else:
            outputs.append(max_pool(x, 3, stride=2))
        return jnp.concatenate(outputs, -1)

    def _run(self, step: tuple[Unit, ...], x: Array, mode: Mode, *, halve: bool = False) -> Array:
        outputs = []
        for name, features, kernel_size in step:
            size = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
            (vertical, horizontal), stride = (side // 2 for side in size), 1
            padding = ((vertical, vertical), (horizontal, horizontal))
            if halve:
                padding, stride = 0, 2
            unit = self.variant.conv_norm(features, kernel_size, stride, padding, name=name)
            outputs.append(nn.relu(unit(x, mode)))
        return jnp.concatenate(outputs, -1)


VARIANTS = {
    "inception_v3": Variant(partial(ConvNorm, epsilon=1e-3), count_padding=True),
    "keras_inception_v3": Variant(
        partial(ConvNorm, epsilon=1e-3, momentum=0.99, use_scale=False),
        count_padding=False,
    ),
}

PREPROCESS = replace(INCEPTION_PREPROCESS, size=299, resize=342)
"""Preprocessing of the published weights."""


def inception(name: str, num_classes: int = 1000) -> Model:
    """Build one of `VARIANTS`, with stages ``stem``, those of `BLOCKS`, ``pool`` and ``head``."""
    variant = VARIANTS[name]
    blocks = (Stage(stage, Mixed(variant, block)) for stage, block in BLOCKS.items())
    stages = Stage("stem", Stem(variant)), *blocks
    return pooled_classifier(name, stages, num_classes, PREPROCESS)
