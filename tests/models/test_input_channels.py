"""Networks for images of other channels than RGB: timm adapts kernels alike."""

import json
from dataclasses import replace

import jax
import numpy as np
import oracles
import pytest
import torch
from networks import difference, random_pretrained, random_variables, randomize_norms, run, to_torch

from tljax.models import (
    MODELS,
    Stage,
    abstract_variables,
    adapt_input,
    apply,
    build_model,
    init,
    input_kernel,
)
from tljax.models.inputs import adapt_kernel
from tljax.models.spec import from_json, to_json
from tljax.pretrained.rules import apply_rules
from tljax.pretrained.tables.layouts import table
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import CAFFE_PREPROCESS, Preprocess
from tljax.runtime.trees import flatten

CHANNELS = (1, 2, 4, 13)


@pytest.mark.parametrize("channels", [*CHANNELS, 3])
def test_a_kernel_is_adapted_as_timm_adapts_it(channels: int):
    adapt_input_conv = oracles.load("timm.models._manipulate").adapt_input_conv
    kernel = np.random.default_rng(0).normal(size=(5, 7, 3, 8)).astype(np.float32)
    source = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    expected = adapt_input_conv(channels, source).numpy().transpose(2, 3, 1, 0)
    actual = adapt_kernel(kernel, channels)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


def test_equal_channels_of_a_repeated_kernel_keep_their_sum():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 8))
    for channels in (1, 3, 6, 12):
        adapted = adapt_kernel(kernel, channels)
        assert adapted.shape[2] == channels
        np.testing.assert_allclose(adapted.sum(2), kernel.sum(2))
    one = adapt_kernel(kernel, 1)
    np.testing.assert_allclose(adapt_kernel(adapt_kernel(one, 4), 1), one)


@pytest.mark.parametrize("name", MODELS)
def test_every_network_has_one_kernel_that_reads_images(name: str):
    model = build_model(name)
    path = input_kernel(model)
    assert path.startswith(f"{model.stage_names[0]}/")
    first = replace(model, stages=model.stages[:1])
    other = replace(first, preprocess=model.preprocess.with_channels(13))
    before, after = (flatten(abstract_variables(one)["params"]) for one in (first, other))
    assert before.keys() == after.keys()
    assert {key for key in before if before[key].shape != after[key].shape} == {path}
    assert after[path].shape[2] == 13


@pytest.mark.parametrize(
    "channels", [1, *(pytest.param(channels, marks=pytest.mark.slow) for channels in (2, 4, 13))]
)
def test_logits_of_other_channels_are_those_of_timm(channels: int):
    timm = oracles.load("timm")
    network = timm.create_model("resnet18d", num_classes=5).eval()
    with torch.no_grad():
        randomize_norms(network, torch.Generator().manual_seed(0))
    adapted = timm.create_model("resnet18d", num_classes=5, in_chans=channels).eval()
    weights = network.state_dict()
    first = "conv1.0.weight"
    weights[first] = timm.models.adapt_input_conv(channels, weights[first])
    adapted.load_state_dict(weights)

    model = build_model("resnet18d", 5)
    tensors = {key: value.numpy() for key, value in network.state_dict().items()}
    variables = apply_rules(table(model, "timm"), tensors, abstract_variables(model), "timm")
    mean, std = np.linspace(0.1, 0.6, channels), np.linspace(0.5, 0.2, channels)
    preprocess = replace(model.preprocess, mean=tuple(mean), std=tuple(std))
    model, variables = adapt_input(model, variables, preprocess)
    for shape in ((2, 64, 64, channels), (1, 75, 53, channels)):
        images = np.random.default_rng(0).random(shape, np.float32)
        with torch.no_grad():
            expected = adapted(to_torch((images - mean) / std).float()).numpy()
        assert difference(run(model, variables, images).logits, expected) < 1e-4


def test_a_gray_image_has_the_logits_of_its_copy_in_rgb():
    model, variables, _ = random_pretrained("resnet18")
    gray = np.random.default_rng(0).integers(0, 256, (2, 64, 48, 1)).astype(np.uint8)
    plain = replace(model.preprocess, mean=(0.4,) * 3, std=(0.2,) * 3)
    expected = run(replace(model, preprocess=plain), variables, gray.repeat(3, -1)).logits
    one, kernel = adapt_input(model, variables, replace(plain, mean=(0.4,), std=(0.2,)))
    assert difference(run(one, kernel, gray).logits, expected) < 1e-5


