"""Two views: train for equal predictions on two random crops of each image.

After Sajjadi, Javanmardi and Tasdizen 2016, "Regularization With Stochastic Transformations and
Perturbations for Deep Semi-Supervised Learning", https://arxiv.org/abs/1606.04586. The objective
makes the views itself, on the device, so it needs images: activations must not be cached.

    python examples/two_views.py FOLDER
    tljax train --data FOLDER --cache none --extension examples/two_views.py
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

import tljax


def two_views(weight: float = 1.0, config: tljax.AugmentConfig | None = None) -> tljax.Objective:
    """Make an objective: the mean cross-entropy of two views plus their squared difference.

    Args:
        weight: weight of the squared distance between the two probability vectors.
        config: the augmentation of each view; by default `tljax.AugmentConfig()`. Crops are squares
            of at least 60% of the side.
    """
    augmentation = config or tljax.AugmentConfig()

    def objective(forward: tljax.Forward, batch: tljax.Batch, key: jax.Array) -> Any:
        if forward.start is not None:
            raise ValueError("two_views needs images, not cached activations: pass --cache none")

        def view(key: jax.Array) -> jax.Array:
            size = forward.model.preprocess.size
            boxes = None if augmentation.crop == "center" else random_squares(key, batch)
            images = tljax.augment(batch.inputs, batch.indices, key, size, augmentation, boxes)
            return forward(images).logits

        one, other = (view(each) for each in jax.random.split(key))
        shares = tljax.class_shares(batch.targets, one.shape[1])
        cross_entropy = sum(optax.softmax_cross_entropy(x, shares) / 2 for x in (one, other))
        disagreement = jnp.square(jax.nn.softmax(one) - jax.nn.softmax(other)).sum(1)
        losses = cross_entropy + weight * disagreement
        return losses, {"cross_entropy": cross_entropy, "disagreement": disagreement}

    return objective


def random_squares(key: jax.Array, batch: tljax.Batch) -> jax.Array:
    """Draw a square within each image of a batch, as `tljax.augment` takes boxes to crop."""
    count, size = batch.inputs.shape[:2]
    draws = jax.random.uniform(key, (count, 3))
    side = size * (0.6 + 0.4 * draws[:, :1])
    corner = (size - side) * draws[:, 1:]
    shape, upright = jnp.full((count, 2), size), jnp.zeros((count, 1))
    return jnp.concatenate([corner, side, side, shape, upright], axis=1)


extension = {"objective": two_views()}


def main(data: str, image_size: int = 96, epochs: int = 4) -> tljax.FitResult:
    """Fit a linear probe, then fine-tune the last stages from it."""
    model, variables, _ = tljax.load_pretrained("efficientnet_lite0.in1k").with_size(image_size)
    config = tljax.FitConfig(cache="none", epochs=epochs)
    splits = tljax.open_splits(data)
    result = tljax.fit(model, variables, splits, config, objective=two_views())
    print(f"{result.evaluation.top1:.3f} of {result.evaluation.examples} images")
    return result


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits")
