"""Padded rows have no effect on gradients, statistics, losses and metrics."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import Unit

from tljax.data.augment import epoch_key
from tljax.data.loader import batch_rows
from tljax.data.options import AugmentConfig
from tljax.metrics.sums import means
from tljax.models import Model, Stage, apply, init
from tljax.models.layers import GlobalAveragePool, LinearHead
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.types import Batch
from tljax.train.adversary import adversarial
from tljax.train.freeze import label
from tljax.train.objectives import cross_entropy
from tljax.train.optimizer import build_optimizer, learning_rate_schedule
from tljax.train.options import AdversaryConfig, OptimizerConfig
from tljax.train.step import init_state, make_train_step

pytestmark = pytest.mark.usefixtures("quick_to_compile")

# 17 layers with weights. Without variance each batch norm multiplies by 316: float32 ends at the
# sixteenth.
STRIDES = 2 * (2, *(1,) * 7)
DEEP = Model(
    "deep",
    (
        *(Stage(f"layer{i}", Unit(4, stride)) for i, stride in enumerate(STRIDES)),
        Stage("pool", GlobalAveragePool()),
        Stage("head", LinearHead(3)),
    ),
    Preprocess(8, 8),
)
BODY = frozenset(DEEP.stage_names)
KEYS = (epoch_key(0, 1), jax.random.key(1))
# A step of this is the gradient of the mean loss.
ONE = optax.sgd(1.0)


def random_variables(dtype="float32"):
    variables = jax.device_get(init(DEEP, jax.random.key(0)))
    head = variables["params"]["head"]
    head["kernel"] = np.random.default_rng(0).normal(0, 0.1, head["kernel"].shape)
    return jax.tree.map(lambda x: np.asarray(x, dtype), variables)


def batches(count, size=8, multiple=4):
    """Return the batches of an epoch, of which the last is padded."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (count + 1, 8, 8, 3)).astype(np.uint8)
    images[-1] = 0
    labels = np.append(rng.integers(0, 3, count), -1).astype(np.int32)
    for rows in batch_rows(count, size, 0, 1, multiple):
        yield Batch(images[rows], labels[rows], rows >= 0, rows)


def first(variables, optimizer: optax.GradientTransformation = ONE, *, ema=False):
    fresh = jax.tree.map(jnp.array, variables)
    return init_state(fresh["params"], fresh["batch_stats"], optimizer, ema=ema)


FROZEN = {"params": {}, "batch_stats": {}}


@cache
def step_of(parts, dtype="float32"):
    """Return a jitted step, compiled once for all tests."""
    model = replace(DEEP, dtype=dtype)
    return make_train_step(model, ONE, batch_statistics=BODY, noise=BODY, accumulate=parts)


@pytest.mark.slow
@pytest.mark.parametrize("count", range(1, 10))
def test_parts_without_images_do_not_contribute_to_accumulated_gradients(count):
    """The gradient equals the sum over these parts, computed one by one with updated statistics."""
    with jax.enable_x64(True):
        variables = random_variables("float64")
        alone = step_of(1, "float64")
        for batch in batches(count):
            actual, sums = step_of(4, "float64")(first(variables), FROZEN, batch, KEYS)
            del sums["gradient_norm"], sums["examples"]
            stats, expected, metrics = variables["batch_stats"], [], []
            for i in range(4):
                part = jax.tree.map(lambda x: x[i::4], batch)  # noqa: B023
                part = jax.tree.map(lambda x: x[part.mask], part)  # noqa: B023
                if not len(part.mask):
                    continue
                before = first({**variables, "batch_stats": stats})
                state, of_part = alone(before, FROZEN, part, KEYS)
                stats = state.batch_stats
                del of_part["gradient_norm"], of_part["examples"]
                metrics.append(of_part)
                share = len(part.mask) / batch.mask.sum()
                expected.append(scaled(difference(variables["params"], state.params), share))
            assert_close(difference(variables["params"], actual.params), added(expected), 1e-9)
            assert_close((actual.batch_stats, sums), (stats, added(metrics)), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("count", range(1, 10))
def test_accumulated_gradients_are_finite_in_single_precision(count):
    for batch in batches(count):
        actual = step_of(4)(first(random_variables()), FROZEN, batch, KEYS)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(actual))


def added(trees):
    return jax.tree.map(lambda *leaves: sum(leaves), *trees)


def scaled(tree, factor):
    return jax.tree.map(lambda x: factor * x, tree)


