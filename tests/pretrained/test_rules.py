"""Key tables are bijections that fit one network each, and describe files that do not fit."""

import functools
import re
import time
from collections.abc import Iterable
from itertools import product

import numpy as np
import pytest
from networks import random_variables
from references import FAST

from tljax.models import MODELS, abstract_variables, build_model, vit
from tljax.models.layers import gelu
from tljax.pretrained.rules import CONV, DENSE, Rule, apply_rules, compare, invert_rules
from tljax.pretrained.tables.layouts import LAYOUTS, layout_rules
from tljax.pretrained.unwrap import check
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.trees import flatten

Arrays = dict[str, np.ndarray]
VECTOR, MATRIX = np.ones(3, np.float32), np.ones((3, 3), np.float32)
TORCHVISION = layout_rules("resnet18", "torchvision")
SKELETON = abstract_variables(build_model("resnet18", 7))


@functools.cache
def file_of(name: str, layout: str, num_classes: int = 7) -> Arrays:
    """Return the keys and shapes of a file; the arrays take no memory."""
    leaves = flatten(abstract_variables(build_model(name, num_classes)))
    return {
        rule.key: np.broadcast_to(np.float32(1), rule.source_shape(leaves[rule.path].shape))
        for rule in layout_rules(name, layout)
    }


@pytest.fixture
def arrays() -> Arrays:
    return invert_rules(
        layout_rules("resnet18", "torchvision"), random_variables(build_model("resnet18", 7))
    )


FEW = ("resnet18", "resnet34", "resnet50", "vgg11", "efficientnet_lite0", "keras_mobilenetv1_025")

# Networks with the same tensors: a file is identified as the second, if that has its layout.
TWINS = {
    f"tf_mobilenetv3_{network}": f"mobilenetv3_{network}"
    for network in ("large_075", "large_100", "small_075", "small_100")
}
TWINS |= {name: name.replace("deit", "vit") for name in vit.DEIT}
TWINS |= {f"hf_{name}": name for name in (*vit.AUGREG, *vit.SIGLIP)}
TWINS |= {name: name.replace("_quickgelu", "") for name in vit.CLIP if "quickgelu" in name}
TWINS["hf_vit_so400m_patch14_siglip_384"] = "vit_so400m_patch14_siglip_378"
TWINS |= {f"timm_efficientnet_lite{i}": f"efficientnet_lite{i}" for i in range(5)}
TWINS |= {f"tf_efficientnet_b{i}": f"efficientnet_b{i}" for i in range(6)}


def identified_as(name: str, layout: str) -> str:
    twin = TWINS.get(name, name)
    return twin if layout in LAYOUTS[twin] else name


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) in FAST else pytest.mark.slow)
        for name in LAYOUTS
        for layout in LAYOUTS[name]
    ],
)
def test_every_table_is_a_bijection_and_identified_by_its_keys(name: str, layout: str) -> None:
    rules = layout_rules(name, layout)
    paths = [rule.path for rule in rules]
    assert len({(rule.key, rule.part) for rule in rules}) == len(set(paths)) == len(rules)
    assert set(paths) == set(flatten(abstract_variables(build_model(name, 7))))
    for model, expected in ((None, identified_as(name, layout)), (name, name)):
        identity = check(file_of(name, layout), "file", model)
        assert (identity.model.name, identity.model.num_classes) == (expected, 7)
        assert LAYOUTS[expected][identity.layout].table is LAYOUTS[name][layout].table


@pytest.mark.parametrize(
    ("rule", "source_shape", "shape"),
    [
        (Rule("", ""), (4, 3), (4, 3)),
        (Rule("", "", CONV), (4, 3, 5, 2), (5, 2, 3, 4)),
        # a linear layer after a flattened [3, 5, 2] map
        (Rule("", "", CONV, (4, 30), (4, 3, 5, 2)), (4, 30), (30, 4)),
        # a head stored as a 1x1 convolution, for any number of classes
        (Rule("", "", DENSE, (-1, 3, 1, 1), (-1, 3)), (7, 3, 1, 1), (3, 7)),
        (Rule("", "", (), (1, 1, 3, -1)), (1, 1, 3, 7), (3, 7)),
    ],
)
def test_a_rule_is_invertible(
    rule: Rule, source_shape: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    array = np.arange(np.prod(source_shape), dtype=np.float32).reshape(source_shape)
    assert rule.source_shape(shape) == source_shape
    ported = rule.from_source(array, shape)
    assert ported.shape == shape
    np.testing.assert_array_equal(rule.to_source(ported), array, strict=True)


def test_one_tensor_of_a_source_may_be_several() -> None:
    names = ("query", "key", "value")
    rules = tuple(Rule("qkv", f"params/{x}", DENSE, part=(i, 3)) for i, x in enumerate(names))
    qkv = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)
    skeleton = {"params": {name: np.empty((5, 4)) for name in names}}
    assert not any(compare(rules, {"qkv": qkv}, skeleton))
    assert compare(rules, {}, skeleton).missing == ("qkv",)
    [line] = compare(rules, {"qkv": qkv.T}, skeleton).shapes
    assert line == "qkv is [5, 12], not [12, 5]"
    variables = apply_rules(rules, {"qkv": qkv}, skeleton)
    np.testing.assert_array_equal(variables["params"]["key"], qkv[4:8].T)
    np.testing.assert_array_equal(invert_rules(rules, variables)["qkv"], qkv, strict=True)


