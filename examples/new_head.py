"""A head of one's own: two hidden layers instead of a linear map, saved and loaded again.

Any Flax module ``module(x, mode)`` can be the last stage of a network. This one is the classifier
that many courses put on top of MobileNet: global average pooling (the stage before), 1,024 and
1,024 rectified units, softmax.

    python examples/new_head.py FOLDER MODEL.safetensors
"""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn

import tljax
from tljax.models import Stage
from tljax.models.layers import INFERENCE, Mode
from tljax.pretrained import Pretrained
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
    *body, old = model.stages
    head = Stage(old.name, HiddenLayers(classes), "vector")
    features = variables["params"][old.name]["kernel"].shape[0]
    params = head.module.init(jax.random.key(0), jnp.zeros((1, features)), INFERENCE)["params"]
    params = {**variables["params"], old.name: params}
    return replace(model, stages=(*body, head)), {**variables, "params": params}


def main(data: str, out: str, image_size: int = 96, epochs: int = 10) -> Pretrained:
    """The saved network, everything but whose head stayed frozen."""
    model, variables, card = tljax.load_pretrained("efficientnet_lite0.in1k").with_size(image_size)
    splits = tljax.open_splits(data)
    config = tljax.FitConfig("finetune", freeze_to="pool", epochs=epochs)
    result = tljax.fit(model, variables, splits, config, new_head=hidden_layers)
    print(f"{result.evaluation.top1:.3f} of {result.evaluation.examples} images")
    card = replace(card, classes=splits.train.classes)
    tljax.save(Path(out), Pretrained(result.model, result.variables, card))
    return tljax.load_pretrained(out, modules={"HiddenLayers": HiddenLayers})


if __name__ == "__main__":
    main(*(sys.argv[1:] or ("digits", "new_head.safetensors")))
