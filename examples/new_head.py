"""A head of one's own: two hidden layers instead of a linear map.

Any Flax module ``module(x, mode)`` can be the last stage of a network. This one is the classifier
that many courses put on top of MobileNet: global average pooling (the stage before), 1,024 and
1,024 rectified units, softmax.

    python examples/new_head.py FOLDER
"""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import linen as nn

import tljax
from tljax.models import Stage
from tljax.models.layers import INFERENCE, Mode
from tljax.runtime.types import Variables


class HiddenLayers(nn.Module):
    """``[batch, features] -> [batch, num_classes]``."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:  # noqa: ARG002 - a stage's signature
        """The logits."""
        for width in (1024, 1024):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)


def hidden_layers(
    model: tljax.Model, variables: Variables, classes: int
) -> tuple[tljax.Model, Variables]:
    """The network with the new head, at random."""
    module = HiddenLayers(classes)
    features = variables["params"]["head"]["kernel"].shape[0]
    params = module.init(jax.random.key(0), jnp.zeros((1, features)), INFERENCE)["params"]
    stages = (*model.stages[:-1], Stage("head", module))
    params = {**variables["params"], "head": params}
    return replace(model, stages=stages), {**variables, "params": params}


def main(data: str, image_size: int = 96, epochs: int = 10) -> float:
    """Validation accuracy with everything but the head frozen."""
    model, variables, _ = tljax.load_pretrained("efficientnet_lite0.in1k").with_size(image_size)
    config = tljax.FitConfig("finetune", freeze_to="pool", epochs=epochs)
    result = tljax.fit(model, variables, tljax.open_splits(data), config, new_head=hidden_layers)
    print(f"{result.evaluation.top1:.3f} of {result.evaluation.examples} images")
    return result.evaluation.top1


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits")
