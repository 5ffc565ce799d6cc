"""What a GPU or a TPU is given to compile: nothing of a CPU's paths, no work twice."""

import re
from collections import Counter

import jax
import pytest
from programs import MODES, program

from tljax.models import abstract_variables, build_model
from tljax.models.convolution import backend

# One of each family.
QUICK = ("resnet18", "mobilenetv2_050")
FAMILIES = (
    *QUICK,
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
)
NAMES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
PLATFORMS = ("cuda", "tpu")
FOREIGN = {"custom_call", "while", "case", "optimization_barrier"}


def operations(text: str) -> Counter[str]:
    """How often each operation of StableHLO stands there."""
    return Counter(re.findall(r'"?stablehlo\.(\w+)', text))


def work(text: str) -> int:
    """How many convolutions and products there are."""
    return operations(text)["convolution"] + operations(text)["dot_general"]


def strided_products(text: str) -> int:
    """How many products have an operand that a stride was cut out of."""
    found = 0
    for function in text.split("func.func")[1:]:
        lines = dict(re.findall(r"(%\w+) = (.*)", function))
        for line in lines.values():
            if "stablehlo.dot_general" in line:
                found += any(_is_cut(lines, name) for name in re.findall(r"%\w+", line))
    return found


def _is_cut(lines: dict[str, str], name: str) -> bool:
    line = lines.get(name, "")
    if "stablehlo.slice" in line:
        return bool(re.search(r"\d+:\d+:[2-9]", line))
    moved = re.match(r"stablehlo\.(reshape|transpose|convert|broadcast_in_dim) (%\w+)", line)
    return bool(moved) and _is_cut(lines, moved[2])


def lowered(name: str, mode: str, platform: str, *, stats: bool = False) -> str:
    function, args, _ = program(name, mode, 2, stats=stats)
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_program_holds_its_layers_and_their_transposes(name: str, mode: str) -> None:
    """And no more than JAX itself makes of plain convolutions."""
    with backend("xla"):
        plain = work(lowered(name, mode, "cuda"))
    if expected := layers(name).get(mode):
        assert plain == expected
    for platform in PLATFORMS:
        text = lowered(name, mode, platform)
        assert work(text) == plain, platform
        assert not operations(text).keys() & {
            "custom_call",
            "while",
            "case",
            "optimization_barrier",
        }
        if platform == "cuda":
            assert strided_products(text) == 0


def layers(name: str) -> dict[str, int]:
    """Forward, kernels' gradients, and the gradient of what enters each layer but the first.

    Of a suffix, as many layers need no gradient of what enters them as branches begin there.
    """
    params = abstract_variables(build_model(name, 10))["params"]
    count = sum(leaf.ndim >= 2 for leaf in jax.tree.leaves(params))
    return {"inference": count, "input gradient": 2 * count, "full step": 3 * count - 1}


@pytest.mark.parametrize("mode", ["inference", "full step"])
def test_on_a_tpu_a_strided_1x1_is_a_product(mode: str) -> None:
    text = lowered("resnet18", mode, "tpu")
    assert strided_products(text) >= 3  # and the test above can see one
    assert operations(text)["convolution"] == (17 if mode == "inference" else 50)


def test_batch_statistics_add_no_product() -> None:
    running, batch = (lowered("resnet18", "full step", "cuda", stats=s) for s in (False, True))
    for kind in ("convolution", "dot_general", "custom_call"):
        assert operations(batch)[kind] == operations(running)[kind]


def test_on_a_cpu_the_fast_paths_are_there() -> None:
    """The tests above look for what a CPU's program has."""
    found = operations(lowered("mobilenetv2_050", "full step", "cpu"))
    assert found["while"] > 0  # kernels' gradients
    assert found["convolution"] < 5 < found["slice"]