def test_a_linear_layer_after_a_flattened_map_gives_the_same_output() -> None:
    rule = Rule("", "", CONV, (4, 30), (4, 3, 5, 2))
    rng = np.random.default_rng(0)
    weight, image = rng.standard_normal((4, 30)), rng.standard_normal((3, 5, 2))
    output = image.transpose(1, 2, 0).ravel() @ rule.from_source(weight, (30, 4))
    np.testing.assert_allclose(output, weight @ image.ravel())


def test_an_unknown_layout_is_refused() -> None:
    expected = "no layout 'keras' for resnet18; known: torchvision, timm, huggingface"
    with pytest.raises(RequestError, match=expected):
        layout_rules("resnet18", "keras")


def test_a_table_must_cover_the_network(arrays: Arrays) -> None:
    rules = layout_rules("resnet18", "torchvision")[:-1]
    with pytest.raises(AssertionError, match=r"does not cover the network: .'params/head/bias'"):
        compare(rules, arrays, abstract_variables(build_model("resnet18", 7)))


@pytest.mark.parametrize("actual", FEW)
def test_the_error_for_a_wrong_model_names_the_right_one(actual: str) -> None:
    assert_right_one_is_named(actual, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("actual", MODELS)
def test_the_error_for_any_wrong_model_names_the_right_one(actual: str) -> None:
    assert_right_one_is_named(actual, FEW)


def _differ_in_size(first: str, second: str) -> bool:
    """Return True for two Vision Transformers that differ in the size of the images alone."""
    variants = [vit.VARIANTS[name] for name in (first, second) if name in vit.VARIANTS]
    settings = {"size": 0, "preprocess": Preprocess(), "epsilon": 0, "activation": gelu}
    return len(variants) == 2 and variants[0]._replace(**settings) == variants[1]._replace(
        **settings
    )


def assert_right_one_is_named(actual: str, models: Iterable[str]) -> None:
    others = [name for name in models if TWINS.get(name, name) != TWINS.get(actual, actual)]
    if actual in vit.VARIANTS:  # positions are resized
        others = [name for name in others if not _differ_in_size(name, actual)]
    for layout, model in product(LAYOUTS[actual], others):
        right = identified_as(actual, layout)
        with pytest.raises(RequestError, match=f"not fit {model} .*: it looks like {right}[ .]"):
            check(file_of(actual, layout), "file", model)


def test_the_error_for_a_wrong_depth_counts_the_blocks() -> None:
    expected = re.escape(
        "net.pth does not fit resnet50 (torchvision keys): it looks like resnet101 "
        "(layer3 has 23 blocks, expected 6). 255 left over: layer3.6.conv1.weight, "
    )
    with pytest.raises(RequestError, match=expected):
        check(file_of("resnet101", "torchvision"), "net.pth", "resnet50")
    with pytest.raises(RequestError, match=r"looks like resnet18\. ") as caught:
        check(file_of("resnet18", "torchvision"), "net.pth", "efficientnet_lite0")
    assert "expected" not in str(caught.value)  # block counts of another family are not compared


def test_a_transposed_head_is_reported_as_a_wrong_shape(arrays: Arrays) -> None:
    arrays["fc.weight"] = arrays["fc.weight"].T
    with pytest.raises(RequestError) as caught:
        check(arrays, "net.pth")
    assert str(caught.value) == (
        "net.pth does not fit resnet18 (torchvision keys). "
        "1 shape: fc.weight is [512, 7], not [7, 512]"
    )


def test_missing_and_leftover_keys_are_listed(arrays: Arrays) -> None:
    del arrays["bn1.weight"]
    for i in range(6):
        arrays[f"extra.{i}"] = np.zeros(1, np.float32)
    with pytest.raises(RequestError) as caught:
        check(arrays, "net.pth")
    assert str(caught.value) == (
        "net.pth does not fit resnet18 (torchvision keys). 1 missing: bn1.weight; "
        "6 left over: extra.0, extra.1, extra.2, ... (3 more)"
    )


def test_counters_of_batch_norm_are_neither_missing_nor_left_over(arrays: Arrays) -> None:
    counters = {key for key in arrays if key.endswith("num_batches_tracked")}
    assert len(counters) == 20
    assert not any(check(arrays, "net.pth").difference)
    without = {key: array for key, array in arrays.items() if key not in counters}
    assert not any(check(without, "net.pth").difference)


@pytest.mark.parametrize("model", [None, "resnet50"])
def test_the_error_for_an_unknown_network_is_short(model: str | None) -> None:
    """For any length of the keys in the file."""
    other = {f"vit.blocks.{i}.{'x' * 500}\n.weight": MATRIX for i in range(200)}
    for arrays, prefix in (({"encoder.weight": MATRIX}, "encoder."), (other, "vit.")):
        with pytest.raises(RequestError) as caught:
            check(arrays, "net.pth", model)
        message = str(caught.value)
        assert re.match(
            r"net.pth holds no network that tljax supports; the nearest is \w+ "
            r"\(\w+ keys\)\. \d+ missing: .* more\); \d+ left over: ",
            message,
        )
        assert prefix in message
        assert "\n" not in message
        assert len(message) < 500


def test_the_nearest_network_is_the_one_with_most_keys_in_the_file(arrays: Arrays) -> None:
    """The file holds parameters without running statistics."""
    arrays = {key: array for key, array in arrays.items() if "running" not in key}
    with pytest.raises(RequestError, match=r"does not fit resnet18 .*40 missing: bn1.running_mean"):
        check(arrays, "net.pth")


# --- keys with a prefix, and additional keys -----------------------------------------------------


def with_prefix(prefix: str, arrays: Arrays) -> Arrays:
    return {prefix + key: array for key, array in arrays.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "model.", "_orig_mod.", "net.", "network.", "backbone.", "encoder."),
        *("encoder_q.", "module.encoder_q.", "base_encoder.", "student.", "teacher.", "resnet."),
        *("_orig_mod.module.", "module._orig_mod.", "model.net.backbone.", "lit_model.cnn."),
    ],
)
@pytest.mark.parametrize("layout", ["torchvision", "huggingface"])
def test_any_common_prefix_of_the_keys_is_removed(prefix: str, layout: str) -> None:
    arrays = file_of("resnet18", layout)
    identity = check(with_prefix(prefix, arrays), "net.pth")
    assert (identity.model.name, identity.layout) == ("resnet18", layout)
    assert identity.notes("net.pth") == ()
    assert identity.arrays.keys() == arrays.keys()
    assert all(identity.arrays[key] is array for key, array in arrays.items())


