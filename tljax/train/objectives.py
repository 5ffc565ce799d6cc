"""What a step minimises: ``objective(forward, batch, key) -> (losses, metrics)``."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from tljax.metrics.classification import class_shares, cross_entropies, ranks
from tljax.metrics.sums import Weighted
from tljax.runtime.types import Array, Batch

if TYPE_CHECKING:
    from tljax.train.step import Forward

Values = Array | Weighted
"""``[batch]``, one an example."""

Objective = Callable[["Forward", Batch, jax.Array], tuple[Values, Mapping[str, Values]]]
"""From the network, a batch and a random key to the losses ``[batch]`` and, by name, to metrics
``[batch]``. Rows that `Batch.mask` leaves out count for nothing, whatever it returns for them."""


def cross_entropy(label_smoothing: float = 0.0, class_weights: tuple[float, ...] = ()) -> Objective:
    """Make the objective of a classification: softmax cross-entropy, in nats.

    Its metrics are the plain cross-entropy, without smoothing and weights, and ``top1``. Of targets
    that mixup or CutMix made, the class with the larger share is the right one.

    Args:
        label_smoothing: share of the target that is spread over all classes.
        class_weights: weight of each class in the loss; empty weighs all alike.
    """

    def objective(
        forward: "Forward", batch: Batch, _: jax.Array
    ) -> tuple[Values, dict[str, Values]]:
        logits = forward(batch.inputs).logits
        plain = class_shares(batch.targets, logits.shape[1])
        shares = optax.smooth_labels(plain, label_smoothing)
        log_probabilities = jax.nn.log_softmax(logits)
        weights = jnp.asarray(class_weights or (1.0,) * logits.shape[1])
        losses = -jnp.sum(weights * shares * log_probabilities, axis=1)
        hard = batch.targets.ndim == 1
        labels = batch.targets if hard else batch.targets.argmax(1)
        metrics: dict[str, Values] = {
            "cross_entropy": cross_entropies(logits, labels)
            if hard
            else -jnp.sum(plain * log_probabilities, axis=1),
            "top1": ranks(logits, labels) < 1,
        }
        return (Weighted(losses, shares @ weights) if class_weights else losses), metrics

    return objective
