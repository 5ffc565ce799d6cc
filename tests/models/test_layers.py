"""Convolution, pooling and norms, compared with XLA's operations and torch."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from networks import difference, from_torch, to_torch
from torch.nn import functional

from tljax.models.convolution import (
    Padding,
    adaptive_avg_pool,
    avg_pool,
    backend,
    conv2d,
    max_pool,
    multiply,
)
from tljax.models.layers import (
    INFERENCE,
    BatchNorm,
    Conv,
    ConvNorm,
    Dense,
    GlobalAveragePool,
    GroupNorm,
    LayerNorm,
    LinearHead,
    Mode,
    SqueezeExcite,
    StochasticDepth,
    gelu,
)

CHANNELS = 6
# kernel size, groups, output channels: pointwise, dense, depthwise, grouped, channel multiplier
KINDS = {
    "pointwise": (1, 1, 4),
    "dense2": (2, 1, 4),
    "dense3": (3, 1, 4),
    "dense4": (4, 1, 4),
    "dense7": (7, 1, 4),
    "depthwise1": (1, 6, 6),
    "depthwise3": (3, 6, 6),
    "depthwise5": (5, 6, 6),
    "grouped1": (1, 2, 4),
    "grouped3": (3, 2, 4),
    "multiplier": (3, 6, 12),
}
TOLERANCES = {"float32": 1e-5, "float64": 1e-13}


def plain_conv2d(*arguments: Any, **options: Any) -> jax.Array:
    with backend("xla"):
        return conv2d(*arguments, **options)


def plain_max_pool(*arguments: Any, **options: Any) -> jax.Array:
    with backend("xla"):
        return max_pool(*arguments, **options)


def plain_conv(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding if isinstance(padding, str) else [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function: Callable[..., jax.Array], *arguments: Any) -> Any:
    """Return the value and the gradients of half its sum of squares."""
    value, pullback = jax.vjp(function, *arguments)
    return value, pullback(value)


def assert_close(actual: Any, expected: Any, dtype: str) -> None:
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert left.dtype == dtype
        assert difference(left, right) <= TOLERANCES[dtype]


def assert_same_conv(
    size: tuple[int, int], kind: str, stride: int, padding: Padding, dtype: str
) -> None:
    """Compare values and the gradients of input and kernel."""
    k, groups, features = KINDS[kind]
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(rng.standard_normal((2, *size, CHANNELS)), dtype)
        kernel = jnp.asarray(rng.standard_normal((k, k, CHANNELS // groups, features)), dtype)
        actual = value_and_gradients(
            lambda x, kernel: conv2d(x, kernel, stride=stride, padding=padding, groups=groups),
            x,
            kernel,
        )
        expected = value_and_gradients(
            lambda x, kernel: plain_conv(x, kernel, stride, padding, groups), x, kernel
        )
        assert_close(actual, expected, dtype)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["pointwise", "depthwise3", "depthwise5"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_conv2d_equals_the_xla_convolution(
    kind: str, stride: int, symmetric: bool, dtype: str
) -> None:
    padding = KINDS[kind][0] // 2 if symmetric else "SAME"
    assert_same_conv((8, 7), kind, stride, padding, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("side", [2, 4])
@pytest.mark.parametrize("size", [(8, 12), (11, 9)])
def test_a_convolution_of_patches_equals_the_xla_convolution(
    size: tuple[int, int], side: int, dtype: str
) -> None:
    """The kernel is as large as the stride; remaining pixels are left out."""
    assert_same_conv(size, f"dense{side}", side, 0, dtype)


@pytest.mark.parametrize("shape", [(5, 6), (3, 7, 6), (2, 5, 3, 6)])
def test_positions_are_multiplied_by_a_matrix(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(size).astype(np.float32) for size in (shape, (6, 4)))
    outputs = value_and_gradients(multiply, x, kernel)
    assert_close(outputs, value_and_gradients(jnp.matmul, x, kernel), "float32")


@pytest.mark.parametrize("kind", ["dense3", "dense7", "grouped1", "depthwise1", "multiplier"])
def test_conv2d_of_other_kernels_equals_the_xla_convolution(kind: str) -> None:
    assert_same_conv((8, 7), kind, 2, KINDS[kind][0] // 2, "float64")
    assert_same_conv((7, 8), kind, 1, "SAME", "float32")


@pytest.mark.parametrize(("rows", "dtype"), [(1, "float32"), (3, "float64")])
@pytest.mark.parametrize("padding", [1, 0, "SAME", ((1, 2), (0, 3))])
@pytest.mark.parametrize("size", [(7, 8), (5, 9), (6, 10), (4, 3)])
def test_winograd_equals_the_xla_convolution(
    size: tuple[int, int], padding: Padding, rows: int, dtype: str
) -> None:
    """The widths have all remainders modulo 4, the number of pixels computed together."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(rng.standard_normal((3, *size, 32)), dtype)
        kernel = jnp.asarray(rng.standard_normal((rows, 3, 32, 33)), dtype)
        actual, expected = (partial(f, padding=padding) for f in (conv2d, plain_conv2d))
        assert jax.jit(actual).lower(x, kernel).as_text().count("stablehlo.convolution") == 6
        outputs = value_and_gradients(actual, x, kernel)
        assert_close(outputs, value_and_gradients(expected, x, kernel), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("padding", [3, 0, "SAME", ((2, 3), (0, 5))])
@pytest.mark.parametrize("size", [(16, 15), (13, 18)])
def test_a_stem_equals_the_xla_convolution(
    size: tuple[int, int], padding: Padding, dtype: str
) -> None:
    """A stem has three channels, stride 2 and a large kernel."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        for window in ((7, 7), (5, 4)):
            x = jnp.asarray(rng.standard_normal((2, *size, 3)), dtype)
            kernel = jnp.asarray(rng.standard_normal((*window, 3, 4)), dtype)
            actual, plain = (
                value_and_gradients(partial(f, stride=2, padding=padding), x, kernel)
                for f in (conv2d, plain_conv2d)
            )
            assert_close(actual, plain, dtype)


@pytest.mark.parametrize(
    ("kernel", "groups", "stride", "padding"),
    [
        ((1, 1, 8, 5), 1, 2, 0),
        ((3, 3, 128, 130), 1, 1, 1),
        ((3, 3, 128, 4), 1, 2, 1),
        ((3, 3, 128, 4), 1, 1, 3),
        ((2, 2, 130, 4), 1, 2, "SAME"),
        ((2, 2, 130, 4), 1, 2, 0),
        ((3, 3, 1, 6), 6, 1, 1),
    ],
)
def test_bfloat16_is_accumulated_in_float32(
    kernel: tuple[int, ...], groups: int, stride: int, padding: Padding
) -> None:
    """Compare values and gradients with float64 of the same rounded inputs."""
    rng = np.random.default_rng(0)

    def random(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), "bfloat16")

    def run(
        convolve: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array, dy: jax.Array
    ) -> Any:
        value, pullback = jax.vjp(
            partial(convolve, stride=stride, padding=padding, groups=groups), x, kernel
        )
        return value, *pullback(dy.astype(value.dtype))

    x, weights = random((2, 7, 6, kernel[2] * groups)), random(kernel)
    shape = jax.eval_shape(
        partial(conv2d, stride=stride, padding=padding, groups=groups), x, weights
    ).shape
    with jax.enable_x64(True):
        half = x, weights, random(shape)
        exact = [array.astype("float64") for array in half]
        actual = jax.jit(partial(run, conv2d))(*half)
        expected = jax.jit(partial(run, plain_conv2d))(*exact)
    for left, right in zip(actual, expected, strict=True):
        assert left.dtype == jnp.bfloat16
        assert difference(left.astype("float32"), right) <= 2**-8


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kind=st.sampled_from(["pointwise", "depthwise3", "depthwise5", "grouped3"]),
    stride=st.integers(1, 3),
    padding=st.sampled_from([0, 1, 2, "SAME"]),
)
def test_conv2d_at_any_size(
    size: tuple[int, int], kind: str, stride: int, padding: Padding
) -> None:
    around = 0 if padding == "SAME" else 2 * padding
    hypothesis.assume(padding == "SAME" or min(size) + around >= KINDS[kind][0])
    assert_same_conv(size, kind, stride, padding, "float32")


def test_conv2d_same_padding_is_not_symmetric_padding() -> None:
    """At an even size and stride 2 the shapes are equal and the values are not."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((1, 8, 8, 3)), rng.standard_normal((3, 3, 3, 2))
    same = conv2d(jnp.asarray(x), jnp.asarray(kernel), stride=2, padding="SAME")
    symmetric = conv2d(jnp.asarray(x), jnp.asarray(kernel), stride=2, padding=1)
    assert same.shape == symmetric.shape
    assert difference(same, symmetric) > 0.1


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    k=st.integers(2, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
)
def test_max_pool_equals_torch(size: tuple[int, int], k: int, stride: int, padding: int) -> None:
    hypothesis.assume(min(size) + 2 * padding >= k)
    """Some windows contain two equal maxima: the first one receives the gradient."""
    rng = np.random.default_rng(0)
    x = rng.integers(-9, -5, (2, *size, 3)).astype(np.float32)
    pixels = to_torch(x).requires_grad_()
    expected = functional.max_pool2d(pixels, k, stride, padding)
    weights = rng.integers(-9, 9, from_torch(expected.detach()).shape).astype(np.float32)
    expected.backward(to_torch(weights))
    actual, pullback = jax.vjp(
        jax.jit(partial(max_pool, k=k, stride=stride, padding=padding)), jnp.asarray(x)
    )
    np.testing.assert_array_equal(actual, from_torch(expected.detach()))
    assert pixels.grad is not None
    np.testing.assert_array_equal(pullback(weights)[0], from_torch(pixels.grad))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("padding", [1, "SAME", ((0, 2), (1, 0))])
def test_max_pool_equals_the_xla_pool(padding: Padding, dtype: str) -> None:
    """Compare values and forward and reverse gradients."""
    with jax.enable_x64(dtype == "float64"):
        x = np.random.default_rng(0).standard_normal((2, 9, 10, 3)).astype(dtype)
        actual, plain = (
            partial(f, k=3, stride=2, padding=padding) for f in (max_pool, plain_max_pool)
        )
        assert_close(value_and_gradients(actual, x), value_and_gradients(plain, x), dtype)
        matrices = [jax.jit(f(actual))(x) for f in (jax.jacfwd, jax.jacrev)]
        np.testing.assert_array_equal(*matrices)


@pytest.mark.parametrize(("k", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, "SAME")])
def test_max_pool_of_any_bfloat16_numbers_equals_the_xla_pool(
    k: int, stride: int, padding: Padding
) -> None:
    """Few different values, so that most windows have ties; NaN is larger than any number."""
    values = np.array([-np.inf, -3e38, -2, -1e-30, -0.0, 0.0, 1e-30, 1, np.inf, np.nan, -np.nan])
    rng = np.random.default_rng(0)
    for numbers in (values[1:9], values[:4], values):
        x = jnp.asarray(rng.choice(numbers, (4, 11, 8, 3)), jnp.bfloat16)
        actual, plain = (
            partial(f, k=k, stride=stride, padding=padding) for f in (max_pool, plain_max_pool)
        )
        y, expected = (np.asarray(jax.jit(f)(x), np.float32) for f in (actual, plain))
        np.testing.assert_array_equal(y, expected)  # NaN equals NaN


