"""Running, training and changing parts of a model."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from networks import (
    assert_same_variables,
    difference,
    from_torch,
    random_images,
    random_variables,
    run,
    to_torch,
    torch_resnet,
)

from tljax.models import (
    MODELS,
    Model,
    Stage,
    abstract_variables,
    apply,
    build_model,
    init,
    layer_outputs,
    normalize,
    replace_head,
)
from tljax.models.layers import Mode
from tljax.pretrained.rules import apply_rules
from tljax.pretrained.tables.layouts import layout_rules
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.trees import flatten
from tljax.runtime.types import Variables

IMAGES = random_images(4, 64, 48)


@pytest.fixture(
    scope="module",
    params=[
        "resnet18",
        pytest.param("efficientnet_lite0", marks=pytest.mark.slow),
        pytest.param("resnetv2_50x1_bit", marks=pytest.mark.slow),
        pytest.param("xception", marks=pytest.mark.slow),
    ],
)
def network(request: pytest.FixtureRequest) -> tuple[Model, Variables]:
    model = build_model(request.param, 7)
    return model, random_variables(model)


@pytest.fixture(scope="module")
def resnet18() -> tuple[Model, Variables]:
    model = build_model("resnet18", 7)
    return model, random_variables(model)


@pytest.mark.parametrize("size", [(97, 128), pytest.param((64, 64), marks=pytest.mark.slow)])
def test_bfloat16_is_close_to_float32(
    resnet18: tuple[Model, Variables], size: tuple[int, int]
) -> None:
    """At the first size, jaxlib 0.12 computes infinite sums after convolutions in bfloat16."""
    model, variables = resnet18
    images = random_images(2, *size)
    half, exact = (
        run(replace(model, dtype=dtype), variables, images).logits
        for dtype in ("bfloat16", "float32")
    )
    assert difference(half, exact) <= 2e-2


MILLIONS = {
    "resnet18": 11.689512,
    "resnet34": 21.797672,
    "resnet50": 25.557032,
    "resnet101": 44.549160,
    "resnet152": 60.192808,
    "resnext50_32x4d": 25.028904,
    "resnext101_32x8d": 88.791336,
    "resnext101_64x4d": 83.455272,
    "wide_resnet50_2": 68.883240,
    "wide_resnet101_2": 126.886696,
    "resnet18d": 11.71,
    "resnet34d": 21.82,
    "resnet50d": 25.58,
    "resnet101d": 44.57,
    "resnet152d": 60.21,
    "resnetv2_50x1_bit": 25.55,
    "resnetv2_50x3_bit": 217.32,
    "resnetv2_101x1_bit": 44.54,
    "resnetv2_101x3_bit": 387.93,
    "resnetv2_152x2_bit": 236.34,
    "resnetv2_152x4_bit": 936.53,
    "inception_v3": 23.83,
    "xception": 22.86,
    "keras_resnet50": 25.583592,
    "keras_resnet101": 44.601832,
    "keras_resnet152": 60.268520,
    "keras_resnet50v2": 25.568360,
    "keras_resnet101v2": 44.577896,
    "keras_resnet152v2": 60.236904,
    "keras_inception_v3": 23.817352,
    "keras_xception": 22.855952,
    "keras_mobilenetv1_025": 0.47,
    "keras_mobilenetv1_050": 1.33,
    "keras_mobilenetv1_075": 2.59,
    "keras_mobilenetv1_100": 4.231976,
    "efficientnet_lite0": 4.65,
    "efficientnet_lite1": 5.42,
    "efficientnet_lite2": 6.09,
    "efficientnet_lite3": 8.20,
    "efficientnet_lite4": 13.01,
    "timm_efficientnet_lite0": 4.65,
    "timm_efficientnet_lite1": 5.42,
    "timm_efficientnet_lite2": 6.09,
    "timm_efficientnet_lite3": 8.2,
    "timm_efficientnet_lite4": 13.01,
    "efficientnet_b0": 5.288548,
    "efficientnet_b1": 7.794184,
    "efficientnet_b2": 9.109994,
    "efficientnet_b3": 12.233232,
    "efficientnet_b4": 19.341616,
    "efficientnet_b5": 30.39,
    "tf_efficientnet_b0": 5.29,
    "tf_efficientnet_b1": 7.79,
    "tf_efficientnet_b2": 9.11,
    "tf_efficientnet_b3": 12.23,
    "tf_efficientnet_b4": 19.34,
    "tf_efficientnet_b5": 30.39,
    "tf_efficientnet_b6": 43.04,
    "tf_efficientnet_b7": 66.35,
    "tv_efficientnet_b5": 30.389784,
    "tv_efficientnet_b6": 43.040704,
    "tv_efficientnet_b7": 66.34796,
    "tf_efficientnetv2_b0": 7.14,
    "tf_efficientnetv2_b1": 8.14,
    "tf_efficientnetv2_b2": 10.1,
    "tf_efficientnetv2_b3": 14.36,
    "tf_efficientnetv2_s": 21.46,
    "tf_efficientnetv2_m": 54.14,
    "tf_efficientnetv2_l": 118.52,
    "tv_efficientnetv2_s": 21.458488,
    "tv_efficientnetv2_m": 54.139356,
    "tv_efficientnetv2_l": 118.515272,
    "mobilenetv4_conv_small": 3.77,
    "mobilenetv4_conv_medium": 9.72,
    "mobilenetv4_conv_large": 32.59,
    "vgg11": 132.863336,
    "vgg13": 133.047848,
    "vgg16": 138.357544,
    "vgg19": 143.667240,
    "vgg11_bn": 132.868840,
    "vgg13_bn": 133.053736,
    "vgg16_bn": 138.365992,
    "vgg19_bn": 143.678248,
    "mobilenetv1_100": 4.23,
    "tf_mobilenetv1_025": 0.47,
    "tf_mobilenetv1_050": 1.33,
    "tf_mobilenetv1_075": 2.59,
    "tf_mobilenetv1_100": 4.23,
    "mobilenetv2_050": 1.97,
    "mobilenetv2_100": 3.504872,
    "mobilenetv2_140": 6.11,
    "tf_mobilenetv2_035": 1.68,
    "tf_mobilenetv2_050": 1.97,
    "tf_mobilenetv2_075": 2.64,
    "tf_mobilenetv2_100": 3.50,
    "tf_mobilenetv2_130": 5.39,
    "tf_mobilenetv2_140": 6.11,
    "mobilenetv3_large_075": 3.99,
    "mobilenetv3_large_100": 5.48,
    "mobilenetv3_small_050": 1.59,
    "mobilenetv3_small_075": 2.04,
    "mobilenetv3_small_100": 2.54,
    "tv_mobilenetv3_large_100": 5.483032,
    "tv_mobilenetv3_small_100": 2.542856,
    "tf_mobilenetv3_large_075": 3.99,
    "tf_mobilenetv3_large_100": 5.48,
    "tf_mobilenetv3_small_075": 2.04,
    "tf_mobilenetv3_small_100": 2.54,
    "regnetx_002": 2.684792,
    "regnetx_004": 5.157512,
    "regnetx_004_tv": 5.495976,
    "regnetx_006": 6.196040,
    "regnetx_008": 7.259656,
    "regnetx_016": 9.190136,
    "regnetx_032": 15.296552,
    "regnetx_040": 22.118248,
    "regnetx_064": 26.209256,
    "regnetx_080": 39.572648,
    "regnetx_120": 46.106056,
    "regnetx_160": 54.278536,
    "regnetx_320": 107.811560,
    "regnety_002": 3.162996,
    "regnety_004": 4.344144,
    "regnety_006": 6.055160,
    "regnety_008": 6.263168,
    "regnety_008_tv": 6.432512,
    "regnety_016": 11.202430,
    "regnety_032": 19.436338,
    "regnety_040": 20.646656,
    "regnety_064": 30.583252,
    "regnety_080": 39.180068,
    "regnety_080_tv": 39.381472,
    "regnety_120": 51.822544,
    "regnety_160": 83.590140,
    "regnety_320": 145.046770,
    "regnety_640": 281.378786,
    "regnety_1280": 644.812894,
    "convnext_atto": 3.70,
    "convnext_femto": 5.22,
    "convnext_pico": 9.05,
    "convnext_nano": 15.59,
    "convnext_tiny": 28.589128,
    "convnext_small": 50.223688,
    "convnext_base": 88.591464,
    "convnext_large": 197.767336,
    "convnext_xlarge": 350.20,
    "convnextv2_atto": 3.71,
    "convnextv2_femto": 5.23,
    "convnextv2_pico": 9.07,
    "convnextv2_nano": 15.62,
    "convnextv2_tiny": 28.64,
    "convnextv2_base": 88.72,
    "convnextv2_large": 197.96,
    "convnextv2_huge": 660.29,
    "vit_tiny_patch16_224": 5.717416,
    "vit_tiny_patch16_384": 5.790376,
    "vit_small_patch16_224": 22.050664,
    "vit_small_patch16_384": 22.196584,
    "vit_base_patch16_224": 86.567656,
    "vit_base_patch16_384": 86.859496,
    "vit_large_patch16_224": 304.326632,
    "vit_large_patch16_384": 304.715752,
    "vit_base_patch32_224": 88.224232,
    "vit_base_patch32_384": 88.297192,
    "vit_base_patch8_224": 86.576872,
    "hf_vit_tiny_patch16_224": 5.717416,
    "hf_vit_tiny_patch16_384": 5.790376,
    "hf_vit_small_patch16_224": 22.050664,
    "hf_vit_small_patch16_384": 22.196584,
    "hf_vit_base_patch16_224": 86.567656,
    "hf_vit_base_patch16_384": 86.859496,
    "hf_vit_large_patch16_224": 304.326632,
    "hf_vit_large_patch16_384": 304.715752,
    "hf_vit_base_patch32_224": 88.224232,
    "hf_vit_base_patch32_384": 88.297192,
    "hf_vit_base_patch8_224": 86.576872,
    "deit_tiny_patch16_224": 5.717416,
    "deit_small_patch16_224": 22.050664,
    "deit_base_patch16_224": 86.567656,
    "deit_base_patch16_384": 86.859496,
    "hf_deit_tiny_distilled_patch16_224": 5.717800,
    "hf_deit_small_distilled_patch16_224": 22.051432,
    "hf_deit_base_distilled_patch16_224": 86.569192,
    "deit3_small_patch16_224": 22.059496,
    "deit3_medium_patch16_224": 38.849512,
    "deit3_base_patch16_224": 86.585320,
    "deit3_large_patch16_224": 304.374760,
    "deit3_small_patch16_384": 22.205416,
    "deit3_base_patch16_384": 86.877160,
    "deit3_large_patch16_384": 304.763880,
    "vit_small_patch14_dinov2": 22.441192,
    "vit_base_patch14_dinov2": 87.348712,
    "vit_large_patch14_dinov2": 305.392616,
    "vit_small_patch14_dinov2_lc": 22.825192,
    "vit_base_patch14_dinov2_lc": 88.116712,
    "vit_large_patch14_dinov2_lc": 306.416616,
    "vit_small_patch14_reg4_dinov2": 22.442344,
    "vit_base_patch14_reg4_dinov2": 87.351016,
    "vit_large_patch14_reg4_dinov2": 305.395688,
    "hf_vit_small_patch14_reg4_dinov2": 22.442728,
    "hf_vit_base_patch14_reg4_dinov2": 87.351784,
    "hf_vit_large_patch14_reg4_dinov2": 305.396712,
    "hf_vit_small_patch14_reg4_dinov2_lc": 22.826728,
    "hf_vit_base_patch14_reg4_dinov2_lc": 88.119784,
    "hf_vit_large_patch14_reg4_dinov2_lc": 306.420712,
    "vit_base_patch32_clip_224": 88.225000,
    "vit_base_patch16_clip_224": 86.568424,
    "vit_large_patch14_clip_224": 304.204776,
    "vit_large_patch14_clip_336": 304.532456,
    "vit_base_patch32_clip_quickgelu_224": 88.225000,
    "vit_base_patch16_clip_quickgelu_224": 86.568424,
    "vit_large_patch14_clip_quickgelu_224": 304.204776,
    "vit_large_patch14_clip_quickgelu_336": 304.532456,
    "vit_base_patch16_siglip_224": 93.653224,
    "vit_base_patch16_siglip_256": 93.699304,
    "vit_base_patch16_siglip_384": 93.945064,
    "vit_base_patch16_siglip_512": 94.289128,
    "vit_large_patch16_siglip_256": 316.981224,
    "vit_large_patch16_siglip_384": 317.308904,
    "vit_so400m_patch14_siglip_224": 428.833704,
    "vit_so400m_patch14_siglip_378": 429.378600,
    "vit_so400m_patch16_siglip_256": 429.041064,
    "vit_so400m_patch16_siglip_384": 429.409704,
    "vit_so400m_patch16_siglip_512": 429.925800,
    "hf_vit_base_patch16_siglip_224": 93.653224,
    "hf_vit_base_patch16_siglip_256": 93.699304,
    "hf_vit_base_patch16_siglip_384": 93.945064,
    "hf_vit_base_patch16_siglip_512": 94.289128,
    "hf_vit_large_patch16_siglip_256": 316.981224,
    "hf_vit_large_patch16_siglip_384": 317.308904,
    "hf_vit_so400m_patch14_siglip_224": 428.833704,
    "hf_vit_so400m_patch14_siglip_384": 429.378600,
    "vit_small_patch16_dinov3": 21.981160,
    "vit_base_patch16_dinov3": 86.428648,
    "vit_large_patch16_dinov3": 304.153576,
    "vit_small_plus_patch16_dinov3": 29.077480,
    "vit_huge_plus_patch16_dinov3": 841.872360,
}
QUICK = (
    "resnet18",
    "resnetv2_50x1_bit",
    "inception_v3",
    "xception",
    "vgg11",
    "mobilenetv2_100",
    "regnety_002",
    "vit_tiny_patch16_224",
)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        pytest.param(name, millions, marks=[] if name in QUICK else pytest.mark.slow)
        for name, millions in MILLIONS.items()
    ],
)
def test_the_number_of_parameters_is_as_published(name: str, millions: float) -> None:
    """Torchvision and Keras publish exact numbers, timm two decimals.

    Those of Vision Transformers are counted in timm and transformers, with 1000 classes.
    """
    leaves = jax.tree.leaves(abstract_variables(build_model(name))["params"])
    tolerance = 0.005 if millions == round(millions, 2) else 0
    assert abs(sum(leaf.size for leaf in leaves) / 1e6 - millions) <= tolerance


def test_the_number_of_parameters_of_every_model_is_tested() -> None:
    assert MILLIONS.keys() == MODELS.keys()


def test_the_nearest_name_is_suggested_for_a_misspelled_model() -> None:
    with pytest.raises(RequestError, match=r"no model is called 'resnet5O'; did you mean resnet50"):
        build_model("resnet5O")
    with pytest.raises(RequestError, match=r"known: resnet18, resnet34, "):
        build_model("alexnet")


def test_a_part_of_a_model_needs_only_its_own_variables(resnet18: tuple[Model, Variables]) -> None:
    model, variables = resnet18
    x = run(model, variables, IMAGES, stop="layer4").value
    part = {
        kind: {name: tree[name] for name in tree if name in ("layer4", "head")}
        for kind, tree in variables.items()
    }
    expected = run(model, variables, IMAGES).logits
    assert difference(run(model, part, x, start="layer4").logits, expected) <= 1e-6


@pytest.mark.parametrize("argument", ["start", "stop", "batch_statistics", "noise", "capture"])
def test_an_unknown_stage_is_refused(resnet18: tuple[Model, Variables], argument: str) -> None:
    model, variables = resnet18
    stage: Any = "layer5" if argument in ("start", "stop") else {"layer5"}
    expected = (
        "resnet18 has no stage 'layer5'; "
        "its stages are stem, layer1, layer2, layer3, layer4, pool, head"
    )
    with pytest.raises(RequestError, match=expected):
        apply(model, variables, IMAGES, **{argument: stage})


def test_layer_outputs_contain_every_layer(network: tuple[Model, Variables]) -> None:
    model, variables = network
    layers = {path.rpartition("/")[0] for path in flatten(variables["params"])}
    outputs = layer_outputs(model, variables, IMAGES)
    assert outputs.keys() == layers
    assert difference(outputs["head"], run(model, variables, IMAGES).logits) <= 1e-6


# --- training mode, against torch ---------------------------------------------------------------


def reference(train: set[str]) -> tuple[torch.nn.Module, Model, Variables]:
    network = torch_resnet("resnet18")
    for stage in train:
        network.get_submodule(STAGES[stage]).train()
    model = build_model("resnet18", 7)
    return network, model, variables_of(network)


STAGES = {
    "stem": "resnet.embedder",
    **{f"layer{i + 1}": f"resnet.encoder.stages.{i}" for i in range(4)},
}


def variables_of(network: torch.nn.Module) -> Variables:
    arrays = {key: value.numpy().copy() for key, value in network.state_dict().items()}
    return apply_rules(
        layout_rules("resnet18", "huggingface"),
        arrays,
        abstract_variables(build_model("resnet18", 7)),
    )


def test_only_the_stages_in_batch_statistics_update_their_statistics() -> None:
    network, model, variables = reference({"layer3"})
    output = apply(model, variables, IMAGES, batch_statistics={"layer3"})
    with torch.no_grad():
        logits = network(to_torch(normalize(IMAGES, model.preprocess))).logits
    assert difference(output.logits, logits) <= 1e-4

    moved, expected = output.batch_stats["layer3"], variables_of(network)["batch_stats"]["layer3"]
    old = flatten(variables["batch_stats"]["layer3"])
    for path, value in flatten(expected).items():
        assert difference(flatten(moved)[path], value) <= 1e-5, path
        assert difference(old[path], value) > 1e-3, path
    for stage in ("stem", "layer1", "layer2", "layer4"):
        assert output.batch_stats[stage] is variables["batch_stats"][stage]
    # The arguments are not modified, and nothing changes if no stage uses batch statistics.
    assert flatten(variables["batch_stats"]["layer3"]) == old
    frozen = apply(model, variables, IMAGES).batch_stats
    assert all(frozen[stage] is tree for stage, tree in variables["batch_stats"].items())


@pytest.mark.slow
def test_gradients_in_training_mode_equal_torch() -> None:
    network, model, variables = reference(set(STAGES))
    weights = np.random.default_rng(1).standard_normal((4, 7)).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradients(params: Variables) -> jax.Array:
        output = apply(model, {**variables, "params": params}, IMAGES, batch_statistics=set(STAGES))
        return (output.logits * weights).sum()

    (
        network(to_torch(normalize(IMAGES, model.preprocess))).logits * torch.tensor(weights)
    ).sum().backward()
    parameters = dict(network.named_parameters())
    actual = flatten({"params": gradients(variables["params"])})
    rules = [rule for rule in layout_rules("resnet18", "huggingface") if rule.path in actual]
    assert len(rules) == len(actual) == len(parameters)
    for key, path, axes, *_ in rules:
        grad = parameters[key].grad
        assert grad is not None
        expected = grad.numpy().transpose(axes) if axes else grad.numpy()
        assert np.isfinite(actual[path]).all()
        assert difference(actual[path], expected) <= 1e-3, path


@pytest.mark.slow
def test_gradients_of_the_image_equal_torch() -> None:
    """Running statistics are used, as in an attack."""
    network, model, variables = reference(set())
    images = IMAGES.astype(np.float32) / 255
    actual = jax.jit(jax.grad(lambda x: apply(model, variables, x).logits[:, 3].sum()))(images)
    pixels = to_torch(normalize(images, model.preprocess)).requires_grad_()
    network(pixels).logits[:, 3].sum().backward()
    assert pixels.grad is not None
    assert (
        difference(actual * np.array(model.preprocess.std, np.float32), from_torch(pixels.grad))
        <= 1e-4
    )


# --- pixels and dtypes --------------------------------------------------------------------------


def test_uint8_and_float_images_give_the_same_logits(resnet18: tuple[Model, Variables]) -> None:
    """XLA multiplies by 1/255 and NumPy divides: the network amplifies the difference."""
    model, variables = resnet18
    floats = IMAGES.astype(np.float32) / 255
    pixels = [normalize(images, model.preprocess) for images in (IMAGES, floats)]
    np.testing.assert_allclose(*pixels, rtol=0, atol=1e-6)
    actual = run(model, variables, floats).logits
    assert difference(actual, run(model, variables, IMAGES).logits) <= 1e-5


def test_normalize_implements_the_common_normalizations() -> None:
    x = IMAGES.astype(np.float64)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(normalize(IMAGES, Preprocess()), (x / 255 - mean) / std, atol=1e-6)
    half = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    np.testing.assert_allclose(normalize(IMAGES, half), x / 127.5 - 1, atol=1e-6)
    mean_bgr, one = (103.939, 116.779, 123.68), 1 / 255
    red, green, blue = (value / 255 for value in mean_bgr[::-1])
    caffe = Preprocess(mean=(red, green, blue), std=(one, one, one), channel_order="bgr")
    expected = x[..., ::-1] - mean_bgr
    np.testing.assert_allclose(normalize(IMAGES, caffe), expected, atol=1e-4)


def test_bfloat16_activations_give_close_float32_logits(resnet18: tuple[Model, Variables]) -> None:
    model, variables = resnet18
    half = replace(model, dtype="bfloat16")
    output = run(half, variables, IMAGES, capture=("stem",))
    assert (output.logits.dtype, output.captured["stem"].dtype) == ("float32", "bfloat16")
    assert difference(output.logits, run(model, variables, IMAGES).logits) <= 0.03


class _Patches(nn.Module):
    """Two zeros, then the mean of each 4 x 4 patch; a later stage adds the row of each patch."""

    @nn.compact
    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        if x.ndim == 4:
            b, h, w, c = x.shape
            x = x.reshape(b, h // 4, 4, w // 4, 4, c).mean((2, 4)).reshape(b, -1, c)
            return jnp.pad(x, ((0, 0), (2, 0), (0, 0)))
        assert mode.grid is not None
        return x.at[:, 2:].add(jnp.repeat(jnp.arange(mode.grid[0]), mode.grid[1])[:, None])


def test_stages_of_tokens_know_the_rows_and_columns_of_their_patches() -> None:
    first = Stage("embed", _Patches(), "tokens", prefix_tokens=2, patch_size=4)
    model = Model("patches", (first, first._replace(name="block")), Preprocess(16, 16))
    images = random_images(1, 12, 20)
    embedded = run(model, {}, images, stop=1).value
    moved = run(model, {}, images).value - embedded
    assert np.round(moved[0, 2:, 0], 3).tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert model.grid(images.shape) == (3, 5)
    assert model.grid(embedded.shape, start=1) is None  # 15 patches form no square
    assert model.grid((1, 18, 3), start="block") == (4, 4)
    assert build_model("resnet18").grid(images.shape) is None


def test_a_model_can_be_a_static_argument() -> None:
    model, traces = build_model("resnet18", 7), []

    @partial(jax.jit, static_argnums=0)
    def num_classes(model: Model, x: jax.Array) -> jax.Array:
        traces.append(model)
        return x * model.num_classes

    again = build_model("resnet18", 7)
    assert (model, hash(model)) == (again, hash(again))
    assert num_classes(model, jnp.ones(())) == num_classes(again, jnp.ones(())) == 7
    assert num_classes(build_model("resnet18", 9), jnp.ones(())) == 9
    assert len(traces) == 2


# --- variables ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_init_returns_the_shapes_of_abstract_variables() -> None:
    model = build_model("resnet18", 7)
    skeleton = flatten(abstract_variables(model))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in skeleton.values())
    variables = flatten(init(model, jax.random.key(0)))
    shapes = {path: (leaf.shape, leaf.dtype) for path, leaf in variables.items()}
    assert shapes == {path: (leaf.shape, leaf.dtype) for path, leaf in skeleton.items()}
    assert {leaf.dtype for leaf in variables.values()} == {jnp.dtype("float32")}

    values = {"scale": 1, "bias": 0, "mean": 0, "var": 1}
    for path, leaf in variables.items():
        if path.endswith("kernel") and "head" not in path:
            fan_in = np.prod(leaf.shape[:-1])
            np.testing.assert_allclose(leaf.std(), np.sqrt(2 / fan_in), rtol=0.03, err_msg=path)
        else:
            value = values.get(path.rpartition("/")[2], 0)
            np.testing.assert_array_equal(leaf, np.full(leaf.shape, value), err_msg=path)


def test_replace_head_initializes_to_zero_and_changes_nothing_else(
    resnet18: tuple[Model, Variables],
) -> None:
    model, variables = resnet18
    new, replaced = replace_head(model, variables, 3)
    assert (new.num_classes, new.name, new.stages[:-1]) == (3, model.name, model.stages[:-1])
    np.testing.assert_array_equal(run(new, replaced, IMAGES).logits, np.zeros((4, 3)))
    assert_same_variables(replaced["batch_stats"], variables["batch_stats"])
    for stage, tree in variables["params"].items():
        assert (replaced["params"][stage] is tree) == (stage != "head")
    assert run(model, variables, IMAGES).logits.shape == (4, 7)


@pytest.mark.parametrize(("after", "features"), [("layer2", 128), ("pool", 512)])
def test_replace_head_removes_the_stages_after_the_chosen_one(
    resnet18: tuple[Model, Variables], after: str, features: int
) -> None:
    model, variables = resnet18
    new, replaced = replace_head(model, variables, 3, after=after)
    retained = model.stage_names[: model.position(after) + 1]
    assert new.stage_names == (*retained, *(["pool"] if after != "pool" else []), "head")
    assert set(replaced["params"]) == {*retained, "head"} - {"pool"}
    assert replaced["params"]["head"]["kernel"].shape == (features, 3)
    actual = run(new, replaced, IMAGES, stop="head").value
    expected = run(model, variables, IMAGES, capture=(after,)).captured[after]
    expected = expected.mean((1, 2)) if expected.ndim == 4 else expected
    assert difference(actual, expected) <= 1e-6


@pytest.mark.parametrize("after", ["head", "layer9"])
def test_replace_head_refuses_the_head_and_unknown_stages(
    resnet18: tuple[Model, Variables], after: str
) -> None:
    with pytest.raises(RequestError, match=after):
        replace_head(*resnet18, 3, after=after)


def test_dropout_is_active_only_with_noise(resnet18: tuple[Model, Variables]) -> None:
    model, variables = resnet18
    new, replaced = replace_head(model, variables, 3, dropout=0.5)
    replaced["params"]["head"]["kernel"] = jnp.eye(512, 3)
    features = jnp.ones((1000, 512))

    def logits(noise: set[str], seed: int) -> jax.Array:
        key = jax.random.key(seed)
        return apply(new, replaced, features, start="head", noise=noise, key=key).logits

    np.testing.assert_array_equal(logits(set(), 0), np.ones((1000, 3)))
    dropped = np.asarray(logits({"head"}, 0))
    assert set(np.unique(dropped)) == {0.0, 2.0}
    assert abs(dropped.mean() - 1) < 0.1  # five standard errors
    np.testing.assert_array_equal(dropped, logits({"head"}, 0))
    assert (dropped != logits({"head"}, 1)).any()
