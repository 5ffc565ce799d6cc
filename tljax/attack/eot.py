"""Expectation over transformation: attacks on networks that draw random numbers."""

from collections.abc import Callable

import jax

from tljax.attack.contract import LogitsFn, fingerprint
from tljax.runtime.errors import RequestError


def eot(
    logits_fn: Callable[[jax.Array, jax.Array], jax.Array], key: jax.Array, samples: int = 20
) -> LogitsFn:
    """A network with random numbers as one that attacks can average over.

        logits_fn = eot(lambda images, key: network(noisy(images, key)), jax.random.key(0))
        adversarial = apgd(logits_fn, images, labels, key, epsilon=8 / 255)

    Losses, gradients and logits are means over the samples. Each sample of each image has a key of
    its own, made of ``key`` and of the image's values: an iteration meets new random numbers, and
    still nothing depends on the position in the batch, and the same image gives the same logits.

    Source: Athalye et al., "Synthesizing robust adversarial examples", 2018 (arXiv 1707.07397).

    Args:
        logits_fn: ``(images [1, ...], key) -> [1, classes]``; it is vectorised over the examples.
        key: random key.
        samples: how many draws; AutoAttack's "rand" takes 20.

    Returns:
        A function of images ``[n, ...]`` to logits ``[samples, n, classes]``.

    Raises:
        RequestError: ``samples`` is less than 1.
    """
    if samples < 1:
        raise RequestError(f"samples {samples} must be at least 1")

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        return logits_fn(image[None], key)[0]

    def sampled(images: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda id_: jax.random.split(jax.random.fold_in(key, id_), samples))(
            fingerprint(images)
        )
        return jax.vmap(jax.vmap(one), in_axes=(None, 1))(images, keys)

    return sampled
