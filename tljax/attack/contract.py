"""What every attack is given: checked arrays, and randomness that belongs to an example.

The random numbers of an example depend on the key and on the example's id alone, never on its
position or its neighbours. So an example is attacked in the same way alone, in any batch, on any
number of devices, and after those that were already fooled have been sorted out.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.tree_util import Partial

from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array

LogitsFn = Callable[[jax.Array], jax.Array]
"""Images ``[n, ...]`` to logits ``[n, classes]``; of a randomised network ``[samples, n, classes]``
(see `tljax.attack.eot.eot`), and then losses and logits are averaged over the samples.

Of a ``jax.tree_util.Partial(function, variables)`` the variables are arguments of the compiled
program: they are not copied into it, and other variables compile nothing.
"""

Function = TypeVar("Function", bound=Callable[..., Any])

_TRACED = {"logits_fn", "images", "labels", "key", "epsilon", "ids", "targets", "step_size"}

_COUNTS = {"candidates": 2} | dict.fromkeys(
    ("num_steps", "num_targets", "num_queries", "restarts", "search_steps"), 1
)
"""Smallest value of the options that are whole numbers."""


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
    """The arguments that all attacks share, converted.

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


def compiled(attack: Function, *, unbounded: bool = False) -> Function:
    """Check an attack's arguments, and run it by `jax.jit` with arrays traced and all else static.

    A second call with the same ``logits_fn`` object, or with a `Partial` of the same function,
    compiles nothing, whatever the values of the arrays, epsilon among them. Within another `jit`
    the attack becomes part of that; values that are traced cannot be checked.

    Images of bfloat16 and float16 are attacked in float32, where small steps do not vanish. What
    the network sees and what is returned has the images' type: each value is rounded towards the
    image, so that it stays in the ball.

    Args:
        attack: see `Attack`.
        unbounded: whether epsilon may be infinite.
    """
    signature = inspect.signature(attack)

    @wraps(attack)
    def run(logits_fn: Partial, images: jax.Array, **options: Any) -> jax.Array:
        if jnp.finfo(images.dtype).bits >= 32:
            return attack(logits_fn, images, **options)
        wide = images.astype(jnp.float32)
        limit = one_each(options["epsilon"], wide, "epsilon")
        found = attack(Partial(_rounded, logits_fn, images, limit), wide, **options)
        return _round_towards(found, images, limit)

    names = [name for name in signature.parameters if name not in _TRACED]
    jitted = jax.jit(run, static_argnames=names)

    @wraps(attack)
    def call(*args: Any, **options: Any) -> jax.Array:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        given = bound.arguments | {"logits_fn": as_tree(bound.arguments["logits_fn"])}
        with jax.ensure_compile_time_eval():  # what another `jit` does not trace can be checked
            for name in given.keys() & _TRACED - {"logits_fn", "key"}:
                given[name] = as_array(given[name], name, signature.parameters[name].default)
        _check(given, math.inf if unbounded else float(jnp.finfo(jnp.float32).max))
        return jitted(**given)

    return call  # pyright: ignore[reportReturnType]


def as_array(value: Any, name: str, default: Any = inspect.Parameter.empty) -> Any:
    """Convert an argument to an array; None stays None where it is the default.

    Raises:
        RequestError: it holds something else than numbers.
    """
    try:
        return None if value is default is None else jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{name} must be numbers, got {value!r:.60}") from error


def _check(given: dict[str, Any], largest_epsilon: float) -> None:
    images, key = given["images"], given["key"]
    given["bounds"] = check_images(images, given["bounds"])
    try:
        jax.eval_shape(jax.random.fold_in, key, 0)
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"key must be one key, as jax.random.key(0) is, got {key!r:.27}"
        ) from error
    for name, least in _COUNTS.items():
        value = given.get(name, least)
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
            raise RequestError(f"{name} must be a whole number, at least {least}, got {value}")
    for name in ("labels", "ids", "targets"):
        value = given.get(name)
        if value is None:
            continue
        if value.shape != images.shape[:1] or not jnp.issubdtype(value.dtype, jnp.integer):
            batch = "" if value.size > 1 else f" for images {list(images.shape)}: pass image[None]?"
            raise RequestError(
                f"{name} must be {len(images)} integers, one per image, "
                f"got {value.dtype} {list(value.shape)}{batch}"
            )
        if name != "ids":
            check_classes(given["logits_fn"], images, value, name)
    must = "must be at least 0" + ("" if math.isinf(largest_epsilon) else " and finite")
    for name in ("epsilon", "step_size"):
        if given.get(name) is not None:
            _check_range(given[name], 0, largest_epsilon, f"{name} {must}")


