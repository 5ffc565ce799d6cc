"""The interface of attacks: checks of the arguments, per-example random keys, compilation.

The random numbers of an example depend only on the key and on the id of the example. The attack on
an example is therefore the same in any batch, at any position, on any number of devices, and after
other examples have been removed.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Float

from tljax.attack.types import Images, LabelMatrix, Labels, LogitsFn, PerExample, Values
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array

Function = TypeVar("Function", bound=Callable[..., Any])

_TRACED = {"logits_fn", "images", "labels", "key", "epsilon", "ids", "targets", "step_size"}

_INTEGER_OPTIONS = {"candidates": 2} | dict.fromkeys(
    ("num_steps", "num_targets", "num_queries", "restarts", "search_steps"), 1
)
"""Smallest value of each integer option."""


class Attack(Protocol):
    """A function from images to adversarial images of the same shape, dtype and bounds."""

    def __call__(
        self,
        logits_fn: LogitsFn,
        images: Images,
        labels: Labels | LabelMatrix,
        key: jax.Array,
        *,
        epsilon: PerExample,
        ids: Labels | None = None,
    ) -> jax.Array:
        """Attack ``images``; the arguments are those of `tljax.attack.pgd.pgd`."""
        ...


Result = tuple[jax.Array, jax.Array, jax.Array]
"""Images ``[batch, ...]``, success ``[batch]`` bool, and loss ``[batch]`` of one run."""


def compiled(attack: Function, *, unbounded: bool = False) -> Function:
    """Decorate an attack: check its arguments and run it under `jax.jit`.

    Arrays are traced, all other arguments are static. Calls with the same ``logits_fn`` object, or
    with a `Partial` of the same function, share one compilation, whatever the values of the arrays
    (epsilon included). Within another `jit` the attack becomes part of that program; traced values
    are not checked.

    Images of bfloat16 and float16 are attacked in float32, so that small steps are not lost. The
    network is called with, and the attack returns, values of the images' dtype: each is rounded
    towards the image, so that it stays in the ball.

    Args:
        attack: see `Attack`.
        unbounded: allow an infinite epsilon.
    """
    signature = inspect.signature(attack)

    @wraps(attack)
    def run(logits_fn: Partial, images: jax.Array, **options: Any) -> jax.Array:
        if jnp.finfo(images.dtype).bits >= 32:
            return attack(logits_fn, images, **options)
        wide = images.astype(jnp.float32)
        epsilon = per_example(options["epsilon"], wide, "epsilon")
        adversarial = attack(Partial(_round_input, logits_fn, images, epsilon), wide, **options)
        return _round_towards(adversarial, images, epsilon)

    names = [name for name in signature.parameters if name not in _TRACED]
    jitted = jax.jit(run, static_argnames=names)

    @wraps(attack)
    def call(*args: Any, **options: Any) -> jax.Array:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        arguments = bound.arguments | {"logits_fn": as_partial(bound.arguments["logits_fn"])}
        with jax.ensure_compile_time_eval():  # within another `jit`, check what it does not trace
            for name in arguments.keys() & _TRACED - {"logits_fn", "key"}:
                optional = signature.parameters[name].default is None
                arguments[name] = as_array(arguments[name], name, optional=optional)
        _check(arguments, math.inf if unbounded else float(jnp.finfo(jnp.float32).max))
        return jitted(**arguments)

    return call  # pyright: ignore[reportReturnType]


def as_array(value: Any, name: str, *, optional: bool = False) -> Any:
    """Convert an argument to an array; None stays None if the argument is optional.

    Raises:
        RequestError: the value is not numeric.
    """
    try:
        return None if optional and value is None else jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{name} must be numbers, got {value!r:.60}") from error


def _check(arguments: dict[str, Any], largest_epsilon: float) -> None:
    images, key = arguments["images"], arguments["key"]
    arguments["bounds"] = check_images(images, arguments["bounds"])
    try:
        jax.eval_shape(jax.random.fold_in, key, 0)
    except (TypeError, ValueError) as error:
        raise RequestError(f"key must be one jax.random.key(seed), got {key!r:.27}") from error
    for name, minimum in _INTEGER_OPTIONS.items():
        value = arguments.get(name, minimum)
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < minimum:
            raise RequestError(f"{name} must be a whole number, at least {minimum}, got {value}")
    _check_classes_or_labels(arguments)
    requirement = "must be at least 0" + ("" if math.isinf(largest_epsilon) else " and finite")
    for name in ("epsilon", "step_size"):
        if arguments.get(name) is not None:
            _check_range(arguments[name], 0, largest_epsilon, f"{name} {requirement}")


def _check_classes_or_labels(arguments: dict[str, Any]) -> None:
    images = arguments["images"]
    several = arguments.get("loss") == "bce"
    if several and "targets" not in arguments:
        raise RequestError("loss='bce' is for several labels, this attack for classes: use apgd")
    for name in ("labels", "ids", "targets"):
        value = arguments.get(name)
        if value is None:
            continue
        if several and name != "ids":
            check_labels(arguments["logits_fn"], images, value, name)
            continue
        if value.shape != images.shape[:1] or not jnp.issubdtype(value.dtype, jnp.integer):
            batch = "" if value.size > 1 else f" for images {list(images.shape)}: pass image[None]?"
            raise RequestError(
                f"{name} must be {len(images)} integers, one per image, "
                f"got {value.dtype} {list(value.shape)}{batch}"
            )
        if name != "ids":
            check_classes(arguments["logits_fn"], images, value, name)


def check_images(images: Images, bounds: Any) -> tuple[float, float]:
    """Check the dtype and shape of images, and their values unless they are traced.

    Returns:
        The bounds as a pair of floats.

    Raises:
        RequestError: the images are not floating point ``[batch, ...]`` within the bounds, or the
            bounds are not a pair ``(low, high)``.
    """
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError):
        low = high = math.nan
    if not low < high:
        raise RequestError(f"bounds must be (low, high), the lower one first, got {bounds}")
    if images.ndim < 2 or not len(images) or not jnp.issubdtype(images.dtype, jnp.floating):
        raise RequestError(
            f"images must be floating point [batch, ...] and at least one, got {images.dtype} "
            f"{list(images.shape)}: divide uint8 by 255"
        )
    rounding = 1e-6 * (high - low)  # tolerance for rounding errors, which the attacks clip
    requirement = f"images must be finite and within the bounds {low:g} to {high:g}"
    advice = ": divide by 255, or pass bounds=(low, high)"
    _check_range(images, low - rounding, high + rounding, requirement, advice)
    return low, high


def check_classes(logits_fn: Partial, images: Images, classes: Labels, name: str) -> None:
    """Check that the network has a logit for each of the classes, unless they are traced.

    Raises:
        RequestError: a class is out of range, or the logits have the wrong shape.
    """
    if not isinstance(classes, Tracer):
        count = _logits.eval_shape(logits_fn, images).shape[-1]
        advice = f": the network has {count} classes"
        _check_range(classes, 0, count - 1, f"{name} must be from 0 to {count - 1}", advice)


def check_labels(logits_fn: Partial, images: Images, labels: LabelMatrix, name: str) -> None:
    """Check several labels per image: their shape, and unless they are traced their values.

    Raises:
        RequestError: there is not one label per image and logit, or one is not 0, 1 or NaN.
    """
    count = len(images)
    width = _logits.eval_shape(logits_fn, images).shape[-1]
    if labels.shape != (count, width):
        raise RequestError(
            f"{name} must be 0, 1 or NaN, [{count}, {width}] for {count} images and {width} "
            f"logits, got {labels.dtype} {list(labels.shape)}"
        )
    if not isinstance(labels, Tracer):
        with jax.ensure_compile_time_eval():
            wrong = labels[(labels != 0) & (labels != 1) & ~jnp.isnan(labels)]
        if wrong.size:
            raise RequestError(f"{name} must be 0, 1 or NaN, got {float(wrong[0]):.6g}")


def _check_range(values: Array, low: float, high: float, message: str, advice: str = "") -> None:
    if not isinstance(values, Tracer):
        with jax.ensure_compile_time_eval():
            smallest, largest = float(jnp.min(values)), float(jnp.max(values))
        if not (low <= smallest and largest <= high):  # also true for NaN
            raise RequestError(f"{message}, got {smallest:.6g} to {largest:.6g}{advice}")


def _round_input(
    logits_fn: Partial, images: jax.Array, epsilon: jax.Array, x: jax.Array
) -> jax.Array:
    """Compute logits of the rounded images that `compiled` returns; the gradient is a cast's."""
    cast = x.astype(images.dtype)
    rounded = _round_towards(lax.stop_gradient(x), images, epsilon)
    return logits_fn(cast + (rounded - lax.stop_gradient(cast)))


