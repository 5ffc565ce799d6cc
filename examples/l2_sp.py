"""L2-SP: pull the weights toward their pretrained values instead of toward zero.

Li, Grandvalet and Davoine 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional
Networks", https://arxiv.org/abs/1802.01483. The penalty ``strength / 2 * ||w - w0||^2`` adds
``strength * (w - w0)`` to the gradient, so the method is one Optax transformation.

    python examples/l2_sp.py FOLDER
    tljax train --data FOLDER --weight-decay 0 --extension examples/l2_sp.py
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

import tljax


def l2_sp(strength: float) -> optax.GradientTransformation:
    """Make a transformation that adds the gradient of the penalty; its state is ``w0``."""

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        pull = jax.tree.map(lambda g, w, w0: g + strength * (w - w0), updates, params, state)
        return pull, state

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.array, params), update)


extension = {"transform": l2_sp(0.1)}


def main(
    data: str,
    image_size: int = 96,
    epochs: int = 4,
    strengths: tuple[float, ...] = (0.0, 0.1),
) -> dict[float, tljax.FitResult]:
    """Fine-tune once for each strength, from the same linear probe."""
    model, variables, _ = tljax.load_pretrained("efficientnet_lite0.in1k").with_size(image_size)
    splits = tljax.open_splits(data)
    config = tljax.FitConfig(
        epochs=epochs, optimizer=tljax.OptimizerConfig(weight_decay=0.0, clip_norm=0.0)
    )
    results = {}
    for strength in strengths:
        results[strength] = result = tljax.fit(
            model, variables, splits, config, transform=l2_sp(strength)
        )
        print(f"strength {strength}: {result.evaluation.top1:.3f}")
    return results


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits")
