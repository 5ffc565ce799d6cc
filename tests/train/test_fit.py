"""Training from start to end: the same result with or without cache and interruptions."""

import gzip
import json
import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from engine import LOADING, config, everything, splits, train
from flax import linen as nn

import tljax.train.feed as feed_module
import tljax.train.fit as fit_module
import tljax.train.inputs as inputs_module
import tljax.train.setup as train_setup
from tljax.data.loader import batch_rows
from tljax.data.options import AugmentConfig, Loading
from tljax.models import replace_head
from tljax.runtime.errors import DivergenceError, RequestError, StoppedError
from tljax.runtime.parallel import Preemption
from tljax.runtime.trees import flatten
from tljax.train import run_directory
from tljax.train.checkpoint import Checkpoints
from tljax.train.feed import Feed
from tljax.train.inputs import Inputs
from tljax.train.objectives import class_weights
from tljax.train.recipes import Phase
from tljax.train.step_log import StepLog

pytestmark = pytest.mark.usefixtures("compilation_cache")

RANDOM = {"batch_norm": "batch", "dropout": 0.3, "ema_decay": 0.8}


@pytest.fixture
def fed(monkeypatch):
    """Record every training batch, with row numbers as inputs if several steps are dispatched."""
    seen, batches = [], Feed.batches

    def recording(self, epoch, first):
        for fed in batches(self, epoch, first):
            if self.steps == 1:
                seen.append(fed.batch)
            else:
                steps = [
                    jax.tree.map(lambda x, i=i: x[i], fed.batch.batches) for i in range(fed.steps)
                ]
                seen.extend(steps)
            yield fed

    monkeypatch.setattr(Feed, "batches", recording)
    return seen


def examples(batches):
    """Return the indices of the valid examples of each batch."""
    return [np.asarray(batch.indices)[np.asarray(batch.mask)].tolist() for batch in batches]


@pytest.fixture(autouse=True)
def feature_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def losses(result):
    entries = result.history[1:]
    return [(entry["train_loss"], entry["val_loss"], entry["train_top1"]) for entry in entries]


def test_a_cached_prefix_does_not_change_the_result(fed, feature_cache):
    actual = {}
    for cache in ("none", "memory", "disk"):
        fed.clear()
        fit_config = config(freeze_to="stem", cache=cache, epochs=4, rate=5e-2, **RANDOM)
        actual[cache] = losses(train(fit_config)), examples(fed)
        assert feature_cache.exists() == (cache == "disk")
    np.testing.assert_allclose(actual["memory"][0], actual["none"][0], rtol=1e-6)
    assert actual["memory"] == actual["disk"]
    assert actual["memory"][1] == actual["none"][1]
    rows = [row for epoch in range(1, 5) for row in batch_rows(11, 4, 0, epoch).tolist()]
    assert actual["none"][1] == [[i for i in row if i not in (-1, 4)] for row in rows]
    # Training has changed the loss, so the comparison is not vacuous.
    assert actual["none"][0][-1][0] < 0.9 * actual["none"][0][0][0]


@pytest.mark.slow
def test_cached_views_are_those_of_the_first_epochs_without_a_cache():
    fresh = train(config(freeze_to="stem", augment=True, epochs=3))
    cached = train(config(freeze_to="stem", augment=True, epochs=3, cache_views=3))
    np.testing.assert_allclose(losses(cached), losses(fresh), rtol=1e-6)
    fewer = train(config(freeze_to="stem", augment=True, epochs=3, cache_views=2))
    assert losses(fewer)[:2] == losses(cached)[:2]
    assert losses(fewer)[2] != losses(cached)[2]


@pytest.mark.slow
def test_a_bfloat16_cache_is_a_close_approximation(feature_cache):
    exact = train(config(freeze_to="stem"))
    for cache in ("memory", "disk"):
        near = train(config(freeze_to="stem", cache=cache, cache_dtype="bfloat16"))
        np.testing.assert_allclose(losses(near), losses(exact), rtol=2e-2)
        assert losses(near) != losses(exact)


@pytest.mark.slow
def test_activations_that_are_computed_in_bfloat16_are_cached_in_it(monkeypatch):
    network = replace(tiny.MODEL, dtype="bfloat16")
    options = config(freeze_to="stem", cache="memory")

    def history():
        return fit_module.fit(
            network, tiny.random_variables(), splits(), options, loading=LOADING
        ).history

    assert inputs_module.cached_dtype(network, options, "layer1") == "bfloat16"
    assert inputs_module.cached_dtype(network, options, "head") == "float32"  # pooled in float32
    cached = history()
    monkeypatch.setattr(inputs_module, "cached_dtype", lambda *_: "float32")
    assert history() == cached


