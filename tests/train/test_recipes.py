"""Plans of the recipes, training with each, and tables of learning rate multiples."""

import json
from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import jax
import numpy as np
import pytest
from engine import LOADING, config, splits, train
from flax import linen as nn
from tiny import MODEL, Unit

from tljax.data.options import AugmentConfig
from tljax.models import Stage, abstract_variables
from tljax.models.layers import StochasticDepth
from tljax.models.model import stochastic_depth_stages
from tljax.models.spec import to_json
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten
from tljax.train.fit import fit
from tljax.train.freeze import freeze_table, label
from tljax.train.options import FitConfig, OptimizerConfig
from tljax.train.recipes import make_plan

pytestmark = pytest.mark.usefixtures("quick_to_compile")

PARAMS = abstract_variables(MODEL)["params"]


def plan(recipe="finetune", examples=100, batch_size=10, **others):
    return make_plan(MODEL, FitConfig(recipe, **others), examples, batch_size)


def rates(table):
    """Return the rate of every stage; None if its parameters differ in their rates."""
    flat = flatten(label(PARAMS, table))
    stages = {path.split("/")[0] for path in flat}
    by_stage = {name: {r for p, r in flat.items() if p.startswith(f"{name}/")} for name in stages}
    return {name: values.pop() if len(values) == 1 else None for name, values in by_stage.items()}


def test_freeze_to_freezes_all_stages_up_to_the_given_one():
    assert rates(freeze_table(MODEL)) == {"stem": 1, "layer1": 1, "head": 1}
    assert rates(freeze_table(MODEL, freeze_to="stem")) == {"stem": 0, "layer1": 1, "head": 1}
    # A stage without parameters freezes those before it.
    assert rates(freeze_table(MODEL, freeze_to="pool")) == {"stem": 0, "layer1": 0, "head": 1}


def test_train_takes_stages_and_patterns():
    expected = {"stem": 0, "layer1": 1, "head": 1}
    for names in (("head", "layer1"), ("head,layer1",), ("head, layer1",), ("head", "layer*")):
        assert rates(freeze_table(MODEL, train=names)) == expected
    labels = flatten(label(PARAMS, freeze_table(MODEL, train=("*/scale,*/bias",))))
    assert {path for path, rate in labels.items() if rate} == {
        path for path in labels if path.endswith(("scale", "bias"))
    }


def test_rates_take_precedence_and_decay_applies_from_the_last_stage_to_the_first():
    assert rates(freeze_table(MODEL, layer_decay=0.5)) == {"stem": 0.25, "layer1": 0.5, "head": 1}
    table = freeze_table(MODEL, freeze_to="stem", layer_decay=0.5, rates=("head=3",))
    assert rates(table) == {"stem": 0, "layer1": 0.5, "head": 3}
    table = freeze_table(MODEL, train=("layer1",), layer_decay=0.5)
    assert rates(table) == {"stem": 0, "layer1": 0.5, "head": 0}
    flat = flatten(label(PARAMS, freeze_table(MODEL, rates=("stem/conv/scale=0.1", "*/scale=0"))))
    assert flat["stem/conv/scale"] == 0.1
    assert flat["layer1/conv/scale"] == 0
    assert flat["layer1/conv/kernel"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_to": "layer9"}, "no stage 'layer9'; its stages are stem"),
        ({"freeze_to": "head"}, "leaves nothing to train"),
        ({"freeze_to": "stem", "train": ("head",)}, "exclude each other"),
        ({"train": ("layer9",)}, "no stage 'layer9'"),
        ({"train": ("head,layer9",)}, "no stage 'layer9'"),
        ({"train": ("pool",)}, r"'pool/\*' matches no parameter"),
        ({"train": ("head/kernle",)}, "'head/kernle' matches no parameter, such as"),
        ({"train": ("*/scale",), "layer_decay": 0.5}, r"'\*/scale' is a pattern"),
        ({"rates": ("head",)}, "PATTERN=RATE"),
        ({"rates": ("head=fast",)}, "PATTERN=RATE"),
        ({"rates": ("head=-1",)}, "PATTERN=RATE"),
        ({"rates": ("head=nan",)}, "PATTERN=RATE"),
        ({"rates": ("=1",)}, "PATTERN=RATE"),
        ({"rates": ("layer9=1",)}, "no stage 'layer9'"),
        ({"rates": ("*/kernle=0",)}, r"'\*/kernle' matches no parameter"),
        ({"rates": ("*=0",)}, "all parameters are frozen"),
        ({"layer_decay": 0.0}, "choose a number in"),
        ({"layer_decay": 1.5}, "choose a number in"),
    ],
)
def test_an_invalid_option_is_refused_in_one_line(options, message):
    with pytest.raises(RequestError, match=message) as caught:
        label(PARAMS, freeze_table(MODEL, **options))
    assert "\n" not in str(caught.value)


