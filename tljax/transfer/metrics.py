"""Sums and counts that merge by addition, so that a ragged last batch is exact."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from tljax.types import Array


class Metrics(NamedTuple):
    """Sums over examples; add two to merge them, divide by ``examples`` for means.

    Attributes:
        loss: summed softmax cross-entropy, nats.
        top1: number of examples whose label is the most probable class.
        top5: number of examples whose label is among the five most probable.
        examples: their number.
    """

    loss: Array
    top1: Array
    top5: Array
    examples: Array

    @staticmethod
    def zero() -> "Metrics":
        """Of no examples."""
        return Metrics(jnp.float32(0), *(jnp.zeros((), jnp.int32) for _ in range(3)))

    def merge(self, other: "Metrics") -> "Metrics":
        """The metrics of both sets of examples together."""
        return jax.tree.map(lambda a, b: a + b, self, other)

    def means(self) -> dict[str, float]:
        """Mean ``loss``, ``top1`` and ``top5`` as Python floats; 0 of no examples is nan."""
        count = float(self.examples)
        sums = {"loss": self.loss, "top1": self.top1, "top5": self.top5}
        return {name: float(x) / count if count else float("nan") for name, x in sums.items()}


def measure(logits: Array, labels: Array, mask: Array) -> Metrics:
    """The metrics of one batch.

    Args:
        logits: ``[batch, classes]``.
        labels: ``[batch]`` class indices.
        mask: ``[batch]``; examples where it is False count for nothing.
    """
    safe = jnp.where(mask, labels, 0)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
    # The number of classes that are more probable than the label; ties go to the lower index.
    of_label = jnp.take_along_axis(logits, safe[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < safe[:, None]
    # Written so that nan, which a network that diverged says of all, is never right.
    rank = (~(logits <= of_label) | ((logits == of_label) & earlier)).sum(1)
    return Metrics(
        loss=jnp.where(mask, loss, 0).sum(),
        top1=(mask & (rank < 1)).sum(),
        top5=(mask & (rank < 5)).sum(),
        examples=mask.sum(),
    )
