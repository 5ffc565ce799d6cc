"""Tokens as feature maps, and Grad-CAM of Vision Transformers against torch."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import torch
from networks import random_images, random_variables, run, to_torch
from references.vit import randomize, timm_network

from tljax.explain import grad_cam
from tljax.models import (
    Model,
    abstract_variables,
    apply,
    feature_map,
    grad_cam_stage,
    normalize,
    vit,
    with_head,
)
from tljax.models.vit import Variant
from tljax.pretrained.rules import apply_rules
from tljax.pretrained.tables.layouts import layout_rules
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten

SMALL = Variant(32, 2, 4, patch=4, size=16)


def torch_grad_cam(
    network: Any, layer: torch.nn.Module, pixels: torch.Tensor, labels: np.ndarray, prefix: int
) -> np.ndarray:
    """Compute Grad-CAM of a layer of tokens, after Selvaraju et al. (2017), equations 1 and 2."""
    kept: list[torch.Tensor] = []
    layer.register_forward_hook(lambda *arguments: kept.append(arguments[2]))
    score = network(pixels)[range(len(labels)), labels].sum()
    gradient = torch.autograd.grad(score, kept[0])[0]
    grid = pixels.shape[2] // SMALL.patch, pixels.shape[3] // SMALL.patch
    maps, gradients = (x[:, prefix:].unflatten(1, grid) for x in (kept[0], gradient))
    weights = gradients.mean((1, 2), keepdim=True)
    return (weights * maps).sum(-1).relu().detach().numpy()


@pytest.mark.parametrize(
    ("source", "options", "arguments", "stage", "size"),
    [
        pytest.param("vit_tiny_patch16_224", {}, {}, "block1", (12, 20), marks=pytest.mark.slow),
        (
            "vit_small_patch14_reg4_dinov2",
            {"registers": 4, "layer_scale": True, "positions": "patches"},
            {},
            "block1",
            (20, 16),
        ),
        (
            "vit_tiny_patch16_224",
            {"pool": "average"},
            {"global_pool": "avg", "fc_norm": False},
            "norm",
            (12, 20),
        ),
    ],
    ids=["class token", "registers", "average"],
)
def test_grad_cam_of_a_vision_transformer_matches_torch(
    source: str,
    options: dict[str, Any],
    arguments: dict[str, Any],
    stage: str,
    size: tuple[int, int],
) -> None:
    geometry = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 4, "img_size": 16}
    network = timm_network(source, **geometry, **arguments).eval()
    randomize(network)
    variant = SMALL._replace(**options)
    model = vit.build("", variant, 7)
    skeleton = abstract_variables(model)
    paths = flatten(skeleton)
    rules = tuple(rule for rule in layout_rules(source, "timm") if rule.path in paths)
    state = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
    variables = apply_rules(rules, state, skeleton)
    images, labels = random_images(3, *size) / np.float32(255), np.array([0, 6, 2])

    layer = network.norm if stage == "norm" else network.blocks[0]
    pixels = to_torch(normalize(images, model.preprocess))
    expected = torch_grad_cam(network, layer, pixels, labels, variant.prefix_tokens)
    assert expected.max() > 0
    assert (expected == 0).any()

    assert grad_cam_stage(model) == stage
    after = model.position(stage) + 1
    explain = jax.jit(
        lambda variables, images: grad_cam(
            lambda x: apply(model, variables, x, stop=after).value,
            lambda x: apply(model, variables, x, start=after).logits,
            images,
            labels,
            as_map=lambda x: feature_map(model, stage, x, images.shape),
        )
    )
    actual = explain(variables, images)
    assert actual.shape == (3, size[0] // 4, size[1] // 4)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.max())


@pytest.mark.slow
def test_grad_cam_explains_the_last_map_that_reaches_the_head() -> None:
    build = partial(vit.build, "")
    assert grad_cam_stage(build(SMALL, 3)) == "block1"
    assert grad_cam_stage(build(SMALL._replace(depth=1), 3)) == "embed"
    assert grad_cam_stage(build(SMALL._replace(pool="attention"), 3)) == "norm"
    assert grad_cam_stage(with_head(build(SMALL, 3), 3, after="block2")) == "block2"  # the average
    assert grad_cam_stage(tiny.MODEL) == "layer1"
    vectors: Model = replace(tiny.MODEL, stages=tiny.MODEL.stages[2:])
    with pytest.raises(RequestError, match="no stage of tiny returns a feature map"):
        grad_cam_stage(vectors)


def test_patches_are_arranged_in_rows_without_the_tokens_before_them() -> None:
    model = vit.build("", SMALL._replace(registers=2), 3)
    tokens = np.arange(3 + 2 * 5)[None, :, None] * np.ones(7)
    maps = feature_map(model, "block1", tokens, (1, 8, 20, 3))
    np.testing.assert_array_equal(maps[0, :, :, 6], [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])
    images = random_images(2, 8, 20)
    stages = model.spatial_stages
    outputs = run(model, random_variables(model), images, capture=stages).captured
    for stage in stages:
        assert feature_map(model, stage, outputs[stage], images.shape).shape == (2, 2, 5, 32)


def test_outputs_that_are_no_feature_maps_are_refused() -> None:
    model = vit.build("", SMALL, 3)
    with pytest.raises(RequestError, match="output of pool is not a feature map: choose from emb"):
        feature_map(model, "pool", np.zeros((1, 32)), (1, 16, 16, 3))
    expected = r"block1 has shape \[1, 10, 32\]: images of 16 x 16 pixels have 1 \+ 4 x 4 tokens"
    with pytest.raises(RequestError, match=expected):
        feature_map(model, "block1", np.zeros((1, 10, 32)), (1, 16, 16, 3))
    bare = replace(model, stages=tuple(stage._replace(patch_size=0) for stage in model.stages))
    with pytest.raises(RequestError, match="output of norm is not a feature map: choose"):
        feature_map(bare, "norm", np.zeros((1, 17, 32)), (1, 16, 16, 3))
