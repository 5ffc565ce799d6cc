"""Adversarial training, and the robust accuracy of its result.

Madry et al. 2018 (https://arxiv.org/abs/1706.06083) train on PGD attacks, Wong et al. 2020
(https://arxiv.org/abs/2001.03994) on attacks of one step from a random start.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Shaped

from tljax.attack import fgsm, pgd
from tljax.attack.contract import as_float
from tljax.data.examples import Source
from tljax.data.options import Loading
from tljax.features.extract import Outputs, collect, over_source, track_rows
from tljax.models import Model, apply
from tljax.runtime.types import Array, Batch, Variables
from tljax.train.objectives import Objective
from tljax.train.options import AdversaryConfig
from tljax.train.step import Forward

EVALUATION_STEPS = 20
"""Number of PGD steps for measuring robust accuracy, more than for training."""


def adversarial(objective: Objective, config: AdversaryConfig) -> Objective:
    """Return the objective, evaluated on attacked images.

    The attack runs the network in inference mode: on running statistics, without dropout.

    Args:
        objective: see `tljax.train.objectives`; it must take labels ``[batch]``.
        config: attack and epsilon.
    """

    def adversarial_objective(forward: Forward, batch: Batch, key: jax.Array) -> Any:
        logits_fn = lambda x: forward.evaluate(x).logits  # noqa: E731
        images = attacked(config, logits_fn, batch.inputs, batch.targets, key, batch.indices)
        return objective(forward, batch._replace(inputs=images), key)

    return adversarial_objective


def attacked(
    config: AdversaryConfig,
    logits_fn: Callable[[jax.Array], jax.Array],
    images: Shaped[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    key: jax.Array,
    ids: Int[Array, " batch"],
) -> Float[jax.Array, "batch height width channels"]:
    """Attack images: raise the loss within an Linf ball around each.

    Args:
        config: attack, number of steps and epsilon, the radius of the ball.
        logits_fn: function from images ``[batch, height, width, channels]`` in [0, 1] to logits
            ``[batch, classes]``.
        images: ``[batch, height, width, channels]`` uint8, or floating point in [0, 1].
        labels: ``[batch]`` class indices; -1 for padding.
        key: random key of the random starts.
        ids: ``[batch]`` integer that identifies each example, for its random start.

    Returns:
        ``[batch, height, width, channels]`` floating point in [0, 1]; no gradient flows through it.
    """
    attack = (
        partial(fgsm, random_start=True)
        if config.attack == "fast"
        else partial(pgd, num_steps=config.attack_steps)
    )
    images, labels = as_float(images), jnp.maximum(labels, 0)
    moved = attack(logits_fn, images, labels, key, epsilon=config.epsilon / 255, ids=ids)
    return jax.lax.stop_gradient(moved)


def robust_logits(
    model: Model,
    variables: Variables,
    source: Source,
    loading: Loading,
    config: AdversaryConfig,
    seed: int,
) -> Outputs:
    """Compute the logits of a source under PGD of `EVALUATION_STEPS` steps, at training's epsilon.

    Args:
        model: the network.
        variables: its variables.
        source: labeled images.
        loading: options of how images are read, the batch size and the devices.
        config: for its epsilon.
        seed: seed of the random starts.
    """
    forward = partial(
        _attacked_logits, model, AdversaryConfig("pgd", config.epsilon, EVALUATION_STEPS)
    )
    key = jax.random.key(seed)
    skipped: dict[int, str] = {}
    batches = over_source(
        lambda variables, batch: forward(variables, batch, key),
        variables,
        source,
        model.preprocess,
        loading,
        skipped,
    )
    batches = track_rows(batches, f"attack at {config.epsilon:g}/255", source)
    return collect(batches, source, skipped)


def trace_robust_logits(
    model: Model, config: AdversaryConfig, variables: Variables, batch: Batch, key: jax.Array
) -> jax.stages.Traced:
    """Trace the program that `robust_logits` runs; shapes and shardings of arrays are enough."""
    evaluated = AdversaryConfig("pgd", config.epsilon, EVALUATION_STEPS)
    return _attacked_logits.trace(model, evaluated, variables, batch, key)


@partial(jax.jit, static_argnums=(0, 1))
def _attacked_logits(
    model: Model, config: AdversaryConfig, variables: Variables, batch: Batch, key: jax.Array
) -> jax.Array:
    def logits_fn(images: jax.Array) -> jax.Array:
        return apply(model, variables, images).logits

    return logits_fn(attacked(config, logits_fn, batch.inputs, batch.targets, key, batch.indices))