def test_max_pool_with_same_padding_equals_tensorflow() -> None:
    x = -jnp.arange(1.0, 17).reshape(1, 4, 4, 1)  # the first value of each window is the largest
    pooled = max_pool(x, 3, stride=2, padding="SAME")
    np.testing.assert_array_equal(pooled[0, ..., 0], [[-1, -3], [-9, -11]])


def random_norm(module: ConvNorm, inputs: int, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    k, out = module.kernel_size, module.features
    return {
        "params": {
            "kernel": rng.standard_normal((k, k, inputs // module.groups, out)).astype(dtype) / k,
            "scale": rng.uniform(0.5, 1.5, out).astype(dtype),
            "bias": rng.normal(0, 0.3, out).astype(dtype),
        },
        "batch_stats": {
            "mean": rng.normal(0, 0.3, out).astype(dtype),
            "var": rng.uniform(0.5, 2, out).astype(dtype),
        },
    }


@pytest.mark.parametrize(
    "module",
    [
        ConvNorm(4, 3, stride=2, padding=1),
        ConvNorm(4, 1, epsilon=1e-3),
        ConvNorm(6, 5, stride=2, padding="SAME", groups=6, epsilon=1e-3),
    ],
)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_folding_the_norm_into_the_kernel_is_exact(module: ConvNorm, dtype: str) -> None:
    """Compare with a convolution followed by the norm with running statistics, and gradients."""

    def explicit(variables: dict[str, Any], x: jax.Array) -> jax.Array:
        params, stats = variables["params"], variables["batch_stats"]
        y = plain_conv(x, params["kernel"], module.stride, module.padding, module.groups)
        y = (y - stats["mean"]) / jnp.sqrt(stats["var"] + module.epsilon)
        return y * params["scale"] + params["bias"]

    with jax.enable_x64(dtype == "float64"):
        variables = random_norm(module, 6, dtype)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 8, 6)), dtype)
        actual = value_and_gradients(lambda v, x: module.apply(v, x, INFERENCE), variables, x)
        assert_close(actual, value_and_gradients(explicit, variables, x), dtype)


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_conv_norm_in_training_mode_equals_torch(momentum: float) -> None:
    """Compare values, gradients and running statistics, whose variance is unbiased."""
    module = ConvNorm(5, 3, stride=2, padding=1, epsilon=1e-3, momentum=momentum)
    variables = random_norm(module, 6)
    x = np.random.default_rng(0).standard_normal((2, 5, 4, 6)).astype(np.float32)
    (actual, state), pullback = jax.vjp(
        lambda params, x: module.apply(
            {**variables, "params": params}, x, Mode(True), mutable=True
        ),
        variables["params"],
        x,
    )

    norm = torch.nn.BatchNorm2d(5, eps=1e-3, momentum=1 - momentum)
    norm.load_state_dict(
        {
            "weight": torch.from_numpy(variables["params"]["scale"]),
            "bias": torch.from_numpy(variables["params"]["bias"]),
            "running_mean": torch.from_numpy(variables["batch_stats"]["mean"]),
            "running_var": torch.from_numpy(variables["batch_stats"]["var"]),
            "num_batches_tracked": torch.tensor(0),
        }
    )
    kernel = torch.from_numpy(variables["params"]["kernel"]).permute(3, 2, 0, 1).requires_grad_()
    images = to_torch(x).requires_grad_()
    expected = norm(functional.conv2d(images, kernel, stride=2, padding=1))
    assert difference(actual, from_torch(expected)) <= 1e-5
    assert difference(state["batch_stats"]["mean"], norm.running_mean) <= 1e-6
    assert difference(state["batch_stats"]["var"], norm.running_var) <= 1e-6

    cotangent = np.random.default_rng(2).standard_normal(actual.shape).astype(np.float32)
    expected.backward(to_torch(cotangent))
    zero = jax.tree.map(jnp.zeros_like, state)
    gradients, grad_x = pullback((jnp.asarray(cotangent), zero))
    grads = [t.grad for t in (kernel, norm.weight, norm.bias, images)]
    assert all(grad is not None for grad in grads)
    by_kernel, by_scale, by_bias, by_x = (grad.numpy() for grad in grads if grad is not None)
    assert difference(gradients["kernel"], by_kernel.transpose(2, 3, 1, 0)) <= 1e-5
    assert difference(gradients["scale"], by_scale) <= 1e-5
    assert difference(gradients["bias"], by_bias) <= 1e-5
    assert difference(grad_x, by_x.transpose(0, 2, 3, 1)) <= 1e-5


