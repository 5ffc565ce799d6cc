"""Feature visualization: images that maximize the logit of a class or the mean of a channel.

Wrapped in `jax.jit`, with the variables as an argument, all steps are one compiled loop:

    @jax.jit
    def ideal(variables, labels, keys):
        logits_fn = lambda x: tljax.apply(model, variables, x).logits
        return visualize(class_score(logits_fn, labels), keys, size=224, tv_weight=1e-3)

    siamese_cat, zebra = ideal(variables, jnp.array([284, 340]), jax.random.split(key))
"""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from tljax.explain.gradients import Images
from tljax.explain.parametrization import FOURIER, Parametrization
from tljax.explain.transforms import DEFAULT_TRANSFORMS, Transforms
from tljax.runtime.types import Array

Objective = Callable[[jax.Array], jax.Array]
"""Maps images ``[batch, height, width, 3]`` in [0, 1] to ``[batch]`` values to be maximized."""


def total_variation(images: Images) -> Float[jax.Array, " batch"]:
    """Compute the anisotropic total variation, as ``tf.image.total_variation`` does.

    Source: Rudin, Osher and Fatemi, "Nonlinear total variation based noise removal algorithms",
    Physica D, 1992.

    Args:
        images: ``[batch, height, width, channels]``.

    Returns:
        ``[batch]``, the sum of the absolute differences of vertical and horizontal neighbors.
    """
    images = jnp.asarray(images)
    return sum(jnp.abs(jnp.diff(images, axis=axis)).sum((1, 2, 3)) for axis in (1, 2))  # pyright: ignore[reportReturnType]


def channel_mean(features_fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Return a function that computes the spatial mean of each channel of a feature map.

    To visualize channels ``[batch]`` instead of classes, use the objective
    ``class_score(channel_mean(features_fn), channels)``.

    Args:
        features_fn: maps images to ``[batch, h, w, channels]``.

    Returns:
        A function from images to ``[batch, channels]``.
    """
    return lambda images: features_fn(images).mean((1, 2))


def visualize(
    objective: Objective,
    keys: jax.Array,
    *,
    size: int,
    parametrization: Parametrization = FOURIER,
    transforms: Transforms = DEFAULT_TRANSFORMS,
    tv_weight: float | Array = 0.0,
    num_steps: int = 512,
    learning_rate: float = 0.05,
) -> Float[jax.Array, "batch size size 3"]:
    """Generate images that maximize an objective, by gradient ascent with Adam.

    Adam maximizes ``objective(transformed images) - tv_weight * total_variation(images)``. An image
    depends on its key alone, not on the rest of the batch.

    Source: Erhan et al., "Visualizing higher-layer features of a deep network", University of
    Montreal, 2009; Simonyan, Vedaldi and Zisserman, 2014 (arXiv 1312.6034).

    Args:
        objective: see `Objective`; for a class, ``class_score(logits_fn, labels)``.
        keys: ``[batch]`` random keys, one per image.
        size: side of the images, in pixels.
        parametrization: `FOURIER` or `PIXELS`.
        transforms: random transformations, drawn anew in each step.
        tv_weight: weight of the total variation, one number or ``[batch]``. The default is 0.
        num_steps: number of gradient steps.
        learning_rate: learning rate of Adam, for the parameters before the sigmoid.

    Returns:
        ``[batch, size, size, 3]`` RGB in [0, 1].
    """

    def to_images(params: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: parametrization.image(x, size))(params)

    def loss(params: jax.Array, step: jax.Array) -> jax.Array:
        images = to_images(params)
        transformed = jax.vmap(lambda k, x: transforms(jax.random.fold_in(k, step), x))(
            keys, images
        )
        return jnp.sum(tv_weight * total_variation(images) - objective(transformed))

    adam = optax.adam(learning_rate)

    def update(
        step: jax.Array, carry: tuple[jax.Array, optax.OptState]
    ) -> tuple[jax.Array, optax.OptState]:
        params, state = carry
        updates, state = adam.update(jax.grad(loss)(params, step), state)
        return cast("jax.Array", optax.apply_updates(params, updates)), state

    # A key itself initializes the image; fold_in(key, i) transforms it in step i.
    params = jax.vmap(lambda key: parametrization.init(key, size))(keys)
    params, _ = jax.lax.fori_loop(0, num_steps, update, (params, adam.init(params)))
    return to_images(params)
