"""Hidden layers of VGG: kept or removed with a new head, and dropout."""

import jax
import numpy as np
import pytest
from networks import random_images, random_variables, run

from tljax.models import Model, apply, build_model, replace_head
from tljax.runtime.types import Variables

IMAGES = random_images(2, 64, 48)


@pytest.fixture(scope="module")
def vgg11() -> tuple[Model, Variables]:
    model = build_model("vgg11", 7)
    return model, random_variables(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "hidden", "features"),
    [
        pytest.param("pool", (), 25088, marks=pytest.mark.slow),
        ("fc1", ("fc1",), 4096),
        pytest.param("fc2", ("fc1", "fc2"), 4096, marks=pytest.mark.slow),
    ],
)
def test_a_new_head_keeps_none_one_or_both_hidden_layers(
    vgg11: tuple[Model, Variables], after: str, hidden: tuple[str, ...], features: int
) -> None:
    model, variables = vgg11
    new, replaced = replace_head(model, variables, 3, after=after)
    blocks = tuple(f"block{i}" for i in range(1, 6))
    assert new.stage_names == (*blocks, "pool", *hidden, "head")
    assert set(replaced["params"]) == {*blocks, *hidden, "head"}
    assert replaced["params"]["head"]["kernel"].shape == (features, 3)
    actual = run(new, replaced, IMAGES, stop="head").value
    expected = run(model, variables, IMAGES, capture=(after,)).captured[after]
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
def test_dropout_in_hidden_layers_drops_half(vgg11: tuple[Model, Variables]) -> None:
    model, variables = vgg11
    pooled = np.random.default_rng(0).standard_normal((2, 25088)).astype(np.float32)

    def hidden(noise: set[str]) -> np.ndarray:
        key = jax.random.key(0)
        output = apply(model, variables, pooled, start="fc1", stop="fc2", noise=noise, key=key)
        return np.asarray(output.value)

    whole, dropped = hidden(set()), hidden({"fc1"})
    positive, remaining = whole > 0, dropped > 0
    np.testing.assert_allclose(dropped[remaining], 2 * whole[remaining], rtol=1e-6)
    assert abs(remaining[positive].mean() - 0.5) < 0.04  # five standard errors
    np.testing.assert_array_equal(hidden({"fc2"}), whole)
