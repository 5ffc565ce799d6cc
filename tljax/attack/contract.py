"""What every attack is given: checked arrays, and randomness that belongs to an example.

The random numbers of an example depend on the key and on the example's id alone, never on its
position or its neighbours. So an example is attacked in the same way alone, in any batch, on any
number of devices, and after those that were already fooled have been sorted out.
"""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from tljax.errors import RequestError
from tljax.types import Array

LogitsFn = Callable[[jax.Array], jax.Array]
"""Images ``[n, ...]`` to logits ``[n, classes]``; of a randomised network ``[samples, n, classes]``
(see `tljax.attack.eot.eot`), and then losses and logits are averaged over the samples.

Of a ``jax.tree_util.Partial(function, variables)`` the variables are arguments of the compiled
program: they are not copied into it, and other variables compile nothing.
"""

Function = TypeVar("Function", bound=Callable[..., Any])

_TRACED = {"logits_fn", "images", "labels", "key", "epsilon", "ids", "targets", "step_size"}


class Attack(Protocol):
    """A function from images to adversarial images of the same shape, type and bounds."""

    def __call__(
        self,
        logits_fn: LogitsFn,
        images: Array,
        labels: Array,
        key: jax.Array,
        *,
        epsilon: Array | float,
        ids: Array | None = None,
    ) -> jax.Array:
        """Attacks ``images``; `tljax.attack.pgd.pgd` says what the arguments are."""
        ...


Found = tuple[jax.Array, jax.Array, jax.Array]
"""Images ``[n, ...]``, whether they reach the goal ``[n]``, and their loss ``[n]``."""


class Examples(NamedTuple):
    """The arguments that all attacks share, checked.

    Attributes:
        images: ``[n, ...]`` floating point.
        labels: ``[n]`` int32.
        epsilon: ``[n]`` radius of the ball, in the units of the images.
        keys: ``[n]`` one random key per example.
    """

    images: jax.Array
    labels: jax.Array
    epsilon: jax.Array
    keys: jax.Array


def compiled(attack: Function) -> Function:
    """`jax.jit` for an attack: arrays are traced, everything else is static.

    A second call with the same ``logits_fn`` object, or with a `Partial` of the same function,
    compiles nothing, whatever the values of the arrays, epsilon among them. Within another `jit`
    the attack becomes part of that.
    """
    names = inspect.signature(attack).parameters
    jitted = jax.jit(attack, static_argnames=[name for name in names if name not in _TRACED])

    @wraps(attack)
    def call(logits_fn: LogitsFn, *args: Any, **options: Any) -> Any:
        return jitted(as_tree(logits_fn), *args, **options)

    return call  # pyright: ignore[reportReturnType]


def as_tree(logits_fn: LogitsFn) -> Partial:
    """The function as an argument of `jax.jit`: static itself, with arrays that are traced.

    Raises:
        RequestError: it cannot be hashed.
    """
    if isinstance(logits_fn, Partial):
        return logits_fn
    try:
        hash(logits_fn)
    except TypeError as error:
        raise RequestError(
            f"logits_fn cannot be hashed ({error}): wrap it, lambda images: model(images)"
        ) from error
    return Partial(logits_fn)


def prepare(
    images: Array, labels: Array, key: jax.Array, epsilon: Array | float, ids: Array | None
) -> Examples:
    """Checks shapes and types, and gives each example its epsilon and its key.

    Raises:
        RequestError: an argument has the wrong shape or type.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    if images.ndim < 2 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise RequestError(
            f"images must be floating point [n, ...], got {images.dtype} {list(images.shape)}: "
            "divide uint8 by 255"
        )
    n = len(images)
    ids = fingerprint(images) if ids is None else jnp.asarray(ids)
    for name, value in (("labels", labels), ("ids", ids)):
        if value.shape != (n,) or not jnp.issubdtype(value.dtype, jnp.integer):
            raise RequestError(
                f"{name} must be {n} integers, one per image, got {value.dtype} {list(value.shape)}"
            )
    epsilon = one_each(epsilon, images, "epsilon")
    keys = jax.vmap(partial(jax.random.fold_in, key))(ids)
    return Examples(images, labels.astype(jnp.int32), epsilon, keys)


def as_float(images: Array) -> jax.Array:
    """uint8 images as floating point in [0, 1]; what is floating point stays what it is."""
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def one_each(value: Array | float, images: jax.Array, name: str) -> jax.Array:
    """``[n]`` values in the type of the images, of a scalar or of one value per image.

    Raises:
        RequestError: ``value`` is neither.
    """
    value = jnp.asarray(value, images.dtype)
    if value.shape not in ((), (len(images),)):
        raise RequestError(
            f"{name} must be a number or {len(images)} numbers, one per image, "
            f"got shape {list(value.shape)}"
        )
    return jnp.broadcast_to(value, (len(images),))


def along(values: jax.Array, images: jax.Array) -> jax.Array:
    """``[n]`` values as ``[n, 1, 1, 1]``, to be combined with images."""
    return values.reshape(-1, *[1] * (images.ndim - 1))


def choose(condition: jax.Array, new: Any, old: Any) -> Any:
    """For each example ``new`` where the condition ``[n]`` holds; trees of arrays ``[n, ...]``."""
    return jax.tree.map(lambda a, b: jnp.where(along(condition, a), a, b), new, old)


def best_of(run: Callable[[jax.Array, jax.Array], Found], count: int, images: jax.Array) -> Found:
    """The best of the runs ``0 .. count - 1``, which are told who has been fooled already."""
    fooled = jnp.zeros(len(images), bool)
    if count == 1:
        return run(jnp.int32(0), fooled)

    def body(number: jax.Array, best: Found) -> Found:
        new = run(number, best[1])
        return choose(~best[1] & (new[1] | (new[2] > best[2])), new, best)

    loss = jnp.full(len(images), -jnp.inf, jnp.promote_types(images.dtype, jnp.float32))
    return lax.fori_loop(0, count, body, (images, fooled, loss))


def fold_in(keys: jax.Array, number: Array | int) -> jax.Array:
    """The keys ``[n]`` of the examples for the iteration or restart ``number``."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def draw(sampler: Callable[..., jax.Array], keys: jax.Array, *args: Any) -> jax.Array:
    """``sampler(key, *args)`` for each of the keys ``[n]``, stacked."""
    return jax.vmap(lambda key: sampler(key, *args))(keys)


def fingerprint(images: jax.Array) -> jax.Array:
    """``[n]`` uint32: a hash of each image's float32 values, the id of an example without one.

    A sum of mixed words, so that no order of summation and no sharding changes it. The mixing is
    the finaliser of MurmurHash3 (Appleby, 2011).
    """
    words = lax.bitcast_convert_type(lax.stop_gradient(images).astype(jnp.float32), jnp.uint32)
    words = words.reshape(len(images), -1)
    words += jnp.arange(words.shape[1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        words = (words ^ (words >> shift)) * jnp.uint32(multiplier)
    return jnp.sum(words ^ (words >> 16), axis=1, dtype=jnp.uint32)
