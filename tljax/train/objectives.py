"""Training objectives: ``objective(forward, batch, key) -> (losses, metrics)``."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Shaped

from tljax.metrics.classification import class_shares, cross_entropies, ranks
from tljax.metrics.sums import Weighted
from tljax.runtime.types import Array, Batch

if TYPE_CHECKING:
    from tljax.train.step import Forward

Values = Shaped[Array, " batch"] | Weighted
"""``[batch]``, one value per example, optionally with a weight each."""

Objective = Callable[["Forward", Batch, jax.Array], tuple[Values, Mapping[str, Values]]]
"""``(forward, batch, key) -> (losses, metrics)``, with losses ``[batch]`` and each of the named
metrics ``[batch]``. Values of rows that `Batch.mask` leaves out are ignored."""


def cross_entropy(label_smoothing: float = 0.0, class_weights: tuple[float, ...] = ()) -> Objective:
    """Return the softmax cross-entropy objective, in nats, for classification.

    Its metrics are ``cross_entropy``, without smoothing and weights, and ``top1``, the accuracy.
    For targets that Mixup or CutMix made, the class with the largest share counts as the label.

    Args:
        label_smoothing: share of the target probability that is spread over all classes, in [0, 1].
        class_weights: weight of each class in the loss; empty for equal weights.
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
