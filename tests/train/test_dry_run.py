"""The dry run of a training: parameters, cost and cache."""

import re

import jax
import pytest
from engine import LOADING, config, splits
from tiny import MODEL, WIDE

import tljax.train.dry_run as dry_run_module
from tljax.data.examples import Source
from tljax.features.extract import feature_bytes
from tljax.models import abstract_variables
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten
from tljax.train.dry_run import dry_run
from tljax.train.inputs import cache_bytes

pytestmark = pytest.mark.usefixtures("quick_to_compile")

# Kernel, scale and bias: 3 x 3 x 3 x 8 + 8 + 8, 3 x 3 x 8 x 12 + 12 + 12, and a head of 12 x 3 + 3.
STEM, LAYER1, HEAD = 232, 888, 39


def text(*args, **options):
    return dry_run(MODEL, splits(), config(*args, **options), LOADING)


def test_the_parameters_are_counted():
    output = text("lp-ft", freeze_to="stem", rates=("layer1=0.5",), epochs=3)
    rows = {
        cells[0]: cells[1:]
        for line in output.splitlines()
        if len(cells := re.split("  +", line.strip())) == 4
    }
    assert rows["stem"] == [f"{STEM}", "frozen", "0"]
    assert rows["layer1"][:2] == [f"{LAYER1}", "0.005"]
    assert rows["head"][:2] == [f"{HEAD}", "0.01"]
    assert "11 training and 7 validation images, 3 steps of 4 an epoch" in output
    assert "linear probe" in output
    assert "3 epochs" in output


def test_the_last_stages_cost_less_than_all_stages():
    share = {
        cache: int(
            re.search(r"(\d+)% of training all stages", text(freeze_to="stem", cache=cache))[1]
        )
        for cache in ("none", "memory")
    }
    assert share["memory"] < share["none"] < 100
    assert "100% of training all stages" in text()


@pytest.mark.slow
def test_the_size_of_the_cache_is_the_size_of_the_activations():
    output = text(freeze_to="stem", cache="disk")
    size = feature_bytes(MODEL, 11 + 7, "layer1")
    assert size == 18 * 16 * 16 * 8 * 4
    assert "cached in disk: the activations that enter layer1" in output
    assert f"{size / 2**20:,.0f} MiB" in output
    for options, expected in (
        ({}, size),
        ({"cache_dtype": "bfloat16"}, size / 2),
        ({"cache_views": 3}, size),  # without augmentation there is one view
        ({"cache_views": 3, "augment": True}, size * (3 * 11 + 7) / 18),
    ):
        assert cache_bytes(MODEL, splits(), config(**options), "layer1") == expected
    assert "nothing is cached" in text()
    assert "nothing is cached" in text(freeze_to="stem", augment=True)


def test_every_phase_has_a_table():
    output = text("gradual")
    assert output.count("phase: ") == 2
    assert output.index("phase: from layer1") < output.index("phase: from stem")


class OnlyLowered:
    """A step that can be lowered, but not called."""

    def __init__(self, step):
        self.lower = step.lower


def test_the_memory_of_a_device_is_that_of_its_parameters_and_optimizer_state():
    params = abstract_variables(WIDE)["params"]
    for options, frozen in (({}, 0.0), ({"freeze_to": "block0", "ema_decay": 0.9}, 1.0)):
        output = dry_run(WIDE, splits(), config(**options), LOADING)
        sizes = dict(
            re.findall(r"(parameters|optimizer state|moving average) ([\d.]+) MiB", output)
        )
        trained = sum(
            4 * leaf.size / 2**20
            for path, leaf in flatten(params).items()
            if not frozen or not path.startswith(("stem", "block0"))
        )
        total = sum(4 * leaf.size / 2**20 for leaf in jax.tree.leaves(params))
        assert float(sizes["parameters"]) == pytest.approx(total, abs=0.06)
        assert float(sizes["optimizer state"]) == pytest.approx(2 * trained, abs=0.06)
        assert float(sizes.get("moving average", 0)) == pytest.approx(frozen * trained, abs=0.06)
    with pytest.raises(RequestError, match="--fsdp divides memory among devices, and there is one"):
        text(fsdp=True)


def test_nothing_is_trained(monkeypatch):
    make = dry_run_module.make_train_step
    monkeypatch.setattr(
        dry_run_module, "make_train_step", lambda *a, **k: OnlyLowered(make(*a, **k))
    )
    monkeypatch.setattr(Source, "read", None)
    assert "nothing is cached" in text()
    with pytest.raises(RequestError, match="no stage 'layer9'"):
        text(freeze_to="layer9")


@pytest.mark.slow
def test_what_bounds_is_said_where_images_are_loaded():
    line = (
        r"images/s: loading [\d,]+, transfer to the devices [\d,]+, the step about [\d,]+ .* bounds"
    )
    assert len(re.findall(line, text(freeze_to="stem", cache="none"))) == 1
    assert "images/s" not in text(freeze_to="stem", cache="memory")
