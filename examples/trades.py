"""TRADES: adversarial training that balances clean accuracy against robustness.

Zhang et al. 2019, "Theoretically Principled Trade-off between Robustness and Accuracy",
https://arxiv.org/abs/1901.08573: the cross-entropy of the clean image plus ``beta`` times the
divergence between its prediction and the most different prediction within ``epsilon`` of it, which
projected gradient ascent finds.

    python examples/trades.py FOLDER
    tljax train --data FOLDER --cache none --extension examples/trades.py
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

import tljax


def trades(beta: float = 6.0, epsilon: float = 4 / 255, steps: int = 10) -> tljax.Objective:
    """Make the objective.

    Args:
        beta: weight of the divergence.
        epsilon: largest change of a pixel value in [0, 1] (Linf).
        steps: number of gradient ascent steps of size ``epsilon / 4``.
    """

    def objective(forward: tljax.Forward, batch: tljax.Batch, key: jax.Array) -> Any:
        if forward.start is not None:
            raise ValueError("TRADES needs images, not cached activations: pass --cache none")
        images = jnp.asarray(batch.inputs)
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 255
        low, high = jnp.maximum(images - epsilon, 0), jnp.minimum(images + epsilon, 1)
        reference = jax.nn.log_softmax(forward.evaluate(images).logits)

        def divergence_from_clean(x: jax.Array) -> jax.Array:
            prediction = jax.nn.log_softmax(forward.evaluate(x).logits)
            return optax.losses.kl_divergence_with_log_targets(prediction, reference).sum()

        def ascend(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            x = x + epsilon / 4 * jnp.sign(jax.grad(divergence_from_clean)(x))
            return jnp.clip(x, low, high), None

        # The gradient is zero at the clean image, so start beside it.
        start = images + 0.001 * jax.random.normal(key, images.shape)
        attacked, _ = jax.lax.scan(ascend, jnp.clip(start, low, high), length=steps)

        natural = forward(images).logits
        robust = jax.nn.log_softmax(forward(jax.lax.stop_gradient(attacked)).logits)
        divergence = optax.losses.kl_divergence_with_log_targets(
            robust, jax.nn.log_softmax(natural)
        )
        shares = tljax.class_shares(batch.targets, natural.shape[1])
        cross_entropy = optax.softmax_cross_entropy(natural, shares)
        losses = cross_entropy + beta * divergence
        return losses, {"cross_entropy": cross_entropy, "divergence": divergence}

    return objective


extension = {"objective": trades()}


def main(data: str, image_size: int = 96, epochs: int = 4) -> tljax.FitResult:
    """Fit a linear probe, then fine-tune the last stages from it."""
    model, variables, _ = tljax.load_pretrained("efficientnet_lite0.in1k").with_size(image_size)
    config = tljax.FitConfig(cache="none", epochs=epochs)
    splits = tljax.open_splits(data)
    result = tljax.fit(model, variables, splits, config, objective=trades())
    print(f"{result.evaluation.top1:.3f} of {result.evaluation.examples} images")
    return result


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits")