@pytest.mark.parametrize("rows", [[0, 1, 2], [3, 1], [2]])
def test_masked_examples_do_not_affect_training(rows: list[int]) -> None:
    """Training with a mask equals training on the unmasked examples alone."""
    module = ConvNorm(5, 3, stride=2, padding=1)
    variables = random_norm(module, 6)
    x = np.random.default_rng(0).standard_normal((4, 6, 7, 6)).astype(np.float32)
    mask = np.isin(np.arange(4), rows)
    x[~mask] *= 1e3
    cotangent = np.random.default_rng(2).standard_normal((4, 3, 4, 5)).astype(np.float32)

    def run(x: np.ndarray, rows: Any, cotangent: np.ndarray) -> Any:
        def function(params: Any, x: Any) -> Any:
            return module.apply(
                {**variables, "params": params}, x, Mode(rows), mutable=["batch_stats"]
            )

        (y, state), pullback = jax.vjp(function, variables["params"], x)
        params, grad_x = pullback((jnp.asarray(cotangent), jax.tree.map(jnp.zeros_like, state)))
        return y, state["batch_stats"], params, grad_x

    y, stats, params, grad_x = run(x, jnp.asarray(mask), cotangent * mask[:, None, None, None])
    alone = run(x[mask], True, cotangent[mask])
    assert_close((y[mask], stats, params, grad_x[mask]), alone, "float32")
    assert not np.any(grad_x[~mask])


