"""Robust accuracy of a data set, and flags for unreliable evaluations."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from victims import accuracy, examples, linear_victim, victim

from tljax.attack import check_network, ensemble, evaluate, fgsm, pgd, round_inward
from tljax.attack.ensemble import title
from tljax.attack.flags import check_outcome
from tljax.runtime.errors import RequestError

KEY = jax.random.key(0)
EPSILONS = [2 / 255, 0.0, 1 / 255]
ATTACKS = {"fgsm": fgsm, "pgd": partial(pgd, num_steps=5)}
TESTS = Path(__file__).resolve().parents[1]


def cousin(images):
    """Compute logits of a network similar to `victim`."""
    return victim()(images * 0.9)


def with_errors():
    x, labels = examples()
    labels = labels.copy()
    labels[:5] = (labels[:5] + 1) % 10
    return x, labels


@pytest.fixture(scope="module")
def result():
    return evaluate(
        victim(),
        with_errors(),
        KEY,
        epsilons=EPSILONS,
        attacks=ATTACKS,
        other=cousin,
        batch_size=20,  # of 48: the last batch is ragged
    )


def test_accuracies_match_attacks_run_directly(result):
    x, labels = with_errors()
    np.testing.assert_allclose(result.epsilons, sorted(EPSILONS))
    np.testing.assert_array_equal(result.clean, np.arange(48) >= 5)
    for name, attack in ATTACKS.items():
        for epsilon, got in zip(result.epsilons, result.accuracy(name), strict=True):
            adversarial = attack(victim(), x, labels, KEY, epsilon=epsilon)
            right = accuracy(adversarial[5:], labels[5:]) * 43 / 48
            assert got.value == pytest.approx(right)
            assert got.error == pytest.approx(np.sqrt(right * (1 - right) / 48))
    values = [got.value for got in result.accuracy()]
    assert values[0] == 43 / 48
    assert values == sorted(values, reverse=True)
    union = result.outcomes["fgsm"].right & result.outcomes["pgd"].right
    np.testing.assert_array_equal(result.right, union)
    assert result.flags == {}


@pytest.mark.slow
def test_masked_uint8_batches_give_the_same_result_as_arrays(result):
    x, labels = with_errors()
    x = np.round(x * 255).astype(np.uint8)
    padding = np.zeros((3, *x.shape[1:]), np.uint8)
    batches = [
        (x[:30], labels[:30], np.ones(30, bool), np.arange(30)),
        (np.r_[x[30:], padding], np.r_[labels[30:], 0, 1, -1], np.arange(21) < 18, np.arange(21)),
    ]
    again = evaluate(
        victim(), iter(batches), KEY, epsilons=EPSILONS, attacks=ATTACKS, batch_size=20
    )
    np.testing.assert_array_equal(again.clean, result.clean)
    np.testing.assert_array_equal(again.right, result.right)
    with pytest.raises(RequestError, match="second network"):
        again.transfer("pgd")


def test_transfer_rates_match_a_direct_computation(result):
    x, labels = with_errors()
    adversarial = ATTACKS["pgd"](victim(), x, labels, KEY, epsilon=2 / 255)
    both = result.clean & (np.asarray(cousin(x).argmax(-1)) == labels)
    fooled = both & (np.asarray(victim()(adversarial).argmax(-1)) != labels)
    expected = np.mean(np.asarray(cousin(adversarial).argmax(-1))[fooled] != labels[fooled])
    got = result.transfer("pgd")
    assert got[0] is None  # epsilon 0 fools nobody
    assert got[2].value == pytest.approx(expected)
    assert 0.3 < expected < 1


def test_rounding_keeps_images_that_have_8_bit_levels(result):
    x, labels = with_errors()
    for k, epsilon in enumerate(result.epsilons):
        adversarial = ATTACKS["fgsm"](victim(), x, labels, KEY, epsilon=epsilon)
        # Steps of whole 8-bit levels remain unchanged.
        np.testing.assert_allclose(round_inward(adversarial, x), adversarial, atol=1e-6)
        assert result.rounded_accuracy("fgsm")[k] == result.accuracy("fgsm")[k]


@pytest.mark.parametrize("epsilon", [0.4 / 255, 1.7 / 255, 8 / 255])
def test_rounded_images_have_8_bit_levels_and_stay_in_the_ball(epsilon):
    x, _ = examples()
    rng = np.random.default_rng(0)
    adversarial = np.clip(x + rng.uniform(-epsilon, epsilon, x.shape), 0, 1).astype("f")
    rounded = np.asarray(round_inward(adversarial, x))
    levels = rounded * 255
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
    assert (np.abs(rounded - x) <= np.abs(adversarial - x) + 1e-6).all()
    assert np.abs(rounded - adversarial).max() < 1 / 255 + 1e-6
    # Without a level between the two values, the nearest level is used.
    np.testing.assert_allclose(
        round_inward(np.float32(10.4 / 255), np.float32(10.2 / 255)), 10 / 255
    )


def test_worst_examples_are_fooled_by_the_smallest_epsilons(result):
    worst = result.worst(100)
    needed = result.right.sum(0)[worst]
    assert (np.diff(needed) >= 0).all()
    assert not set(worst) & set(range(5))
    assert len(worst) == (result.clean & ~result.right[-1]).sum()
    np.testing.assert_array_equal(result.worst(2), worst[:2])


ENSEMBLE = ensemble(10, num_steps=10, num_queries=60)


@pytest.mark.slow
def test_huge_logits_raise_a_flag_and_do_not_make_a_network_robust():
    reports = [
        evaluate(
            lambda images, scale=scale: victim()(images) * scale, examples(), KEY,
            epsilons=[1 / 255], attacks=ENSEMBLE, survivors_only=True, batch_size=48,
        )
        for scale in (1.0, 1e4)
    ]  # fmt: skip
    plain, huge = reports
    assert plain.flags == {}
    assert "zero_gradient" in huge.flags
    masked, seen = (report.accuracy("apgd-ce")[0].value for report in (huge, plain))
    assert masked > seen + 0.2  # gradient masking does weaken the attack
    assert not (huge.right & ~plain.right).any()
    by_attack = [plain.accuracy(name)[0].value for name in ENSEMBLE]
    assert by_attack == sorted(by_attack, reverse=True)
    assert plain.accuracy()[0].value == by_attack[-1]


def names_of_flags(logits_fn):
    x, labels = (a[:20] for a in examples())  # as many as `result` has in a batch
    result = check_network(logits_fn, x, labels)
    assert all("\n" not in line for line in result.values())
    return list(result)


def test_faulty_networks_raise_flags():
    assert names_of_flags(victim()) == []
    assert names_of_flags(lambda x: jax.nn.softmax(victim()(x))) == ["probabilities"]
    assert names_of_flags(lambda x: victim()(jnp.round(x * 4) / 4)) == ["zero_gradient"]


@pytest.mark.slow
def test_randomized_networks_raise_a_flag():
    draws = iter(range(100))
    noise = lambda x: jax.random.normal(jax.random.key(next(draws)), x.shape)  # noqa: E731
    assert names_of_flags(lambda x: victim()(x + 0.01 * noise(x))) == ["randomized"]
    fixed = lambda x: jax.random.normal(KEY, x.shape)  # noqa: E731
    assert names_of_flags(lambda x: victim()(x + 0.01 * fixed(x))) == ["randomized"]
    assert names_of_flags(lambda x: victim()(x - x.mean(0))) == [
        "randomized"
    ]  # depends on the batch


@pytest.mark.slow
def test_two_classes_raise_a_flag():
    x = examples()[0][:20]
    two = linear_victim(np.random.default_rng(0).normal(size=300) / 9, 0)
    result = check_network(two, x, np.asarray(two(x).argmax(-1)))
    assert list(result) == ["few_classes"]
    assert "any DLR" in result["few_classes"]


@pytest.mark.slow
def test_two_classes_are_attacked_with_the_margin_loss():
    rng = np.random.default_rng(0)
    logits_fn, x = linear_victim(rng.normal(size=300), -1.0), examples()[0] * 0.5 + 0.25
    labels = np.asarray(logits_fn(x).argmax(-1))
    attacks = ensemble(2, num_steps=10, num_queries=10)
    report = evaluate(logits_fn, (x, labels), KEY, epsilons=[0.2], attacks=attacks)
    assert "few_classes" in report.flags
    assert report.accuracy("apgd-t")[0].value == 0


def test_square_raises_a_flag_where_it_fools_more_images():
    right = {"pgd": np.ones((2, 1000), bool), "square": np.ones((2, 1000), bool)}
    right["square"][1, :2] = False
    assert check_outcome(right) == {}
    right["square"][1, :3] = False
    assert "0.3%" in check_outcome(right)["square_improves"]
    right["pgd"][1, :1] = False
    assert check_outcome(right) == {}
    assert check_outcome({"square": right["square"]}) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilons": []}, "finite epsilons >= 0"),
        ({"epsilons": [-1]}, "finite epsilons >= 0"),
        ({"attacks": {}}, "needs attacks"),
        (
            {"data": (np.zeros((2, 10, 10, 3), "f"), np.array([-1, -1]))},
            "at least one labeled image",
        ),
        ({"data": (np.zeros((2, 10, 10, 3), "f"), np.array([1, 10]))}, "label 10.*10 classes"),
    ],
)
def test_invalid_evaluations_are_rejected(change, message):
    arguments = {"data": examples(), "epsilons": [0.1], "attacks": ATTACKS, **change}
    with pytest.raises(RequestError, match=message):
        evaluate(victim(), key=KEY, **arguments)
    with pytest.raises(RequestError, match="no ensemble 'custom'"):
        ensemble(10, version="custom")
    assert list(ensemble(10, version="rand")) == ["apgd-ce", "apgd-dlr"]
    with pytest.raises(RequestError, match="AutoAttack does not support norm 'l1'"):
        ensemble(10, norm="l1")


def test_the_ensemble_is_autoattack_and_other_numbers_appear_in_its_title():
    for norm in ("linf", "l2"):
        *by_gradients, last = ensemble(10, norm=norm).items()
        assert [name for name, _ in by_gradients] == ["apgd-ce", "apgd-t", "fab-t"]
        for _, attack in by_gradients:
            assert attack.keywords["num_steps"] == 100
            assert attack.keywords["norm"] == norm
        expected = {"norm": norm, "num_queries": 5000, "rescale": False, "bounds": (0.0, 1.0)}
        assert (last[0], last[1].keywords) == ("square", expected)
    assert title() == title(norm="l2") == "autoattack"
    assert title(num_steps=20, num_queries=200) == "autoattack, 20 steps, 200 queries"
    assert title(num_queries=200) == "autoattack, 100 steps, 200 queries"
    assert title(version="rand") == "autoattack rand"
    assert title(version="rand", num_steps=10) == "autoattack rand, 10 steps"


DEVICES = """
import json, sys
import jax
jax.config.update("jax_disable_most_optimizations", True)
from functools import partial
from tljax.attack import apgd, evaluate, pgd
from tljax.runtime.parallel import data_mesh
from victims import examples, one_by_one
x, labels = (a[:21] for a in examples())
attacks = {"pgd": partial(pgd, num_steps=4), "apgd": partial(apgd, num_steps=8, stop_early=True)}
for devices in (1, 8):
    result = evaluate(
        one_by_one(), (x, labels), jax.random.key(0), epsilons=[1 / 255, 2 / 255], attacks=attacks,
        survivors_only=True, batch_size=9, mesh=data_mesh(devices),
    )
    right = {name: outcome.right.tolist() for name, outcome in result.outcomes.items()}
    print(json.dumps([jax.device_count(), result.clean.tolist(), right]))
