"""What an attack maximises, and how it sees that it has won.

A loss takes logits ``[n, classes]``, labels ``[n]`` and either None or targets ``[n]``, and returns
``[n]`` values that are larger the nearer the network is to a mistake: away from the label without
targets, towards the target with them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tljax.attack.contract import LogitsFn, sample_logits
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array

Loss = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


def cross_entropy(
    logits: jax.Array, labels: jax.Array, targets: jax.Array | None = None
) -> jax.Array:
    """Cross-entropy of the label, nats; with targets, minus the target's.

    Where the logits are so large that the label's probability rounds to 1, its gradient is 0.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    if targets is not None:
        return _at(log_probabilities, targets)
    return -_at(log_probabilities, labels)


def margin(logits: jax.Array, labels: jax.Array, targets: jax.Array | None = None) -> jax.Array:
    """How far the best other logit exceeds the label's; with targets, the target's all others."""
    if targets is not None:
        return _at(logits, targets) - _best_other(logits, targets)
    return _best_other(logits, labels) - _at(logits, labels)


def dlr(logits: jax.Array, labels: jax.Array, targets: jax.Array | None = None) -> jax.Array:
    """Difference of logits ratio: a margin that scaling or shifting the logits does not change.

    With the logits in descending order ``z1, z2, ...`` it is
    ``-(z_y - max_{i != y} z_i) / (z1 - z3)``, and towards a target ``t``
    ``-(z_y - z_t) / (z1 - (z3 + z4) / 2)``. Both denominators get 1e-12 added.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks", 2020 (arXiv 2003.01690), equations 6 and 7.

    Raises:
        RequestError: fewer than 3 classes, or 4 with targets.
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
    difference = _at(logits, targets) - _at(logits, labels)
    return difference / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr, "margin": margin}


class Goal(NamedTuple):
    """An attack's aim, as functions of the logits ``[n, classes]``.

    Attributes:
        objective: ``[n]`` the loss, to be maximised.
        reached: ``[n]`` bool, whether the network makes the mistake that is wanted.
    """

    objective: Callable[[jax.Array], jax.Array]
    reached: Callable[[jax.Array], jax.Array]


def goal(loss: str | Loss, labels: jax.Array, targets: Array | None = None) -> Goal:
    """Any class but the label; with targets, the target.

    Raises:
        RequestError: there is no loss of that name.
    """
    if isinstance(loss, str) and loss not in LOSSES:
        raise RequestError(f"there is no loss '{loss}'; choose from {', '.join(LOSSES)}")
    function = LOSSES[loss] if isinstance(loss, str) else loss
    wanted = None if targets is None else jnp.asarray(targets)

    def reached(logits: jax.Array) -> jax.Array:
        predicted = logits.argmax(-1)
        return predicted != labels if wanted is None else predicted == wanted

    return Goal(lambda logits: function(logits, labels, wanted), reached)


def mean_logits(logits_fn: LogitsFn, images: jax.Array) -> jax.Array:
    """Logits ``[n, classes]`` in float32 or wider, averaged over the samples if there are some."""
    logits = sample_logits(logits_fn, images)
    return logits[0] if len(logits) == 1 else logits.mean(0)


def best_others(logits: jax.Array, labels: jax.Array, count: int) -> jax.Array:
    """``[n, count]`` classes other than the label, the highest logit first; fewer if there are."""
    count = min(count, logits.shape[-1] - 1)
    return lax.top_k(_without(logits, labels), count)[1]


class Ascent(NamedTuple):
    """A point on the way up.

    Attributes:
        loss: ``[n]`` the objective.
        gradient: ``[n, ...]`` its gradient with respect to the images; 0 where it is not a number.
        logits: ``[n, classes]``.
    """

    loss: jax.Array
    gradient: jax.Array
    logits: jax.Array


def ascent(
    logits_fn: LogitsFn, objective: Callable[[jax.Array], jax.Array], images: jax.Array
) -> Ascent:
    """The objective, its gradient and the logits, by one pass forwards and one back."""

    def total(x: jax.Array):
        logits = sample_logits(logits_fn, x)
        loss = jax.vmap(objective)(logits).mean(0)
        return loss.sum(), (loss, logits.mean(0))

    gradient, (loss, logits) = jax.grad(total, has_aux=True)(images)
    return Ascent(loss, jnp.where(jnp.isnan(gradient), 0, gradient), logits)


def _at(values: jax.Array, classes: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, classes[:, None], axis=1)[:, 0]


def _best_other(logits: jax.Array, classes: jax.Array) -> jax.Array:
    return jnp.max(_without(logits, classes), axis=-1)


def _without(logits: jax.Array, classes: jax.Array) -> jax.Array:
    itself = jnp.arange(logits.shape[-1]) == classes[:, None]
    return jnp.where(itself, -jnp.inf, logits)
