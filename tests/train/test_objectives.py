"""Functions that a step or `fit` takes: objective, materialize, transform and callbacks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from engine import config, everything, source, splits, train
from tiny import MODEL, random_variables

from tljax.data.examples import Splits, select
from tljax.data.options import AugmentConfig
from tljax.metrics.classification import class_shares
from tljax.metrics.sums import Weighted, means
from tljax.models import apply, replace_head
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten
from tljax.runtime.types import Batch
from tljax.train.freeze import combine, join, label, split
from tljax.train.objectives import cross_entropy
from tljax.train.step import init_state, make_train_step

pytestmark = pytest.mark.usefixtures("compilation_cache")

EVERYTHING = (("*", 1.0),)
STAGES = frozenset(MODEL.stage_names)
KEYS = jax.random.key(0), jax.random.key(1)


def batch(size=6, masked=0, targets=None, **extra):
    rng = np.random.default_rng(0)
    return Batch(
        rng.uniform(size=(size, 16, 16, 3)).astype(np.float32),
        rng.integers(0, 3, size).astype(np.int32) if targets is None else targets,
        np.arange(size) < size - masked,
        np.arange(size, dtype=np.int32),
        extra,
    )


def one_step(objective, data, *, table=EVERYTHING, optimizer=None, **settings):
    """Return state and metrics after a step of SGD at rate 1, and the variables before it."""
    variables = jax.tree.map(jnp.array, random_variables())
    changing, staying = split(
        variables, label(variables["params"], table), settings.get("batch_statistics", ())
    )
    optimizer = optimizer or optax.sgd(1.0)
    state = init_state(*jax.tree.map(jnp.array, tuple(changing.values())), optimizer)
    step = make_train_step(MODEL, optimizer, objective, **settings)
    state, metrics = step(state, staying, data, KEYS)
    return state, means(metrics), changing


def gradient(objective, data, **settings):
    state, _, before = one_step(objective, data, **settings)
    return jax.tree.map(np.subtract, before["params"], state.params)


def assert_close(actual, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_the_default_is_the_cross_entropy():
    data = batch(masked=2)
    actual, _, _ = one_step(None, data)
    expected, _, _ = one_step(cross_entropy(), data)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_each_call_of_the_network_updates_the_statistics():
    def twice(forward, batch, _):
        views = [forward(x).logits for x in (batch.inputs, batch.inputs[:, :, ::-1])]
        return sum(jnp.square(logits).sum(1) for logits in views), {}

    moving = frozenset({"stem", "layer1"})
    data = batch(masked=1)
    state, actual, before = one_step(twice, data, batch_statistics=moving)
    variables = random_variables()
    total, stats = 0.0, variables["batch_stats"]
    for x in (data.inputs, data.inputs[:, :, ::-1]):
        output = apply(
            MODEL,
            {**variables, "batch_stats": stats},
            x,
            batch_statistics=moving,
            mask=data.mask,
        )
        total, stats = total + float(jnp.square(output.logits)[:5].sum()), output.batch_stats
    assert actual["loss"] == pytest.approx(total / 5, rel=1e-5)
    assert_close(state.batch_stats, {name: stats[name] for name in moving})
    assert not np.array_equal(state.params["head"]["kernel"], before["params"]["head"]["kernel"])


def test_every_call_draws_new_noise_and_none_without_noise():
    def spread(forward, batch, _):
        one, other, still, again = (
            forward(batch.inputs, noise=noise).logits for noise in (True, True, False, False)
        )
        differences = {"noisy": jnp.abs(one - other).sum(1), "still": jnp.abs(still - again).sum(1)}
        return one.sum(1), differences

    _, actual, _ = one_step(spread, batch(), noise=STAGES)
    assert actual["noisy"] > 0.1
    assert actual["still"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("moving", [frozenset(), frozenset({"stem", "layer1"})])
def test_input_gradients_update_no_statistics_and_are_differentiable_by_the_parameters(moving):
    """A gradient penalty is the square of the input gradient, differentiated by the parameters."""

    def penalty(forward, batch, _):
        def score(x):
            return forward(x).logits[:, 0].sum()

        slope = jax.grad(score)(batch.inputs)
        return jnp.square(slope).sum((1, 2, 3)), {}

    data = batch(masked=2)
    state, actual, before = one_step(penalty, data, batch_statistics=moving)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, before["batch_stats"])
    variables = random_variables()

    def total(params):
        def score(x):
            whole = {**variables, "params": params}
            return (
                apply(MODEL, whole, x, batch_statistics=moving, mask=data.mask).logits[:4, 0].sum()
            )

        return jnp.square(jax.grad(score)(data.inputs))[:4].sum() / 4

    assert actual["loss"] == pytest.approx(float(total(variables["params"])), rel=1e-4)
    moved = jax.tree.map(np.subtract, before["params"], state.params)
    assert_close(moved, jax.grad(total)(variables["params"]), 1e-4)


def test_evaluate_has_no_noise_and_no_parameter_gradient():
    def teacher(forward, batch, _):
        return forward.evaluate(batch.inputs).logits.sum(1), {}

    moved = gradient(teacher, batch(), batch_statistics=STAGES - {"pool"}, noise=STAGES)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(moved))
    _, actual, _ = one_step(teacher, batch(), batch_statistics=STAGES - {"pool"}, noise=STAGES)
    plain = apply(MODEL, random_variables(), batch().inputs).logits
    assert actual["loss"] == pytest.approx(float(plain.sum(1).mean()), rel=1e-5)


def test_an_objective_gets_captured_stages_and_extra_arrays():
    wanted = np.random.default_rng(1).normal(size=(6, 8, 8, 12)).astype(np.float32)

    def match(forward, batch, _):
        actual = forward(batch.inputs, capture=("layer1",)).captured["layer1"]
        return jnp.square(actual - batch.extra["wanted"]).mean((1, 2, 3)), {}

    _, actual, _ = one_step(match, batch(masked=1, wanted=wanted))
    output = apply(MODEL, random_variables(), batch().inputs, capture=("layer1",))
    expected = np.square(output.captured["layer1"] - wanted).mean((1, 2, 3))[:5].mean()
    assert actual["loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_targets_may_be_a_tree_and_weights_apply(accumulate):
    """Missing targets, which are nan, have weight 0, and so have padded rows."""
    rng = np.random.default_rng(2)
    numbers = rng.normal(size=6).astype(np.float32)
    numbers[1] = np.nan
    several = rng.integers(0, 2, (6, 3)).astype(np.float32)
    data = batch(masked=2, targets={"number": numbers, "several": several})

    def objective(forward, batch, _):
        logits = forward(batch.inputs).logits
        known = ~jnp.isnan(batch.targets["number"])
        error = jnp.where(known, logits[:, 0] - jnp.nan_to_num(batch.targets["number"]), 0)
        each = optax.sigmoid_binary_cross_entropy(logits, batch.targets["several"]).mean(1)
        return each, {"square": Weighted(error**2, known.astype(jnp.float32))}

    state, actual, _ = one_step(objective, data, accumulate=accumulate)
    logits = np.asarray(apply(MODEL, random_variables(), data.inputs).logits)
    retained = [0, 2, 3]
    assert actual["square"] == pytest.approx(
        np.mean((logits[retained, 0] - numbers[retained]) ** 2), 1e-5
    )
    each = optax.sigmoid_binary_cross_entropy(logits, several).mean(1)
    assert actual["loss"] == pytest.approx(float(each[:4].mean()), rel=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_reserved_metric_names_are_refused():
    def objective(forward, batch, _):
        return forward(batch.inputs).logits.sum(1), {"loss": jnp.zeros(6)}

    with pytest.raises(RequestError, match="an objective's metric must not be called 'loss'"):
        one_step(objective, batch())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: (x[:, None], {}), r"losses of shape \(6, 1\) instead of \(6,\)"),
        (lambda x: (x.mean(), {}), r"losses of shape \(\) instead"),
        (lambda x: (x, {"m": x[:3]}), r"returned m of shape \(3,\)"),
        (lambda x: (x, {"m": Weighted(x, x.sum())}), r"returned m of shape \(\)"),
        (lambda x: x, "a pair: losses and a dict"),
        (lambda x: (x, {"step": x}), "must not be called 'step'"),
        (lambda x: (x, {3: x}), "must not be called 3"),
    ],
)
def test_values_that_are_not_one_per_example_are_refused(returned, message):
    with pytest.raises(RequestError, match=message):
        one_step(lambda forward, batch, _: returned(forward(batch.inputs).logits.sum(1)), batch())


@pytest.mark.parametrize(
    ("fit_config", "hooks", "message"),
    [
        ({}, {"materialize": lambda t, _: t}, "materialize made variables that do not fit tiny"),
        ({}, {"new_head": lambda m, v, _: replace_head(m, v, 5)}, "made 5 outputs, not 3"),
        ({"label_smoothing": 0.1}, {"objective": cross_entropy()}, "--label-smoothing 0.1 has no"),
        ({}, {"log_every": 0}, "log_every must be at least 1"),
    ],
)
def test_invalid_hooks_are_refused_before_the_first_step(fit_config, hooks, message):
    with pytest.raises(RequestError, match=message):
        train(config(freeze_to="stem", **fit_config), **hooks)


def test_validation_images_without_labels_are_refused():
    data = splits()
    data = data._replace(val=replace(data.val, labels=np.full(7, -1, np.int32)))
    with pytest.raises(RequestError, match="a validation image has no label"):
        train(config(), data)


def test_callbacks_cannot_change_the_run_and_a_metric_may_be_nan():
    def blank(forward, batch, key):
        losses, metrics = cross_entropy()(forward, batch, key)
        return losses, {**metrics, "blank": Weighted(losses, jnp.zeros(len(losses)))}

    result = train(config(), objective=blank, on_epoch=lambda history: history.clear())
    assert len(result.history) == 3
    assert np.isnan(result.history[1]["train_blank"])


def test_materialize_computes_the_parameters_from_the_trainable_ones():
    """The trainable parameters are a factor per kernel, which the result does not contain."""
    variables = random_variables()
    variables["params"]["head"]["factor"] = np.float32(1.5)

    def materialize(trainable, frozen):
        params = combine(trainable, frozen)
        head = dict(params["head"])
        head["kernel"] = head.pop("factor") * head["kernel"]
        return {**params, "head": head}

    rates = label(variables["params"], (("head/factor", 1.0), ("*", 0.0)))
    changing, staying = jax.tree.map(jnp.array, split(variables, rates, ()))
    state = init_state(changing["params"], {}, optax.sgd(1.0))
    step = make_train_step(MODEL, optax.sgd(1.0), None, materialize)
    state, _ = step(state, staying, batch(), KEYS)

    def loss(factor):
        head = random_variables()["params"]["head"]
        head = {**head, "kernel": factor * head["kernel"]}
        params = {**random_variables()["params"], "head": head}
        logits = apply(MODEL, {**random_variables(), "params": params}, batch().inputs).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch().targets).mean()

    expected = 1.5 - float(jax.grad(loss)(1.5))
    assert float(state.params["head"]["factor"]) == pytest.approx(expected, rel=1e-5)

    def with_factor(model, _, classes):
        assert classes == 3
        return model, jax.tree.map(np.array, variables)

    fit_config = config(train=("head/factor",), rate=0.1)
    result = train(fit_config, new_head=with_factor, materialize=materialize)
    assert set(result.variables["params"]["head"]) == {"kernel", "bias"}
    before = random_variables()["params"]["head"]["kernel"]
    assert np.ptp(result.variables["params"]["head"]["kernel"] / before) < 1e-5
    retained = np.stack([splits().val.read(int(i)) for i in result.logits.indices])
    expected = np.asarray(apply(MODEL, result.variables, retained).logits)
    np.testing.assert_allclose(result.logits.values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_optimizer_gets_the_loss_and_a_function_of_gradients():
    def update(grads, state, params, *, value, grad_fn, **_):
        elsewhere = grad_fn(jax.tree.map(lambda x: x + 0.1, params))
        return jax.tree.map(lambda g: -g, elsewhere), (value, *state[1:])

    start = jnp.float32(0)
    optimizer = optax.GradientTransformationExtraArgs(lambda _: (start,), update)
    state, actual, before = one_step(None, batch(masked=1), optimizer=optimizer)
    assert float(state.opt_state[0]) == pytest.approx(actual["loss"], rel=1e-6)
    variables, data = random_variables(), batch()

    def loss(params):
        logits = apply(MODEL, {**variables, "params": params}, data.inputs[:5]).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, data.targets[:5]).mean()

    there = jax.grad(loss)(jax.tree.map(lambda x: x + 0.1, variables["params"]))
    assert_close(jax.tree.map(np.subtract, before["params"], state.params), there)


def confident(forward, batch, key):
    losses, metrics = cross_entropy()(forward, batch, key)
    shares = class_shares(batch.targets, 3)
    return losses + 0.1 * jnp.square(forward(batch.inputs).logits - shares).sum(1), metrics


def test_fit_takes_an_objective_and_calls_callbacks_in_order(tmp_path):
    steps, epochs = [], []
    fit_config = config(cache="none", augment=True, augmentation=AugmentConfig(mixup=0.3))
    result = train(
        fit_config,
        objective=confident,
        on_step=lambda step, metrics: steps.append((step, metrics)),
        log_every=2,
        on_epoch=lambda history: epochs.append(len(history)),
    )
    assert [step for step, _ in steps] == [2, 4, 6]
    assert set(steps[0][1]) == {
        *("loss", "cross_entropy", "top1", "gradient_norm", "learning_rate", "images_per_second")
    }
    assert epochs == [1, 2, 3]
    entry = result.history[1]
    assert entry["train_loss"] > entry["train_cross_entropy"]
    plain = train(fit_config)
    assert everything(result)["variables"] != everything(plain)["variables"]
    # Callbacks do not change the result.
    assert everything(train(fit_config, objective=confident)) == everything(result)


def test_extra_arrays_reach_the_objective_with_and_without_a_cache():
    """A teacher's logits stay with their examples."""
    data = splits()
    teacher = np.random.default_rng(3).normal(size=(11, 3)).astype(np.float32)
    data = data._replace(train=replace(data.train, extra={"teacher": teacher}))

    def distil(forward, batch, _):
        logits = forward(batch.inputs).logits
        return optax.l2_loss(logits, batch.extra["teacher"]).sum(1), {
            "sum": batch.extra["teacher"].sum(1)
        }

    for cache in ("none", "memory"):
        result = train(config(freeze_to="stem", cache=cache, epochs=1), data, objective=distil)
        assert result.history[1]["train_sum"] == pytest.approx(
            np.delete(teacher.sum(1), 4).mean(), rel=1e-4
        )
    chosen = select(data.train, [3, 1])
    np.testing.assert_array_equal(chosen.extra["teacher"], teacher[[3, 1]])
    assert data.train.digest != splits().train.digest


def test_a_transform_function_wraps_the_optimizer():
    def halved(inner):
        inner = optax.with_extra_args_support(inner)

        def update(grads, state, params, **extra):
            updates, state = inner.update(grads, state, params, **extra)
            return jax.tree.map(lambda x: 0 * x, updates), state

        return optax.GradientTransformationExtraArgs(inner.init, update)

    result = train(config(epochs=1), transform=halved)
    start = train(config(epochs=1, rate=0.0))
    for name, leaf in flatten(result.variables).items():
        np.testing.assert_array_equal(leaf, flatten(start.variables)[name])


def test_fit_trains_on_arrays():
    """An array of images serves as the examples of a source."""
    made = source(9)
    images = np.stack([made.read(i) for i in range(9)])
    arrays = replace(made, examples=images)
    actual, expected = (train(config(epochs=1), Splits(data, data, ())) for data in (arrays, made))
    assert everything(actual) == everything(expected)


def test_join_is_the_inverse_of_split():
    variables = random_variables()
    rates = label(variables["params"], (("head/*", 1.0), ("*", 0.0)))
    jax.tree.map(np.testing.assert_array_equal, join(*split(variables, rates, {"stem"})), variables)
