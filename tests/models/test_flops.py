"""Operations of programs, counted before they are compiled."""

import jax
import jax.numpy as jnp
import pytest

from tljax.models import abstract_variables, apply, build_model
from tljax.models.flops import count_flops

MATRIX = jax.ShapeDtypeStruct((8, 8), jnp.float32)


def product(x):
    return x @ x


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (product, 1),
        (jax.value_and_grad(lambda x: product(x).sum()), 3),
        (lambda x: jax.lax.fori_loop(0, 7, lambda _, y: product(y), x), 7),
        (lambda x: jax.lax.while_loop(lambda y: y.sum() < 1, product, x), 1),
        (lambda x: jax.lax.cond(x.sum() > 0, product, lambda y: y, x), 1),
        (jax.vmap(lambda row: row), 0),
    ],
)
def test_each_product_counts_as_often_as_it_runs(function, products):
    assert count_flops(jax.jit(function).trace(MATRIX)) == products * 2 * 8**3


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet18", 1.81e9),
        pytest.param("resnet50", 4.09e9, marks=pytest.mark.slow),
        pytest.param("vgg16", 15.47e9, marks=pytest.mark.slow),
    ],
)
def test_networks_take_the_multiplications_that_torchvision_publishes(name, published):
    model = build_model(name, 1000)
    variables = jax.eval_shape(lambda: abstract_variables(model))
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)

    def loss(variables, images):
        return apply(model, variables, images).logits.sum()

    forward = count_flops(jax.jit(loss).trace(variables, images))
    assert forward / 2 == pytest.approx(published, rel=0.01)
    # Backward it takes a product for the kernel and, but in the first layer, one for the input.
    step = jax.jit(jax.value_and_grad(loss)).trace(variables, images)
    assert 2.9 < count_flops(step) / forward <= 3
