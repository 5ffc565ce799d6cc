"""Focal loss: give less weight to examples that are already classified well.

Lin et al. 2017, "Focal Loss for Dense Object Detection", https://arxiv.org/abs/1708.02002: the
cross-entropy of an example times ``(1 - p) ** gamma``, where ``p`` is the probability of its class.

    python examples/focal_loss.py FOLDER
    tljax train --data FOLDER --extension examples/focal_loss.py
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

import tljax


def focal_loss(gamma: float = 2.0) -> tljax.Objective:
    """Make the objective; with ``gamma`` 0 it is the cross-entropy."""

    def objective(forward: tljax.Forward, batch: tljax.Batch, _: jax.Array) -> Any:
        logits = forward(batch.inputs).logits
        shares = tljax.class_shares(batch.targets, logits.shape[1])
        cross_entropy = optax.softmax_cross_entropy(logits, shares)
        losses = (1 - jnp.exp(-cross_entropy)) ** gamma * cross_entropy
        return losses, {"cross_entropy": cross_entropy}

    return objective


extension = {"objective": focal_loss()}


def main(data: str, image_size: int = 96, epochs: int = 4, gamma: float = 2.0) -> tljax.FitResult:
    """Fit a linear probe, then fine-tune the last stages from it."""
    model, variables, _ = tljax.load_pretrained("efficientnet_lite0.in1k").with_size(image_size)
    config = tljax.FitConfig(epochs=epochs)
    splits = tljax.open_splits(data)
    result = tljax.fit(model, variables, splits, config, objective=focal_loss(gamma))
    print(f"{result.evaluation.top1:.3f} of {result.evaluation.examples} images")
    return result


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits")
