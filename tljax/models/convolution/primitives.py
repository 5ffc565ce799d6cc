"""Convolution and max pooling as JAX primitives, whose derivatives are primitives too.

The implementation is chosen when a program is lowered for a platform, after differentiation. So
programs for other platforms contain no code for CPUs, and all derivatives (forward and reverse, of
any order) use fast implementations. A convolution and its two gradients are bilinear and transposes
of each other. The tangent and the gradient of a max pool are linear in their second argument,
constant in their first, and transposes of each other::

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
from tljax.runtime.types import FeatureMap

Implementation = Callable[..., jax.Array]


def convolution(x: FeatureMap, kernel: jax.Array, geometry: Geometry) -> FeatureMap:
    """Convolve ``[batch, height, width, in]`` with ``[rows, columns, in // groups, out]``."""
    return _CONVOLUTION.bind(x, kernel, static=(geometry,))


def maximum(x: FeatureMap, window: Window) -> FeatureMap:
    """Compute the maxima of the windows of ``[batch, height, width, channels]``."""
    return _MAXIMUM.bind(x, static=(window,))


def _primitive(
    name: str, batched: tuple[bool, ...], *, default: Implementation, **platforms: Implementation
) -> Primitive:
    """Create a primitive that is lowered to ``implementation(*arrays, *static)``.

    Args:
        name: name in jaxprs.
        batched: for each array, whether its first axis is a batch of images. If `jax.vmap` maps
            only such arrays, the mapped axis is merged into the batch; otherwise the
            implementation itself is mapped.
        default: implementation on other platforms; it also determines the shape of the result.
        **platforms: implementations by platform.
    """
    primitive = Primitive(f"tljax_{name}")

    def abstract(*avals: Any, static: tuple[Any, ...]) -> ShapedArray:
        structs = (jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
        result = jax.eval_shape(lambda *arrays: default(*arrays, *static), *structs)
        return ShapedArray(result.shape, result.dtype)

    @partial(jax.jit, static_argnames="static")
    def call(*arrays: jax.Array, static: tuple[Any, ...]) -> jax.Array:
        return primitive.bind(*arrays, static=static)

    def batch(arrays: Any, axes: Any, *, static: tuple[Any, ...]) -> tuple[jax.Array, int]:
        if any(axis is not None and not has for axis, has in zip(axes, batched, strict=True)):
            mapped = {
                platform: jax.vmap(lambda *arrays, run=run: run(*arrays, *static), axes)
                for platform, run in {"default": default, **platforms}.items()
            }
            return jax.lax.platform_dependent(*arrays, **mapped), 0
        count = next(a.shape[i] for a, i in zip(arrays, axes, strict=True) if i is not None)
        merged = [
            jax.lax.collapse(batching.bdim_at_front(array, axis, count), 0, 2) if has else array
            for array, axis, has in zip(arrays, axes, batched, strict=True)
        ]
        y = primitive.bind(*merged, static=static)
        return y.reshape(count, y.shape[0] // count, *y.shape[1:]), 0

    primitive.def_abstract_eval(abstract)
    primitive.def_impl(call)  # outside of jit
    batching.primitive_batchers[primitive] = batch
    for platform, run in {None: default, **platforms}.items():
        rule = mlir.lower_fun(
            lambda *arrays, static, run=run: run(*arrays, *static), multiple_results=False
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
_MAXIMUM = _primitive("maximum", (True,), default=xla.max_pool, cpu=cpu.max_pool)
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


# Transposes of f(a, b) with respect to a and to b; ct is the cotangent of the result.
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


def _tangent(dx: jax.Array, x: jax.Array, static: tuple[Window]) -> jax.Array:
    return _MAXIMUM_TANGENT.bind(x, dx, static=static)


def _transpose_by(primitive: Primitive) -> Callable[..., Any]:
    """Return the transpose rule of a function that is linear in its second argument only."""

    def transpose(ct: Any, x: jax.Array, linear: Any, static: tuple[Window]) -> tuple[None, Any]:
        if type(ct) is ad.Zero:
            return None, ad.Zero(linear.aval)
        return None, primitive.bind(x, ct, static=static)

    return transpose


ad.defjvp(_MAXIMUM, _tangent)
ad.defjvp(_MAXIMUM_TANGENT, None, lambda dx, x, _, static: _tangent(dx, x, static))
ad.defjvp(
    _MAXIMUM_GRADIENT,
    None,
    lambda dy, x, _, static: _MAXIMUM_GRADIENT.bind(x, dy, static=static),
)
ad.primitive_transposes[_MAXIMUM_TANGENT] = _transpose_by(_MAXIMUM_GRADIENT)
ad.primitive_transposes[_MAXIMUM_GRADIENT] = _transpose_by(_MAXIMUM_TANGENT)
