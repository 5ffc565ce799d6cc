"""Feature matching: a stage that trains stays close to what the pretrained network said there.

After Romero et al. 2015, "FitNets", https://arxiv.org/abs/1412.6550, and Li et al. 2019, "DELTA",
https://arxiv.org/abs/1901.09229, which keeps features rather than weights near their start. The
pretrained network sees every image once; its features travel with the images from then on.

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
    """Make the objective.

    Args:
        stage: whose output is matched, averaged over its positions; one that trains, or follows.
        strength: weight of the squared distance, a mean over the channels.
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
    """Put the features of a network beside the examples; unreadable ones keep zeros."""
    stop = model.stage_names[model.position(stage) + 1]
    found = tljax.compute_features(model, variables, source, tljax.Loading(), stop=stop).pooled()
    features = np.zeros((len(source), found.values.shape[1]), np.float32)
    features[found.indices] = found.values
    return replace(source, extra={**source.extra, "features": features})


def main(
    data: str, image_size: int = 96, epochs: int = 4, strength: float = 1.0
) -> tljax.FitResult:
    """Fine-tune the last stages, from a linear probe."""
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
