"""The geometry of a ball around each image: Linf, L2 and L1.

An attack needs five things of a norm. Another norm is another entry of `NORMS`.
"""

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tljax.attack.contract import along, draw
from tljax.runtime.errors import RequestError

Bounds = tuple[float, float]

Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]


class Norm(NamedTuple):
    """Functions of perturbations ``[n, ...]``, radii ``[n]`` and random keys ``[n]``.

    Attributes:
        length: ``(delta) -> [n]``.
        project: ``(delta, radius)``, the nearest perturbation within the ball.
        steepest: ``(gradient)``, the perturbation of length 1 along which the loss grows fastest;
            0 for a gradient of 0. For L1 spread over the largest 1% of the entries (Tramèr and
            Boneh, 2019, arXiv 1904.13000): a single one is soon at a bound.
        inside: ``(keys, shape)``, uniform in the ball of radius 1; ``shape`` is of one image.
        surface: ``(keys, shape)``, on its surface.
    """

    length: Callable[[jax.Array], jax.Array]
    project: Callable[[jax.Array, jax.Array], jax.Array]
    steepest: Callable[[jax.Array], jax.Array]
    inside: Draw
    surface: Draw


def norm_of(name: str, among: Collection[str] = ("linf", "l2")) -> Norm:
    """A norm by its name, of those that an attack can do.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in among:
        raise RequestError(f"there is no norm '{name}' here; choose from {', '.join(among)}")
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


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(x), axis=range(1, x.ndim))


def _clip(delta: jax.Array, radius: jax.Array) -> jax.Array:
    radius = along(radius, delta)
    return jnp.clip(delta, -radius, radius)


def _shrink(delta: jax.Array, radius: jax.Array) -> jax.Array:
    return delta * along(jnp.minimum(1, radius / jnp.maximum(_euclidean(delta), 1e-12)), delta)


def _soften(delta: jax.Array, radius: jax.Array) -> jax.Array:
    # Duchi et al., 2008: every entry loses the same, so that as much as the radius is left. That is
    # the largest of what the k largest entries alone would have to lose.
    entries = jnp.sort(jnp.abs(delta).reshape(len(delta), -1), descending=True)
    excess = jnp.cumsum(entries, axis=1) - radius[:, None]
    loss = jnp.max(excess / jnp.arange(1, entries.shape[1] + 1), axis=1)
    return jnp.sign(delta) * jnp.maximum(jnp.abs(delta) - along(jnp.maximum(loss, 0), delta), 0)


def _largest_few(gradient: jax.Array) -> jax.Array:
    entries = jnp.abs(gradient).reshape(len(gradient), -1)
    least = jax.lax.top_k(entries, math.ceil(entries.shape[1] / 100))[0][:, -1]
    signs = jnp.sign(gradient) * (jnp.abs(gradient) >= along(least, gradient))
    return _over(signs, _sum(signs))


def _normalise(gradient: jax.Array) -> jax.Array:
    # By the largest entry first: squares of tiny numbers are 0.
    scaled = _over(gradient, _largest(gradient))
    return _over(scaled, _euclidean(scaled))


def _cube(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return 2 * draw(jax.random.uniform, keys, shape) - 1


def _sphere(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _normalise(draw(jax.random.normal, keys, shape))


def _solid_ball(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    pairs = jax.vmap(jax.random.split)(keys)
    radius = draw(jax.random.uniform, pairs[:, 0]) ** (1 / math.prod(shape))
    direction = _sphere(pairs[:, 1], shape)
    return direction * along(radius, direction)


def _octahedron(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    pairs = jax.vmap(jax.random.split)(keys)
    point = draw(jax.random.laplace, pairs[:, 0], shape)
    # What is left of the ball's surface in one more dimension without it is uniform inside.
    return _over(point, _sum(point) + draw(jax.random.exponential, pairs[:, 1]))


def _scaled(inside: Draw, length: Callable[[jax.Array], jax.Array]) -> Draw:
    """On the surface: points within the ball, moved outwards."""
    return lambda keys, shape: _over(point := inside(keys, shape), length(point))


NORMS = {
    "linf": Norm(_largest, _clip, jnp.sign, _cube, _scaled(_cube, _largest)),
    "l2": Norm(_euclidean, _shrink, _normalise, _solid_ball, _sphere),
    "l1": Norm(_sum, _soften, _largest_few, _octahedron, _scaled(_octahedron, _sum)),
}
