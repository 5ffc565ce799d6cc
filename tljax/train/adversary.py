"""Training on images that were attacked a moment before, and what such a training is worth.

Madry et al. 2018 (https://arxiv.org/abs/1706.06083) attack by PGD, Wong et al. 2020
(https://arxiv.org/abs/2001.03994) by one step from a random start.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tljax.attack import fgsm, pgd
from tljax.attack.contract import as_float
from tljax.data.options import Loading
from tljax.data.sources import Source
from tljax.features.extract import Outputs, collect, over_source
from tljax.models import Model, apply
from tljax.runtime.parallel import data_mesh, shard
from tljax.runtime.progress import track
from tljax.runtime.types import Array, Batch, Variables
from tljax.train.objectives import Objective
from tljax.train.options import AdversaryConfig
from tljax.train.step import Forward

PROOF_STEPS = 20
"""Of the PGD that measures robust accuracy: more than training has seen."""


def adversarial(objective: Objective, config: AdversaryConfig) -> Objective:
    """Give an objective images that were attacked a moment before, on running statistics."""

    def of_attacked(forward: Forward, batch: Batch, key: jax.Array) -> Any:
        see = lambda x: forward.evaluate(x).logits  # noqa: E731
        moved = attacked(config, see, batch.inputs, batch.targets, key, batch.indices)
        return objective(forward, batch._replace(inputs=moved), key)

    return of_attacked


def attacked(
    config: AdversaryConfig,
    logits_fn: Callable[[jax.Array], jax.Array],
    images: Array,
    labels: Array,
    key: jax.Array,
    ids: Array,
) -> jax.Array:
    """The images, moved within the ball to where the loss is high.

    Args:
        config: see `AdversaryConfig`.
        logits_fn: images in [0, 1] to logits.
        images: ``[batch, height, width, 3]`` uint8, or floating point in [0, 1].
        labels: ``[batch]``; -1 for padding.
        key: of the random starts.
        ids: ``[batch]`` int, the name of each example.

    Returns:
        Floating point in [0, 1]; no gradient flows back through it.
    """
    by = (
        partial(fgsm, random_start=True)
        if config.attack == "fast"
        else partial(pgd, num_steps=config.attack_steps)
    )
    images, labels = as_float(images), jnp.maximum(labels, 0)
    moved = by(logits_fn, images, labels, key, epsilon=config.epsilon / 255, ids=ids)
    return jax.lax.stop_gradient(moved)


def robust_logits(
    model: Model,
    variables: Variables,
    source: Source,
    loading: Loading,
    config: AdversaryConfig,
    seed: int,
) -> Outputs:
    """Logits of a whole source after PGD of `PROOF_STEPS` steps at the epsilon of the training.

    Args:
        model: the network.
        variables: its variables.
        source: labelled images.
        loading: how they are read.
        config: for epsilon.
        seed: of the random starts.
    """
    mesh = data_mesh(loading.devices)
    forward = partial(_attacked_logits, model, AdversaryConfig("pgd", config.epsilon, PROOF_STEPS))
    key = jax.random.key(seed)
    skipped: dict[int, str] = {}
    batches = track(
        over_source(
            lambda variables, batch: forward(variables, shard(batch, mesh), key),
            variables,
            source,
            model.preprocess,
            loading,
            skipped,
        ),
        description=f"attack at {config.epsilon:g}/255",
        total=len(source),
        size=lambda part: len(part[1]),
    )
    return collect(batches, source, skipped)


@partial(jax.jit, static_argnums=(0, 1))
def _attacked_logits(
    model: Model, config: AdversaryConfig, variables: Variables, batch: Batch, key: jax.Array
) -> jax.Array:
    def logits_fn(images: jax.Array) -> jax.Array:
        return apply(model, variables, images).logits

    return logits_fn(attacked(config, logits_fn, batch.inputs, batch.targets, key, batch.indices))
