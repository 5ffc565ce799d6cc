"""Training on images that were attacked a moment before, and what such a training is worth.

Madry et al. 2018 (https://arxiv.org/abs/1706.06083) attack by PGD, Wong et al. 2020
(https://arxiv.org/abs/2001.03994) by one step from a random start.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tljax.attack import fgsm, pgd
from tljax.config import AdversaryConfig, Loading
from tljax.data.loader import load_batches
from tljax.data.sources import Source
from tljax.models import Model, apply
from tljax.parallel import data_mesh, divisible, gather, local_rows, replicate, shard
from tljax.progress import track
from tljax.transfer.features import Features, process_shard
from tljax.types import Array, Batch, Variables

PROOF_STEPS = 20
"""Of the PGD that measures robust accuracy: more than training has seen."""


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
    images = jnp.asarray(images)
    if jnp.issubdtype(images.dtype, jnp.integer):
        images = images.astype(jnp.float32) / 255
    by = (
        partial(fgsm, random_start=True)
        if config.attack == "fast"
        else partial(pgd, num_steps=config.attack_steps)
    )
    moved = by(
        logits_fn, images, jnp.maximum(labels, 0), key, epsilon=config.epsilon / 255, ids=ids
    )
    return jax.lax.stop_gradient(moved)


def robust_logits(
    model: Model,
    variables: Variables,
    source: Source,
    loading: Loading,
    config: AdversaryConfig,
    seed: int,
) -> Features:
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
    variables = replicate(variables, mesh)
    proof = AdversaryConfig("pgd", config.epsilon, PROOF_STEPS)
    skipped: dict[int, str] = {}
    batches = track(
        load_batches(
            source,
            model.preprocess,
            batch_size=divisible(loading.batch_size, mesh),
            shard=process_shard(),
            workers=loading.workers,
            on_bad_image=loading.on_bad_image,
            skipped=skipped,
        ),
        description=f"attack at {config.epsilon:g}/255",
        total=len(source),
        size=lambda batch: int(batch.mask.sum()),
    )
    values, indices = [], []
    for batch in batches:
        logits = _attacked_logits(model, proof, variables, shard(batch, mesh), jax.random.key(seed))
        mask = gather(np.asarray(batch.mask))
        values.append(gather(local_rows(logits))[mask])
        indices.append(gather(np.asarray(batch.indices))[mask])
    rows = np.concatenate(indices)
    return Features(np.concatenate(values), np.asarray(source.labels)[rows], rows, skipped)


@partial(jax.jit, static_argnums=(0, 1))
def _attacked_logits(
    model: Model, config: AdversaryConfig, variables: Variables, batch: Batch, key: jax.Array
) -> jax.Array:
    def logits_fn(images: jax.Array) -> jax.Array:
        return apply(model, variables, images).logits

    return logits_fn(attacked(config, logits_fn, batch.images, batch.labels, key, batch.indices))
