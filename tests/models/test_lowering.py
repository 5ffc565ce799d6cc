"""Programs lowered for GPUs and TPUs: no code for CPUs, and no duplicate work."""

import re
from collections import Counter
from functools import cache
from typing import Any

import jax
import pytest
from programs import MODES, program

from tljax.models import abstract_variables, build_model
from tljax.models.convolution import backend
from tljax.runtime.trees import flatten

# The other modes of a depthwise network are parts of its full step.
QUICK = (*(("resnet18", mode) for mode in MODES), ("mobilenetv1_100", "full step"))
# One of each family.
FAMILIES = (
    "resnet18",
    "mobilenetv2_050",
    "resnet50",
    "resnext50_32x4d",
    "resnet18d",
    "keras_resnet50",
    "keras_resnet50v2",
    "resnetv2_50x1_bit",
    "inception_v3",
    "xception",
    "efficientnet_lite0",
    "vgg11_bn",
    "mobilenetv1_100",
    "mobilenetv3_small_050",
    "tf_mobilenetv3_small_075",
    "regnety_002",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "tf_efficientnetv2_b0",
    "convnext_atto",
    "convnextv2_atto",
    "vit_tiny_patch16_224",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_siglip_224",
)
CASES = [
    pytest.param(name, mode, marks=[] if (name, mode) in QUICK else pytest.mark.slow)
    for name in FAMILIES
    for mode in MODES
]
PLATFORMS = ("cuda", "tpu")
FOREIGN = {"custom_call", "while", "case", "optimization_barrier"}


def operations(text: str) -> Counter[str]:
    """Count the operations of StableHLO by name."""
    return Counter(re.findall(r'"?stablehlo\.(\w+)', text))


def work(text: str) -> int:
    """Count the convolutions and matrix products."""
    return operations(text)["convolution"] + operations(text)["dot_general"]


def strided_products(text: str) -> int:
    """Count the matrix products with an operand that is a strided slice."""
    count = 0
    for function in text.split("func.func")[1:]:
        lines = dict(re.findall(r"(%\w+) = (.*)", function))
        for line in lines.values():
            if "stablehlo.dot_general" in line:
                count += any(_is_cut(lines, name) for name in re.findall(r"%\w+", line))
    return count


def _is_cut(lines: dict[str, str], name: str) -> bool:
    line = lines.get(name, "")
    if "stablehlo.slice" in line:
        return bool(re.search(r"\d+:\d+:[2-9]", line))
    moved = re.match(r"stablehlo\.(reshape|transpose|convert|broadcast_in_dim) (%\w+)", line)
    return bool(moved) and _is_cut(lines, moved[2])


@cache
def traced(name: str, mode: str, chosen: str = "platform", *, stats: bool = False) -> Any:
    """Trace a program, with the convolutions of a backend, once for all platforms and tests."""
    function, args, _ = program(name, mode, 2, stats=stats)
    with backend(chosen):
        return jax.jit(function).trace(*args)


def lowered(name: str, mode: str, platform: str, *how: str, stats: bool = False) -> str:
    return traced(name, mode, *how, stats=stats).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_program_contains_its_layers_and_their_transposes_once(name: str, mode: str) -> None:
    """Compare the numbers with those of XLA's convolutions."""
    plain = work(lowered(name, mode, "cuda", "xla"))
    if expected := layers(name).get(mode):
        assert plain == expected
    for platform in PLATFORMS:
        text = lowered(name, mode, platform)
        assert work(text) == plain, platform
        assert not operations(text).keys() & FOREIGN
        if platform == "cuda":
            assert strided_products(text) == 0


def layers(name: str) -> dict[str, int]:
    """Return the number of convolutions and products by mode.

    A full step computes each layer, the gradient of its kernel and, except for the first layer,
    the gradient of its input. For a suffix the number depends on the branches at its start. An
    attention multiplies twice, and both factors have gradients.
    """
    paths = flatten(abstract_variables(build_model(name, 10))["params"])
    count = sum(path.endswith("/kernel") for path in paths)
    attention = 2 * sum(path.endswith("/query/kernel") for path in paths)
    return {
        "inference": count + attention,
        "input gradient": 2 * count + 3 * attention,
        "full step": 3 * count - 1 + 3 * attention,
    }


@pytest.mark.parametrize("mode", ["inference", "full step"])
def test_on_a_tpu_a_strided_1x1_convolution_is_a_product(mode: str) -> None:
    text = lowered("resnet18", mode, "tpu")
    assert strided_products(text) >= 3  # so the test above can detect one
    assert operations(text)["convolution"] == (17 if mode == "inference" else 50)


def test_batch_statistics_add_no_products() -> None:
    running, batch = (lowered("resnet18", "full step", "cuda", stats=s) for s in (False, True))
    for kind in ("convolution", "dot_general", "custom_call"):
        assert operations(batch)[kind] == operations(running)[kind]


def test_programs_for_cpus_contain_the_fast_paths() -> None:
    """Otherwise the tests above could not fail."""
    counts = operations(lowered("mobilenetv1_100", "full step", "cpu"))
    assert counts["while"] > 0  # gradients of kernels
    assert counts["convolution"] < 5 < counts["slice"]
