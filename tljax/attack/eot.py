"""Expectation over transformation (EOT): attacks on randomized networks."""

from collections.abc import Callable

import jax

from tljax.attack.contract import fingerprint
from tljax.attack.types import LogitsFn
from tljax.runtime.errors import RequestError


def eot(
    logits_fn: Callable[[jax.Array, jax.Array], jax.Array], key: jax.Array, samples: int = 20
) -> LogitsFn:
    """Wrap a randomized network so that attacks average over its random numbers (EOT).

        logits_fn = eot(lambda images, key: network(noisy(images, key)), jax.random.key(0))
        adversarial = apgd(logits_fn, images, labels, key, epsilon=8 / 255)

    Losses, gradients and logits are means over the samples, which cost ``samples`` times the time
    and memory. Each sample of each image has its own key, derived from ``key`` and the image's
    values: an iteration that changes the image draws new random numbers, and the same image gives
    the same logits at any position in any batch.

    Source: Athalye et al., "Synthesizing robust adversarial examples", 2018 (arXiv 1707.07397).

    Args:
        logits_fn: ``(images [1, ...], key) -> logits [1, classes]``; vectorized by `jax.vmap`.
        key: random key.
        samples: number of samples per image; 20 in the "rand" version of AutoAttack.

    Returns:
        A function from images ``[batch, ...]`` to logits ``[samples, batch, classes]``.

    Raises:
        RequestError: ``samples`` is less than 1.
    """
    if samples < 1:
        raise RequestError(f"samples must be at least 1, got {samples}")

    def sampled(images: jax.Array) -> jax.Array:
        split = jax.vmap(lambda id_: jax.random.split(jax.random.fold_in(key, id_), samples))
        sample = jax.vmap(lambda image, key: logits_fn(image[None], key)[0])
        return jax.vmap(sample, in_axes=(None, 1))(images, split(fingerprint(images)))

    return sampled