def test_prefixes_of_wrapped_modules_are_removed() -> None:
    """Compiled, sharded and checkpointed modules add them."""
    arrays = file_of("resnet18", "torchvision")
    wrapped = {
        re.sub(r"^(layer1|fc)\.", r"\1._orig_mod._checkpoint_wrapped_module.", key): array
        for key, array in with_prefix("_fsdp_wrapped_module.", arrays).items()
    }
    assert check(wrapped, "net.pth").arrays.keys() == arrays.keys()


@pytest.mark.parametrize(
    ("prefix", "others", "listed"),
    [
        ("", {"criterion.weight": VECTOR, "loss_fn.centers": MATRIX}, "criterion.weight, loss_fn."),
        ("", {"normalize.mean": np.ones((1, 3, 1, 1))}, "normalize.mean"),
        ("", {"queue": MATRIX, "queue_ptr": VECTOR[:1]}, "queue, queue_ptr"),
        ("", {"projector.0.weight": MATRIX, "prototypes.weight": MATRIX}, "projector.0.weight, "),
        ("", {"conv1.total_ops": VECTOR, "total_params": VECTOR}, "conv1.total_ops, total_params"),
        ("module.", {"n_averaged": np.array(7)}, "n_averaged (its keys begin with 'module.')"),
        ("model.", {"head.weight": MATRIX, "val_acc.sum": VECTOR}, "head.weight, val_acc.sum"),
        ("model.", {f"x.{i}": VECTOR for i in range(5)}, "x.0, x.1, x.2, ... (2 more)"),
    ],
)
def test_a_note_lists_additional_tensors(prefix: str, others: Arrays, listed: str) -> None:
    arrays = file_of("resnet18", "torchvision")
    identity = check(with_prefix(prefix, arrays) | others, "net.pth")
    assert identity.model.name == "resnet18"
    assert {key: identity.arrays[key] for key in arrays} == arrays
    [note] = identity.notes("net.pth")
    assert note.startswith(f"net.pth: ignored tensors that resnet18 does not use: {listed}")


