"""Sums and counts that merge by addition, so that a ragged last batch is exact."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from tljax.runtime.types import Array


class Metrics(NamedTuple):
    """Sums over examples; add two to merge them.

    Attributes:
        loss: summed objective, nats: what training minimises, divided by ``weight``.
        weight: summed weight of the examples in it.
        cross_entropy: summed softmax cross-entropy of the labels, nats.
        top1: number of examples whose label is the most probable class.
        top5: number of examples whose label is among the five most probable.
        examples: their number.
    """

    loss: Array
    weight: Array
    cross_entropy: Array
    top1: Array
    top5: Array
    examples: Array

    @staticmethod
    def zero() -> "Metrics":
        """Of no examples."""
        return Metrics(*(jnp.zeros(()) for _ in range(3)), *(jnp.zeros((), int) for _ in range(3)))

    def merge(self, other: "Metrics") -> "Metrics":
        """The metrics of both sets of examples together."""
        return jax.tree.map(lambda a, b: a + b, self, other)

    def means(self) -> dict[str, float]:
        """Mean ``loss``, ``cross_entropy``, ``top1`` and ``top5`` as Python floats.

        Those of no examples are nan.
        """

        def mean(total: Array, count: Array) -> float:
            return float(total) / float(count) if count else float("nan")

        of_examples = ("cross_entropy", "top1", "top5")
        return {
            "loss": mean(self.loss, self.weight),
            **{name: mean(getattr(self, name), self.examples) for name in of_examples},
        }


def measure(logits: Array, labels: Array, mask: Array) -> Metrics:
    """The metrics of one batch, with the plain cross-entropy as its objective.

    Args:
        logits: ``[batch, classes]``.
        labels: ``[batch]`` class indices.
        mask: ``[batch]``; examples where it is False count for nothing.
    """
    safe = jnp.where(mask, labels, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
    cross_entropy, examples = jnp.where(mask, losses, 0).sum(), mask.sum()
    # The number of classes that are more probable than the label; ties go to the lower index.
    of_label = jnp.take_along_axis(logits, safe[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < safe[:, None]
    # Written so that nan, which a network that diverged says of all, is never right.
    rank = (~(logits <= of_label) | ((logits == of_label) & earlier)).sum(1)
    return Metrics(
        loss=cross_entropy,
        weight=examples,
        cross_entropy=cross_entropy,
        top1=(mask & (rank < 1)).sum(),
        top5=(mask & (rank < 5)).sum(),
        examples=examples,
    )