def test_probe_and_lp_ft_start_from_the_probe():
    actual = plan("probe")
    assert (actual.start, actual.phases) == ("probe", ())
    actual = plan("lp-ft")
    assert actual.start == "probe"
    (phase,) = actual.phases
    assert (phase.name, rates(phase.table), phase.epochs) == (
        "train",
        {"stem": 0, "layer1": 1, "head": 1},
        10,
    )
    assert actual.config.optimizer.learning_rate == 1e-4
    assert rates(plan("lp-ft", train=("head",)).phases[0].table)["layer1"] == 0


def test_gradual_unfreezes_from_the_last_stage_to_the_first():
    actual = plan("gradual", epochs=5)
    assert actual.start == "probe"
    assert [(p.name, p.epochs, rates(p.table)) for p in actual.phases] == [
        ("from layer1", 3, {"stem": 0, "layer1": 1, "head": 1}),
        ("from stem", 2, {"stem": 1, "layer1": 1, "head": 1}),
    ]
    only = plan("gradual", freeze_to="stem", epochs=5)
    assert [(p.name, p.epochs) for p in only.phases] == [("from layer1", 5)]
    # Stages frozen by a pattern stay frozen and get no phase.
    for options in ({"train": ("stem", "layer1")}, {"rates": ("head=0",)}):
        (phase,) = plan("gradual", **options).phases
        assert rates(phase.table) == {"stem": 1, "layer1": 1, "head": 0}
    with pytest.raises(RequestError, match="set --epochs to at least 2"):
        plan("gradual", epochs=1)
    with pytest.raises(RequestError, match="at least two"):
        plan("gradual", train=("head",))


@pytest.mark.parametrize(
    ("examples", "steps", "warmup", "mixup"),
    [
        (1000, 500, 100, 0),
        (19_999, 500, 100, 0),
        (20_000, 10_000, 500, 0.1),
        (10**6, 20_000, 500, 0.1),
    ],
)
def test_bit_follows_the_hyperrule(examples, steps, warmup, mixup):
    actual = plan("bit", examples, 512)
    (phase,), config = actual.phases, actual.config
    assert actual.start == "zeros"
    per_epoch = -(-examples // 512)
    assert phase.epochs == -(-steps // per_epoch)
    optimizer = config.optimizer
    assert (optimizer.optimizer, optimizer.schedule, optimizer.momentum) == ("sgd", "step", 0.9)
    assert optimizer.learning_rate == pytest.approx(0.003)
    assert optimizer.weight_decay == 0
    assert optimizer.clip_norm == 0
    assert optimizer.warmup == pytest.approx(warmup / steps)
    assert config.augment
    assert config.augmentation.mixup == mixup
    assert plan("bit", examples, 128).config.optimizer.learning_rate == pytest.approx(0.00075)


def test_scratch_trains_all_stages_from_random_weights():
    actual = plan("scratch")
    assert actual.start == "random"
    assert actual.phases[0].epochs == actual.config.epochs == 30
    assert actual.config.optimizer.learning_rate == 1e-3
    assert (actual.config.batch_norm, actual.config.augment) == ("batch", True)
    for options in ({"freeze_to": "stem"}, {"train": ("head",)}, {"rates": ("stem=0",)}):
        with pytest.raises(RequestError, match="must train all stages"):
            plan("scratch", **options)


def test_given_options_override_the_defaults_of_a_recipe():
    zero = OptimizerConfig(learning_rate=0.0)
    for recipe in ("finetune", "bit", "scratch"):
        actual = plan(recipe, optimizer=zero, epochs=3, batch_norm="running")
        assert actual.config.optimizer.learning_rate == 0
        assert actual.phases[0].epochs == 3
        assert actual.config.batch_norm == "running"


def test_a_cache_without_views_and_a_cache_of_mixed_images_are_refused():
    with pytest.raises(RequestError, match="add --cache-views 8"):
        plan(augment=True, cache="disk")
    with pytest.raises(RequestError, match="cannot mix cached views"):
        plan(augment=True, cache_views=2, augmentation=AugmentConfig(mixup=0.2))


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"augmentation": AugmentConfig(mixup=0.4)}, "--mixup 0.4 has no effect without --augment"),
        ({"recipe": "probe", "epochs": 3}, "--epochs 3 has no effect with --recipe probe: it "),
        ({"recipe": "bit", "optimizer": OptimizerConfig("sgd")}, "--optimizer sgd has no effect"),
        ({"augment": True, "augmentation": AugmentConfig(mixup=0.4)}, ""),
        ({"recipe": "bit", "augmentation": AugmentConfig(flip=False), "epochs": 3}, ""),
    ],
)
def test_an_option_without_effect_is_noted_and_not_refused(options, note, capsys, monkeypatch):
    """One configuration may serve several recipes."""
    import tljax.train.setup as train_setup

    monkeypatch.setattr(train_setup, "make_plan", mock.Mock(side_effect=RequestError("enough")))
    with pytest.raises(RequestError, match="enough"):
        train(FitConfig(**options))
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"note: {note}" if note else "")
    assert len(stderr.splitlines()) == bool(note)


