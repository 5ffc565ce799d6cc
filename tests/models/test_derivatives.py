"""First and second derivatives, forward and reverse, of both backends."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import difference, random_images, random_variables

from tljax.models import apply, build_model, replace_head
from tljax.models.convolution import Padding, avg_pool, backend, conv2d, max_pool
from tljax.models.layers import BatchNorm, Mode

# shape of the kernel, groups: every algorithm on CPUs
KINDS = {
    "product": ((1, 1, 6, 4), 1),
    "dense": ((3, 2, 6, 4), 1),
    "winograd": ((3, 3, 32, 33), 1),
    "stem": ((7, 7, 3, 4), 1),
    "depthwise": ((3, 3, 1, 6), 6),
    "grouped": ((3, 3, 3, 4), 2),
}
FAMILIES = {
    "resnet18": 33,
    "keras_resnet50v2": 33,
    "resnetv2_50x1_bit": 33,
    "inception_v3": 75,
    "xception": 71,
    "efficientnet_lite0": 33,
    "vgg11_bn": 33,
    "mobilenetv1_100": 33,
    "mobilenetv2_050": 33,
    "tf_mobilenetv3_small_075": 33,
    "regnety_002": 33,
}


def derivatives(function: Callable[..., jax.Array], *args: jax.Array) -> dict[str, Any]:
    """Compute all derivatives, in a direction proportional to the arguments."""
    direction = tuple(0.3 * (i + 1) * arg for i, arg in enumerate(args))
    several = jax.tree.map(lambda *xs: jnp.stack(xs), direction, args)

    def loss(*args: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(function(*args)))

    gradient = jax.grad(loss, tuple(range(len(args))))
    pullback = jax.linear_transpose(jax.linearize(function, *args)[1], *args)
    return {
        "jvp": jax.jvp(function, args, direction),
        "linearize": jax.linearize(function, *args)[1](*direction),
        "transpose": pullback(function(*args)),
        "gradient": gradient(*args),
        "forward over reverse": jax.jvp(gradient, args, direction)[1],
        "reverse over reverse": jax.grad(lambda *a: sum(map(jnp.vdot, gradient(*a), direction)), 0)(
            *args
        ),
        "reverse over forward": jax.grad(lambda *a: jax.jvp(loss, a, direction)[1], 0)(*args),
        "of several images": jax.vmap(gradient)(*several),
        "of several kernels": jax.vmap(gradient, (None, *[0] * (len(args) - 1)))(
            args[0], *several[1:]
        )
        if len(args) > 1
        else None,
    }


def derivatives_of_both_backends(function: Callable[..., jax.Array], *args: Any) -> tuple[Any, Any]:
    """Compute the derivatives with the backends ``platform`` and ``xla``."""
    run = jax.jit(partial(derivatives, function))
    actual = run(*args)
    with backend("xla"):
        plain = run(*args)
    return actual, plain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stride", "padding"),
    [
        (2, ((1, 2), (0, 3))),
        (1, "SAME"),
        (2, "SAME"),
        (1, 1),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_a_convolution_equal_those_of_xla(
    kind: str, stride: int, padding: Padding
) -> None:
    shape, groups = KINDS[kind]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((2, 9, 8, shape[2] * groups)))
        kernel = jnp.asarray(rng.standard_normal(shape) / 8)
        if kind == "product":
            padding = 0
        convolve = partial(conv2d, stride=stride, padding=padding, groups=groups)
        actual, plain = derivatives_of_both_backends(convolve, x, kernel)
    for name, expected in plain.items():
        assert difference_of_trees(actual[name], expected) <= 1e-12, name


@pytest.mark.parametrize("padding", [1, pytest.param("SAME", marks=pytest.mark.slow)])
def test_derivatives_of_a_max_pool_equal_those_of_xla(padding: Padding) -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 8, 3)))
        actual, plain = derivatives_of_both_backends(
            partial(max_pool, k=3, stride=2, padding=padding), x
        )
    assert jax.tree.structure(actual) == jax.tree.structure(plain)
    for name, expected in plain.items():
        assert difference_of_trees(actual[name], expected) <= 1e-14, name


def test_derivatives_of_a_batch_norm_equal_those_of_its_definition() -> None:
    """Of the selected examples alone, with the variance in two passes."""
    rows = jnp.asarray([0, 2, 3])

    def actual(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        stats = {"mean": jnp.full(3, 0.7), "var": jnp.ones(3)}
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        mode = Mode(jnp.isin(jnp.arange(5), rows))
        return BatchNorm().apply(variables, x, mode, mutable=["batch_stats"])[0][rows]

    def definition(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        centered = x[rows] - x[rows].mean((0, 1, 2))
        return scale * centered / jnp.sqrt(jnp.square(centered).mean((0, 1, 2)) + 1e-5) + bias

    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        args = [jnp.asarray(rng.normal(1, 2, shape)) for shape in ((5, 4, 2, 3), 3, 3)]
        # Without the sine, the gradients of half the sum of squares are those of a constant.
        values, expected = (
            jax.jit(partial(derivatives, lambda *args, f=f: jnp.sin(f(*args))))(*args)
            for f in (actual, definition)
        )
    for name, value in expected.items():
        assert difference_of_trees(values[name], value) <= 1e-12, name


def difference_of_trees(actual: Any, expected: Any) -> float:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max((difference(left, right) for left, right in pairs), default=0)


def test_an_average_pool_has_derivatives() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 8, 3)))
    pool = partial(avg_pool, k=3, stride=2, padding=1)
    actual = jax.jit(partial(derivatives, pool))(x)
    assert difference(actual["jvp"][1], 0.3 * actual["jvp"][0]) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("backend_name", ["platform", "xla"])
@pytest.mark.parametrize("name", FAMILIES)
def test_derivatives_of_a_network_equal_finite_differences(name: str, backend_name: str) -> None:
    """Check derivatives by images and parameters in float64, with running statistics."""
    size, step = FAMILIES[name], 1e-7
    context = contextlib.nullcontext() if backend_name == "platform" else backend(backend_name)
    with jax.enable_x64(True), context:
        model = replace(build_model(name, 7), dtype="float64")
        variables = random_variables(model)
        if name.startswith("vgg"):  # without the hidden layers, which need gigabytes
            model, variables = replace_head(model, variables, 7, after="block5")
            variables["params"]["head"]["kernel"] = np.random.default_rng(0).normal(size=(512, 7))
        variables = jax.tree.map(lambda x: jnp.asarray(x, "float64"), variables)
        images = jnp.asarray(random_images(2, size, size) / 255)
        point = {"images": images, "params": variables["params"]}
        rng = np.random.default_rng(1)
        direction = jax.tree.map(lambda x: 1e-2 * rng.standard_normal(x.shape), point)

        def logits(point: Any) -> jax.Array:
            mixed = {**variables, "params": point["params"]}
            return apply(model, mixed, point["images"]).logits

        def loss(point: Any) -> jax.Array:
            return jax.nn.logsumexp(logits(point), axis=1).sum()

        def moved(by: float) -> Any:
            return jax.tree.map(lambda x, d: x + by * d, point, direction)

        run = jax.jit(logits)
        _, tangent = jax.jit(lambda p, d: jax.jvp(logits, (p,), (d,)))(point, direction)
        linear = jax.jit(lambda p, d: jax.linearize(logits, p)[1](d))(point, direction)
        differences = (run(moved(step)) - run(moved(-step))) / (2 * step)
        assert difference(tangent, differences) <= 1e-6
        assert difference(linear, tangent) <= 1e-12

        gradient = jax.jit(jax.grad(loss))
        _, product = jax.jit(lambda p, d: jax.jvp(jax.grad(loss), (p,), (d,)))(point, direction)
        ahead, behind = gradient(moved(step)), gradient(moved(-step))
        for path in ("images", "params"):
            flat = [
                np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree[path])])
                for tree in (product, ahead, behind)
            ]
            assert difference(flat[0], (flat[1] - flat[2]) / (2 * step)) <= 1e-4, path