class KilledError(Exception):
    pass


@pytest.fixture
def lives(monkeypatch):
    """After ``left.append(n)``, stop the run after n more steps or history entries."""
    left: list[int] = []
    make, made = train_setup.make_train_step, {}

    def once():
        if not left[-1]:
            raise KilledError
        left[-1] -= 1

    def make_train_step(model, optimizer, objective, materialize, **settings):
        # A resumed run reuses the step, which saves compiling it again.
        key = model, *settings.items()
        step = made[key] = made.get(key) or make(
            model, optimizer, objective, materialize, **settings
        )

        def counted(*args):
            once()
            return step(*args)

        return counted

    monkeypatch.setattr(train_setup, "make_train_step", make_train_step)
    # The probe takes long to compile and does not matter here.
    rng = np.random.default_rng(0)
    probe = SimpleNamespace(kernel=rng.normal(0, 0.1, (12, 3)), bias=np.zeros(3))
    probe = SimpleNamespace(**{k: v.astype(np.float32) for k, v in vars(probe).items()})
    monkeypatch.setattr(train_setup, "fit_source_probe", lambda *_, **__: probe)
    longest = 1

    def log(history):
        nonlocal longest
        if len(history) > longest:
            once()
            longest = len(history)

    return left, log


MIX = AugmentConfig(mixup=0.4)
RUNS = {
    "cached": config(freeze_to="stem", epochs=3, **RANDOM),
    "augmented": config(epochs=3, augment=True, accumulate=2, ema_decay=0.9, augmentation=MIX),
    "gradual": config("gradual", epochs=3, ema_decay=0.5, dropout=0.2, batch_norm="batch"),
    "impatient": config(epochs=6, patience=2, rate=1e-9, optimizer="sgd", cache="none"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name != "augmented" else []) for name in RUNS],
)
def test_a_run_that_is_killed_and_resumed_gives_the_same_result(name, lives, tmp_path, monkeypatch):
    left, log = lives
    fit_config = RUNS[name]
    left.append(10**6)
    expected = everything(train(fit_config, folder=tmp_path / "whole"), tmp_path / "whole")
    result, rng = None, np.random.default_rng(list(RUNS).index(name))
    while result is None:
        left.append(int(rng.integers(1, 6)))
        try:
            result = train(fit_config, folder=tmp_path / "killed", on_epoch=log)
        except KilledError:
            continue
    assert len(left) > 3
    assert everything(result, tmp_path / "killed") == expected
    # Resuming a finished run takes no step.
    left.append(0)
    again = train(fit_config, folder=tmp_path / "killed")
    assert everything(again, tmp_path / "killed") == expected
    if name == "gradual":
        assert {entry["phase"] for entry in expected["history"][1:]} == {"from layer1", "from stem"}
    if name == "impatient":
        assert len(expected["history"]) == 3