@pytest.mark.parametrize(
    ("used", "other"),
    [
        ("module.encoder_q.", "module.encoder_k."),
        ("module.base_encoder.", "module.momentum_encoder."),
        ("teacher.backbone.", "student.module.backbone."),
        ("online_network.", "target_network."),
        ("model.", "ema_model."),
        ("model.", "model_ema.module."),
        ("", "teacher."),
    ],
)
def test_of_two_copies_the_evaluated_one_is_loaded(used: str, other: str) -> None:
    arrays = file_of("resnet18", "torchvision")
    copy = {key: np.zeros_like(array) for key, array in arrays.items()}
    identity = check(with_prefix(other, copy) | with_prefix(used, arrays), "net.pth")
    assert identity.prefix == used
    assert identity.arrays["conv1.weight"] is arrays["conv1.weight"]
    assert f"{other}conv1.weight, " in identity.notes("net.pth")[0]


def test_a_file_with_two_networks_is_refused() -> None:
    arrays = file_of("resnet18", "torchvision")
    expected = "net.pth holds several networks, under 'net1.' and 'net2.'; save the one you mean"
    with pytest.raises(RequestError, match=re.escape(expected)):
        check(with_prefix("net1.", arrays) | with_prefix("net2.", arrays), "net.pth")


@pytest.mark.parametrize(
    "others",
    [
        {"layer1.0.se.fc.weight": MATRIX},  # another network: SE-ResNet
        {"layer1.0.prelu.weight": VECTOR},
        {"layer1.2.conv1.weight": MATRIX},
        {"attention.weight": MATRIX},
        {f"bn2.{name}": VECTOR for name in ("weight", "bias", "running_mean", "running_var")},
        {"fc2.weight": MATRIX, "fc2.bias": VECTOR},
        {"classifier.weight": MATRIX},
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_additional_layers_are_refused(prefix: str, others: Arrays) -> None:
    """Without them the file fits a smaller network, whose outputs would be wrong."""
    arrays = file_of("resnet18", "torchvision") | others
    with pytest.raises(
        RequestError, match=r"net.pth does not fit resnet18 .* left over: "
    ) as caught:
        check(with_prefix(prefix, arrays), "net.pth")
    assert (f"(its keys begin with '{prefix}')" in str(caught.value)) == bool(prefix)


@pytest.mark.parametrize("lost", ["conv1.weight", "layer2.0.bn1.weight"])
def test_the_error_for_a_missing_tensor_names_the_prefix(lost: str) -> None:
    arrays = file_of("resnet18", "torchvision")
    arrays = with_prefix("module.encoder_q.", {key: x for key, x in arrays.items() if key != lost})
    with pytest.raises(RequestError) as caught:
        check(arrays, "net.pth")
    if lost != "conv1.weight":  # the key that determines the prefix
        assert str(caught.value) == (
            f"net.pth does not fit resnet18 (torchvision keys). 1 missing: {lost} "
            "(its keys begin with 'module.encoder_q.')"
        )
    assert len(str(caught.value)) < 400


def test_additional_layers_of_keras_are_refused() -> None:
    arrays = file_of("keras_mobilenetv1_025", "keras") | {"batch_normalization_99/gamma": VECTOR}
    with pytest.raises(RequestError, match="1 left over: batch_normalization_99/gamma"):
        check(arrays, "net.h5")


def test_many_prefixes_are_checked_in_bounded_time() -> None:
    arrays = {f"{i}.conv1.weight": MATRIX for i in range(20_000)}
    start = time.perf_counter()
    with pytest.raises(RequestError, match="the nearest is"):
        check(arrays, "net.pth")
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(arrays: Arrays, value: float) -> None:
    arrays["layer2.0.conv1.weight"][3, 2, 1, 0] = value
    expected = "layer2.0.conv1.weight holds NaN or infinity; the file is damaged"
    with pytest.raises(RequestError, match=expected):
        apply_rules(TORCHVISION, arrays, SKELETON)


def test_swapped_statistics_are_refused(arrays: Arrays) -> None:
    mean, var = "layer2.0.bn1.running_mean", "layer2.0.bn1.running_var"
    arrays[mean], arrays[var] = arrays[var], arrays[mean]
    expected = f"{var} is a running variance and holds negative values; were running_mean and"
    with pytest.raises(RequestError, match=expected):
        apply_rules(TORCHVISION, arrays, SKELETON)


def test_half_precision_is_read_as_float32(arrays: Arrays) -> None:
    halves = {key: np.asarray(array, np.float16) for key, array in arrays.items()}
    variables = apply_rules(TORCHVISION, halves, SKELETON)
    assert {leaf.dtype for leaf in flatten(variables).values()} == {np.dtype("float32")}