@partial(jax.jit, static_argnames="dtype")
def trained_norm(x: jax.Array, mask: Any, dtype: str = "float32") -> Any:
    """Return outputs, statistics and gradients of a batch norm with running mean 0."""
    variables = {
        "params": {"scale": jnp.linspace(0.5, 2, x.shape[-1]), "bias": jnp.ones(x.shape[-1])},
        "batch_stats": {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])},
    }
    params, stats = (jax.tree.map(lambda leaf: leaf.astype(dtype), v) for v in variables.values())

    def run(params: Any, x: jax.Array) -> Any:
        return BatchNorm().apply(
            {"params": params, "batch_stats": stats}, x, Mode(mask), mutable=["batch_stats"]
        )

    (y, state), pullback = jax.vjp(run, params, x)
    cotangent = jnp.sin(jnp.arange(y.size, dtype="float32")).reshape(y.shape).astype(y.dtype)
    cotangent = jnp.where(mask[:, None, None, None], cotangent, 0)
    return y, state["batch_stats"], *pullback((cotangent, jax.tree.map(jnp.zeros_like, state)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_whatever_a_masked_example_holds_a_batch_norm_does_the_same(dtype: str) -> None:
    """The number of masked examples has no effect, either."""
    x = jnp.asarray(np.random.default_rng(0).normal(100.3, 1, (5, 4, 3, 6)), dtype)
    rows = jnp.asarray([0, 3])
    mask = jnp.isin(jnp.arange(5), rows)
    results = [trained_norm(x.at[~mask].set(held), mask) for held in (0, jnp.nan, jnp.inf, -1e38)]
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, results[0])
    stats = trained_norm(x[rows], jnp.ones(2, bool))[1]
    for name, value in stats.items():
        np.testing.assert_allclose(results[0][1][name], value, rtol=1e-6)
    assert np.isfinite(results[0][0].astype("float32")).all()


@pytest.mark.parametrize("distance", [0, 1, 100])
def test_a_batch_norm_loses_digits_with_the_square_of_the_distance_to_the_running_mean(
    distance: float,
) -> None:
    """Compare with float64; the distance is in standard deviations, the tolerance ten roundings."""
    tolerance = 10 * np.finfo(np.float32).eps * (1 + distance**2)
    x = np.random.default_rng(0).normal(2 * distance, 2, (8, 9, 7, 6)).astype(np.float32)
    with jax.enable_x64(True):
        every = jnp.ones(len(x), bool)
        actual = trained_norm(jnp.asarray(x), every)
        exact = trained_norm(jnp.asarray(x, "float64"), every, "float64")
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(exact), strict=True):
        assert left.dtype == "float32"
        assert difference(left, right) <= tolerance


