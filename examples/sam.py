"""SAM: sharpness-aware minimization, a step along the gradient at a point slightly uphill.

Foret et al. 2020, "Sharpness-Aware Minimization for Efficiently Improving Generalization",
https://arxiv.org/abs/2010.01412. It wraps the optimizer. The wrapper is given ``grad_fn``, which
returns the gradient of the same batch at other parameters.

    python examples/sam.py FOLDER
    tljax train --data FOLDER --extension examples/sam.py
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import optax

import tljax


def sam(
    rho: float = 0.05,
) -> Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs]:
    """Make the wrapper; ``rho`` is the L2 distance uphill, over all trainable parameters."""

    def around(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        inner = optax.with_extra_args_support(inner)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            scale = rho / (optax.tree.norm(updates) + 1e-12)
            uphill = jax.tree.map(lambda w, g: w + scale * g, params, updates)
            return inner.update(extra["grad_fn"](uphill), state, params, **extra)

        return optax.GradientTransformationExtraArgs(inner.init, update)

    return around


extension = {"transform": sam()}


def main(data: str, image_size: int = 96, epochs: int = 4, rho: float = 0.05) -> tljax.FitResult:
    """Fit a linear probe, then fine-tune the last stages from it."""
    model, variables, _ = tljax.load_pretrained("efficientnet_lite0.in1k").with_size(image_size)
    config = tljax.FitConfig(epochs=epochs)
    result = tljax.fit(model, variables, tljax.open_splits(data), config, transform=sam(rho))
    print(f"{result.evaluation.top1:.3f} of {result.evaluation.examples} images")
    return result


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits")
