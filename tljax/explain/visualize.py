"""What does a class, or a channel, look like? Gradient ascent on a picture.

Wrapped in `jax.jit`, with the variables as an argument, all steps are one compiled loop:

    @jax.jit
    def ideal(variables, labels, keys):
        logits_fn = lambda x: tljax.apply(model, variables, x).logits
        return visualize(score_of(logits_fn, labels), keys, size=224, tv_weight=1e-3)

    siamese_cat, zebra = ideal(variables, jnp.array([284, 340]), jax.random.split(key))
"""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax

from tljax.explain.parametrization import FOURIER, Parametrization
from tljax.explain.transforms import MOVING, Transforms
from tljax.runtime.types import Array

Objective = Callable[[jax.Array], jax.Array]
"""``[batch, height, width, 3]`` pictures in [0, 1] to ``[batch]``: what is to become large."""


def total_variation(images: Array) -> jax.Array:
    """How much neighbours differ (Rudin, Osher and Fatemi 1992, in its anisotropic form).

    Args:
        images: ``[batch, height, width, channels]``.

    Returns:
        ``[batch]``: the sum of the absolute differences of all vertical and horizontal neighbours,
        as ``tf.image.total_variation``.
    """
    images = jnp.asarray(images)
    return sum(jnp.abs(jnp.diff(images, axis=axis)).sum((1, 2, 3)) for axis in (1, 2))  # pyright: ignore[reportReturnType]


def channel_mean(features_fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Channels as if they were classes: the "logit" of a channel is its mean over the map.

    ``score_of(channel_mean(features_fn), channels)`` is then the objective of channel
    visualisation, with ``channels`` ``[batch]``.

    Args:
        features_fn: images to ``[batch, h, w, channels]``.

    Returns:
        A function of images to ``[batch, channels]``.
    """
    return lambda images: features_fn(images).mean((1, 2))


def visualize(
    objective: Objective,
    keys: jax.Array,
    *,
    size: int,
    parametrization: Parametrization = FOURIER,
    transforms: Transforms = MOVING,
    tv_weight: float | Array = 0.0,
    num_steps: int = 512,
    learning_rate: float = 0.05,
) -> jax.Array:
    """Climbs to pictures that make the objective large (Erhan et al. 2009; Simonyan et al. 2014).

    Adam maximises ``objective(moved pictures) - tv_weight * total_variation(pictures)``. A picture
    is a function of its key alone, whatever else is in the batch.

    Args:
        objective: see `Objective`; for a class `score_of` the logits.
        keys: ``[batch]`` random keys, one for each picture.
        size: side of the pictures, in pixels.
        parametrization: `FOURIER` or `PIXELS`.
        transforms: how the picture moves from step to step.
        tv_weight: of the total variation, for all or ``[batch]`` for each picture.
        num_steps: gradient steps.
        learning_rate: of Adam (Kingma and Ba 2015), for the parameters before the sigmoid.

    Returns:
        ``[batch, size, size, 3]`` RGB in [0, 1].
    """

    def images_of(params: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: parametrization.image(x, size))(params)

    def loss(params: jax.Array, step: jax.Array) -> jax.Array:
        images = images_of(params)
        moved = jax.vmap(lambda k, x: transforms(jax.random.fold_in(k, step), x))(keys, images)
        return jnp.sum(tv_weight * total_variation(images) - objective(moved))

    adam = optax.adam(learning_rate)

    def climb(
        step: jax.Array, carry: tuple[jax.Array, optax.OptState]
    ) -> tuple[jax.Array, optax.OptState]:
        params, state = carry
        change, state = adam.update(jax.grad(loss)(params, step), state)
        return cast("jax.Array", optax.apply_updates(params, change)), state

    # The first random number of a key makes the picture; step i's come from fold_in(key, i).
    params = jax.vmap(lambda key: parametrization.init(key, size))(keys)
    params, _ = jax.lax.fori_loop(0, num_steps, climb, (params, adam.init(params)))
    return images_of(params)
