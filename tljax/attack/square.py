"""Square attack: random search with squares, without gradients."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tljax.attack.contract import LogitsFn, along, choose, compiled, fold_in, prepare
from tljax.attack.losses import goal, mean_logits
from tljax.attack.norms import Bounds, into_ball, norm_of
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10000 queries


def side(query: jax.Array | int, num_queries: int, p: float, height: int, width: int) -> jax.Array:
    """Side of the square, in pixels, that the given query of ``num_queries`` changes."""
    at = jnp.asarray(query) * 10000 // num_queries
    halvings = jnp.sum(at > jnp.array(_HALVINGS))
    largest = min(height, width)
    return jnp.clip(jnp.round(jnp.sqrt(p * height * width / 2.0**halvings)), 1, largest).astype(int)


class Square(NamedTuple):
    """A square at a random place within an image.

    Attributes:
        rows: ``[height, 1]`` int, of the pixels, counted from its first row.
        columns: ``[1, width]`` int, likewise.
        inside: ``[height, width, 1]`` bool.
    """

    rows: jax.Array
    columns: jax.Array
    inside: jax.Array


def place(key: jax.Array, length: jax.Array, shape: tuple[int, ...]) -> Square:
    """Put a square of the given side anywhere within an image of the given shape."""
    share = jax.random.uniform(key, (2,), jnp.float32)
    rows, columns = (
        jnp.arange(size) - jnp.floor(u * (size - length + 1)).astype(int)
        for size, u in zip(shape[:2], share, strict=True)
    )
    rows, columns = rows[:, None], columns[None]
    inside = (rows >= 0) & (rows < length) & (columns >= 0) & (columns < length)
    return Square(rows, columns, inside[..., None])


def bump(rows: jax.Array, columns: jax.Array, length: jax.Array | int) -> jax.Array:
    """Draw a hill in the upper half of a square, a valley in the lower; the squares sum to 1.

    ``rows`` and ``columns`` are those of `Square`; exchanged, they give left and right halves.
    """
    half, size = length // 2, max(rows.size, columns.size)
    sums = jnp.pad(jnp.cumsum(1 / jnp.arange(1, size + 1, dtype=jnp.float32) ** 2), (1, 0))

    def hill(first: jax.Array | int, height: jax.Array | int) -> jax.Array:
        # A pyramid: at a distance d from its middle the sum of 1 / (k + 1)^2 over k >= d.
        inside = (rows >= first) & (rows < first + height) & (columns >= 0) & (columns < length)
        distance = jnp.maximum(jnp.abs(rows - first - height // 2), jnp.abs(columns - half))
        values = jnp.where(inside, sums[jnp.maximum(height, length) // 2 + 1] - sums[distance], 0)
        return _unit(values)

    return _unit(hill(0, half) - hill(half, length - half))


def _unit(x: jax.Array) -> jax.Array:
    """Divide each channel of ``[height, width, ...]`` by its L2 length."""
    return x / (jnp.linalg.norm(x, axis=(0, 1)) + 1e-12)


def _signs(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.rademacher(key, shape, jnp.float32)


def _stripes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _signs(key, (1, *shape[1:]))


def _add(key: jax.Array, delta: jax.Array, epsilon: jax.Array, length: jax.Array) -> jax.Array:
    where, which = jax.random.split(key)
    inside = place(where, length, delta.shape).inside
    return delta + 2 * epsilon * inside * _signs(which, delta.shape[2:])


def _hills(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Lay bumps side by side, five in a row of a square image."""
    length = max(min(shape[:2]) // 5, 1)
    margin = max(min(shape[:2]) - 5 * length, 0) // 2
    rows, columns = ((size - margin) // length for size in shape[:2])
    which, turn = jax.random.split(key)
    one = bump(jnp.arange(length)[:, None], jnp.arange(length)[None], length)
    turned = jax.random.bernoulli(turn, 0.5, (rows, columns, 1, 1))
    signs = _signs(which, (rows, columns, shape[2]))
    tiles = jnp.einsum("ijab,ijc->iajbc", jnp.where(turned, one.T, one), signs)
    tiles = tiles.reshape(rows * length, columns * length, shape[2])
    return lax.dynamic_update_slice(jnp.zeros(shape, tiles.dtype), tiles, (margin, margin, 0))


def _move(key: jax.Array, delta: jax.Array, epsilon: jax.Array, length: jax.Array) -> jax.Array:
    length = jnp.minimum(jnp.maximum(length, 3) | 1, (min(delta.shape[:2]) - 1) | 1)  # odd
    to, whence, which, turn = jax.random.split(key, 4)
    here, there = (place(key, length, delta.shape) for key in (to, whence))
    upright, lying = bump(here.rows, here.columns, length), bump(here.columns, here.rows, length)
    added = jnp.where(jax.random.bernoulli(turn), lying, upright)[..., None]
    new = _unit(added * _signs(which, delta.shape[2:]) + _unit(delta * here.inside))
    # What the two squares had, and what clipping to the bounds took.
    missing = jnp.maximum(epsilon**2 - jnp.sum(delta**2), 0) / delta.shape[2]
    new *= jnp.sqrt(missing + jnp.sum((delta * (here.inside | there.inside)) ** 2))
    return jnp.where(here.inside, new, jnp.where(there.inside, 0, delta))


_SEARCHES = {"linf": (_stripes, _add), "l2": (_hills, _move)}
"""How it begins, ``(key, shape)``, and what it tries, ``(key, delta, epsilon, length)``."""


@compiled
def square(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    key: jax.Array,
    *,
    epsilon: Array | float,
    ids: Array | None = None,
    targets: Array | None = None,
    norm: str = "linf",
    num_queries: int = 5000,
    p: float = 0.8,
    rescale: bool = True,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Change one random square after the other, and keep what raises the margin.

    It looks at logits alone. A network that it fools more often than attacks by gradients do is not
    robust: it hides its gradients.

    Source: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack
    via random search", 2020 (arXiv 1912.00049). For Linf, algorithm 2: it begins with vertical
    stripes of +-epsilon and adds +-2 epsilon to a square. For L2, algorithm 3: it begins with hills
    and valleys all over the image, and moves the perturbation of one square into another, where a
    hill and a valley are added; the whole always has the length epsilon before it is clipped.

    Args:
        logits_fn: images to logits; never differentiated.
        images: ``[n, height, width, channels]`` floating point within ``bounds``.
        labels: ``[n]`` int, the true classes.
        key: random key.
        epsilon: radius in the units of the images; one number, or ``[n]``.
        ids: ``[n]`` int names of the examples (see `tljax.attack.pgd.pgd`).
        targets: ``[n]`` int, the classes wanted instead; by default any but the label.
        norm: "linf" or "l2".
        num_queries: number of squares tried. An example that has been fooled stays as it is, and
            when all have been, the search ends.
        p: share of the image that the first squares cover; it is halved nine times.
        rescale: whether the halvings, which are meant for 10,000 queries, come at the same shares
            of ``num_queries``; AutoAttack leaves them where they are.
        bounds: smallest and largest value of a pixel.

    Returns:
        The first image that fools the network, or where none does that of the highest margin.

    Raises:
        RequestError: an argument has the wrong shape or type.
    """
    images, labels, epsilon, keys = prepare(images, labels, key, epsilon, ids)
    if images.ndim != 4:
        raise RequestError(f"square needs images [n, height, width, channels], got {images.shape}")
    aim, ball, radius = goal("margin", labels, targets), norm_of(norm), along(epsilon, images)
    begin, propose = _SEARCHES[norm]

    def evaluate(delta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        if norm == "l2":
            delta = radius * ball.steepest(delta)  # on the sphere
        x = into_ball(images + delta, images, epsilon, ball, bounds)
        logits = mean_logits(logits_fn, x)
        return x, aim.objective(logits), aim.reached(logits)

    def body(carry):
        query, (x, margin, fooled) = carry
        length = side(query, num_queries if rescale else 10000, p, *images.shape[1:3])
        new = jax.vmap(partial(propose, length=length))(fold_in(keys, query), x - images, epsilon)
        there = evaluate(new)
        better = ~fooled & (there[2] | (there[1] > margin))
        return query + 1, choose(better, there, (x, margin, fooled))

    start = evaluate(radius * jax.vmap(partial(begin, shape=images.shape[1:]))(keys))
    _, (x, _, _) = lax.while_loop(
        lambda carry: (carry[0] < num_queries) & ~carry[1][2].all(), body, (jnp.int32(0), start)
    )
    return x
