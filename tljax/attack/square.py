"""Square attack: random search with squares, without gradients."""

import jax
import jax.numpy as jnp
from jax import lax

from tljax.attack.contract import LogitsFn, along, choose, compiled, draw, fold_in, prepare
from tljax.attack.losses import goal, mean_logits
from tljax.attack.norms import Bounds, into_ball, norm_of
from tljax.errors import RequestError
from tljax.types import Array

# Of 10000 queries; a search of another length has them at the same shares.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def side(query: jax.Array | int, num_queries: int, p: float, height: int, width: int) -> jax.Array:
    """Side of the square, in pixels, that the given query changes."""
    at = jnp.asarray(query) * 10000 // num_queries
    halvings = jnp.sum(at > jnp.array(_HALVINGS))
    largest = min(height, width)
    return jnp.clip(jnp.round(jnp.sqrt(p * height * width / 2.0**halvings)), 1, largest).astype(int)


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
    num_queries: int = 5000,
    p: float = 0.8,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Changes one random square after the other by 2 * epsilon, and keeps what raises the margin.

    It looks at logits alone. A network that it fools more often than attacks by gradients do is not
    robust: it hides its gradients.

    Source: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack
    via random search", 2020 (arXiv 1912.00049), algorithm 2, for Linf. It begins with vertical
    stripes of +-epsilon.

    Args:
        logits_fn: images to logits; never differentiated.
        images: ``[n, height, width, channels]`` floating point within ``bounds``.
        labels: ``[n]`` int, the true classes.
        key: random key.
        epsilon: Linf radius in the units of the images; one number, or ``[n]``.
        ids: ``[n]`` int names of the examples (see `tljax.attack.pgd.pgd`).
        targets: ``[n]`` int, the classes wanted instead; by default any but the label.
        num_queries: number of squares tried. An example that has been fooled is left in peace, and
            when all have been, the search ends.
        p: share of the image that the first squares cover; it is halved nine times.
        bounds: smallest and largest value of a pixel.

    Returns:
        The first image that fools the network, or where none does that of the highest margin.

    Raises:
        RequestError: an argument has the wrong shape or type.
    """
    images, labels, epsilon, keys = prepare(images, labels, key, epsilon, ids)
    if images.ndim != 4:
        raise RequestError(f"square needs images [n, height, width, channels], got {images.shape}")
    _, height, width, channels = images.shape
    aim, ball, radius = goal("margin", labels, targets), norm_of("linf"), along(epsilon, images)

    def evaluate(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = mean_logits(logits_fn, x)
        return x, aim.objective(logits), aim.reached(logits)

    def window(key: jax.Array, length: jax.Array) -> jax.Array:
        """``[height, width, channels]`` of 0 and, within the square, one sign for each channel."""
        where, which = jax.random.split(key)
        corner = jax.random.uniform(where, (2,))
        inside = [
            (position >= start) & (position < start + length)
            for position, size, u in zip(
                (jnp.arange(height)[:, None], jnp.arange(width)),
                (height, width),
                corner,
                strict=True,
            )
            for start in [jnp.floor(u * (size - length + 1))]
        ]
        signs = jax.random.rademacher(which, (channels,), images.dtype)
        return (inside[0] & inside[1])[..., None] * signs

    def body(carry):
        query, (x, margin, fooled) = carry
        length = side(query, num_queries, p, height, width)
        change = jax.vmap(lambda key: window(key, length))(fold_in(keys, query))
        new = into_ball(x + 2 * radius * change, images, epsilon, ball, bounds)
        there = evaluate(new)
        better = ~fooled & (there[2] | (there[1] > margin))
        return query + 1, choose(better, there, (x, margin, fooled))

    stripes = draw(jax.random.rademacher, keys, (1, width, channels), images.dtype)
    start = evaluate(into_ball(images + radius * stripes, images, epsilon, ball, bounds))
    _, (x, _, _) = lax.while_loop(
        lambda carry: (carry[0] < num_queries) & ~carry[1][2].all(), body, (jnp.int32(0), start)
    )
    return x