def difference(one, other):
    return jax.tree.map(np.subtract, one, other)


def assert_close(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


SMALL = replace(DEEP, stages=(*DEEP.stages[:2], *DEEP.stages[-2:]))
TRAINED = frozenset(SMALL.stage_names)
MIXED = AugmentConfig(flip=False, mixup=0.4)
MOVING = {"batch_statistics": TRAINED, "noise": TRAINED}
PGD = adversarial(cross_entropy(), AdversaryConfig("pgd", attack_steps=2))
HOW: dict[str, dict[str, Any]] = {
    "batch statistics": MOVING,
    "running statistics": {},
    "mixup": {**MOVING, "augment": MIXED},
    "an adversary": {**MOVING, "objective": PGD},
}


@pytest.mark.parametrize("settings", HOW.values(), ids=HOW)
def test_the_content_of_a_padded_row_has_no_effect(settings):
    """It is zero for images, and a copy of the first row for cached activations."""
    variables = jax.device_get(init(SMALL, jax.random.key(0)))
    (batch,) = batches(5)
    images = batch.inputs / np.float32(1 if "augment" in settings else 255)
    step = make_train_step(SMALL, ONE, **settings)
    results = []
    for held in (0, np.nan, np.inf, 1e38):
        images[~batch.mask] = held
        held_batch = batch._replace(inputs=images.copy())
        results.append(jax.device_get(step(first(variables), FROZEN, held_batch, KEYS)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results[0]))
    assert np.any(results[0][0].params["head"]["kernel"])
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, results[0])


WEIGHED = cross_entropy(0.1, (0.5, 1.0, 2.0))


@pytest.mark.parametrize(
    "settings",
    [
        {**MOVING, "objective": WEIGHED, "augment": MIXED, "accumulate": 2},
        {**MOVING, "objective": adversarial(WEIGHED, AdversaryConfig("fast"))},
    ],
    ids=["mixed", "attacked"],
)
def test_the_logged_loss_is_the_minimized_loss(settings):
    """Finite differences of the logged loss along the step agree with the gradient."""
    with jax.enable_x64(True):
        variables = jax.device_get(init(SMALL, jax.random.key(0)))
        rng = np.random.default_rng(0)
        variables = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape) ** 2, variables)
        step = make_train_step(replace(SMALL, dtype="float64"), ONE, **settings)
        (batch,) = batches(5)
        if "augment" not in settings:
            batch = batch._replace(inputs=batch.inputs / 255)

        def run(params):
            return step(first({**variables, "params": params}), FROZEN, batch, KEYS)

        def loss(params):
            return means(run(params)[1])["loss"]

        start = variables["params"]
        gradient = difference(start, run(start)[0].params)
        square = sum(np.sum(x**2) for x in jax.tree.leaves(gradient))
        rise = loss(added([start, scaled(gradient, 1e-5)]))
        fall = loss(added([start, scaled(gradient, -1e-5)]))
        assert (rise - fall) / 2e-5 == pytest.approx(square, rel=1e-5)
        assert square > 1e-3


@pytest.mark.parametrize(("name", "parts"), [("sgd", 1), ("adamw", 2)])
def test_a_batch_without_images_changes_the_step_count_only(name, parts):
    """It applies no weight decay, no momentum and no moving average."""
    variables = jax.device_get(init(SMALL, jax.random.key(0)))
    config = OptimizerConfig(name, 0.1, weight_decay=0.5)
    labels = label(variables["params"], (("*", 1.0),))
    optimizer = build_optimizer(config, labels, learning_rate_schedule(config, 9))
    step = make_train_step(SMALL, optimizer, **MOVING, ema_decay=0.5, accumulate=parts)
    (batch,) = batches(8)
    before, _ = jax.device_get(step(first(variables, optimizer, ema=True), FROZEN, batch, KEYS))
    empty = batch._replace(mask=np.zeros(8, bool))
    after, sums = step(jax.tree.map(jnp.array, before), FROZEN, empty, KEYS)
    assert after.step == before.step + 1
    assert sums["loss"] == (0, 0)
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=before.step), before)


def test_a_batch_without_images_keeps_all_running_statistics():
    """Also when the network is applied without a training step."""
    variables = jax.device_get(init(SMALL, jax.random.key(0)))
    images = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
    actual = apply(
        SMALL, variables, images, batch_statistics=TRAINED, mask=np.zeros(2, bool)
    ).batch_stats
    jax.tree.map(np.testing.assert_array_equal, actual, variables["batch_stats"])
