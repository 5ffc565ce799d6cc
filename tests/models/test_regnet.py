"""Stochastic depth of RegNets; test_zoo.py compares them with their reference implementations."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
from networks import random_images, random_variables, run

from tljax.models import build_model
from tljax.models.regnet import VARIANTS, Blocks


def test_blocks_are_numbered_from_zero_to_one() -> None:
    for name, variant in VARIANTS.items():
        modules = [stage.module for stage in build_model(name).stages]
        blocks = [module for module in modules if isinstance(module, Blocks)]
        positions = [position for module in blocks for position in module.positions]
        np.testing.assert_allclose(positions, np.linspace(0, 1, sum(variant.depths)))


def test_stochastic_depth_drops_branches_only_with_noise() -> None:
    model = build_model("regnety_002", 7)
    variables, images = random_variables(model), random_images(2, 32, 32)
    dropping, key = replace(model, drop_path=0.9), jax.random.key(0)
    stages = model.stage_names[: model.position("stage4")]
    forward = partial(run, images=images, stop="stage4", capture=stages)
    plain = forward(model, variables)
    quiet = forward(dropping, variables)
    noisy = forward(dropping, variables, noise=stages, key=key)
    for stage in stages:
        np.testing.assert_array_equal(quiet.captured[stage], plain.captured[stage])
    # stage1 has only the first block, whose rate is 0
    np.testing.assert_array_equal(noisy.captured["stage1"], plain.captured["stage1"])
    assert np.abs(noisy.value - plain.value).max() > 0
