"""A tljax network as a Flax NNX module, trained by NNX.

`tljax.apply` is a pure function of the variables, so an ``nnx.Module`` can hold them like any other
parameters. The last lines of `main` turn the trained parameters back into tljax variables.

    python examples/inside_nnx.py FOLDER
"""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import tljax


class Backbone(nnx.Module):
    """The stages before the head: images ``[b, h, w, 3]`` to features ``[b, features]``."""

    def __init__(self, model: tljax.Model, variables: tljax.Variables) -> None:
        """Wrap parameters and running statistics in NNX variables."""
        self.model = model
        self.params = nnx.data(jax.tree.map(nnx.Param, variables["params"]))
        self.batch_stats = nnx.data(jax.tree.map(nnx.BatchStat, variables["batch_stats"]))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the pooled features ``[batch, features]`` of images ``[batch, h, w, 3]``."""
        variables = nnx.as_pure({"params": self.params, "batch_stats": self.batch_stats})
        return tljax.apply(self.model, variables, images, stop=-1).value


@nnx.jit
def train_step(network: nnx.Sequential, optimizer: nnx.Optimizer, batch: tljax.Batch) -> jax.Array:
    """Take one optimizer step; return the mean cross-entropy of the batch, in nats."""

    def loss(network: nnx.Sequential) -> jax.Array:
        logits = network(batch.inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return jnp.mean(losses, where=batch.mask)

    value, grads = nnx.value_and_grad(loss)(network)
    optimizer.update(network, grads)
    return value


def main(data: str, image_size: int = 96, epochs: int = 4) -> tuple[tljax.Pretrained, list[float]]:
    """Train all parameters under an NNX linear head; return the network and the losses."""
    model, variables, card = tljax.load_pretrained("efficientnet_lite0.in1k").with_size(image_size)
    train, val, _ = tljax.open_splits(data)
    model, variables = tljax.replace_head(model, variables, len(train.classes))
    params, head = variables["params"], model.stage_names[-1]
    body = {**variables, "params": {name: params[name] for name in params if name != head}}
    backbone = Backbone(model, body)
    linear = nnx.Linear(*params[head]["kernel"].shape, rngs=nnx.Rngs(0))
    network = nnx.Sequential(backbone, linear)
    optimizer = nnx.Optimizer(network, optax.adamw(1e-4), wrt=nnx.Param)
    losses = [
        float(train_step(network, optimizer, batch))
        for epoch in range(epochs)
        for batch in tljax.load_batches(train, model.preprocess, batch_size=32, seed=0, epoch=epoch)
    ]
    trained = nnx.as_pure({**backbone.params, head: {"kernel": linear.kernel, "bias": linear.bias}})
    variables = {**variables, "params": jax.device_get(trained)}
    logits = tljax.compute_features(model, variables, val, tljax.Loading(), stop=None)
    print(f"{(logits.values.argmax(1) == logits.labels).mean():.3f} of {len(logits.labels)} images")
    return tljax.Pretrained(model, variables, replace(card, classes=train.classes)), losses


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits")