def check_images(images: Array, bounds: Any) -> tuple[float, float]:
    """Check the type and the shape of images, and their values unless they are traced.

    Returns:
        The bounds, a pair of floats.

    Raises:
        RequestError: they are not floating point ``[n, ...]`` within the bounds, or those no pair.
    """
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError):
        low = high = math.nan
    if not low < high:
        raise RequestError(f"bounds must be (low, high), the lower one first, got {bounds}")
    if images.ndim < 2 or not len(images) or not jnp.issubdtype(images.dtype, jnp.floating):
        raise RequestError(
            f"images must be floating point [n, ...] and at least one, got {images.dtype} "
            f"{list(images.shape)}: divide uint8 by 255"
        )
    rounding = 1e-6 * (high - low)  # of whoever computed them; the attacks cut it off
    must = f"images must be finite and within the bounds {low:g} to {high:g}"
    advice = ": divide by 255, or pass bounds=(low, high)"
    _check_range(images, low - rounding, high + rounding, must, advice)
    return low, high


def check_classes(logits_fn: Partial, images: Array, classes: Array, name: str) -> None:
    """Check that the network has a logit for each of the classes, unless they are traced.

    Raises:
        RequestError: it has none, or its logits for the images have a wrong shape.
    """
    if not isinstance(classes, Tracer):
        count = _logits.eval_shape(logits_fn, images).shape[-1]
        advice = f": the network has {count} classes"
        _check_range(classes, 0, count - 1, f"{name} must be from 0 to {count - 1}", advice)


def _check_range(values: Array, low: float, high: float, must: str, advice: str = "") -> None:
    if not isinstance(values, Tracer):
        with jax.ensure_compile_time_eval():
            least, most = float(jnp.min(values)), float(jnp.max(values))
        if not (low <= least and most <= high):  # so that NaN is not
            raise RequestError(f"{must}, got {least:.6g} to {most:.6g}{advice}")


def _rounded(logits_fn: Partial, images: jax.Array, limit: jax.Array, x: jax.Array) -> jax.Array:
    """Show the network what `compiled` would return; the gradient is that of a cast."""
    cast = x.astype(images.dtype)
    shown = _round_towards(lax.stop_gradient(x), images, limit)
    return logits_fn(cast + (shown - lax.stop_gradient(cast)))


def _round_towards(x: jax.Array, images: jax.Array, limit: jax.Array) -> jax.Array:
    """Round to the type of the images, towards them, and to no more than the limit from them."""
    near = x.astype(images.dtype)
    origin = images.astype(x.dtype)
    allowed = jnp.minimum(jnp.abs(x - origin), along(limit, x))
    return jnp.where(jnp.abs(near - origin) > allowed, jnp.nextafter(near, images), near)


def as_tree(logits_fn: LogitsFn) -> Partial:
    """The function as an argument of `jax.jit`: static itself, with arrays that are traced.

    Raises:
        RequestError: it cannot be hashed.
    """
    if isinstance(logits_fn, Partial):
        return logits_fn
    try:
        hash(logits_fn)
        return Partial(logits_fn)
    except TypeError as error:
        raise RequestError(
            f"logits_fn must be a function ({error}): wrap it, lambda images: model(images)"
        ) from error


def prepare(
    images: Array, labels: Array, key: jax.Array, epsilon: Array | float, ids: Array | None
) -> Examples:
    """Give each example its epsilon and its key."""
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    ids = fingerprint(images) if ids is None else jnp.asarray(ids)
    keys = jax.vmap(partial(jax.random.fold_in, key))(ids)
    return Examples(images, labels.astype(jnp.int32), one_each(epsilon, images, "epsilon"), keys)


def sample_logits(logits_fn: LogitsFn, images: jax.Array) -> jax.Array:
    """Compute logits ``[samples, n, classes]`` in the type of the images, float32 or wider.

    Raises:
        RequestError: the network returns anything else.
    """
    logits = logits_fn(images)
    shape: tuple[int, ...] = getattr(logits, "shape", ())
    if len(shape) not in (2, 3) or shape[-2:-1] != (len(images),):
        raise RequestError(
            f"logits_fn must return [n, classes] or [samples, n, classes] for n = {len(images)} "
            f"images, got {list(shape) or type(logits).__name__}"
        )
    return logits.astype(_at_least_float32(images)).reshape(-1, *logits.shape[-2:])


_logits = jax.jit(sample_logits)  # its shapes are remembered


def _at_least_float32(images: Array) -> jnp.dtype:
    return jnp.promote_types(images.dtype, jnp.float32)


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

    loss = jnp.full(len(images), -jnp.inf, images.dtype)
    return lax.fori_loop(0, count, body, (images, fooled, loss))


def fold_in(keys: jax.Array, number: Array | int) -> jax.Array:
    """The keys ``[n]`` of the examples for the iteration or restart ``number``."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def draw(
    sampler: Callable[..., jax.Array],
    keys: jax.Array,
    shape: tuple[int, ...] = (),
    dtype: Any = jnp.float32,
) -> jax.Array:
    """``sampler(key, shape, dtype)`` for each of the keys ``[n]``, stacked."""
    return jax.vmap(lambda key: sampler(key, shape, dtype))(keys)


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
