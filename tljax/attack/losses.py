"""Values that attacks maximize, and the criterion of success.

A loss takes logits ``[batch, classes]``, labels ``[batch]`` and optional targets ``[batch]``, and
returns ``[batch]`` values. Without targets they grow as the prediction moves away from the label,
with targets as it moves towards the target. Labels and targets of `binary_cross_entropy`, for
networks with several labels per image, are ``[batch, labels]``.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Integer

from tljax.attack.contract import sample_logits
from tljax.attack.types import LabelMatrix, Labels, LogitsFn, Values
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array

Loss = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
Logits = Float[jax.Array, "batch classes"]
Classes = Integer[jax.Array, " batch"]


def cross_entropy(logits: Logits, labels: Classes, targets: Classes | None = None) -> Values:
    """Compute the cross-entropy of the labels, or minus that of the targets, in nats.

    The gradient is 0 where the logits are so large that a probability rounds to 1.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    if targets is not None:
        return _gather(log_probabilities, targets)
    return -_gather(log_probabilities, labels)


def margin(logits: Logits, labels: Classes, targets: Classes | None = None) -> Values:
    """Compute the highest other logit minus the label's, or the target's minus the highest other.

    Returns ``[batch]``, in logits; positive where the attack succeeds. With targets, labels are
    ignored.
    """
    if targets is not None:
        return _gather(logits, targets) - _best_other(logits, targets)
    return _best_other(logits, labels) - _gather(logits, labels)


def dlr(logits: Logits, labels: Classes, targets: Classes | None = None) -> Values:
    """Compute the difference of logits ratio, which is invariant to scale and shift of the logits.

    With the logits in descending order ``z1, z2, ...`` it is
    ``-(z_y - max_{i != y} z_i) / (z1 - z3)``, and for a target ``t``
    ``-(z_y - z_t) / (z1 - (z3 + z4) / 2)``. 1e-12 is added to both denominators.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks", 2020 (arXiv 2003.01690), equations 6 and 7.

    Raises:
        RequestError: there are fewer than 3 classes, or 4 with targets.
    """
    needed = 3 if targets is None else 4
    if logits.shape[-1] < needed:
        raise RequestError(
            f"the {'' if targets is None else 'targeted '}dlr loss needs {needed} classes, the "
            f"network has {logits.shape[-1]}: use loss='margin'"
        )
    top = lax.top_k(logits, needed)[0]
    if targets is None:
        return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)
    difference = _gather(logits, targets) - _gather(logits, labels)
    return difference / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def binary_cross_entropy(
    logits: Logits, labels: LabelMatrix, targets: LabelMatrix | None = None
) -> Values:
    """Compute the mean sigmoid cross-entropy of the labels, or minus that of the targets, in nats.

    The mean is over the known labels of each image; it is 0 if there are none.

    Args:
        logits: ``[batch, labels]``.
        labels: ``[batch, labels]`` of 0, 1 and NaN, which is unknown.
        targets: ``[batch, labels]``, 1 for a label that shall be predicted, 0 for one that shall
            not, NaN for one that may be either.
    """
    wanted = labels if targets is None else targets
    known = ~jnp.isnan(wanted)
    applies = jnp.where(known, wanted, 0)
    losses = applies * jax.nn.softplus(-logits) + (1 - applies) * jax.nn.softplus(logits)
    mean = jnp.sum(losses, axis=-1, where=known) / jnp.maximum(known.sum(-1), 1)
    return mean if targets is None else -mean


LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "dlr": dlr,
    "margin": margin,
    "bce": binary_cross_entropy,
}


class Goal(NamedTuple):
    """The objective of an attack and its criterion of success.

    Attributes:
        objective: ``(logits [batch, classes]) -> [batch]``, the loss to be maximized.
        reached: ``(logits [batch, classes]) -> [batch]`` bool, True where the attack succeeds.
    """

    objective: Callable[[jax.Array], jax.Array]
    reached: Callable[[jax.Array], jax.Array]


def make_goal(loss: str | Loss, labels: Labels | LabelMatrix, targets: Array | None = None) -> Goal:
    """Return the goal of any class but the label, or of the target class.

    With "bce" no image is ever a success: how probable a label must be to be predicted is not known
    here, so attacks return the highest loss.

    Raises:
        RequestError: there is no loss of that name.
    """
    if isinstance(loss, str) and loss not in LOSSES:
        raise RequestError(f"there is no loss '{loss}'; choose from {', '.join(LOSSES)}")
    function = LOSSES[loss] if isinstance(loss, str) else loss
    target_classes = None if targets is None else jnp.asarray(targets)

    def reached(logits: jax.Array) -> jax.Array:
        if loss == "bce":
            return jnp.zeros(len(logits), bool)
        predicted = logits.argmax(-1)
        return predicted != labels if target_classes is None else predicted == target_classes

    return Goal(lambda logits: function(logits, jnp.asarray(labels), target_classes), reached)


def mean_logits(logits_fn: LogitsFn, images: jax.Array) -> Logits:
    """Compute logits ``[batch, classes]`` of images ``[batch, ...]``, in at least float32.

    The samples of a randomized network are averaged.

    Raises:
        RequestError: the network returns another shape.
    """
    logits = sample_logits(logits_fn, images)
    return logits[0] if len(logits) == 1 else logits.mean(0)


def top_other_classes(
    logits: Logits, labels: Classes, count: int
) -> Integer[jax.Array, "batch count"]:
    """Return the classes with the highest logits other than the label, in descending order.

    ``count`` is reduced if there are not as many classes.
    """
    count = min(count, logits.shape[-1] - 1)
    return lax.top_k(_mask_out(logits, labels), count)[1]


class LossAndGradient(NamedTuple):
    """The result of one forward and one backward pass.

    Attributes:
        loss: ``[batch]``, the objective.
        gradient: ``[batch, ...]``, its gradient with respect to the images; NaN is replaced by 0.
        logits: ``[batch, classes]``.
    """

    loss: Values
    gradient: Float[jax.Array, "batch ..."]
    logits: Logits


def loss_and_gradient(
    logits_fn: LogitsFn, objective: Callable[[jax.Array], jax.Array], images: jax.Array
) -> LossAndGradient:
    """Compute the objective, its gradient and the logits."""

    def total(x: jax.Array):
        logits = sample_logits(logits_fn, x)
        loss = jax.vmap(objective)(logits).mean(0)
        return loss.sum(), (loss, logits.mean(0))

    gradient, (loss, logits) = jax.grad(total, has_aux=True)(images)
    return LossAndGradient(loss, jnp.where(jnp.isnan(gradient), 0, gradient), logits)


def _gather(values: jax.Array, classes: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, classes[:, None], axis=1)[:, 0]


def _best_other(logits: jax.Array, classes: jax.Array) -> jax.Array:
    return jnp.max(_mask_out(logits, classes), axis=-1)


def _mask_out(logits: jax.Array, classes: jax.Array) -> jax.Array:
    masked = jnp.arange(logits.shape[-1]) == classes[:, None]
    return jnp.where(masked, -jnp.inf, logits)