def test_a_constant_channel_far_from_the_running_mean_has_no_negative_variance() -> None:
    x = jnp.asarray(np.float32(1000 / np.arange(3, 67))) * jnp.ones((7, 5, 3, 1))
    y, stats, *gradients = trained_norm(x, jnp.ones(7, bool))
    assert (stats["var"] >= 0.9 - 1e-6).all()  # 0.1 of the variance is added to 0.9
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, gradients)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_outputs_have_the_dtype_of_the_input_and_statistics_are_float32(
    dtype: Literal["bfloat16", "float32"],
) -> None:
    module = ConvNorm(4, 3)
    variables = random_norm(module, 3)
    x = jnp.ones((2, 6, 6, 3), dtype) * jnp.arange(6, dtype=dtype)[:, None, None]
    assert module.apply(variables, x, INFERENCE).dtype == dtype  # pyright: ignore[reportAttributeAccessIssue]
    trained, state = module.apply(variables, x, Mode(True), mutable=["batch_stats"])
    assert trained.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}


def test_pooled_features_and_logits_are_float32() -> None:
    x = jnp.full((1, 64, 64, 2), 1.0, "bfloat16").at[0, 0, 0].set(2)
    pooled = GlobalAveragePool().apply({}, x, INFERENCE)
    np.testing.assert_array_equal(pooled, np.full((1, 2), 1 + 1 / 4096, np.float32))
    head = {"params": {"kernel": jnp.full((2, 3), 0.1), "bias": jnp.arange(3.0)}}
    logits = LinearHead(3).apply(head, jnp.ones((1, 2), "bfloat16"), INFERENCE)
    assert isinstance(logits, jax.Array)
    np.testing.assert_allclose(logits, [[0.2, 1.2, 2.2]], rtol=1e-6)