@pytest.mark.usefixtures("compilation_cache")
@pytest.mark.parametrize("recipe", ["lp-ft", "gradual", "finetune", "bit", "scratch"])
def test_every_recipe_learns(recipe, monkeypatch):
    import tljax.train.setup as train_setup

    # An untrained probe leaves something to learn, and takes no time to compile.
    probe = type("Probe", (), {"kernel": np.zeros((12, 3), "f"), "bias": np.zeros(3, "f")})
    monkeypatch.setattr(train_setup, "fit_source_probe", lambda *_, **__: probe)
    options = config(recipe, rate=0.02, epochs=8)
    result = train(options, splits(24), loading=LOADING)
    losses = [entry["train_loss"] for entry in result.history[1:]]
    assert len(losses) == 8
    assert losses[-1] < 0.97 * losses[0]
    assert (result.probe is None) == (recipe not in ("lp-ft", "gradual"))


class Residual(nn.Module):
    depth: float

    @nn.compact
    def __call__(self, x, mode):
        return x + StochasticDepth(self.depth)(Unit(8, name="unit")(x, mode), mode)


RESIDUAL = replace(
    MODEL,
    name="residual",
    stages=(
        MODEL.stages[0],
        Stage("block1", Residual(0.0)),
        Stage("block2", Residual(1.0)),
        *MODEL.stages[2:],
    ),
)


def test_drop_path_is_refused_where_it_has_no_effect():
    message = "--drop-path 0.1: tiny has no stochastic depth: leave it out"
    with pytest.raises(RequestError, match=message):
        plan(drop_path=0.1)
    assert stochastic_depth_stages(RESIDUAL) == {"block2"}
    for options, refused in (
        ({}, False),
        ({"freeze_to": "block1"}, False),
        ({"freeze_to": "block2"}, True),
        ({"rates": ("block2/unit/conv/scale=0",)}, True),
    ):
        where = f"with {options}"
        with (
            pytest.raises(RequestError, match="the trained stages have no stochastic depth")
            if refused
            else nullcontext()
        ):
            make_plan(RESIDUAL, FitConfig("finetune", drop_path=0.1, **options), 100, 10)
            assert not refused, where


def test_drop_path_changes_the_steps_and_is_not_saved():
    shapes = abstract_variables(RESIDUAL)
    variables = jax.tree.map(lambda x: np.full(x.shape, 0.1, np.float32), shapes)
    results = [
        fit(
            *(RESIDUAL, variables, splits(), config(epochs=1, drop_path=rate)),
            loading=LOADING,
        )
        for rate in (0.0, 0.0, 0.5)
    ]
    losses = [result.history[-1]["train_loss"] for result in results]
    assert losses[0] == losses[1] != losses[2]
    assert results[2].model == results[0].model
    assert "drop" not in json.dumps(to_json(results[2].model)).replace("dropout", "")
