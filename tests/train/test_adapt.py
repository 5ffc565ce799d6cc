"""Runs that train an adapter: what trains, what is cached, and that they resume."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from engine import LOADING, config, everything, splits, train
from tiny import MODEL, random_variables

from tljax.data.loader import load_batches
from tljax.models import abstract_variables
from tljax.models.adapters import merge_lora
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten
from tljax.train.adapt import add_adapter
from tljax.train.dry_run import dry_run
from tljax.train.freeze import freeze_table, label, partition
from tljax.train.optimizer import build_optimizer
from tljax.train.options import AdapterConfig, FitConfig, OptimizerConfig
from tljax.train.recipes import make_plan
from tljax.train.step import init_state, make_train_step

pytestmark = pytest.mark.usefixtures("compilation_cache")

LORA = AdapterConfig("lora", rank=2, alpha=6.0)
FACTORS = {"layer1/conv/lora_a", "layer1/conv/lora_b"}
HEAD = {"head/kernel", "head/bias"}


def trainable(adaptation, recipe="finetune", **others):
    """Return {path: rate} of the parameters that train in the last phase."""
    plan = make_plan(MODEL, config(recipe, adaptation=adaptation, **others), 100, 10)
    shapes = jax.eval_shape(
        lambda v: add_adapter(MODEL, v, plan.config, jax.random.key(0)), abstract_variables(MODEL)
    )
    rates = flatten(label(shapes["params"], plan.phases[-1].table))
    return {path: rate for path, rate in rates.items() if rate}


def test_an_adapter_and_the_head_train():
    assert trainable(LORA).keys() == FACTORS | HEAD
    everywhere = replace(LORA, adapter_targets=("stem", "*1/*"))
    stem = {path.replace("layer1", "stem") for path in FACTORS}
    assert trainable(everywhere).keys() == FACTORS | stem | HEAD
    assert trainable(AdapterConfig("bitfit")).keys() == {
        *("stem/conv/bias", "layer1/conv/bias", *HEAD),
    }
    norms = {f"{stage}/conv/{leaf}" for stage in ("stem", "layer1") for leaf in ("scale", "bias")}
    assert trainable(AdapterConfig("norm")).keys() == norms | HEAD


def test_an_adapter_goes_with_rates_recipes_and_a_frozen_prefix():
    rates = trainable(AdapterConfig("bitfit"), layer_decay=0.5, rates=("head=3",))
    assert rates == {"stem/conv/bias": 0.25, "layer1/conv/bias": 0.5, **dict.fromkeys(HEAD, 3.0)}
    assert trainable(AdapterConfig("norm"), freeze_to="stem").keys() == {
        *("layer1/conv/scale", "layer1/conv/bias", *HEAD),
    }
    # Without an adapter, lp-ft freezes the stem.
    assert "stem/conv/bias" in trainable(AdapterConfig("bitfit"), "lp-ft")
    gradual = make_plan(MODEL, FitConfig("gradual", adaptation=AdapterConfig("norm")), 100, 10)
    assert [phase.name for phase in gradual.phases] == ["from layer1", "from stem"]
    assert make_plan(MODEL, FitConfig(adaptation=LORA), 100, 10).config.optimizer == (
        OptimizerConfig(learning_rate=1e-3)
    )


@pytest.mark.parametrize(
    ("adaptation", "others", "message"),
    [
        (LORA, {"train": ("layer1",)}, "--adapter and --train exclude each other"),
        (LORA, {"recipe": "scratch"}, "--recipe scratch must train all stages"),
        (LORA, {"freeze_to": "pool"}, "--freeze-to pool leaves nothing to adapt"),
        (replace(LORA, rank=64), {}, "no kernel of layer1 is large enough for --rank 64"),
        (replace(LORA, adapter_targets=("layer9",)), {}, "has no stage 'layer9'"),
        (
            replace(LORA, adapter_targets=("stem/*",)),
            {"freeze_to": "stem"},
            r"--adapter-targets stem/\* matches no kernel of layer1, such as layer1/conv/kernel",
        ),
    ],
)
def test_contradicting_options_are_refused(adaptation, others, message):
    with pytest.raises(RequestError, match=message):
        make_plan(MODEL, FitConfig(adaptation=adaptation, **others), 100, 10)


@pytest.mark.slow
def test_options_of_lora_without_lora_are_reported(capsys):
    train(config(epochs=1, adaptation=AdapterConfig("norm", rank=2)))
    assert "--rank 2 has no effect without --adapter lora" in capsys.readouterr().err


def test_a_materialize_of_ones_own_does_not_go_with_lora():
    with pytest.raises(RequestError, match="--adapter lora has a materialize of its own"):
        train(config(adaptation=LORA), materialize=lambda trainable, _: trainable)


def test_only_adapter_and_head_reach_the_optimizer():
    size = 3 * 3 * 8 * 2 + 2 * 12 + 12 * 3 + 3
    variables = add_adapter(
        MODEL, random_variables(), FitConfig(adaptation=LORA), jax.random.key(0)
    )
    plan = make_plan(MODEL, FitConfig("finetune", adaptation=LORA), 100, 10)
    rates = label(variables["params"], plan.phases[0].table)
    params, _ = partition(variables["params"], rates)
    optimizer = build_optimizer(OptimizerConfig(), rates, optax.constant_schedule(1e-3))
    state = jax.eval_shape(lambda p: init_state(p, {}, optimizer).opt_state, params)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert numbers == 2 * size  # two moments of Adam
    rows = {
        tuple(cells[1:3])
        for line in dry_run(MODEL, splits(), config(adaptation=LORA), LOADING).splitlines()
        if len(cells := re.split("  +", line.strip())) == 4
    }
    assert rows == {
        *(("parameters", "learning rate"), ("232", "frozen"), ("888", "frozen")),
        *((f"{3 * 3 * 8 * 2 + 2 * 12}", "0.01"), ("39", "0.01")),
    }


@pytest.mark.parametrize("recipe", ["finetune", pytest.param("lp-ft", marks=pytest.mark.slow)])
def test_training_starts_from_the_network_without_an_adapter(recipe):
    plain = train(config(recipe, epochs=1, freeze_to="stem", cache="none"))
    lora = train(config(recipe, epochs=1, freeze_to="stem", cache="none", adaptation=LORA))
    assert lora.history[0] == plain.history[0]


def test_the_result_is_merged_and_says_what_trained():
    result = train(config(adaptation=LORA, rate=5e-2, ema_decay=0.5))
    before, after = (flatten(tree["params"]) for tree in (random_variables(), result.variables))
    unmerged = flatten(result.unmerged["params"])
    assert after.keys() == before.keys() == unmerged.keys() - FACTORS
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {"layer1/conv/kernel", *HEAD}
    assert {path for path in before if not np.array_equal(before[path], unmerged[path])} == HEAD
    merged = flatten(merge_lora({}, result.unmerged["params"], scale=3.0))
    for path, leaf in merged.items():
        np.testing.assert_allclose(after[path], leaf, rtol=1e-6, atol=1e-7)
    update = after["layer1/conv/kernel"] - before["layer1/conv/kernel"]
    assert np.linalg.matrix_rank(update.reshape(-1, 12), tol=1e-5) == 2


@pytest.mark.slow
def test_the_cached_prefix_stays_exact():
    everywhere = replace(LORA, adapter_targets=("*",), adapter_dropout=0.2)
    runs = [
        train(config(adaptation=everywhere, freeze_to="stem", cache=cache, rate=5e-2))
        for cache in ("none", "memory")
    ]
    losses = [[entry["val_loss"] for entry in run.history] for run in runs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert losses[0][-1] < 0.99 * losses[0][0]
    steady = replace(everywhere, adapter_dropout=0.0)
    without = train(config(adaptation=steady, freeze_to="stem", rate=5e-2)).history
    assert without[-1]["val_loss"] != losses[1][-1]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["finetune", "gradual"])
def test_a_run_resumes_with_the_same_result(recipe, tmp_path):
    fit_config = config(
        recipe,
        adaptation=replace(LORA, adapter_targets=("*",), adapter_dropout=0.3),
        accumulate=2,
        ema_decay=0.8,
    )
    whole = train(fit_config, folder=tmp_path / "whole")
    folder, seen = tmp_path / "stopped", []

    def stop(history):
        if not seen and len(history) == 2:
            seen.append(history)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(fit_config, folder=folder, on_epoch=stop)
    again = train(fit_config, folder=folder)
    assert seen
    assert everything(again, folder) == everything(whole, tmp_path / "whole")


def test_dropout_is_differentiated_and_drawn_anew_in_every_step():
    def noise(params, key):
        keep = jax.random.bernoulli(key, 0.5, params["head"]["kernel"].shape)
        return {"head": {**params["head"], "kernel": jnp.where(keep, params["head"]["kernel"], 0)}}

    variables = random_variables()
    rates = label(variables["params"], freeze_table(MODEL, train=("head",)))
    params, frozen = partition(variables["params"], rates)
    optimizer = optax.sgd(1.0)
    step = make_train_step(MODEL, optimizer, parameter_noise=noise)
    source = splits(broken=()).train
    data = next(iter(load_batches(source, MODEL.preprocess, batch_size=8, seed=0, epoch=1)))
    keys = jax.random.key(0), jax.random.key(1)
    state = init_state(jax.tree.map(jnp.array, params), {}, optimizer)
    staying = {"params": frozen, "batch_stats": variables["batch_stats"]}
    masks = []
    for _ in range(2):
        before = np.asarray(state.params["head"]["kernel"])
        state, _ = step(state, staying, data, keys)
        masks.append(before != np.asarray(state.params["head"]["kernel"]))
    assert masks[0].any()
    assert not masks[0].all()  # what was dropped has no gradient
    assert (masks[0] != masks[1]).any()
