"""Freezing, the optimizer and the training step, on a network small enough to check by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from tiny import MODEL, Unit

from tljax.data.augment import epoch_key
from tljax.metrics.classification import cross_entropies, ranks
from tljax.metrics.sums import masked_sum, means, merge
from tljax.models import Model, Stage, apply, init
from tljax.models.layers import GlobalAveragePool, LinearHead
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.trees import flatten, unflatten
from tljax.runtime.types import Batch
from tljax.train.freeze import (
    combine,
    first_trainable_stage,
    freeze_table,
    label,
    partition,
    split,
)
from tljax.train.objectives import cross_entropy
from tljax.train.optimizer import build_optimizer, learning_rate_schedule
from tljax.train.options import OptimizerConfig
from tljax.train.step import init_state, make_train_step

pytestmark = pytest.mark.usefixtures("quick_to_compile")


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


def freeze_to(model, stage):
    return freeze_table(model, freeze_to=stage)


def set_up(variables, config, *, table, steps=10, **settings):
    """Return a step, its initial state and frozen variables, all copies of ``variables``."""
    variables = jax.tree.map(jnp.array, variables)
    labels = label(variables["params"], table)
    changing, staying = split(variables, labels, settings.get("batch_statistics", ()))
    optimizer = build_optimizer(config, labels, learning_rate_schedule(config, steps))
    ema = settings.get("ema_decay", 0.0) > 0
    state = init_state(changing["params"], changing["batch_stats"], optimizer, ema=ema)
    return make_train_step(MODEL, optimizer, **settings), state, staying


def trained(variables, config, *, table, steps=1, batches=None, **settings):
    """Return the state, the frozen variables and the metrics after the last step."""
    step, state, frozen = set_up(variables, config, table=table, **settings)
    metrics = {}
    for i in range(steps):
        data = (batches or [batch(seed=i)])[i % len(batches or [1])]
        state, metrics = step(state, frozen, data, KEYS)
    return state, frozen, metrics


def test_flatten_and_unflatten_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree


def test_the_first_matching_pattern_applies_and_every_parameter_needs_one(variables):
    params = variables["params"]
    labels = label(params, (("*/scale", 0.5), ("head/*", 1.0), ("*", 0.0)))
    flat = flatten(labels)
    assert flat["stem/conv/scale"] == 0.5
    assert flat["stem/conv/kernel"] == 0
    assert flat["head/kernel"] == 1
    with pytest.raises(RequestError, match=r"no pattern matches layer1/conv/bias and 5 other"):
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
    moving = frozenset({"layer1", "head"})
    state, frozen, _ = trained(
        variables, config, table=table, steps=100, batch_statistics=moving, noise=moving
    )
    for kind in ("params", "batch_stats"):
        before, after = variables[kind]["stem"], frozen[kind]["stem"]
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), before, after)
    # Trainable parameters and their statistics have changed.
    assert not np.array_equal(
        variables["batch_stats"]["layer1"]["conv"]["mean"],
        state.batch_stats["layer1"]["conv"]["mean"],
    )
    for name, leaf in flatten(state.params).items():
        assert not np.array_equal(leaf, flatten(variables["params"])[name]), name


def test_optimizer_state_exists_for_trainable_leaves_only(variables):
    config = OptimizerConfig("adamw")
    state, *_ = trained(variables, config, table=freeze_to(MODEL, "layer1"))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    head = variables["params"]["head"]
    assert sorted(m.shape for m in moments) == sorted(2 * [x.shape for x in head.values()])


def test_running_statistics_are_fixed_by_default(variables):
    state, frozen, _ = trained(variables, OptimizerConfig(), table=(("*", 1.0),), steps=3)
    jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"], frozen["batch_stats"])
    assert state.batch_stats == {}


@pytest.mark.parametrize("masked", [0, 2])
def test_one_sgd_step_is_the_gradient_of_the_mean_loss(variables, masked):
    data = batch(masked=masked)
    config = OptimizerConfig("sgd", 0.1, momentum=0.0, warmup=0.0, weight_decay=0.0, clip_norm=0.0)
    state, *_ = trained(variables, config, table=(("*", 1.0),), batches=[data])

    def loss(params):
        logits = apply(MODEL, {**variables, "params": params}, data.inputs).logits
        retained = data.mask
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[retained], data.targets[retained]
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
    optimizer = build_optimizer(config, labels, learning_rate_schedule(config, 10))
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
def test_a_very_short_schedule_has_positive_rates(steps):
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=2.0), steps)
    assert all(schedule(i) > 0 for i in range(steps))


def test_frozen_parameters_cost_no_gradient(variables):
    """By compiled cost, training only the head takes little more than one forward pass."""

    def flops(stage):
        step, state, frozen = set_up(variables, OptimizerConfig(), table=freeze_to(MODEL, stage))
        return step.lower(state, frozen, batch(), KEYS).compile().cost_analysis()["flops"]

    forward = jax.jit(lambda v, x: apply(MODEL, v, x).logits)
    once = forward.lower(variables, batch().inputs).compile().cost_analysis()["flops"]
    assert flops("layer1") < 1.1 * once
    assert flops("stem") > 1.5 * once


def test_dropout_depends_on_the_key_and_applies_in_training_only(variables):
    images = batch().inputs
    run = lambda **settings: np.asarray(apply(MODEL, variables, images, **settings).logits)  # noqa: E731
    first = run(noise={"head"}, key=jax.random.key(0))
    np.testing.assert_array_equal(first, run(noise={"head"}, key=jax.random.key(0)))
    assert not np.array_equal(first, run(noise={"head"}, key=jax.random.key(1)))
    np.testing.assert_array_equal(run(), run(key=jax.random.key(1)))


def test_metrics_merge_exactly_and_ignore_the_mask():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 8)), rng.integers(0, 8, 50)

    def measure(logits, labels, mask):
        actual = {"loss": cross_entropies(logits, labels), "top1": ranks(logits, labels) < 1}
        sums = {name: masked_sum(values, mask) for name, values in actual.items()}
        return {name: (float(total), float(count)) for name, (total, count) in sums.items()}

    whole = measure(logits, labels, np.ones(50, bool))
    mask = np.arange(32) < 18
    padded = np.concatenate([logits[32:], np.full((14, 8), np.inf)])
    parts = merge(
        measure(logits[:32], labels[:32], np.ones(32, bool)),
        measure(padded, np.concatenate([labels[32:], np.full(14, -1)]), mask),
    )
    assert parts.keys() == whole.keys()
    for name, pair in whole.items():
        np.testing.assert_allclose(parts[name], pair, rtol=1e-6)
    order = np.argsort(-logits, 1)
    assert means(whole)["top1"] == pytest.approx((order[:, 0] == labels).mean())
    np.testing.assert_array_equal(
        ranks(logits, labels) < 5, (order[:, :5] == labels[:, None]).any(1)
    )
    assert np.isnan(means(measure(logits, labels, np.zeros(50, bool)))["loss"])


def test_nan_logits_never_count_as_correct():
    assert (ranks(np.full((4, 8), np.nan), np.arange(4)) >= 5).all()


DEEP = Model(
    "deep",
    (
        Stage("stem", Unit(16)),
        Stage("layer1", Unit(32)),
        Stage("layer2", Unit(32, stride=2)),
        Stage("pool", GlobalAveragePool()),
        Stage("head", LinearHead(3)),
    ),
    Preprocess(16, 16),
)


@pytest.mark.slow
def test_a_step_costs_one_forward_pass_and_the_backward_pass_of_trained_stages():
    """Clipping reads all gradients, which must be those of trainable parameters."""
    frozen_to = "layer1"
    variables = init(DEEP, jax.random.key(0))
    data = batch(16)
    names = DEEP.stage_names
    start = names[names.index(frozen_to) + 1]
    labels = label(variables["params"], freeze_to(DEEP, frozen_to))
    params, frozen = partition(variables["params"], labels)
    config = OptimizerConfig(clip_norm=1.0, weight_decay=0.1)
    optimizer = build_optimizer(config, labels, learning_rate_schedule(config, 10))
    state = init_state(params, {}, optimizer)
    still = {"params": frozen, "batch_stats": variables["batch_stats"]}

    def loss(params, x):
        whole = {"params": combine(params, frozen), "batch_stats": variables["batch_stats"]}
        logits = apply(DEEP, whole, x, start=start).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, data.targets).mean()

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    def prefix(images):
        return apply(DEEP, variables, images, stop=start).value

    def step(start, data):
        step = make_train_step(DEEP, optimizer, start=start)
        compiled = step.lower(state, still, data, KEYS).compile()  # pyright: ignore[reportFunctionMemberAccess]
        return compiled.cost_analysis()["flops"]

    values = prefix(data.inputs)
    suffix = flops(jax.grad(loss), params, values)
    assert step(None, data) <= 1.05 * (flops(prefix, data.inputs) + suffix)
    assert step(start, data._replace(inputs=np.asarray(values))) <= 1.05 * suffix


def test_optimizer_memory_is_proportional_to_trainable_parameters(variables):
    def size(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim)

    for name in ("sgd", "adam", "adamw", "lamb"):
        for stage in ("stem", "layer1"):
            table = freeze_to(MODEL, stage)
            _, state, _ = set_up(variables, OptimizerConfig(name), table=table)
            moments = 1 if name == "sgd" else 2
            assert size(state.opt_state) == moments * size(state.params), (name, stage)


KERNELS = {"kernel": True, "scale": False, "bias": False}


def by_optax(name, decay):
    """Return the optimizers as Optax defines them, at a learning rate of 0.1."""

    def mask(params):
        return unflatten({path: KERNELS[path.split("/")[-1]] for path in flatten(params)})

    decayed = optax.add_decayed_weights(decay, mask)
    return {
        "sgd": optax.chain(decayed, optax.sgd(0.1, 0.9, nesterov=True)),
        "adam": optax.chain(decayed, optax.adam(0.1)),
        "adamw": optax.adamw(0.1, weight_decay=decay, mask=mask),
        "lamb": optax.lamb(0.1, eps=1e-8, weight_decay=decay, mask=mask),
    }[name]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lamb"])
def test_the_optimizers_agree_with_those_of_optax(variables, name):
    config = OptimizerConfig(
        name, 0.1, weight_decay=0.3, schedule="constant", warmup=0.0, clip_norm=0.0
    )
    params = variables["params"]
    schedule = learning_rate_schedule(config, 9)
    ours = build_optimizer(config, label(params, (("*", 1.0),)), schedule)
    theirs = by_optax(name, 0.3)
    states = [ours.init(params), theirs.init(params)]
    trees = [params, params]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)  # noqa: B023
        for i, optimizer in enumerate((ours, theirs)):
            updates, states[i] = optimizer.update(grads, states[i], trees[i])
            trees[i] = optax.apply_updates(trees[i], updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), *trees)


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("constant", {9: 1, 10: 1, 55: 1, 99: 1}),
        ("step", {9: 1, 29: 1, 30: 0.1, 59: 0.1, 60: 0.01, 89: 0.01, 90: 0.001, 99: 0.001}),
        ("exponential", {9: 1, 9 + 91 / 2: 0.1, 100: 0.01}),
        ("cosine", {9: 1, 9 + 91 / 2: 0.5, 9 + 91 / 3: 0.75, 100: 0}),
    ],
)
def test_schedules_at_known_points(schedule, points):
    rate = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, schedule=schedule), 100)
    for at, share in ({0: 0.1, 4: 0.5} | points).items():
        assert rate(at) == pytest.approx(2 * share, rel=1e-5, abs=1e-6), at


def test_one_cycle_rises_for_a_quarter():
    config = OptimizerConfig(learning_rate=2.0, schedule="one-cycle")
    rates = np.array([learning_rate_schedule(config, 100)(i) for i in range(101)])
    assert rates[0] == pytest.approx(2 / 25)
    assert rates.argmax() == 25
    assert rates[25] == pytest.approx(2)
    assert np.all(np.diff(rates[:26]) > 0)
    assert np.all(np.diff(rates[25:]) < 0)
    assert 0 < rates[100] < 1e-4


@pytest.mark.parametrize("schedule", ["cosine", "constant", "one-cycle", "step", "exponential"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_every_schedule_works_for_few_steps(schedule, steps):
    rate = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, schedule=schedule), steps)
    for i in range(steps):
        assert 0 < rate(i) <= 2


WEIGHTS = (0.5, 1.0, 2.5)


@pytest.mark.parametrize(
    ("smoothing", "weights", "parts"), [(0.0, WEIGHTS, 1), (0.2, (), 1), (0.0, WEIGHTS, 3)]
)
def test_class_weights_and_smoothing_agree_with_torch(variables, smoothing, weights, parts):
    """The step of plain SGD shows the gradient of the head."""
    data = batch(size=6, masked=2)
    config = OptimizerConfig(
        "sgd", 1.0, 0.0, weight_decay=0.0, schedule="constant", warmup=0.0, clip_norm=0.0
    )
    objective = cross_entropy(smoothing, weights)
    settings = {"objective": objective, "accumulate": parts, "batches": [data]}
    state, _, metrics = trained(variables, config, table=freeze_to(MODEL, "layer1"), **settings)
    features = np.array(apply(MODEL, variables, data.inputs, stop="head").value)
    head = {k: torch.tensor(v, requires_grad=True) for k, v in variables["params"]["head"].items()}
    loss = torch.nn.CrossEntropyLoss(
        torch.tensor(weights) if weights else None, label_smoothing=smoothing
    )
    logits = torch.from_numpy(features[:4]) @ head["kernel"] + head["bias"]
    labels = torch.from_numpy(data.targets[:4]).long()
    loss(logits, labels).backward()
    plain = torch.nn.functional.cross_entropy(logits, labels)
    actual = means(metrics)
    assert actual["loss"] == pytest.approx(loss(logits, labels).item(), rel=1e-5)
    assert actual["cross_entropy"] == pytest.approx(plain.item(), rel=1e-5)
    for name, tensor in head.items():
        moved = variables["params"]["head"][name] - state.params["head"][name]
        np.testing.assert_allclose(moved, tensor.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masked", [0, 5])
def test_accumulated_parts_give_the_gradient_of_the_whole_batch(variables, masked):
    """Also if a part has no valid image."""
    config = OptimizerConfig("sgd", 0.1)
    data = [batch(size=8, seed=i, masked=masked) for i in range(3)]
    actual = [
        trained(
            variables,
            config,
            table=(("*", 1.0),),
            batches=data,
            steps=3,
            objective=cross_entropy(0.1),
            accumulate=parts,
        )[::2]
        for parts in (1, 4)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *actual)


def test_the_moving_average_follows_its_formula(variables):
    moving = frozenset({"layer1", "head"})
    step, state, frozen = set_up(
        variables,
        OptimizerConfig("sgd", 0.1),
        table=freeze_to(MODEL, "stem"),
        batch_statistics=moving,
        ema_decay=0.25,
    )
    expected = jax.tree.map(np.array, state.changing)
    for i in range(4):
        state, _ = step(state, frozen, batch(seed=i), KEYS)
        decay = min(0.25, (1 + i) / (10 + i))
        now = state.changing
        expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, expected, now)  # noqa: B023
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.ema, expected
    )


@pytest.mark.parametrize(("decay", "ema"), [(0.5, False), (0.0, True)])
def test_a_state_that_does_not_fit_the_ema_decay_is_refused(variables, decay, ema):
    optimizer = optax.sgd(0.1)
    state = init_state(variables["params"], {}, optimizer, ema=ema)
    step = make_train_step(MODEL, optimizer, ema_decay=decay)
    frozen = {"params": {}, "batch_stats": variables["batch_stats"]}
    with pytest.raises(RequestError, match=f"call init_state with ema={not ema}"):
        step(state, frozen, batch(), KEYS)
