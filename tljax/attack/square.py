"""Square Attack: black-box random search, without gradients."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Integer

from tljax.attack.contract import choose, compiled, expand_like, fold_in, prepare
from tljax.attack.losses import make_goal, mean_logits
from tljax.attack.norms import get_norm, project_to_ball
from tljax.attack.types import Bounds, DeviceImages, Images, Labels, LogitsFn, PerExample
from tljax.runtime.errors import RequestError

# The queries, out of 10,000, after which the share p of the image is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def side(query: jax.Array | int, num_queries: int, p: float, height: int, width: int) -> jax.Array:
    """Return the side in pixels of the square that a query changes."""
    scaled_query = jnp.asarray(query) * 10000 // num_queries
    halvings = jnp.sum(scaled_query > jnp.array(_HALVINGS))
    largest = min(height, width)
    return jnp.clip(jnp.round(jnp.sqrt(p * height * width / 2.0**halvings)), 1, largest).astype(int)


class Square(NamedTuple):
    """A square at a random position within an image.

    Attributes:
        rows: ``[height, 1]`` integers, the row of each pixel relative to the square's first row.
        columns: ``[1, width]`` integers, the same for columns.
        inside: ``[height, width, 1]`` bool, True within the square.
    """

    rows: Integer[jax.Array, "height 1"]
    columns: Integer[jax.Array, "1 width"]
    inside: Bool[jax.Array, "height width 1"]


def place(key: jax.Array, length: jax.Array, shape: tuple[int, ...]) -> Square:
    """Draw the position of a square of the given side within an image of the given shape."""
    corner = jax.random.uniform(key, (2,), jnp.float32)
    rows, columns = (
        jnp.arange(size) - jnp.floor(u * (size - length + 1)).astype(int)
        for size, u in zip(shape[:2], corner, strict=True)
    )
    rows, columns = rows[:, None], columns[None]
    inside = (rows >= 0) & (rows < length) & (columns >= 0) & (columns < length)
    return Square(rows, columns, inside[..., None])


def bump(rows: jax.Array, columns: jax.Array, length: jax.Array | int) -> jax.Array:
    """Compute a positive bump in the upper half of a square and a negative one in the lower half.

    The result has L2 norm 1. ``rows`` and ``columns`` are those of `Square`; exchange them for
    bumps in the left and right halves.
    """
    half, size = length // 2, max(rows.size, columns.size)
    sums = jnp.pad(jnp.cumsum(1 / jnp.arange(1, size + 1, dtype=jnp.float32) ** 2), (1, 0))

    def half_bump(first: jax.Array | int, height: jax.Array | int) -> jax.Array:
        # At distance d from the middle the height is the sum of 1 / (k + 1)^2 over k >= d.
        inside = (rows >= first) & (rows < first + height) & (columns >= 0) & (columns < length)
        distance = jnp.maximum(jnp.abs(rows - first - height // 2), jnp.abs(columns - half))
        values = jnp.where(inside, sums[jnp.maximum(height, length) // 2 + 1] - sums[distance], 0)
        return _unit(values)

    return _unit(half_bump(0, half) - half_bump(half, length - half))


def _unit(x: jax.Array) -> jax.Array:
    """Divide each channel of ``[height, width, ...]`` by its L2 norm."""
    return x / (jnp.linalg.norm(x, axis=(0, 1)) + 1e-12)


def _signs(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.rademacher(key, shape, jnp.float32)


def _stripes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _signs(key, (1, *shape[1:]))


def _add(key: jax.Array, delta: jax.Array, epsilon: jax.Array, length: jax.Array) -> jax.Array:
    where, which = jax.random.split(key)
    inside = place(where, length, delta.shape).inside
    return delta + 2 * epsilon * inside * _signs(which, delta.shape[2:])


def _bumps(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Tile an image with bumps, five per row of a square image."""
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
    new_key, old_key, which, turn = jax.random.split(key, 4)
    target, source = (place(key, length, delta.shape) for key in (new_key, old_key))
    upright = bump(target.rows, target.columns, length)
    lying = bump(target.columns, target.rows, length)
    added = jnp.where(jax.random.bernoulli(turn), lying, upright)[..., None]
    new = _unit(added * _signs(which, delta.shape[2:]) + _unit(delta * target.inside))
    # Budget of the new square: the norm of the two old ones, plus what clipping has removed.
    unused = jnp.maximum(epsilon**2 - jnp.sum(delta**2), 0) / delta.shape[2]
    new *= jnp.sqrt(unused + jnp.sum((delta * (target.inside | source.inside)) ** 2))
    return jnp.where(target.inside, new, jnp.where(source.inside, 0, delta))


