"""Per-example classification metrics from logits and class indices."""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Integer

from tljax.runtime.types import Array, Labels, Logits


def cross_entropies(logits: Logits, labels: Labels) -> Float[jax.Array, " examples"]:
    """Compute the softmax cross-entropy of every example, in nats.

    Args:
        logits: ``[examples, classes]``.
        labels: ``[examples]`` class indices.

    Returns:
        ``[examples]``.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def ranks(logits: Logits, labels: Labels) -> Integer[jax.Array, " examples"]:
    """Count the classes ranked above the label; a top-k prediction is correct if ``rank < k``.

    Equal logits are ranked by class index, lower first. NaN logits always rank above the label.

    Args:
        logits: ``[examples, classes]``.
        labels: ``[examples]`` class indices.

    Returns:
        ``[examples]``, from 0 (the label is the prediction) to ``classes``.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    label_logits = jnp.take_along_axis(logits, labels[:, None], axis=1)
    lower_index = jnp.arange(logits.shape[1]) < labels[:, None]
    # `~(a <= b)` instead of `a > b`: a diverged network returns NaN, which must not be correct.
    return (~(logits <= label_logits) | ((logits == label_logits) & lower_index)).sum(1)


def class_shares(targets: Array, classes: int) -> Float[jax.Array, "examples classes"]:
    """Convert classification targets to one probability per class.

    Args:
        targets: ``[examples]`` class indices, which are one-hot encoded, or ``[examples, classes]``
            probabilities (as produced by mixup), which are returned unchanged.
        classes: number of classes.

    Returns:
        ``[examples, classes]`` floats. A class index of -1 gives a row of zeros.
    """
    targets = jnp.asarray(targets)
    return jax.nn.one_hot(targets, classes) if targets.ndim == 1 else targets


def standard_error(share: float, count: int) -> float:
    """Compute the standard error of a share, ``sqrt(share * (1 - share) / count)``.

    Args:
        share: fraction of examples with some property, such as an accuracy, in [0, 1].
        count: number of examples, at least 1.
    """
    return math.sqrt(share * (1 - share) / count)
