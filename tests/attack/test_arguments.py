"""Checks of the arguments of attacks, and dtypes other than float32."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import attack
from tljax.attack import check_network, evaluate
from tljax.runtime.errors import RequestError

KEY, EPSILON = jax.random.key(0), 8 / 255
ATTACKS = {
    name: getattr(attack, name)
    for name in (
        "apgd", "apgd_t", "auto_attack", "bim", "carlini_wagner", "deepfool", "fab_t", "fgsm",
        "mi_fgsm", "pgd", "square",
    )
}  # fmt: skip
WEIGHTS = np.random.default_rng(0).normal(size=(8 * 6 * 3, 5)).astype("f")
IMAGES = np.random.default_rng(1).uniform(0, 1, (4, 8, 6, 3)).astype("f")


def logits_fn(images):
    return images.reshape(len(images), -1).astype(jnp.float32) @ WEIGHTS


LABELS = np.asarray(logits_fn(IMAGES).argmax(1))
WRONG = [
    ({"images": IMAGES * 255}, "images .*0 to 1, got .* to 25.*: divide by 255"),
    ({"images": IMAGES - 0.5}, "images must be finite and within the bounds 0 to 1"),
    ({"images": np.where(IMAGES > 0.9, np.nan, IMAGES)}, "images must be finite and"),
    ({"images": (IMAGES * 255).astype(np.uint8)}, "divide uint8 by 255"),
    ({"images": IMAGES[:0], "labels": LABELS[:0]}, "images must be .* at least one, got"),
    ({"images": IMAGES * np.float32(1.001) / IMAGES.max()}, "within the bounds 0 to 1"),
    ({"bounds": (-1.0, 0.5)}, "within the bounds -1 to 0.5"),
    ({"bounds": (1.0, 0.0)}, r"bounds must be \(low, high\), the lower one first, got \(1.0, 0.0"),
    ({"bounds": None}, r"bounds must be \(low, high\)"),
    ({"bounds": (0.0, np.nan)}, r"bounds must be \(low, high\)"),
    ({"images": None}, "images must be numbers, got None"),
    ({"images": IMAGES[0], "labels": 1}, r"for images \[8, 6, 3\]: pass image\[None\]"),
    ({"images": IMAGES[0], "labels": LABELS[:1]}, r"for images \[8, 6, 3\]: pass image\[None\]"),
    ({"labels": None}, "labels must be numbers, got None"),
    ({"labels": ["lynx", "wolf", "otter", "toad"]}, "labels must be numbers, got "),
    ({"labels": np.eye(5, dtype=int)[LABELS]}, r"labels must be 4 integers.* got int32 \[4, 5\]"),
    ({"epsilon": "8/255"}, "epsilon must be numbers, got '8/255'"),
    ({"key": 0}, r"key must be one jax.random.key\(seed\), got 0"),
    ({"key": None}, "key must be one jax.random.key"),
    ({"key": jax.random.split(KEY)}, r"key must be one jax.random.key.*, got Array\(\(2,\)"),
    ({"logits_fn": 3}, "logits_fn must be a function"),
    (
        {"logits_fn": lambda x: x.sum((1, 2, 3))},
        r"logits_fn must return .* got \[4\]",
    ),
    ({"logits_fn": lambda x: x}, r"logits_fn must return .* got \[4, 8, 6, 3\]"),
    ({"logits_fn": lambda x: (logits_fn(x), x)}, "logits_fn must return .* got tuple"),
    ({"labels": LABELS + 5}, "labels must be from 0 to 4, got 7 to 9: the network has 5 classes"),
    ({"labels": LABELS - 5}, "labels must be from 0 to 4, got -"),
    ({"labels": LABELS[:3]}, "labels must be 4 integers"),
    ({"labels": LABELS / 2}, "labels must be 4 integers"),
    ({"targets": LABELS + 5}, "targets must be from 0 to 4, got"),
    ({"targets": LABELS[:1]}, "targets must be 4 integers"),
    ({"ids": np.arange(3)}, "ids must be 4 integers"),
    ({"epsilon": -EPSILON}, "epsilon must be at least 0"),
    ({"epsilon": np.array([0.1, -0.1, 0.1, 0.1])}, "epsilon must be at least 0.* -0.1 to 0.1"),
    ({"epsilon": np.nan}, "epsilon must be at least 0"),
    ({"epsilon": np.inf}, "epsilon must be at least 0 and finite"),
    ({"step_size": -0.1}, "step_size must be at least 0"),
    ({"num_steps": 0}, "num_steps must be a whole number, at least 1, got 0"),
    ({"num_steps": 2.5}, "num_steps must be a whole number"),
    ({"num_queries": 0}, "num_queries must be a whole number, at least 1"),
    ({"num_targets": 0}, "num_targets must be a whole number, at least 1"),
    ({"restarts": 0}, "restarts must be a whole number, at least 1"),
    ({"search_steps": 0}, "search_steps must be a whole number, at least 1"),
    ({"candidates": 1}, "candidates must be a whole number, at least 2"),
]


def call(function, **change):
    arguments = {"images": IMAGES, "labels": LABELS, "epsilon": EPSILON, **change}
    first = (
        arguments.pop("logits_fn", logits_fn),
        arguments.pop("images"),
        arguments.pop("labels"),
    )
    return function(*first, arguments.pop("key", KEY), **arguments)


def test_sequences_and_wider_numbers_are_converted():
    right = call(ATTACKS["fgsm"])
    bounds, wide = [0, np.float64(1)], IMAGES.astype(np.float64)
    result = call(ATTACKS["fgsm"], images=wide, labels=LABELS.tolist(), bounds=bounds)
    np.testing.assert_array_equal(result, right)


def test_images_rounded_beyond_the_bounds_are_clipped():
    result = call(ATTACKS["pgd"], images=IMAGES / IMAGES.max() * np.float32(1 + 2e-7))
    assert 0 <= np.min(result) <= np.max(result) <= 1


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_rejects_invalid_arguments_with_a_one_line_error(name):
    known, num_errors = inspect.signature(ATTACKS[name]).parameters, 0
    for change, message in WRONG:
        unlimited = known["epsilon"].default is not inspect.Parameter.empty or name == "fab_t"
        if change.keys() - known.keys() or (unlimited and message.endswith("finite")):
            continue
        with pytest.raises(RequestError, match=message) as error:
            call(ATTACKS[name], **change)
        assert "\n" not in str(error.value)
        num_errors += 1
    assert num_errors > 15


def test_traced_values_are_not_checked():
    result = jax.jit(lambda x, y: call(attack.fgsm, images=x, labels=y))(IMAGES, LABELS)
    np.testing.assert_array_equal(result, call(attack.fgsm))
    with pytest.raises(RequestError, match="labels must be from 0 to 4"):
        jax.jit(lambda x: call(attack.fgsm, images=x, labels=LABELS + 5))(IMAGES)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES * 255, LABELS, "images must be"),
        (np.where(IMAGES > 0.9, np.nan, IMAGES), LABELS, "images must be finite"),
        (IMAGES, LABELS + 5, "label [5-9], but the network has 5 classes"),
        (IMAGES, LABELS[:3], "4 images have 3 labels"),
    ],
)
def test_evaluate_checks_its_data_first(images, labels, message):
    with pytest.raises(RequestError, match=message):
        evaluate(logits_fn, (images, labels), KEY, epsilons=[0.1], attacks={"fgsm": attack.fgsm})


def length(delta: np.ndarray, norm: str) -> np.ndarray:
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    return np.linalg.norm(delta.astype("f8").reshape(len(delta), -1), ord=order, axis=1)


FEW = {"num_steps": 5}
SIXTEEN_BITS = {
    "fgsm": ("linf", attack.fgsm),
    "pgd": ("linf", partial(attack.pgd, **FEW)),
    "pgd-l2": ("l2", partial(attack.pgd, norm="l2", **FEW)),
    "pgd-l1": ("l1", partial(attack.pgd, norm="l1", **FEW)),
    "mi-fgsm": ("linf", partial(attack.mi_fgsm, **FEW)),
    "apgd": ("linf", partial(attack.apgd, restarts=2, **FEW)),
    "apgd-l2": ("l2", partial(attack.apgd, norm="l2", loss="dlr", **FEW)),
    "apgd-t": ("linf", partial(attack.apgd_t, num_targets=2, **FEW)),
    "fab": ("l2", partial(attack.fab_t, norm="l2", **FEW)),
    "square": ("linf", partial(attack.square, num_queries=20)),
    "square-l2": ("l2", partial(attack.square, norm="l2", num_queries=20)),
    "deepfool": ("l2", attack.deepfool),
    "cw": ("l2", partial(attack.carlini_wagner, num_steps=20, search_steps=2, first_constant=1.0)),
    "autoattack": ("linf", partial(attack.auto_attack, num_queries=10, **FEW)),
}
QUICK = {("fgsm", "bfloat16"), ("pgd", "bfloat16"), ("pgd-l2", "float16")}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for name in SIXTEEN_BITS
        for case in ((name, "bfloat16"), (name, "float16"))
    ],
)
def test_adversarial_images_in_16_bits_stay_in_the_ball(name, dtype):
    norm, function = SIXTEEN_BITS[name]
    images = jnp.asarray(IMAGES, dtype)
    labels = np.asarray(logits_fn(images).argmax(1))
    scale = {"linf": 1, "l2": 20, "l1": 100}[norm]
    # 1/32 is a multiple of the bfloat16 spacing near 1; the next smaller float32 is not.
    epsilon = np.array([EPSILON, 1 / 32, np.nextafter(np.float32(1 / 32), 0), 0], "f") * scale

    def network(x):
        assert x.dtype == dtype
        return logits_fn(x)

    result = function(network, images, labels, KEY, epsilon=epsilon)
    assert result.dtype == dtype
    exact = np.asarray(result, "f")
    assert (length(exact - np.asarray(images, "f"), norm) <= epsilon).all()
    assert exact.min() >= 0
    assert exact.max() <= 1
    assert (np.asarray(logits_fn(result).argmax(1)) != labels).sum() >= 2


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if name == "pgd" else pytest.mark.slow)
        for name in SIXTEEN_BITS
        for dtype in ("float32", "float64")
    ],
)
def test_images_keep_their_dtype_when_float64_is_enabled(name, dtype):
    norm, function = SIXTEEN_BITS[name]
    expected = call(function, epsilon=EPSILON * 20)
    with jax.enable_x64(True):
        images = IMAGES.astype(dtype)
        wide = lambda x: x.reshape(len(x), -1) @ WEIGHTS.astype("f8")  # noqa: E731
        result = function(wide, images, LABELS, KEY, epsilon=EPSILON * 20)
        assert result.dtype == dtype
        away = length(np.asarray(result, "f8") - images, norm)
    assert away.max() <= EPSILON * 20 * (1 + 1e-6)
    fooled = (np.asarray(logits_fn(x).argmax(1)) != LABELS for x in (result, expected))
    assert sum(next(fooled)) == sum(next(fooled))


def test_a_bfloat16_network_raises_no_flag():
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=(144, 400)).astype("f") / 12

    def rounding(x):  # the order of summation depends on the batch size
        x = x.reshape(len(x), -1).astype(jnp.bfloat16)
        order = np.random.default_rng(len(x)).permutation(144)
        x = jax.nn.relu(x[:, order] @ jnp.asarray(hidden, jnp.bfloat16)[order])
        return (x @ jnp.asarray(hidden[:5].T, jnp.bfloat16)).astype(jnp.float32)

    assert check_network(rounding, IMAGES, LABELS) == {}
    exact = lambda x: logits_fn(x) + 0.02 * len(x)  # noqa: E731
    assert "randomized" in check_network(exact, IMAGES, LABELS)


def test_check_network_uses_32_images_and_compiles_the_network():
    seen = []

    def network(x):
        assert isinstance(x, jax.core.Tracer)
        seen.append(len(x))
        return logits_fn(x)

    many = np.random.default_rng(3).uniform(0, 1, (100, 8, 6, 3)).astype("f")
    assert check_network(network, many, np.asarray(logits_fn(many).argmax(1))) == {}
    assert max(seen) == 64  # the same images again, and as many others