class StopAfter(Preemption):
    """A request to stop after some steps."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def reached(self):
        self.left -= 1
        self.requested = not self.left
        return self.requested


def test_a_run_that_is_asked_to_stop_saves_its_last_step(tmp_path, monkeypatch):
    fit_config, taken, append = config(ema_decay=0.8, cache="none"), [], StepLog.append
    expected = everything(train(fit_config, folder=tmp_path / "whole"), tmp_path / "whole")
    stopped = tmp_path / "stopped"
    monkeypatch.setattr(StepLog, "append", lambda *args: (taken.append(args), append(*args)))
    for steps in (1, 3, 2):  # within an epoch, within the next one, and at the very end
        taken.clear()
        with pytest.raises(StoppedError, match="stopped by SIGTERM"):
            train(fit_config, folder=stopped, preemption=StopAfter(steps))
        assert len(taken) == steps
    taken.clear()
    assert everything(train(fit_config, folder=stopped), stopped) == expected
    assert not taken


HEAD = config(freeze_to="layer1", epochs=6, rate=5e-2, dropout=0.1, ema_decay=0.8)


def test_several_steps_in_one_dispatch_give_the_result_of_single_steps(fed, monkeypatch):
    actual = {}
    for steps in (1, 2):
        fed.clear()
        monkeypatch.setattr(feed_module, "steps_at_most", lambda *_, steps=steps: steps)
        logged = {}
        result = train(HEAD, on_step=lambda step, metrics, log=logged: log.update({step: metrics}))
        logged = [(step, metrics["loss"]) for step, metrics in logged.items()]
        actual[steps] = losses(result), logged, examples(fed)
        assert {batch.inputs.shape for batch in fed} == ({(4, 12)} if steps == 1 else {(4,)})
    np.testing.assert_allclose(actual[2][0], actual[1][0], rtol=1e-6)
    np.testing.assert_allclose(actual[2][1], actual[1][1], rtol=1e-6)
    assert actual[2][2] == actual[1][2]
    assert actual[1][0][-1][0] < 0.9 * actual[1][0][0][0]


@pytest.mark.slow
def test_a_run_that_stops_between_two_dispatches_continues_equally(tmp_path, monkeypatch):
    monkeypatch.setattr(feed_module, "steps_at_most", lambda *_: 2)
    expected = everything(train(HEAD, folder=tmp_path / "whole"), tmp_path / "whole")
    for dispatches in (1, 2, 1):
        with pytest.raises(StoppedError):
            train(HEAD, folder=tmp_path / "stopped", preemption=StopAfter(dispatches))
    result = train(HEAD, folder=tmp_path / "stopped")
    assert everything(result, tmp_path / "stopped") == expected


def test_the_first_signal_waits_for_the_step_and_the_second_does_not():
    def again(preemption):
        with preemption.deferred():
            signal.raise_signal(signal.SIGTERM)
            assert preemption.requested
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("the second one waited, too")

    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption, pytest.raises(StoppedError):
        signal.raise_signal(signal.SIGTERM)
    with Preemption() as preemption, pytest.raises(StoppedError), preemption.deferred():
        signal.raise_signal(signal.SIGTERM)
    with Preemption() as preemption, pytest.raises(StoppedError):
        again(preemption)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_the_batch_size_is_at_most_the_size_of_the_training_set(fed):
    for others in ({"cache": "none", "accumulate": 2}, {"freeze_to": "stem"}):
        actual = {}
        for size in (11, 2048):
            fed.clear()
            fit_config = config(epochs=2, dropout=0.3, **others)
            result = everything(train(fit_config, loading=Loading(size)))
            actual[size] = result, [batch.inputs.shape for batch in fed]
        assert actual[11] == actual[2048]
        assert {shape[0] for shape in actual[2048][1]} == {12 if "accumulate" in others else 11}


def test_a_plan_that_freezes_trained_parameters_is_refused(monkeypatch):
    """A checkpoint of the second phase would not hold them."""
    make_plan = train_setup.make_plan

    def there_and_back(*arguments):
        plan = make_plan(*arguments)
        tables = ([("layer1/*", 1.0), ("*", 0.0)], [("head/*", 1.0), ("*", 0.0)])
        return plan._replace(phases=tuple(Phase("x", table, 1) for table in tables))

    monkeypatch.setattr(train_setup, "make_plan", there_and_back)
    with pytest.raises(RequestError, match=r"layer1/\S+ is trained in one phase and frozen"):
        train(config())


def test_metrics_are_kept_when_the_checkpoints_are_refused(tmp_path):
    train(config(), folder=tmp_path)
    retained = (tmp_path / "metrics.jsonl").read_bytes()
    assert retained.count(b"\n") == 3
    with pytest.raises(RequestError, match="belongs to a run with other"):
        train(config(rate=1e-3), folder=tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == retained


def test_the_same_seed_gives_the_same_bytes_and_another_does_not():
    first = everything(train(RUNS["cached"]))
    assert everything(train(RUNS["cached"])) == first
    assert everything(train(RUNS["cached"], seed=1))["variables"] != first["variables"]


@pytest.fixture
def measured(monkeypatch):
    """Record the variables of every evaluation, including the one before training."""
    seen, logits = [], Inputs.logits

    def recording(self, model, variables):
        seen.append(jax.tree.map(np.array, variables))
        return logits(self, model, variables)

    monkeypatch.setattr(Inputs, "logits", recording)
    return seen


def test_frozen_parameters_keep_their_bytes_for_a_hundred_steps(measured):
    fit_config = config(
        freeze_to="stem", batch_norm="batch", epochs=34, cache="none", ema_decay=0.5
    )
    fit_config = replace(
        fit_config, optimizer=replace(fit_config.optimizer, weight_decay=0.1, clip_norm=0.5)
    )
    train(fit_config)
    first = tiny.random_variables()
    assert len(measured) == 36
    for variables in measured:
        for kind in ("params", "batch_stats"):
            before, after = first[kind]["stem"], variables[kind]["stem"]
            jax.tree.map(
                lambda a, b: np.testing.assert_array_equal(a, b, strict=True), before, after
            )
    for kind in ("params", "batch_stats"):
        for path, leaf in flatten(first[kind]["layer1"]).items():
            assert not np.array_equal(leaf, flatten(measured[-2][kind]["layer1"])[path]), path


def test_patience_stops_the_run_and_the_best_epoch_is_returned(measured, monkeypatch):
    """Accuracy improves once, then drops: the run stops after two epochs without improvement."""
    top1 = iter([0.2, 0.4, 0.8, 0.6, 0.8, 0.9, 1.0])
    evaluate = fit_module.evaluate

    def scripted(*arguments):
        evaluation, value = evaluate(*arguments), next(top1, 1.0)
        monkeypatch.setattr(type(evaluation), "metric", lambda self, name: self.values[name])
        object.__setattr__(evaluation, "values", {"top1": value, "loss": 1.0})
        return evaluation

    monkeypatch.setattr(fit_module, "evaluate", scripted)
    result = train(config(epochs=6, patience=2))
    # The tie of epoch 4 is not better, so two epochs have passed since epoch 2.
    assert [entry["val_top1"] for entry in result.history] == [0.2, 0.4, 0.8, 0.6, 0.8]
    jax.tree.map(np.testing.assert_array_equal, result.variables, measured[2])
    heads = [variables["params"]["head"]["bias"] for variables in measured]
    assert not np.array_equal(heads[2], heads[3])


@pytest.mark.slow
def test_the_moving_average_is_validated_and_accumulation_changes_nothing():
    plain, averaged, parts = (
        train(fit_config)
        for fit_config in (config(), config(ema_decay=0.999), config(accumulate=2))
    )
    for name in ("train_loss", "val_loss"):
        actual, expected = ([e[name] for e in r.history[1:]] for r in (parts, plain))
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
    for same, entry in zip(plain.history[1:], averaged.history[1:], strict=True):
        assert entry["train_loss"] == pytest.approx(same["train_loss"], rel=1e-6)
        assert entry["val_loss"] != pytest.approx(same["val_loss"], rel=1e-4)


def strict(line):
    """Parse strict JSON, which has no NaN."""
    return json.loads(line, parse_constant=pytest.fail)


def test_a_run_that_diverges_stops_with_advice():
    with pytest.raises(DivergenceError) as stopped:
        train(config(optimizer="sgd", rate=1e30, clip_norm=0.0))
    message = str(stopped.value)
    assert re.match(r"training diverged: \w+_loss is (nan|inf) after step 3, at a learn", message)
    assert "a learning rate of 7.5e+29: lower --learning-rate, set --clip-norm, or len" in message
    assert "\n" not in message


def test_the_network_after_the_last_step_is_checked():
    """With a single step, the training loss is that of a zero head."""
    with pytest.raises(DivergenceError, match="val_loss is nan after step 1"):
        train(config(rate=1e38, optimizer="sgd", clip_norm=0.0), splits(4, broken=()))


def test_a_network_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    """Not even within an epoch, and earlier checkpoints are kept."""
    make = train_setup.make_train_step

    def make_train_step(*args, **settings):
        step = make(*args, **settings)

        def poisoned(state, *others):
            state, metrics = step(state, *others)
            params = jax.tree.map(lambda x: x * np.nan, state.params)
            return (state._replace(params=params) if state.step == 5 else state), metrics

        return poisoned

    monkeypatch.setattr(train_setup, "make_train_step", make_train_step)
    fit_config = config(ema_decay=0.5)
    with pytest.raises(DivergenceError, match=r"step 5, .*; earlier checkpoints are kept"):
        train(fit_config, folder=tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints", repr(fit_config))
    saved = checkpoints.restore()
    checkpoints.close()
    assert saved is not None
    assert (saved.position["epoch"], saved.position["batch"]) == (2, 1)
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(saved.folder)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [strict(line)["epoch"] for line in lines] == [0, 1]


def test_weights_that_are_not_finite_are_reported_before_the_first_step(monkeypatch):
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), tiny.random_variables())
    monkeypatch.setattr(tiny, "random_variables", lambda: broken)
    with pytest.raises(RequestError, match="val_loss is nan before the first step: check the w"):
        train(config())


def test_files_are_strict_json(tmp_path):
    values = {"nan": np.nan, "inf": [-np.inf, (1.5, np.float64("inf"))], "path": tmp_path, "n": 1}
    run_directory.write_json(tmp_path / "found.json", values)
    actual = strict((tmp_path / "found.json").read_text())
    assert actual == {"nan": None, "inf": [None, [1.5, None]], "path": str(tmp_path), "n": 1}
    run_directory.MetricsFile(tmp_path).on_epoch([{"epoch": 0, "val_loss": np.inf}])
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {"epoch": 0, "val_loss": None}


def test_unreadable_images_are_listed_and_a_class_without_images_is_refused():
    for cache in ("none", "memory"):
        fit_config = config(freeze_to="stem", cache=cache, epochs=1)
        assert [sorted(part) for part in train(fit_config).skipped] == [[4], [2]]
        with pytest.raises(RequestError, match="no image of the validation data can be read"):
            train(fit_config, splits(val_broken=range(7)))
        with pytest.raises(RequestError, match="no image of class 'b' in the training data"):
            train(fit_config, splits(broken=range(1, 11, 3)))
        with pytest.raises(RequestError, match=r"image \d: .*skip it"):
            train(fit_config, loading=replace(LOADING, on_bad_image="fail"))


def test_balanced_class_weights_are_inverse_to_the_class_frequencies():
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 2], np.int32)
    data = replace(splits(9, broken=()).train, labels=labels)
    assert class_weights(data) == pytest.approx((0.5, 1.5, 3.0))


def test_a_profile_traces_some_steps(tmp_path):
    actual = train(config(epochs=1), profile=tmp_path)
    [path] = tmp_path.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert "PjitFunction(step)" in {event.get("name") for event in events}
    assert everything(actual) == everything(train(config(epochs=1)))


def test_half_precision_applies_to_activations_only():
    half = replace(tiny.MODEL, dtype="bfloat16")
    actual, expected = (
        fit_module.fit(model, tiny.random_variables(), splits(), config(epochs=2), loading=LOADING)
        for model in (half, tiny.MODEL)
    )
    assert actual.model.dtype == "bfloat16"
    leaves = [*flatten(actual.variables).values(), actual.logits.values]
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    np.testing.assert_allclose(losses(actual), losses(expected), rtol=0.05)
    assert losses(actual) != losses(expected)


def test_frozen_parameters_in_half_precision_are_returned_in_full_precision():
    settings = config(freeze_to="stem", cache="none")
    actual, expected = train(replace(settings, frozen_dtype="bfloat16")), train(settings)
    np.testing.assert_allclose(losses(actual), losses(expected), rtol=0.05)
    assert losses(actual)[1:] != losses(expected)[1:]
    before = flatten(tiny.random_variables())
    for path, leaf in flatten(actual.variables).items():
        if "/stem/" in path:
            np.testing.assert_array_equal(leaf, before[path], strict=True)


# --- other heads ----------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(self.num_classes)(nn.relu(nn.Dense(4)(x)))


def two_layers(model, variables, classes):
    *body, old = model.stages
    head = TwoLayers(classes)
    params = head.init(jax.random.key(0), np.zeros((1, 12)), False)["params"]
    variables = {**variables, "params": {**variables["params"], old.name: params}}
    return replace(model, stages=(*body, old._replace(module=head))), variables


@pytest.mark.slow
def test_a_head_of_two_layers_is_trained_by_recipes_without_a_probe():
    with pytest.raises(RequestError, match=r"lp-ft starts with a probe, which needs a linear head"):
        train(config("lp-ft"), new_head=two_layers)
    result = train(config(rate=5e-2), new_head=two_layers)
    assert result.model.num_classes == 3
    before = two_layers(tiny.MODEL, tiny.random_variables(), 3)[1]["params"]["head"]
    after = result.variables["params"]["head"]
    assert not np.array_equal(after["Dense_0"]["kernel"], before["Dense_0"]["kernel"])


@pytest.mark.slow
def test_a_network_without_a_head_gives_the_same_result_as_with_one(monkeypatch):
    expected = everything(train(config("lp-ft")))
    model, variables = replace_head(tiny.MODEL, tiny.random_variables(), 0)
    monkeypatch.setattr(tiny, "MODEL", model)
    monkeypatch.setattr(tiny, "random_variables", lambda: variables)
    assert everything(train(config("lp-ft"))) == expected
