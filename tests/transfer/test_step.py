"""Freezing, the optimizer and the training step, on a network small enough to check by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import MODEL

from tljax.config import OptimizerConfig
from tljax.data.augment import epoch_key
from tljax.errors import RequestError
from tljax.models import apply
from tljax.transfer.freeze import (
    combine,
    first_trainable_stage,
    freeze_table,
    label,
    partition,
)
from tljax.transfer.metrics import Metrics, measure
from tljax.transfer.optimizer import build_optimizer, learning_rate_schedule
from tljax.transfer.step import StepConfig, init_state, make_train_step
from tljax.trees import flatten, unflatten
from tljax.types import Batch


@pytest.fixture
def variables(tiny):
    return tiny[1]


def batch(size=6, seed=0, masked=0):
    rng = np.random.default_rng(seed)
    return Batch(
        rng.integers(0, 256, (size, 16, 16, 3)).astype(np.uint8),
        rng.integers(0, 3, size).astype(np.int32),
        np.arange(size) < size - masked,
        np.arange(size, dtype=np.int32),
    )


KEYS = (epoch_key(0, 1), jax.random.key(1))
PLAIN = StepConfig()


def freeze_to(model, stage):
    return freeze_table(model, freeze_to=stage)


def set_up(variables, config, *, table, how=PLAIN, steps=10):
    """A step, its first state and what is frozen; nothing shares a buffer with ``variables``."""
    variables = jax.tree.map(jnp.array, variables)
    labels = label(variables["params"], table)
    trainable, frozen = partition(variables["params"], labels)
    moving, still = {}, {}
    for name, stats in variables["batch_stats"].items():
        (moving if name in how.train else still)[name] = stats
    optimizer = build_optimizer(config, labels, steps)
    state = init_state(trainable, moving, optimizer, average=how.average > 0)
    step = make_train_step(MODEL, optimizer, how)
    return step, state, {"params": frozen, "batch_stats": still}


def trained(variables, config, *, table, steps=1, batches=None, how=PLAIN):
    step, state, frozen = set_up(variables, config, table=table, how=how)
    for i in range(steps):
        state = step(state, frozen, (batches or [batch(seed=i)])[i % len(batches or [1])], KEYS)
    return state, frozen


def test_paths_round_trip():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree


def test_the_first_pattern_wins_and_none_may_be_forgotten(variables):
    params = variables["params"]
    labels = label(params, (("*/scale", 0.5), ("head/*", 1.0), ("*", 0.0)))
    flat = flatten(labels)
    assert flat["stem/conv/scale"] == 0.5
    assert flat["stem/conv/kernel"] == 0
    assert flat["head/kernel"] == 1
    with pytest.raises(RequestError, match=r"no pattern covers layer1/conv/bias and 5 other"):
        label(params, (("head/*", 1.0),))


def test_freezing_to_a_stage_splits_the_parameters_there(variables):
    labels = label(variables["params"], freeze_to(MODEL, "stem"))
    trainable, frozen = partition(variables["params"], labels)
    assert set(trainable) == {"layer1", "head"}
    assert set(frozen) == {"stem"}
    assert combine(trainable, frozen) == variables["params"]
    assert first_trainable_stage(MODEL, labels) == "layer1"
    with pytest.raises(RequestError, match="leaves nothing to train"):
        freeze_to(MODEL, "head")
    with pytest.raises(RequestError, match="no stage 'layer9'"):
        freeze_to(MODEL, "layer9")


def test_frozen_parameters_and_statistics_keep_their_bytes(variables):
    config = OptimizerConfig("adamw", 0.1, weight_decay=0.1, clip_norm=0.5)
    table = freeze_to(MODEL, "stem")
    how = StepConfig(frozenset({"layer1", "head"}))
    state, frozen = trained(variables, config, table=table, steps=100, how=how)
    for kind in ("params", "batch_stats"):
        before, after = variables[kind]["stem"], frozen[kind]["stem"]
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), before, after)
    # And what trains has moved, its statistics too.
    assert not np.array_equal(
        variables["batch_stats"]["layer1"]["conv"]["mean"],
        state.batch_stats["layer1"]["conv"]["mean"],
    )
    for name, leaf in flatten(state.params).items():
        assert not np.array_equal(leaf, flatten(variables["params"])[name]), name


def test_optimizer_state_exists_for_trainable_leaves_only(variables):
    config = OptimizerConfig("adamw")
    state, _ = trained(variables, config, table=freeze_to(MODEL, "layer1"))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    head = variables["params"]["head"]
    assert sorted(m.shape for m in moments) == sorted(2 * [x.shape for x in head.values()])


def test_running_statistics_stay_by_default(variables):
    state, frozen = trained(variables, OptimizerConfig(), table=(("*", 1.0),), steps=3)
    jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"], frozen["batch_stats"])
    assert state.batch_stats == {}


@pytest.mark.parametrize("masked", [0, 2])
def test_one_sgd_step_is_the_gradient_of_the_mean_loss(variables, masked):
    data = batch(masked=masked)
    config = OptimizerConfig("sgd", 0.1, momentum=0.0, warmup=0.0, weight_decay=0.0, clip_norm=0.0)
    state, _ = trained(variables, config, table=(("*", 1.0),), batches=[data])

    def loss(params):
        logits = apply(MODEL, {**variables, "params": params}, data.images).logits
        kept = data.mask
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[kept], data.labels[kept]
        ).mean()

    gradient = jax.grad(loss)(variables["params"])
    assert learning_rate_schedule(config, 10)(0) == pytest.approx(0.1)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradient)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.params, expected
    )


def test_the_head_learns_faster_than_the_backbone_and_norms_do_not_decay(variables):
    config = OptimizerConfig("sgd", 1.0, momentum=0.0, weight_decay=0.5, warmup=0.1)
    table = freeze_table(MODEL, freeze_to="stem", layer_decay=0.1)
    labels = label(variables["params"], table)
    params = partition(variables["params"], labels)[0]
    optimizer = build_optimizer(config, labels, 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    flat, moved = flatten(params), flatten(updates)
    np.testing.assert_allclose(moved["head/kernel"], -0.5 * flat["head/kernel"], rtol=1e-5)
    np.testing.assert_allclose(
        moved["layer1/conv/kernel"], -0.05 * flat["layer1/conv/kernel"], rtol=1e-5
    )
    for name in ("head/bias", "layer1/conv/scale", "layer1/conv/bias"):
        assert not np.any(moved[name]), name


def test_the_schedule_warms_up_and_ends_at_zero():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, warmup=0.2), 50)
    rates = np.array([schedule(i) for i in range(51)])
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11), rtol=1e-5)
    assert np.all(np.diff(rates[9:]) < 0)
    assert rates[49] > 0
    assert rates[50] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_very_short_schedule_still_moves(steps):
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=2.0), steps)
    assert all(schedule(i) > 0 for i in range(steps))


def test_the_step_takes_no_gradient_of_what_is_frozen(variables):
    """Compiled cost: training the head alone costs one forward pass and next to nothing more."""

    def flops(stage):
        step, state, frozen = set_up(variables, OptimizerConfig(), table=freeze_to(MODEL, stage))
        return step.lower(state, frozen, batch(), KEYS).compile().cost_analysis()["flops"]

    forward = jax.jit(lambda v, x: apply(MODEL, v, x).logits)
    once = forward.lower(variables, batch().images).compile().cost_analysis()["flops"]
    assert flops("layer1") < 1.1 * once
    assert flops("stem") > 1.5 * once


def test_dropout_follows_the_key_and_only_in_training(variables):
    images = batch().images
    run = lambda **how: np.asarray(apply(MODEL, variables, images, **how).logits)  # noqa: E731
    first = run(train={"head"}, key=jax.random.key(0))
    np.testing.assert_array_equal(first, run(train={"head"}, key=jax.random.key(0)))
    assert not np.array_equal(first, run(train={"head"}, key=jax.random.key(1)))
    np.testing.assert_array_equal(run(), run(key=jax.random.key(1)))


def test_metrics_merge_exactly_and_ignore_the_mask():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 8)), rng.integers(0, 8, 50)
    whole = measure(logits, labels, np.ones(50, bool))
    mask = np.arange(32) < 18
    padded = np.concatenate([logits[32:], np.full((14, 8), np.inf)])
    parts = Metrics.merge(
        measure(logits[:32], labels[:32], np.ones(32, bool)),
        measure(padded, np.concatenate([labels[32:], np.full(14, -1)]), mask),
    )
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    order = np.argsort(-logits, 1)
    assert whole.means()["top1"] == pytest.approx((order[:, 0] == labels).mean())
    assert whole.means()["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).mean())
    assert np.isnan(measure(logits, labels, np.zeros(50, bool)).means()["loss"])
