"""Networks small enough to train in a test: with every kind of layer, and with large parameters."""

from dataclasses import replace

import jax
import numpy as np
from flax import linen as nn

from tljax.models import Model, Stage, abstract_variables
from tljax.models.layers import ConvNorm, GlobalAveragePool, LinearHead
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.types import Variables


class Unit(nn.Module):
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, mode):
        return nn.relu(ConvNorm(self.features, 3, self.stride, padding=1, name="conv")(x, mode))


MODEL = Model(
    "tiny",
    (
        Stage("stem", Unit(8)),
        Stage("layer1", Unit(12, stride=2)),
        Stage("pool", GlobalAveragePool(), "vector"),
        Stage("head", LinearHead(3, dropout=0.5), "vector"),
    ),
    Preprocess(16, 16),
)

WIDE = replace(
    MODEL,
    name="wide",
    stages=(
        Stage("stem", Unit(64, stride=4)),
        *(Stage(f"block{i}", Unit(64)) for i in range(4)),
        *MODEL.stages[2:],
    ),
)


def random_variables() -> Variables:
    """Return random variables, including those of batch norms."""
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), abstract_variables(MODEL)
    )
    variables["batch_stats"] = jax.tree.map(lambda x: np.abs(x) + 0.5, variables["batch_stats"])
    return variables
