"""Metrics of single examples from logits and class indices."""

import jax
import jax.numpy as jnp
import optax

from tljax.runtime.types import Array


def cross_entropies(logits: Array, labels: Array) -> jax.Array:
    """Compute the softmax cross-entropy of every example, ``[n]``, in nats.

    Args:
        logits: ``[n, classes]``.
        labels: ``[n]`` class indices.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def ranks(logits: Array, labels: Array) -> jax.Array:
    """Count the classes that are more probable than the label, ``[n]``; top-k is ``ranks < k``.

    Ties go to the lower index. A label is never right where the logits are nan.

    Args:
        logits: ``[n, classes]``.
        labels: ``[n]`` class indices.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    of_label = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    # Written so that nan, which a network that diverged says of all, is never right.
    return (~(logits <= of_label) | ((logits == of_label) & earlier)).sum(1)


def class_shares(targets: Array, classes: int) -> jax.Array:
    """Return what each class has of every example, ``[n, classes]`` float.

    Args:
        targets: ``[n]`` class indices, or already ``[n, classes]`` shares, as mixup makes them.
        classes: their number.
    """
    targets = jnp.asarray(targets)
    return jax.nn.one_hot(targets, classes) if targets.ndim == 1 else targets
