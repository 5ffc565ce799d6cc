"""Adapters: the kernels that are chosen, the identity at the start, and LoRA against peft."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import torch
from flax import linen as nn
from networks import difference, random_images, run, to_torch, torch_resnet
from tiny import MODEL, random_variables
from transformers import ViTConfig, ViTForImageClassification

from tljax.models import MODELS, Model, Stage, abstract_variables, apply, build_model, normalize
from tljax.models.adapters import (
    add_lora,
    bias_paths,
    drop_lora_inputs,
    lora_kernels,
    lora_paths,
    merge_lora,
    norm_paths,
)
from tljax.models.layers import Dense, GlobalAveragePool, LinearHead, gelu
from tljax.pretrained import load_pretrained
from tljax.pretrained.tables.layouts import table
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.trees import flatten, unflatten

KEY = jax.random.key(0)


# --- choice of parameters -----------------------------------------------------------------------


def test_wide_kernels_are_adapted_and_depthwise_and_narrow_ones_are_not():
    params = abstract_variables(build_model("efficientnet_lite0"))["params"]
    assert set(lora_kernels(params, ["stage7", "conv_head"], rank=8)) == {
        *("stage7/block0/expand/kernel", "stage7/block0/project/kernel", "conv_head/conv/kernel"),
    }
    resnet = abstract_variables(build_model("resnet18"))["params"]
    assert "layer4/block0/conv1/kernel" in lora_kernels(resnet, ["layer4"], rank=8)


def test_patterns_choose_kernels_and_must_match_one():
    params = abstract_variables(build_model("resnet18"))["params"]
    stages = ["layer3", "layer4"]
    assert lora_kernels(params, stages, rank=8, targets=["layer4/*/conv2/*"]) == (
        "layer4/block0/conv2/kernel",
        "layer4/block1/conv2/kernel",
    )
    with pytest.raises(RequestError, match=r"--adapter-targets \*/query/\* matches no kernel of"):
        lora_kernels(params, stages, rank=8, targets=["layer4/*", "*/query/*"])
    with pytest.raises(RequestError, match="no kernel of stem is large enough for --rank 99"):
        lora_kernels(params, ["stem"], rank=99)


def test_norms_and_biases_are_found_in_modules_of_every_kind():
    params = {
        "conv": {"kernel": 0, "bias": 0},
        "fused": {"kernel": 0, "scale": 0, "bias": 0, "conv_bias": 0},
        "unscaled": {"kernel": 0, "bias": 0},
        "layer_scale": {"scale": 0},
        "norm": {"scale": 0, "bias": 0},
    }
    variables = {"params": params, "batch_stats": {"fused": {"mean": 0}, "unscaled": {"mean": 0}}}
    assert norm_paths(variables) == (
        *("fused/scale", "fused/bias", "unscaled/bias", "norm/scale", "norm/bias"),
    )
    assert bias_paths(params) == (
        *("conv/bias", "fused/bias", "fused/conv_bias", "unscaled/bias", "norm/bias"),
    )


# --- LoRA ---------------------------------------------------------------------------------------


def adapted(params, kernels, rank=3):
    """Return parameters with factors of LoRA that change the network."""
    flat = flatten(add_lora(params, kernels, rank, KEY))
    rng = np.random.default_rng(0)
    for path in lora_paths(unflatten(flat)):
        flat[path] = rng.normal(0, 0.2, flat[path].shape).astype(np.float32)
    return unflatten(flat)


def test_before_the_first_step_the_network_is_the_same_bit_for_bit():
    variables = random_variables()
    params = add_lora(variables["params"], ["layer1/conv/kernel"], 4, KEY)
    a, b = params["layer1"]["conv"]["lora_a"], params["layer1"]["conv"]["lora_b"]
    assert (a.shape, b.shape) == ((3, 3, 8, 4), (4, 12))
    bound = 1 / np.sqrt(3 * 3 * 8)
    assert 0.9 * bound < jnp.abs(a).max() <= bound
    merged = merge_lora({}, params, scale=2.0)
    for path, leaf in flatten(variables["params"]).items():
        np.testing.assert_array_equal(flatten(merged)[path], leaf, strict=True)
    assert flatten(merged).keys() == flatten(variables["params"]).keys()


def test_factors_depend_on_the_key_and_their_path_alone():
    params = random_variables()["params"]
    both = add_lora(params, ["stem/conv/kernel", "layer1/conv/kernel"], 4, KEY)
    one = add_lora(params, ["layer1/conv/kernel"], 4, KEY)
    np.testing.assert_array_equal(both["layer1"]["conv"]["lora_a"], one["layer1"]["conv"]["lora_a"])
    other = add_lora(params, ["layer1/conv/kernel"], 4, jax.random.key(1))
    assert (other["layer1"]["conv"]["lora_a"] != one["layer1"]["conv"]["lora_a"]).any()


def test_merged_and_apart_give_the_same_logits():
    variables = random_variables()
    params = adapted(variables["params"], ["layer1/conv/kernel"])
    images = random_images(4, 16, 16)
    apart = jax.jit(
        lambda params: (
            apply(MODEL, {**variables, "params": merge_lora({}, params, scale=2.0)}, images).logits
        )
    )(params)
    whole = jax.device_get(merge_lora({}, params, scale=2.0))
    merged = run(MODEL, {**variables, "params": whole}, images).logits
    assert difference(apart, merged) < 1e-6
    assert difference(run(MODEL, variables, images).logits, merged) > 1e-2


def test_dropout_drops_whole_channels_and_keeps_the_mean():
    params = adapted(random_variables()["params"], ["layer1/conv/kernel"])
    conv = params["layer1"]["conv"]
    draws = jax.vmap(lambda key: drop_lora_inputs(params, key, rate=0.25)["layer1"]["conv"])(
        jax.random.split(KEY, 2000)
    )
    np.testing.assert_array_equal(draws["lora_b"][7], conv["lora_b"])
    factors = np.asarray(draws["lora_a"] / conv["lora_a"])
    per_channel = factors[:, 0, 0, :, 0]
    np.testing.assert_allclose(
        factors, np.broadcast_to(factors[:, :1, :1, :, :1], factors.shape), rtol=1e-6
    )
    assert {0, 1333} == {round(1000 * factor) for factor in np.unique(per_channel).tolist()}
    np.testing.assert_allclose(per_channel.mean(0), 1, atol=0.06)  # five standard errors


# --- peft ---------------------------------------------------------------------------------------


def peft_lora(network, keys, rank, alpha):
    """Inject LoRA with random factors into some layers of a network of torch, by peft."""
    peft = oracles.load("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=keys)
    network = peft.inject_adapter_in_model(config, network).eval()
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.05)
    return network.double()  # so that the rounding errors are ours alone


def factors(network, keys, *, gradients=False):
    """Return the factors of peft, or their gradients, as ours, by the key of their layer."""
    modules = dict(network.named_modules())

    def ours(layer):
        weight = layer["default"].weight
        value = (weight.grad if gradients else weight.detach()).numpy()
        return np.moveaxis(value, (0, 1), (-1, -2)).astype(np.float32)

    pairs = {key: (ours(modules[key].lora_A), ours(modules[key].lora_B)) for key in keys}
    return {key: (a, b.reshape(b.shape[-2:])) for key, (a, b) in pairs.items()}


def compare_with_peft(network, pretrained, keys, images, logits_of, *, rank=3, alpha=5.0):
    """Compare logits, and the gradient of every factor, of the same factors.

    Args:
        network: network of torch whose weights ``pretrained`` holds.
        pretrained: ours.
        keys: {key of an adapted layer in torch: path of our kernel}.
        images: uint8 images.
        logits_of: function of the network and normalized images ``[b, 3, h, w]``.
        rank: rank of the update.
        alpha: rank times its factor.
    """
    model, variables, _ = pretrained
    labels = np.arange(len(images)) % model.num_classes
    network = peft_lora(network, list(keys), rank, alpha)
    expected = logits_of(network, to_torch(normalize(images, model.preprocess)).double())
    torch.nn.functional.cross_entropy(expected, torch.from_numpy(labels)).backward()

    def named(pairs):
        modules = {key: path.removesuffix("/kernel") for key, path in keys.items()}
        return {
            f"{modules[key]}/{name}": value
            for key, pair in pairs.items()
            for name, value in zip(("lora_a", "lora_b"), pair, strict=True)
        }

    def loss(trainable, variables):
        params = merge_lora(trainable, variables["params"], scale=alpha / rank)
        logits = apply(model, {**variables, "params": params}, images).logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))
        return losses.mean(), logits

    trainable = unflatten(named(factors(network, keys)))
    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(trainable, variables)
    plain = run(model, variables, images).logits
    assert difference(plain, expected.detach()) > 1e-2  # the factors matter
    assert difference(logits, expected.detach()) < 1e-5
    theirs = named(factors(network, keys, gradients=True))
    ours = flatten(gradients)
    assert ours.keys() == theirs.keys()
    worst = {path: difference(ours[path], theirs[path]) for path in ours}
    assert max(worst.values()) < 1e-5, worst


def kernels_by_key(pretrained, layout, pattern):
    """Return {key of a layer in a layout: path of its kernel} for some of our kernels."""
    chosen = {f"params/{path}" for path in pattern}
    rules = table(pretrained.model, layout)
    return {
        rule.key.removesuffix(".weight"): rule.path.removeprefix("params/")
        for rule in rules
        if rule.path in chosen
    }


@pytest.mark.slow
def test_convolutions_agree_with_peft(tmp_path):
    network = torch_resnet("resnet18")
    network.save_pretrained(tmp_path)
    pretrained = load_pretrained(tmp_path)
    kernels = lora_kernels(pretrained.variables["params"], ["layer4"], rank=3)
    keys = kernels_by_key(pretrained, "huggingface", kernels)
    assert {path.split("/", 1)[1] for path in kernels} >= {
        *("block0/conv1/kernel", "block0/shortcut/kernel"),
    }
    images = random_images(3, 65, 47)
    compare_with_peft(network, pretrained, keys, images, lambda net, x: net(x).logits)


VIT = "hf_vit_tiny_patch16_224"
LAYERS = {
    "attention/query": "attention.q_proj",
    "attention/key": "attention.k_proj",
    "attention/value": "attention.v_proj",
    "attention/out": "attention.o_proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}


@pytest.mark.slow
@pytest.mark.skipif(VIT not in MODELS, reason="this tljax has no Vision Transformer yet")
def test_a_vision_transformer_agrees_with_peft(tmp_path):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 192, "num_attention_heads": 3, "num_labels": 7}
    sizes["intermediate_size"] = 768
    network = ViTForImageClassification(ViTConfig(**sizes)).eval()
    network.save_pretrained(tmp_path)
    pretrained = load_pretrained(tmp_path, model=VIT)
    blocks = [f"block{i + 1}" for i in range(12)]
    kernels = lora_kernels(pretrained.variables["params"], blocks, rank=3)
    assert len(kernels) == 12 * len(LAYERS)
    keys = {
        f"vit.layers.{i}.{theirs}": f"block{i + 1}/{ours}/kernel"
        for i in range(12)
        for ours, theirs in LAYERS.items()
    }
    assert {*keys.values()} == {*kernels}
    images = random_images(2, 224, 224)
    compare_with_peft(network, pretrained, keys, images, lambda net, x: net(x).logits)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x, mode):
        return Dense(24, name="fc2")(gelu(Dense(32, name="fc1")(x)))


def test_dense_layers_agree_with_peft():
    stages = (
        Stage("patches", Mlp(), "map"),
        Stage("block1", Mlp(), "map"),
        Stage("pool", GlobalAveragePool(), "vector"),
        Stage("head", LinearHead(5), "vector"),
    )
    model = Model("mlp", stages, Preprocess(8, 8))
    rng = np.random.default_rng(0)
    shapes = abstract_variables(model)
    variables = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)

    layers = torch.nn.ModuleDict()
    for path, leaf in flatten(variables["params"]).items():
        module, _, name = path.replace("/", "_").rpartition("_")
        if name == "bias":
            weight = flatten(variables["params"])[path.replace("bias", "kernel")]
            layers[module] = torch.nn.Linear(*weight.shape)
            state = {"weight": torch.from_numpy(weight.T.copy()), "bias": torch.from_numpy(leaf)}
            layers[module].load_state_dict(state)

    def logits_of(layers, x):
        x = x.permute(0, 2, 3, 1)
        for name in ("patches", "block1"):
            hidden = torch.nn.functional.gelu(layers[f"{name}_fc1"](x))
            x = layers[f"{name}_fc2"](hidden)
        return layers["head"](x.mean((1, 2)))

    keys = {f"{s}_{fc}": f"{s}/{fc}/kernel" for s in ("patches", "block1") for fc in ("fc1", "fc2")}
    images = random_images(4, 7, 5)
    compare_with_peft(layers, (model, variables, None), keys, images, logits_of)
