"""What is particular to ConvNeXt: response norm, stochastic depth, and its configurations."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from networks import difference, random_images
from torch import nn
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN

from tljax.models import abstract_variables, apply, build_model, with_head
from tljax.models.convnext import VARIANTS, Block, Blocks, GlobalResponseNorm
from tljax.models.layers import INFERENCE, Mode
from tljax.pretrained.configs import read_architecture, read_configs
from tljax.pretrained.tables.layouts import layout_rules
from tljax.pretrained.unwrap import check
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten

IMAGES = random_images(3, 65, 97)


def test_the_response_norm_and_its_gradients_equal_transformers() -> None:
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((2, 2, 5, 3, 8)).astype(np.float32)
    params = {name: rng.standard_normal(8).astype(np.float32) for name in ("scale", "bias")}
    network = ConvNextV2GRN(8)
    network.weight = nn.Parameter(torch.from_numpy(params["scale"].reshape(1, 1, 1, 8)))
    network.bias = nn.Parameter(torch.from_numpy(params["bias"].reshape(1, 1, 1, 8)))
    pixels = torch.from_numpy(x).requires_grad_()
    expected = network(pixels)
    (expected * torch.from_numpy(weights)).sum().backward()

    def normalize(x: jax.Array, params: dict[str, Any]) -> jax.Array:
        return GlobalResponseNorm().apply({"params": params}, x)  # pyright: ignore[reportReturnType]

    actual, gradient = jax.vjp(normalize, jnp.asarray(x), params)
    dx, dparams = gradient(jnp.asarray(weights))
    assert difference(actual, expected.detach()) <= 1e-6
    assert pixels.grad is not None
    assert difference(dx, pixels.grad) <= 1e-5
    for name, parameter in (("scale", network.weight), ("bias", network.bias)):
        assert parameter.grad is not None
        assert difference(dparams[name], parameter.grad.flatten()) <= 1e-5


def test_an_image_of_zeros_has_a_finite_gradient_through_the_response_norm() -> None:
    """A padded batch holds such images, and initial biases are zero."""
    x = jnp.zeros((1, 4, 4, 8)).at[..., 0].set(1)
    params = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    for images in (x, jnp.zeros_like(x)):
        gradient = jax.grad(lambda x: GlobalResponseNorm().apply({"params": params}, x).sum())  # pyright: ignore[reportAttributeAccessIssue]
        assert np.isfinite(gradient(images)).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_rate_of_stochastic_depth_increases_from_zero_to_one(name: str) -> None:
    modules = [stage.module for stage in build_model(name).stages]
    depths = [depth for module in modules if isinstance(module, Blocks) for depth in module.depths]
    np.testing.assert_allclose(depths, np.linspace(0, 1, sum(VARIANTS[name].depths)))


@pytest.mark.parametrize("response_norm", [False, True])
def test_noise_drops_the_branches_of_single_images(*, response_norm: bool) -> None:
    x = jax.random.normal(jax.random.key(0), (32, 4, 4, 8))
    block = Block(0.8, response_norm)
    variables: Any = block.init(jax.random.key(1), x, INFERENCE)
    if not response_norm:
        variables["params"]["layer_scale"]["scale"] = jnp.ones(8)
    mode, rngs = Mode(noise=True, drop_path=0.5), {"dropout": jax.random.key(2)}
    branch = np.asarray(block.apply(variables, x, INFERENCE)) - x
    noisy = np.asarray(block.apply(variables, x, mode, rngs=rngs)) - x
    dropped = ~noisy.any((1, 2, 3))
    assert 4 <= dropped.sum() <= 21  # of 32 at a rate of 0.8 * 0.5
    np.testing.assert_allclose(noisy[~dropped], branch[~dropped] / 0.6, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["convnext_atto", pytest.param("convnextv2_atto", marks=pytest.mark.slow)]
)
def test_a_head_can_follow_any_stage(name: str) -> None:
    model = build_model(name, 7)
    for after in model.stage_names[:-1]:
        cut = with_head(model, 3, after=after)
        variables = abstract_variables(cut)
        pooled = jax.eval_shape(lambda v, m=cut: apply(m, v, IMAGES, stop="head").value, variables)
        logits = jax.eval_shape(lambda v, m=cut: apply(m, v, IMAGES).logits, variables)
        assert (pooled.ndim, logits.shape) == (2, (3, 3)), after


# --- configurations ------------------------------------------------------------------------------


def _write(folder: Path, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def test_arguments_of_timm_that_change_a_convnext_are_refused(tmp_path: Path) -> None:
    fits = {"act_layer": "gelu", "conv_mlp": True, "norm_eps": 1e-6, "drop_path_rate": 0.1}
    _write(tmp_path, architecture="convnext_nano", model_args=fits)
    assert read_architecture(tmp_path) == "convnext_nano"
    for key, value in (("act_layer", "silu"), ("norm_eps", 1e-5), ("norm_layer", "rmsnorm")):
        _write(tmp_path, architecture="convnext_nano", model_args={key: value})
        with pytest.raises(RequestError, match=f"{key} is {value!r}; tljax supports only"):
            read_architecture(tmp_path)


def test_both_configurations_of_transformers_are_read(tmp_path: Path) -> None:
    model = build_model("convnext_tiny", 0)
    sizes = {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]}
    for kind, epsilon in (("convnext", 1e-12), ("dinov3_convnext", 1e-6)):
        _write(tmp_path, model_type=kind, layer_norm_eps=epsilon, **sizes)
        assert read_configs(tmp_path, model).classes == ()
        _write(tmp_path, model_type=kind, hidden_act="silu", **sizes)
        with pytest.raises(RequestError, match="hidden_act is 'silu'; tljax supports only 'gelu'"):
            read_configs(tmp_path, model)
        _write(tmp_path, model_type=kind, layer_norm_eps=1e-5, **sizes)
        expected = "layer_norm_eps is 1e-05; tljax supports only 1e-06"
        with pytest.raises(RequestError, match=expected):
            read_configs(tmp_path, model)


def test_the_default_processor_of_dinov3_squeezes_images(tmp_path: Path) -> None:
    _write(tmp_path, model_type="dinov3_convnext")
    values = {"size": {"height": 224, "width": 224}, "image_mean": [0] * 3, "image_std": [1] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    description = read_configs(tmp_path, build_model("convnext_tiny", 0))
    assert description.preprocess is not None
    assert (description.preprocess.size, description.preprocess.resize) == (224, 224)
    assert "DINOv3ViT squeezes images into a square" in description.notes[0]


def test_a_file_of_keras_without_the_last_norm_gives_a_note() -> None:
    leaves = flatten(abstract_variables(build_model("convnext_tiny", 7)))
    arrays = {
        rule.key: np.broadcast_to(np.float32(1), rule.source_shape(leaves[rule.path].shape))
        for rule in layout_rules("convnext_tiny", "keras")
        if rule.path.split("/")[1] not in ("norm", "head")
    }
    identity = check(arrays, "net", "convnext_tiny")
    assert "norm" not in identity.model.stage_names
    expected = ("net: it lacks the last norm, so its features are those before it",)
    assert identity.notes("net") == expected
