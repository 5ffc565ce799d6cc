"""Norms, projections and random points for balls in Linf, L2 and L1.

To add a norm, add an entry to `NORMS`.
"""

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tljax.attack.contract import draw, expand_like
from tljax.attack.types import Bounds, DeviceImages, Values
from tljax.runtime.errors import RequestError

Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]


class Norm(NamedTuple):
    """Functions of perturbations ``[batch, ...]``, radii ``[batch]`` and random keys ``[batch]``.

    Attributes:
        length: ``(delta) -> [batch]``, the norm.
        project: ``(delta, radius)``, the nearest perturbation within the ball.
        steepest: ``(gradient)``, the direction of steepest ascent, of length 1; 0 for a gradient of
            0. For L1 it is spread over the largest 1% of the entries (Tramèr and Boneh, 2019,
            arXiv 1904.13000), because a single entry soon reaches a bound.
        inside: ``(keys, shape)``, uniform in the unit ball; ``shape`` is that of one image.
        surface: ``(keys, shape)``, random points on the surface of the unit ball.
    """

    length: Callable[[jax.Array], jax.Array]
    project: Callable[[jax.Array, jax.Array], jax.Array]
    steepest: Callable[[jax.Array], jax.Array]
    inside: Draw
    surface: Draw


def get_norm(name: str, among: Collection[str] = ("linf", "l2")) -> Norm:
    """Return the norm of a name, which must be among those that the attack supports.

    Raises:
        RequestError: the attack does not support a norm of that name.
    """
    if name not in among:
        raise RequestError(f"unsupported norm '{name}': choose from {', '.join(among)}")
    return NORMS[name]


def project_to_ball(
    points: DeviceImages, images: DeviceImages, epsilon: Values, norm: Norm, bounds: Bounds
) -> DeviceImages:
    """Project points into the balls around the images, then clip them to the bounds."""
    return jnp.clip(images + norm.project(points - images, epsilon), *bounds)


def _linf(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), axis=range(1, x.ndim))


def _l2(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=range(1, x.ndim)))


def _divide(x: jax.Array, lengths: jax.Array) -> jax.Array:
    return x / expand_like(jnp.maximum(lengths, jnp.finfo(x.dtype).tiny), x)


def _l1(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(x), axis=range(1, x.ndim))


def _clip(delta: jax.Array, radius: jax.Array) -> jax.Array:
    radius = expand_like(radius, delta)
    return jnp.clip(delta, -radius, radius)


def _rescale(delta: jax.Array, radius: jax.Array) -> jax.Array:
    return delta * expand_like(jnp.minimum(1, radius / jnp.maximum(_l2(delta), 1e-12)), delta)


def _soft_threshold(delta: jax.Array, radius: jax.Array) -> jax.Array:
    # Soft thresholding by the largest of the thresholds that the k largest entries alone would need
    # (Duchi et al., "Efficient projections onto the l1-ball", 2008).
    entries = jnp.sort(jnp.abs(delta).reshape(len(delta), -1), descending=True)
    excess = jnp.cumsum(entries, axis=1) - radius[:, None]
    threshold = jnp.max(excess / jnp.arange(1, entries.shape[1] + 1), axis=1)
    return jnp.sign(delta) * jnp.maximum(
        jnp.abs(delta) - expand_like(jnp.maximum(threshold, 0), delta), 0
    )


def _spread_over_largest(gradient: jax.Array) -> jax.Array:
    entries = jnp.abs(gradient).reshape(len(gradient), -1)
    least = jax.lax.top_k(entries, math.ceil(entries.shape[1] / 100))[0][:, -1]
    signs = jnp.sign(gradient) * (jnp.abs(gradient) >= expand_like(least, gradient))
    return _divide(signs, _l1(signs))


def _normalize(gradient: jax.Array) -> jax.Array:
    # Dividing by the largest entry first keeps the squares of tiny numbers from underflowing.
    scaled = _divide(gradient, _linf(gradient))
    return _divide(scaled, _l2(scaled))


def _cube(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return 2 * draw(jax.random.uniform, keys, shape) - 1


def _sphere(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _normalize(draw(jax.random.normal, keys, shape))


def _solid_ball(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    pairs = jax.vmap(jax.random.split)(keys)
    radius = draw(jax.random.uniform, pairs[:, 0]) ** (1 / math.prod(shape))
    direction = _sphere(pairs[:, 1], shape)
    return direction * expand_like(radius, direction)


def _octahedron(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    pairs = jax.vmap(jax.random.split)(keys)
    point = draw(jax.random.laplace, pairs[:, 0], shape)
    # A point on the surface of a ball with one more dimension is uniform inside without it (Barthe
    # et al., "A probabilistic approach to the geometry of the l_p^n-ball", 2005).
    return _divide(point, _l1(point) + draw(jax.random.exponential, pairs[:, 1]))


def _on_surface(inside: Draw, length: Callable[[jax.Array], jax.Array]) -> Draw:
    """Scale random points inside the unit ball to length 1."""
    return lambda keys, shape: _divide(point := inside(keys, shape), length(point))


NORMS = {
    "linf": Norm(_linf, _clip, jnp.sign, _cube, _on_surface(_cube, _linf)),
    "l2": Norm(_l2, _rescale, _normalize, _solid_ball, _sphere),
    "l1": Norm(
        _l1, _soft_threshold, _spread_over_largest, _octahedron, _on_surface(_octahedron, _l1)
    ),
}