def test_rectangular_kernels_and_uneven_padding_equal_torch() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 9, 12, CHANNELS), np.float32)
    for groups in (1, CHANNELS):
        kernel = rng.standard_normal((1, 7, CHANNELS // groups, CHANNELS), np.float32)
        actual = conv2d(
            jnp.asarray(x), jnp.asarray(kernel), padding=((0, 0), (2, 3)), groups=groups
        )
        padded = functional.pad(to_torch(x), (2, 3, 0, 0))
        weight = torch.from_numpy(kernel).permute(3, 2, 0, 1)
        expected = functional.conv2d(padded, weight, groups=groups)
        assert difference(actual, from_torch(expected)) <= 1e-5


@pytest.mark.parametrize("count_padding", [True, False])
@pytest.mark.parametrize(("k", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (2, 2, 0)])
def test_avg_pool_equals_torch(count_padding: bool, k: int, stride: int, padding: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 9, 12, 3), np.float32)
    actual = avg_pool(
        jnp.asarray(x), k, stride=stride, padding=padding, count_padding=count_padding
    )
    expected = functional.avg_pool2d(
        to_torch(x), k, stride, padding, count_include_pad=count_padding
    )
    assert difference(actual, from_torch(expected)) <= 1e-6


@pytest.mark.parametrize("size", [(7, 7), (9, 8), (4, 3), (1, 15)])
def test_adaptive_avg_pool_equals_torch(size: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    actual = adaptive_avg_pool(jnp.asarray(x), 7)
    assert difference(actual, from_torch(functional.adaptive_avg_pool2d(to_torch(x), 7))) <= 1e-6
    if size == (7, 7):
        np.testing.assert_array_equal(actual, x)


def test_layers_without_norm_equal_torch() -> None:
    x = np.random.default_rng(0).standard_normal((2, 9, 12, CHANNELS), np.float32)
    conv = Conv(4, 3, stride=2, padding=1, groups=2)
    variables = random_like(conv.init(jax.random.key(0), jnp.asarray(x)))
    kernel, bias = (torch.from_numpy(variables["params"][name]) for name in ("kernel", "bias"))
    expected = functional.conv2d(to_torch(x), kernel.permute(3, 2, 0, 1), bias, 2, 1, groups=2)
    assert difference(conv.apply(variables, jnp.asarray(x)), from_torch(expected)) <= 1e-5

    rows = x[:, 0, 0]
    dense = Dense(4)
    variables = random_like(dense.init(jax.random.key(0), jnp.asarray(rows)))
    kernel, bias = (torch.from_numpy(variables["params"][name]) for name in ("kernel", "bias"))
    expected = functional.linear(torch.from_numpy(rows), kernel.T, bias)
    assert difference(dense.apply(variables, jnp.asarray(rows)), expected) <= 1e-5


def test_layer_norm_and_gelu_equal_torch() -> None:
    x = 3 * np.random.default_rng(0).standard_normal((2, 5, CHANNELS), np.float32) + 2
    norm = LayerNorm(epsilon=0.1)
    variables = random_like(norm.init(jax.random.key(0), jnp.asarray(x)))
    scale, bias = (torch.from_numpy(variables["params"][name]) for name in ("scale", "bias"))
    expected = functional.layer_norm(torch.from_numpy(x), (CHANNELS,), scale, bias, 0.1)
    assert difference(norm.apply(variables, jnp.asarray(x)), expected) <= 1e-6
    assert difference(gelu(jnp.asarray(x)), functional.gelu(torch.from_numpy(x))) <= 1e-6


@pytest.mark.parametrize("offset", [0.0, 30.0, -300.0])
@pytest.mark.parametrize("layer", [LayerNorm(), GroupNorm(2)], ids=["layer", "group"])
def test_norms_of_bfloat16_lose_less_than_the_rounding_of_their_inputs(
    layer: LayerNorm | GroupNorm, offset: float
) -> None:
    given = np.random.default_rng(0).standard_normal((3, 7, 9, 64)) + offset
    rounded = jnp.asarray(given, jnp.bfloat16)

    def exact(x: np.ndarray) -> np.ndarray:
        axes: Any = -1
        if isinstance(layer, GroupNorm):
            x, axes = x.reshape(3, 7, 9, 2, 32), (1, 2, 4)
        deviation = np.sqrt(x.var(axes, keepdims=True) + layer.epsilon)
        return ((x - x.mean(axes, keepdims=True)) / deviation).reshape(given.shape)

    actual = layer.apply(layer.init(jax.random.key(0), rounded), rounded)
    expected = exact(np.asarray(rounded, np.float64))
    loss = np.abs(expected - exact(given)).max()  # by rounding the inputs
    error = np.abs(np.asarray(actual, np.float64) - expected)
    assert (error <= 2**-8 * np.maximum(np.abs(expected), 1) + 0.02 * loss).all()


def test_squeeze_excite_gates_channels_by_the_averages_of_all() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 3, CHANNELS), np.float32)
    module = SqueezeExcite(4)
    variables = random_like(module.init(jax.random.key(0), jnp.asarray(x)))
    reduce, expand = (variables["params"][name] for name in ("reduce", "expand"))
    hidden = np.maximum(x.mean((1, 2)) @ reduce["kernel"][0, 0] + reduce["bias"], 0)
    gates = 1 / (1 + np.exp(-(hidden @ expand["kernel"][0, 0] + expand["bias"])))
    actual = module.apply(variables, jnp.asarray(x))
    assert difference(actual, x * gates[:, None, None]) <= 1e-6