def _round_towards(x: jax.Array, images: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Round to the dtype of the images, towards the images and at most epsilon away from them."""
    nearest = x.astype(images.dtype)
    origin = images.astype(x.dtype)
    limit = jnp.minimum(jnp.abs(x - origin), expand_like(epsilon, x))
    return jnp.where(jnp.abs(nearest - origin) > limit, jnp.nextafter(nearest, images), nearest)


def as_partial(logits_fn: LogitsFn) -> Partial:
    """Convert a function to a `Partial`, which `jax.jit` accepts as an argument.

    Raises:
        RequestError: the function is not hashable.
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
    images: Images,
    labels: Labels | LabelMatrix,
    key: jax.Array,
    epsilon: PerExample,
    ids: Labels | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return images, labels, epsilons ``[batch]`` and random keys ``[batch]``.

    Labels ``[batch]`` become int32, several labels per image float32.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    ids = fingerprint(images) if ids is None else jnp.asarray(ids)
    keys = jax.vmap(partial(jax.random.fold_in, key))(ids)
    labels = labels.astype(jnp.int32 if labels.ndim == 1 else jnp.float32)
    return images, labels, per_example(epsilon, images, "epsilon"), keys


def sample_logits(logits_fn: LogitsFn, images: jax.Array) -> jax.Array:
    """Compute logits ``[samples, batch, classes]`` in float32 or the wider dtype of the images.

    Raises:
        RequestError: the logits have another shape.
    """
    logits = logits_fn(images)
    shape: tuple[int, ...] = getattr(logits, "shape", ())
    if len(shape) not in (2, 3) or shape[-2:-1] != (len(images),):
        raise RequestError(
            f"logits_fn must return [batch, classes] or [samples, batch, classes] for a batch of "
            f"{len(images)}, got {list(shape) or type(logits).__name__}"
        )
    dtype = jnp.promote_types(images.dtype, jnp.float32)
    return logits.astype(dtype).reshape(-1, *logits.shape[-2:])


_logits = jax.jit(sample_logits)  # caches the result of eval_shape


def as_float(images: Array) -> Float[jax.Array, "..."]:
    """Convert uint8 images to float32 in [0, 1]; floating point images stay unchanged."""
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def per_example(value: PerExample, images: jax.Array, name: str) -> Values:
    """Broadcast a scalar or ``[batch]`` values to ``[batch]``, in the dtype of the images.

    Raises:
        RequestError: ``value`` has another shape.
    """
    value = jnp.asarray(value, images.dtype)
    if value.shape not in ((), (len(images),)):
        raise RequestError(
            f"{name} must be a number or {len(images)} numbers, one per image, "
            f"got shape {list(value.shape)}"
        )
    return jnp.broadcast_to(value, (len(images),))


def expand_like(values: jax.Array, images: jax.Array) -> jax.Array:
    """Reshape ``[batch]`` values to ``[batch, 1, ...]``, so that they broadcast to the images."""
    return values.reshape(-1, *[1] * (images.ndim - 1))


def choose(condition: jax.Array, new: Any, old: Any) -> Any:
    """Select between two trees of arrays ``[batch, ...]`` by a condition ``[batch]``."""
    return jax.tree.map(lambda a, b: jnp.where(expand_like(condition, a), a, b), new, old)


def best_of(run: Callable[[jax.Array, jax.Array], Result], count: int, images: jax.Array) -> Result:
    """Return the best result of several runs for each example.

    A success is better than a failure; among failures, the highest loss is best.

    Args:
        run: called with the number of the run and ``[batch]`` bool, the earlier successes.
        count: number of runs.
        images: ``[batch, ...]``.
    """
    fooled = jnp.zeros(len(images), bool)
    if count == 1:
        return run(jnp.int32(0), fooled)

    def body(number: jax.Array, best: Result) -> Result:
        new = run(number, best[1])
        return choose(~best[1] & (new[1] | (new[2] > best[2])), new, best)

    loss = jnp.full(len(images), -jnp.inf, images.dtype)
    return lax.fori_loop(0, count, body, (images, fooled, loss))


def fold_in(keys: jax.Array, number: Array | int) -> jax.Array:
    """Return the keys ``[batch]`` for one iteration or restart."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def draw(
    sampler: Callable[..., jax.Array], keys: jax.Array, shape: tuple[int, ...] = ()
) -> jax.Array:
    """Draw a float32 array of the given shape with each of the keys ``[batch]``."""
    return jax.vmap(lambda key: sampler(key, shape, jnp.float32))(keys)


def fingerprint(images: jax.Array) -> jax.Array:
    """Hash the float32 values of each image to ``[batch]`` uint32, the default id of an example.

    The hash is a sum of mixed words, so it does not depend on the order of summation or on the
    sharding. The mixing function is the finalizer of MurmurHash3 (Appleby, 2011).
    """
    words = lax.bitcast_convert_type(lax.stop_gradient(images).astype(jnp.float32), jnp.uint32)
    words = words.reshape(len(images), -1)
    words += jnp.arange(words.shape[1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        words = (words ^ (words >> shift)) * jnp.uint32(multiplier)
    return jnp.sum(words ^ (words >> 16), axis=1, dtype=jnp.uint32)
