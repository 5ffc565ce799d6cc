"""Convolution and maximum pooling as JAX primitives, whose derivatives are primitives again.

How each of them is computed is decided when a program is lowered for a platform, after it has been
differentiated: what a CPU needs never reaches another platform, and every derivative, forward or
reverse, first or higher, is as fast as the function itself. A convolution and its two gradients are
bilinear and each other's transposes; the tangent of a maximum, and its transpose, are linear in
their second argument and constant in the first::

    convolution(x, kernel) -> y    input_gradient(dy, kernel) -> dx    kernel_gradient(x, dy) -> dk
    maximum(x) -> y                maximum_tangent(x, dx) -> dy        maximum_gradient(x, dy) -> dx

See https://docs.jax.dev/en/latest/jax-primitives.html.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from tljax.models.convolution import cpu, xla
from tljax.models.convolution.geometry import Geometry, Window

Way = Callable[..., jax.Array]


def convolution(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolve ``[b, h, w, in]`` with ``[h, w, in // groups, out]``."""
    return _CONVOLUTION.bind(x, kernel, static=(geometry,))


def maximum(x: jax.Array, window: Window) -> jax.Array:
    """Return the maxima of the windows of ``[b, h, w, c]``."""
    return _MAXIMUM.bind(x, static=(window,))


def _primitive(name: str, images: tuple[bool, ...], *, default: Way, **ways: Way) -> Primitive:
    """Make a primitive that calls ``way(*arrays, *static)``, whichever way is its platform's.

    Args:
        name: in jaxprs.
        images: which arrays begin with a batch of images, as the result then does: under
            `jax.vmap` a batch of batches is a larger batch. With a kernel for each batch every way
            is mapped by JAX instead.
        default: where no other way is given; it also says what the result looks like.
        ways: by platform.
    """
    primitive = Primitive(f"tljax_{name}")

    def abstract(*avals: Any, static: tuple[Any, ...]) -> ShapedArray:
        structs = (jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
        result = jax.eval_shape(lambda *arrays: default(*arrays, *static), *structs)
        return ShapedArray(result.shape, result.dtype)

    @partial(jax.jit, static_argnames="static")
    def outside_of_jit(*arrays: jax.Array, static: tuple[Any, ...]) -> jax.Array:
        return primitive.bind(*arrays, static=static)

    def batch(arrays: Any, axes: Any, *, static: tuple[Any, ...]) -> tuple[jax.Array, int]:
        if any(axis is not None and not image for axis, image in zip(axes, images, strict=True)):
            mapped = {
                platform: jax.vmap(lambda *arrays, way=way: way(*arrays, *static), axes)
                for platform, way in {"default": default, **ways}.items()
            }
            return jax.lax.platform_dependent(*arrays, **mapped), 0
        count = next(a.shape[i] for a, i in zip(arrays, axes, strict=True) if i is not None)
        merged = [
            jax.lax.collapse(batching.bdim_at_front(array, axis, count), 0, 2) if image else array
            for array, axis, image in zip(arrays, axes, images, strict=True)
        ]
        y = primitive.bind(*merged, static=static)
        return y.reshape(count, y.shape[0] // count, *y.shape[1:]), 0

    primitive.def_abstract_eval(abstract)
    primitive.def_impl(outside_of_jit)
    batching.primitive_batchers[primitive] = batch
    for platform, way in {None: default, **ways}.items():
        rule = mlir.lower_fun(
            lambda *arrays, static, way=way: way(*arrays, *static), multiple_results=False
        )
        mlir.register_lowering(primitive, rule, platform)
    return primitive


_CONVOLUTION = _primitive(
    "convolution",
    (True, False),
    default=xla.convolve_on_gpu,
    tpu=xla.convolve_on_tpu,
    cpu=cpu.convolve,
)
_INPUT_GRADIENT = _primitive(
    "convolution_input_gradient",
    (True, False),
    default=partial(xla.input_gradient, xla.convolve_on_gpu),
    tpu=partial(xla.input_gradient, xla.convolve_on_tpu),
    cpu=cpu.input_gradient,
)
_KERNEL_GRADIENT = _primitive(
    "convolution_kernel_gradient",
    (False, False),
    default=partial(xla.kernel_gradient, xla.convolve_on_gpu),
    tpu=partial(xla.kernel_gradient, xla.convolve_on_tpu),
    cpu=cpu.kernel_gradient,
)
_MAXIMUM = _primitive("maximum", (True,), default=xla.max_pool)
_MAXIMUM_TANGENT = _primitive(
    "maximum_tangent", (True, True), default=xla.max_pool_tangent, cpu=cpu.max_pool_tangent
)
_MAXIMUM_GRADIENT = _primitive(
    "maximum_gradient", (True, True), default=xla.max_pool_gradient, cpu=cpu.max_pool_gradient
)


def _input_gradient(dy: jax.Array, kernel: jax.Array, geometry: Geometry, x: Any) -> jax.Array:
    return _INPUT_GRADIENT.bind(dy, kernel, static=(geometry, x.aval.shape[1:3]))


def _kernel_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry, kernel: Any) -> jax.Array:
    return _KERNEL_GRADIENT.bind(x, dy, static=(geometry, kernel.aval.shape[:2]))


# The transposes of f(a, b) with respect to a and to b; ct is the cotangent of its result.
ad.defbilinear(
    _CONVOLUTION,
    lambda ct, x, kernel, static: _input_gradient(ct, kernel, static[0], x),
    lambda ct, x, kernel, static: _kernel_gradient(x, ct, static[0], kernel),
)
ad.defbilinear(
    _INPUT_GRADIENT,
    lambda ct, _, kernel, static: convolution(ct, kernel, static[0]),
    lambda ct, dy, kernel, static: _kernel_gradient(ct, dy, static[0], kernel),
)
ad.defbilinear(
    _KERNEL_GRADIENT,
    lambda ct, x, dy, static: _input_gradient(dy, ct, static[0], x),
    lambda ct, x, _, static: convolution(x, ct, static[0]),
)


def _tangent(of_x: jax.Array, x: jax.Array, static: tuple[Window]) -> jax.Array:
    return _MAXIMUM_TANGENT.bind(x, of_x, static=static)


def _either(transposed: Primitive) -> Callable[..., Any]:
    """Transpose a map that is linear in its second argument and constant in its first."""

    def transpose(ct: Any, x: jax.Array, moved: Any, static: tuple[Window]) -> tuple[None, Any]:
        if type(ct) is ad.Zero:
            return None, ad.Zero(moved.aval)
        return None, transposed.bind(x, ct, static=static)

    return transpose


ad.defjvp(_MAXIMUM, _tangent)
ad.defjvp(_MAXIMUM_TANGENT, None, lambda of_dx, x, _, static: _tangent(of_dx, x, static))
ad.defjvp(
    _MAXIMUM_GRADIENT,
    None,
    lambda of_dy, x, _, static: _MAXIMUM_GRADIENT.bind(x, of_dy, static=static),
)
ad.primitive_transposes[_MAXIMUM_TANGENT] = _either(_MAXIMUM_GRADIENT)
ad.primitive_transposes[_MAXIMUM_GRADIENT] = _either(_MAXIMUM_TANGENT)