_SEARCHES = {"linf": (_stripes, _add), "l2": (_bumps, _move)}
"""The initial perturbation, ``(key, shape)``, and proposals, ``(key, delta, epsilon, length)``."""


@compiled
def square(
    logits_fn: LogitsFn,
    images: Images,
    labels: Labels,
    key: jax.Array,
    *,
    epsilon: PerExample,
    ids: Labels | None = None,
    targets: Labels | None = None,
    norm: str = "linf",
    num_queries: int = 5000,
    p: float = 0.8,
    rescale: bool = True,
    bounds: Bounds = (0.0, 1.0),
) -> DeviceImages:
    """Change random squares, keeping the changes that increase the margin loss (Square Attack).

    The attack uses logits only, no gradients. If it fools a network more often than gradient-based
    attacks do, the network masks its gradients.

    Source: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack
    via random search", 2020 (arXiv 1912.00049). Linf is algorithm 2: it starts with vertical
    stripes of +-epsilon and adds +-2 epsilon to a square. L2 is algorithm 3: it starts with bumps
    all over the image, moves the perturbation of one square to another and adds a bump there; the
    norm of the perturbation is epsilon before clipping.

    Args:
        logits_fn: maps images ``[batch, ...]`` to logits ``[batch, classes]``; it need not be
            differentiable.
        images: ``[batch, height, width, channels]`` floating point in ``bounds``.
        labels: ``[batch]`` integers, the true classes.
        key: random key.
        epsilon: radius of the ball in the units of the images, one number or ``[batch]``.
        ids: ``[batch]`` integers that identify the examples (see `tljax.attack.pgd.pgd`).
        targets: ``[batch]`` integers, the classes to be predicted; by default any but the label.
        norm: "linf" or "l2".
        num_queries: largest number of squares to try. An example is no longer changed once it is
            fooled; the search stops when all are.
        p: fraction of the image that the first squares cover; it is halved nine times.
        rescale: scale the schedule of the halvings, which is meant for 10,000 queries, to
            ``num_queries``. AutoAttack does not.
        bounds: smallest and largest value of a pixel; images must lie within them.

    Returns:
        The first image that fools the network, or the one with the highest margin if none does.

    Raises:
        RequestError: an argument has the wrong shape or dtype, an unknown name, or a value out of
            range.
    """
    images, labels, epsilon, keys = prepare(images, labels, key, epsilon, ids)
    if images.ndim != 4:
        raise RequestError(f"square needs [batch, height, width, channels], got {images.shape}")
    goal, ball = make_goal("margin", labels, targets), get_norm(norm)
    radius = expand_like(epsilon, images)
    initialize, propose = _SEARCHES[norm]

    def evaluate(delta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        if norm == "l2":
            delta = radius * ball.steepest(delta)  # rescaled to norm epsilon
        x = project_to_ball(images + delta, images, epsilon, ball, bounds)
        logits = mean_logits(logits_fn, x)
        return x, goal.objective(logits), goal.reached(logits)

    def body(carry):
        query, (x, margin, fooled) = carry
        length = side(query, num_queries if rescale else 10000, p, *images.shape[1:3])
        new = jax.vmap(partial(propose, length=length))(fold_in(keys, query), x - images, epsilon)
        proposal = evaluate(new)
        better = ~fooled & (proposal[2] | (proposal[1] > margin))
        return query + 1, choose(better, proposal, (x, margin, fooled))

    start = evaluate(radius * jax.vmap(partial(initialize, shape=images.shape[1:]))(keys))
    _, (x, _, _) = lax.while_loop(
        lambda carry: (carry[0] < num_queries) & ~carry[1][2].all(), body, (jnp.int32(0), start)
    )
    return x
