"""The geometry of a ball around each image: Linf and L2.

An attack needs four things of a norm. Another norm is another entry of `NORMS`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tljax.attack.contract import along, draw
from tljax.errors import RequestError

Bounds = tuple[float, float]


class Norm(NamedTuple):
    """Functions of perturbations ``[n, ...]``, radii ``[n]`` and random keys ``[n]``.

    Attributes:
        length: ``(delta) -> [n]``.
        project: ``(delta, radius)``, the nearest perturbation within the ball.
        steepest: ``(gradient)``, the perturbation of length 1 along which the loss grows fastest;
            0 for a gradient of 0.
        inside: ``(keys, shape)``, uniform in the ball of radius 1; ``shape`` is of one image.
        surface: ``(keys, shape)``, on its surface.
    """

    length: Callable[[jax.Array], jax.Array]
    project: Callable[[jax.Array, jax.Array], jax.Array]
    steepest: Callable[[jax.Array], jax.Array]
    inside: Callable[[jax.Array, tuple[int, ...]], jax.Array]
    surface: Callable[[jax.Array, tuple[int, ...]], jax.Array]


def norm_of(name: str) -> Norm:
    """A norm by its name.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in NORMS:
        raise RequestError(f"there is no norm '{name}'; choose from {', '.join(NORMS)}")
    return NORMS[name]


def into_ball(
    points: jax.Array, images: jax.Array, epsilon: jax.Array, norm: Norm, bounds: Bounds
) -> jax.Array:
    """Projects points into the balls around the images, then clips them to the bounds."""
    return jnp.clip(images + norm.project(points - images, epsilon), *bounds)


def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), axis=range(1, x.ndim))


def _euclidean(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=range(1, x.ndim)))


def _over(x: jax.Array, lengths: jax.Array) -> jax.Array:
    return x / along(jnp.maximum(lengths, jnp.finfo(x.dtype).tiny), x)


def _clip(delta: jax.Array, radius: jax.Array) -> jax.Array:
    radius = along(radius, delta)
    return jnp.clip(delta, -radius, radius)


def _shrink(delta: jax.Array, radius: jax.Array) -> jax.Array:
    return delta * along(jnp.minimum(1, radius / jnp.maximum(_euclidean(delta), 1e-12)), delta)


def _normalise(gradient: jax.Array) -> jax.Array:
    # By the largest entry first: squares of tiny numbers are 0.
    scaled = _over(gradient, _largest(gradient))
    return _over(scaled, _euclidean(scaled))


def _cube(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return draw(jax.random.uniform, keys, shape, float, -1, 1)


def _sphere(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _normalise(draw(jax.random.normal, keys, shape))


def _solid_ball(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    pairs = jax.vmap(jax.random.split)(keys)
    radius = draw(jax.random.uniform, pairs[:, 0]) ** (1 / math.prod(shape))
    direction = _sphere(pairs[:, 1], shape)
    return direction * along(radius, direction)


NORMS = {
    "linf": Norm(
        _largest,
        _clip,
        jnp.sign,
        _cube,
        lambda keys, shape: _over(cube := _cube(keys, shape), _largest(cube)),
    ),
    "l2": Norm(_euclidean, _shrink, _normalise, _solid_ball, _sphere),
}
