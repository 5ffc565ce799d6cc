"""Feature matching: keep the output of a trained stage close to the pretrained features.

After Romero et al. 2015, "FitNets", https://arxiv.org/abs/1412.6550, and Li et al. 2019, "DELTA",
https://arxiv.org/abs/1901.09229, which keeps features, not weights, near their starting values. The
pretrained network runs once per image; its features are then stored beside the images.

    python examples/feature_matching.py FOLDER
"""

import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tljax


def feature_matching(stage: str = "pool", strength: float = 1.0) -> tljax.Objective:
    """Make an objective: cross-entropy plus the squared distance to the pretrained features.

    Args:
        stage: name of the stage whose output is matched, averaged over its positions. It must
            train, or follow a stage that does.
        strength: weight of the squared distance, which is a mean over the channels.
    """

    def objective(forward: tljax.Forward, batch: tljax.Batch, _: jax.Array) -> Any:
        output = forward(batch.inputs, capture=(stage,))
        features = output.captured[stage]
        features = features.mean(range(1, features.ndim - 1))
        distance = jnp.square(features - batch.extra["features"]).mean(1)
        shares = tljax.class_shares(batch.targets, output.logits.shape[1])
        cross_entropy = optax.softmax_cross_entropy(output.logits, shares)
        losses = cross_entropy + strength * distance
        return losses, {"cross_entropy": cross_entropy, "distance": distance}

    return objective


def with_features(
    source: tljax.Source, model: tljax.Model, variables: tljax.Variables, stage: str = "pool"
) -> tljax.Source:
    """Return the source with pooled features of every example; zeros if unreadable."""
    stop = model.stage_names[model.position(stage) + 1]
    computed = tljax.compute_features(model, variables, source, tljax.Loading(), stop=stop).pooled()
    features = np.zeros((len(source), computed.values.shape[1]), np.float32)
    features[computed.indices] = computed.values
    return replace(source, extra={**source.extra, "features": features})


def main(
    data: str, image_size: int = 96, epochs: int = 4, strength: float = 1.0
) -> tljax.FitResult:
    """Fit a linear probe, then fine-tune the last stages from it."""
    model, variables, _ = tljax.load_pretrained("efficientnet_lite0.in1k").with_size(image_size)
    splits = tljax.open_splits(data)
    splits = splits._replace(train=with_features(splits.train, model, variables))
    config = tljax.FitConfig(epochs=epochs)
    result = tljax.fit(
        model, variables, splits, config, objective=feature_matching(strength=strength)
    )
    print(f"{result.evaluation.top1:.3f} of {result.evaluation.examples} images")
    return result


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits")
