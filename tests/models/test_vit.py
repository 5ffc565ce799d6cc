"""Options, sizes and noise of Vision Transformers; test_zoo.py compares the networks."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import torch
from networks import difference, random_images, random_variables, run, to_torch
from references.vit import randomize, timm_network

from tljax.models import abstract_variables, apply, build_model, normalize, vit
from tljax.models.attention import rotate
from tljax.models.vit import Block, Variant, resize_positions
from tljax.pretrained.rules import Rule, apply_rules
from tljax.pretrained.tables.layouts import layout_rules
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten

TINY = Variant(32, 2, 4, patch=4, size=16, layer_scale=True, registers=2, positions="class")


def test_queries_and_keys_are_normalized_as_in_timm() -> None:
    variant = vit.VARIANTS["vit_tiny_patch16_224"]._replace(depth=2, qk_norm=True)
    network = timm_network("vit_tiny_patch16_224", depth=2, qk_norm=True).eval()
    randomize(network)
    model = vit.build("", variant, 7)
    skeleton = abstract_variables(model)
    paths = flatten(skeleton)
    rules = [
        rule for rule in layout_rules("vit_tiny_patch16_224", "timm") if rule.path in paths
    ] + [
        Rule(
            f"blocks.{i}.attn.{x[0]}_norm.{theirs}",
            f"params/block{i + 1}/attention/{x}_norm/{ours}",
        )
        for i in (0, 1)
        for x in ("query", "key")
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    ]
    assert {rule.path for rule in rules} == set(paths)
    arrays = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
    images = random_images(2, 112, 80)
    with torch.no_grad():
        expected = network(to_torch(normalize(images, model.preprocess))).numpy()
    logits = run(model, apply_rules(tuple(rules), arrays, skeleton), images).logits
    assert difference(logits, expected) <= 1e-5


@pytest.mark.parametrize("new", [(7, 5), (14, 14), (20, 31), (30, 8)])
def test_positions_are_resized_as_in_timm(new: tuple[int, int]) -> None:
    positions = np.random.default_rng(0).standard_normal((196, 8)).astype(np.float32)
    resample: Any = oracles.load("timm.layers").resample_abs_pos_embed
    expected = resample(
        torch.from_numpy(positions)[None], list(new), old_size=[14, 14], num_prefix_tokens=0
    )
    resized = resize_positions(jnp.asarray(positions), (14, 14), new)
    assert difference(resized, expected[0].numpy()) <= 1e-6


def test_images_that_patches_do_not_divide_are_refused() -> None:
    model = vit.build("", TINY, 3)
    expected = "images of 17 x 16 pixels cannot be divided into patches of 4 x 4; choose a multiple"
    with pytest.raises(RequestError, match=expected):
        apply(model, random_variables(model), random_images(2, 17, 16))


def test_images_of_the_native_size_may_have_a_rest() -> None:
    """SigLIP has 27 patches of 14 pixels in images of 384."""
    model = vit.build("", TINY._replace(size=18), 3)
    variables, images = random_variables(model), random_images(2, 18, 18)
    cropped = run(model, variables, images[:, :16, :16])
    np.testing.assert_allclose(run(model, variables, images).logits, cropped.logits, atol=1e-5)


def test_rotary_positions_need_the_grid() -> None:
    model = vit.build("", TINY._replace(positions="rotary"), 3)
    variables, images = random_variables(model), random_images(2, 16, 12)
    tokens = run(model, variables, images, stop="block1").value
    with pytest.raises(RequestError, match="15 tokens do not tell rows from columns"):
        apply(model, variables, tokens, start="block1")


def test_rotations_keep_lengths_and_the_tokens_before_the_patches() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3 + 6, 4, 8)), jnp.float32)
    turned = rotate(x, (2, 3))
    np.testing.assert_array_equal(turned[:, :3], x[:, :3])
    assert (turned[:, 3:] != x[:, 3:]).any((0, 2, 3)).all()
    norms = (jnp.linalg.norm(each, axis=-1) for each in (turned, x))
    np.testing.assert_allclose(*norms, rtol=1e-5)


def test_blocks_are_numbered_from_zero_to_one() -> None:
    for name in vit.VARIANTS:
        modules = [stage.module for stage in build_model(name).stages]
        depths = [module.depth for module in modules if isinstance(module, Block)]
        np.testing.assert_allclose(depths, np.linspace(0, 1, vit.VARIANTS[name].depth))


def test_stochastic_depth_drops_branches_only_with_noise() -> None:
    model = vit.build("", TINY, 3)
    variables, images = random_variables(model), random_images(8, 16, 16)
    dropping, key = replace(model, drop_path=0.9), jax.random.key(0)
    stages = model.stage_names
    plain = run(model, variables, images, capture=stages)
    quiet = run(dropping, variables, images, capture=stages)
    noisy = run(dropping, variables, images, noise=stages, capture=stages, key=key)
    np.testing.assert_array_equal(quiet.logits, plain.logits)
    np.testing.assert_array_equal(noisy.captured["block1"], plain.captured["block1"])
    same = (noisy.captured["block2"] == plain.captured["block1"]).all((1, 2))
    assert same.any()  # both branches dropped
    assert not same.all()


def test_bfloat16_is_close_to_float32() -> None:
    model = vit.build("", TINY, 3)
    variables, images = random_variables(model), random_images(2, 16, 16)
    half, exact = (
        run(replace(model, dtype=dtype), variables, images, capture=("block2",))
        for dtype in ("bfloat16", "float32")
    )
    assert half.captured["block2"].dtype == jnp.bfloat16
    assert half.logits.dtype == jnp.float32
    assert difference(half.logits, exact.logits) <= 5e-2


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["class", "average", "class_average", "attention"])
def test_derivatives_agree_in_both_modes(pool: Any) -> None:
    model = vit.build("", TINY._replace(pool=pool), 3)
    variables = random_variables(model)
    images = np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype(np.float32)

    def loss(images: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(apply(model, variables, images).logits))

    direction = np.random.default_rng(1).standard_normal(images.shape).astype(np.float32)
    gradient = jax.jit(jax.grad(loss))(images)
    _, forward = jax.jit(lambda x, t: jax.jvp(loss, (x,), (t,)))(images, direction)
    np.testing.assert_allclose(forward, jnp.vdot(gradient, direction), rtol=1e-3)
    assert np.abs(gradient).max() > 0