"""


@pytest.mark.slow
def test_eight_devices_give_the_result_of_one():
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), *sys.path]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    run = subprocess.run(
        [sys.executable, "-c", DEVICES],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    one, eight = (json.loads(line) for line in run.stdout.splitlines())
    assert one == eight
    assert one[0] == 8
    assert 0 < np.sum(one[2]["apgd"]) < 42


@pytest.mark.slow
@pytest.mark.parametrize("survivors_only", [False, True])
def test_nested_epsilons_attack_only_the_remaining_images(survivors_only, capsys):
    x, labels = with_errors()
    batches = []

    def counted(logits_fn, images, labels, key, *, epsilon):
        jax.debug.callback(
            lambda y, e: batches.append((round(float(e) * 255), len(y), int((y >= 0).sum()))),
            labels,
            epsilon,
        )
        return ATTACKS["pgd"](logits_fn, images, labels, key, epsilon=epsilon)

    attacks = {"fgsm": ATTACKS["fgsm"], "pgd": counted}
    result = evaluate(
        victim(),
        (x, labels),
        KEY,
        epsilons=[1 / 255, 2 / 255, 3 / 255],
        attacks=attacks,
        survivors_only=survivors_only,
        nested=True,
        batch_size=48,
    )
    jax.effects_barrier()
    surviving = result.outcomes["fgsm" if survivors_only else "pgd"].right
    before = np.stack([result.clean, *result.outcomes["pgd"].right[:-1]])
    expected = [int((now & old).sum()) for now, old in zip(surviving, before, strict=True)]
    if not survivors_only:
        expected = [int(old.sum()) for old in before]
    rows = [sum(count for at, _, count in batches if at == k + 1) for k in range(len(expected))]
    assert rows == expected
    # A few remaining examples are put into small batches instead of a padded full one.
    for k, count in enumerate(rows):
        lengths = [length for at, length, _ in batches if at == k + 1]
        assert lengths == ([48] if count > 24 else [6] * -(-count // 6))
    assert 0 < rows[1] <= 24
    for outcome in result.outcomes.values():
        assert (np.diff(outcome.right.astype(int), axis=0) <= 0).all()
    assert result.rounded_accuracy("pgd") is None
    progress = capsys.readouterr().err
    assert f"clean  {len(x)} images" in progress
    assert f"pgd 1/255  {rows[0]} images" in progress
    # For the smallest epsilon nesting changes nothing; larger ones attack the remaining images.
    alone = evaluate(
        victim(), (x, labels), KEY, epsilons=result.epsilons, attacks=ATTACKS, batch_size=48
    )
    np.testing.assert_array_equal(
        result.outcomes["fgsm"].right,
        np.logical_and.accumulate(alone.outcomes["fgsm"].right),
    )