@pytest.mark.slow
def test_a_network_of_caffe_reads_rgb_of_the_deviation_of_imagenet():
    model, variables, _ = random_pretrained("resnet18")
    caffe = replace(model, preprocess=replace(CAFFE_PREPROCESS, size=64, resize=64))
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    expected = run(caffe, variables, images).logits
    new = replace(Preprocess(64, 64), mean=CAFFE_PREPROCESS.mean)  # its own mean is near ImageNet's
    rgb, adapted = adapt_input(caffe, variables, new)
    assert rgb.preprocess.channel_order == "rgb"
    assert difference(run(rgb, adapted, images).logits, expected) < 1e-4
    assert adapt_input(caffe, variables, new.with_channels(4))[0].preprocess.channels == 4


def test_variables_before_are_not_modified():
    model, variables, _ = random_pretrained("resnet18")
    path = f"params/{input_kernel(model)}"
    before = np.array(flatten(variables)[path])
    _, adapted = adapt_input(model, variables, model.preprocess.with_channels(4))
    np.testing.assert_array_equal(flatten(variables)[path], before)
    assert flatten(adapted)[path].shape[2] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("mobilenetv2_050", 13),
        *(pytest.param("resnet18", channels, marks=pytest.mark.slow) for channels in CHANNELS),
        *(pytest.param("mobilenetv2_050", c, marks=pytest.mark.slow) for c in CHANNELS[:3]),
    ],
)
@pytest.mark.usefixtures("quick_to_compile")
def test_any_part_of_the_network_runs_and_is_differentiable(name: str, channels: int):
    model = build_model(name, 3)
    preprocess = model.preprocess.with_channels(channels).with_size(32)
    model = replace(model, preprocess=preprocess)
    variables = random_variables(model)
    images = np.random.default_rng(0).random((2, 33, 47, channels), np.float32)
    whole = run(model, variables, images).logits
    second = model.stage_names[1]
    rest = run(model, variables, run(model, variables, images, stop=second).value, start=second)
    assert difference(rest.logits, whole) < 1e-5

    def loss(x: jax.Array) -> jax.Array:
        return apply(model, variables, x).logits.sum()

    gradient = jax.jit(jax.grad(loss))(images)
    _, forward = jax.jit(lambda x: jax.jvp(loss, (x,), (jax.numpy.ones_like(x),)))(images)
    assert gradient.shape == images.shape
    assert difference(gradient.sum(), forward) < 1e-3


def test_images_of_other_channels_are_refused():
    model, variables, _ = random_pretrained("resnet18")
    with pytest.raises(
        RequestError, match=r"\[1, 32, 32, 4\] have 4 channels: the network needs 3"
    ):
        apply(model, variables, np.zeros((1, 32, 32, 4), np.uint8))


def test_a_network_without_a_kernel_over_channels_is_refused():
    model = build_model("resnet18")
    model = replace(model, stages=(Stage("pool", model.stages[-2].module, "vector"),))
    with pytest.raises(RequestError, match="has 0 kernels over three channels instead of one"):
        input_kernel(model)


@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint8"), (3, "float32"), (13, "float32")])
def test_a_model_of_other_channels_is_read_back_from_json(channels: int, dtype: str):
    model = build_model("resnet18", 5)
    preprocess = replace(model.preprocess.with_channels(channels), dtype=dtype)
    model = replace(model, preprocess=preprocess)
    written = json.loads(json.dumps(to_json(model)))
    assert from_json(written) == model
    assert ("dtype" in written["preprocess"]) == (dtype == "float32")
    first = replace(model, stages=model.stages[:1])
    kernel = flatten(init(first, jax.random.key(0))["params"])[input_kernel(model)]
    assert kernel.shape[2] == channels


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.5, 0.5]},
        {"mean": [], "std": []},
        {"mean": [0.5] * 1025, "std": [0.5] * 1025},
        {"mean": [0.5], "std": [0.0]},
        {"mean": [0.5], "std": [0.5], "channel_order": "bgr"},
        {"dtype": "int32"},
    ],
)
def test_damaged_channels_are_refused(change: dict[str, object]):
    written = to_json(build_model("resnet18"))
    written["preprocess"] = {**written["preprocess"], **change}
    with pytest.raises(RequestError, match="damaged"):
        from_json(json.loads(json.dumps(written)))
