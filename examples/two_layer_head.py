"""A head of your own: two hidden layers instead of a linear map, saved and loaded again.

Any Flax module ``module(x, mode)`` can be the last stage of a network. This one is the classifier
that many courses put on top of MobileNet: global average pooling (the stage before), two layers of
1,024 rectified units, softmax. A saved network names the class of each module and never imports
anything, so pass the class when you load it.

    python examples/two_layer_head.py FOLDER
    tljax train --data FOLDER --recipe finetune --train head --extension examples/two_layer_head.py
"""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn

import tljax


class TwoLayerHead(nn.Module):
    """A classifier with two hidden layers, ``[batch, features] -> [batch, num_classes]``."""

    num_classes: int
    width: int = 1024

    @nn.compact
    def __call__(self, x: jax.Array, mode: tljax.Mode) -> jax.Array:  # noqa: ARG002 - the signature of a stage
        """Compute the logits."""
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(self.num_classes)(x)


def two_layer_head(
    model: tljax.Model, variables: tljax.Variables, classes: int
) -> tuple[tljax.Model, tljax.Variables]:
    """Replace the head by one with two hidden layers and random parameters."""
    *body, old = model.stages
    head = tljax.Stage(old.name, TwoLayerHead(classes), "vector")
    size = model.preprocess.size
    features = jax.eval_shape(
        lambda x: tljax.apply(model, variables, x, stop=-1).value, jnp.zeros((1, size, size, 3))
    )
    zeros = jnp.zeros(features.shape)
    params = head.module.init(jax.random.key(0), zeros, tljax.Mode())["params"]
    params = {**variables["params"], old.name: params}
    return replace(model, stages=(*body, head)), {**variables, "params": params}


extension = {"new_head": two_layer_head, "modules": {"TwoLayerHead": TwoLayerHead}}


def main(
    data: str, image_size: int = 96, epochs: int = 10, out: str = "two_layer_head.safetensors"
) -> tuple[tljax.FitResult, tljax.Pretrained]:
    """Train only the head, save the network, and load the saved file."""
    model, variables, card = tljax.load_pretrained("efficientnet_lite0.in1k").with_size(image_size)
    splits = tljax.open_splits(data)
    config = tljax.FitConfig("finetune", train=("head",), epochs=epochs)
    result = tljax.fit(model, variables, splits, config, new_head=two_layer_head)
    print(f"{result.evaluation.top1:.3f} of {result.evaluation.examples} images")

    card = replace(card, classes=splits.train.classes)
    tljax.save(Path(out), tljax.Pretrained(result.model, result.variables, card))
    return result, tljax.load_pretrained(out, modules={"TwoLayerHead": TwoLayerHead})


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits")