def test_stochastic_depth_drops_examples_at_a_rate_that_increases_with_depth() -> None:
    x, key = jnp.ones((20_000, 2, 3)), jax.random.key(0)
    for depth in (0.0, 0.5, 1.0):
        module, mode = StochasticDepth(depth), Mode(noise=True, drop_path=0.4)
        y = np.asarray(module.apply({}, x, mode, rngs={"dropout": key}))
        assert (y == y[:, :1, :1]).all()  # an example is kept or dropped as a whole
        assert abs((y[:, 0, 0] == 0).mean() - 0.4 * depth) <= 0.01
        assert abs(y.mean() - 1) <= 0.02
        np.testing.assert_array_equal(module.apply({}, x, mode._replace(noise=False)), x)


@pytest.mark.parametrize("train", [False, True])
def test_a_separate_batch_norm_equals_torch(train: bool) -> None:
    x = np.random.default_rng(0).standard_normal((2, 9, 12, CHANNELS), np.float32)
    norm = BatchNorm(epsilon=1e-3)
    variables = random_like(norm.init(jax.random.key(0), jnp.asarray(x), INFERENCE))
    reference = torch.nn.BatchNorm2d(CHANNELS, eps=1e-3).train(train)
    state = {"weight": variables["params"]["scale"], "bias": variables["params"]["bias"]}
    state |= {f"running_{k}": v for k, v in variables["batch_stats"].items()}
    reference.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=False)
    actual, moved = norm.apply(variables, jnp.asarray(x), Mode(train), mutable=["batch_stats"])
    assert difference(actual, from_torch(reference(to_torch(x)))) <= 1e-5
    for name, value in moved["batch_stats"].items():
        assert difference(value, getattr(reference, f"running_{name}")) <= 1e-6


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("use_scale", [False, True])
def test_a_bias_before_the_norm_is_added(train: bool, use_scale: bool) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 12, CHANNELS), np.float32))
    module = ConvNorm(4, 3, padding=1, use_bias=True, use_scale=use_scale)
    variables = random_like(module.init(jax.random.key(0), x, INFERENCE))
    assert ("scale" in variables["params"]) == use_scale
    params = variables["params"]
    y = conv2d(x, params["kernel"], padding=1) + params["conv_bias"]
    norm = {name: params[name] for name in ("scale", "bias") if name in params}
    norm.setdefault("scale", np.ones(4, np.float32))
    expected, _ = BatchNorm().apply(
        {"params": norm, "batch_stats": variables["batch_stats"]},
        y,
        Mode(train),
        mutable=["batch_stats"],
    )
    actual, _ = module.apply(variables, x, Mode(train), mutable=["batch_stats"])
    assert difference(actual, expected) <= 1e-5


def random_like(variables: Any) -> Any:
    """Return random values of the same shapes."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype("f"), variables)
