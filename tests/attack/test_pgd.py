"""PGD, FGSM, BIM and MI-FGSM, compared with four other libraries."""

import captum.robust
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchattacks
from art.attacks.evasion import FastGradientMethod, MomentumIterativeMethod
from art.estimators.classification import PyTorchClassifier
from scipy.optimize import brentq
from victims import (
    CLASSES,
    SIZE,
    accuracy,
    examples,
    foolbox,
    foolbox_victim,
    images,
    linear_victim,
    to_numpy,
    torch_examples,
    torch_victim,
    victim,
)

from tljax.attack import bim, fgsm, mi_fgsm, pgd
from tljax.attack.norms import NORMS
from tljax.runtime.errors import RequestError

KEY = jax.random.key(0)
EPSILON = 4 / 255


def art_victim() -> PyTorchClassifier:
    return PyTorchClassifier(
        torch_victim(),
        torch.nn.CrossEntropyLoss(),
        (3, SIZE, SIZE),
        CLASSES,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


def by_art(attack, targets=None) -> np.ndarray:
    x, y = torch_examples()
    labels = np.eye(CLASSES)[y.numpy() if targets is None else targets]
    return np.moveaxis(attack.generate(x.numpy(), labels), 1, -1)


def same(actual, expected, tolerance=1e-6):
    assert np.abs(np.asarray(actual) - examples()[0]).max() > 0.9 * EPSILON  # the images changed
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("library", ["foolbox", "torchattacks", "art", "captum"])
def test_fgsm_matches_other_libraries(library):
    x, y = torch_examples()
    match library:
        case "foolbox":
            attack = foolbox.attacks.LinfFastGradientAttack()
            expected = attack(foolbox_victim(), x, y, epsilons=EPSILON)[1]
        case "torchattacks":
            expected = torchattacks.FGSM(torch_victim(), eps=EPSILON)(x, y)
        case "art":
            expected = torch.from_numpy(
                FastGradientMethod(art_victim(), eps=EPSILON).generate(x.numpy(), np.eye(10)[y])
            )
        case _:
            loss = torch.nn.CrossEntropyLoss(reduction="none")
            attack = captum.robust.FGSM(torch_victim(), loss, lower_bound=0, upper_bound=1)
            expected = attack.perturb(x.clone().requires_grad_(), epsilon=EPSILON, target=y)
    same(fgsm(victim(), *examples(), KEY, epsilon=EPSILON), to_numpy(expected))


@pytest.mark.slow
def test_fgsm_in_l2_and_with_targets_matches_other_libraries():
    x, y = torch_examples()
    attack = foolbox.attacks.L2FastGradientAttack()
    expected = to_numpy(attack(foolbox_victim(), x, y, epsilons=0.5)[1])
    actual = fgsm(victim(), *examples(), KEY, epsilon=0.5, norm="l2")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
    targets = (examples()[1] + 1) % CLASSES
    expected = by_art(FastGradientMethod(art_victim(), eps=EPSILON, targeted=True), targets)
    same(fgsm(victim(), *examples(), KEY, epsilon=EPSILON, targets=targets), expected)


def test_bim_and_pgd_without_random_start_match_torchattacks():
    x, y = torch_examples()
    options = {"eps": EPSILON, "alpha": 1 / 255, "steps": 10}
    actual = bim(victim(), *examples(), KEY, epsilon=EPSILON, step_size=1 / 255)
    same(actual, to_numpy(torchattacks.BIM(torch_victim(), **options)(x, y)))
    actual = pgd(
        victim(), *examples(), KEY, epsilon=EPSILON, step_size=1 / 255, num_steps=10,
        random_start=False,
    )  # fmt: skip
    expected = torchattacks.PGD(torch_victim(), **options, random_start=False)(x, y)
    same(actual, to_numpy(expected))


@pytest.mark.slow
def test_pgd_in_l2_matches_torchattacks_and_foolbox():
    x, y = torch_examples()
    expected = torchattacks.PGDL2(torch_victim(), eps=0.5, alpha=0.1, steps=10, random_start=False)
    options = {"epsilon": 0.5, "norm": "l2", "random_start": False}
    actual = pgd(victim(), *examples(), KEY, step_size=0.1, num_steps=10, **options)
    np.testing.assert_allclose(actual, to_numpy(expected(x, y)), rtol=0, atol=1e-6)
    expected = foolbox.attacks.L2PGD(rel_stepsize=0.025, steps=20, random_start=False)
    actual = pgd(victim(), *examples(), KEY, step_size=0.0125, num_steps=20, **options)
    expected = to_numpy(expected(foolbox_victim(), x, y, epsilons=0.5)[1])
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_targeted_pgd_matches_torchattacks():
    x, y = torch_examples()
    targets = (y + 3) % CLASSES
    expected = torchattacks.PGD(torch_victim(), EPSILON, 1 / 255, 10, random_start=False)
    expected.set_mode_targeted_by_label(quiet=True)
    actual = pgd(
        victim(), *examples(), KEY, epsilon=EPSILON, step_size=1 / 255, num_steps=10,
        random_start=False, targets=targets.numpy(),
    )  # fmt: skip
    same(actual, to_numpy(expected(x, targets)))


@pytest.mark.parametrize("library", ["torchattacks", "art"])
def test_mi_fgsm_matches_torchattacks_and_art(library):
    x, y = torch_examples()
    if library == "art":
        attack = MomentumIterativeMethod(
            art_victim(), eps=EPSILON, eps_step=1 / 255, decay=1.0, max_iter=10, verbose=False
        )
        expected = by_art(attack)
    else:
        attack = torchattacks.MIFGSM(torch_victim(), EPSILON, 1 / 255, 10, decay=1.0)
        expected = to_numpy(attack(x, y))
    same(mi_fgsm(victim(), *examples(), KEY, epsilon=EPSILON, step_size=1 / 255), expected)


@pytest.mark.slow
def test_more_restarts_fool_more_images():
    # A weak attack, so that random starts matter.
    options = {"epsilon": 1.5 / 255, "num_steps": 1, "step_size": 0.5 / 255}
    result = [
        accuracy(pgd(victim(), *examples(), KEY, restarts=n, **options), examples()[1])
        for n in (2, 20)
    ]
    assert result[0] > result[1]


@pytest.mark.slow
def test_random_starts_are_uniform_in_the_ball():
    keys = jax.random.split(KEY, 2000)
    for name, expected in {"linf": 0.5, "l2": 0.5 ** (1 / 3), "l1": 0.5 ** (1 / 3)}.items():
        points = np.asarray(jax.jit(lambda k, n=name: NORMS[n].inside(k, (3,)))(keys))
        lengths = np.asarray(jax.jit(NORMS[name].length)(points))
        assert lengths.max() <= 1 + 1e-6
        np.testing.assert_allclose(points.mean(0), 0, atol=0.06)
        if name == "linf":
            np.testing.assert_allclose(np.abs(points).mean(), expected, atol=0.02)
        else:
            np.testing.assert_allclose(np.median(lengths), expected, atol=0.02)
        surface = jax.jit(lambda k, n=name: NORMS[n].length(NORMS[n].surface(k, (3,))))
        np.testing.assert_allclose(surface(keys), 1, 1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-18])
def test_the_normalized_gradient_has_length_one_for_tiny_gradients(scale):
    gradient = jnp.array([[3.0, 4.0], [0, 0]]) * scale
    result = NORMS["l2"].steepest(gradient)
    np.testing.assert_allclose(result, [[0.6, 0.8], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize("radius", [0.0, 0.3, 2.0])
def test_projection_onto_the_l1_ball_returns_the_nearest_point(radius):
    delta = np.random.default_rng(0).normal(size=(6, 3, 4)).astype("f") * 0.4
    result = np.asarray(NORMS["l1"].project(delta, jnp.full(6, radius)))
    for point, start in zip(result, delta.astype("f8"), strict=True):

        def excess(loss, start=start):
            return np.maximum(np.abs(start) - loss, 0).sum() - radius

        # By the KKT conditions all entries share one multiplier.
        loss = brentq(excess, 0, np.abs(start).max() + 1) if excess(0.0) > 0 else 0.0
        nearest = np.sign(start) * np.maximum(np.abs(start) - loss, 0)
        np.testing.assert_allclose(point, nearest, rtol=0, atol=1e-6)


def test_pgd_in_l1_matches_the_closed_form_of_a_linear_network():
    rng = np.random.default_rng(0)
    weights, x = rng.normal(size=300), images(1) * 0.5 + 0.25
    f = 0.2
    logits_fn = linear_victim(weights, f - x.reshape(-1) @ weights)
    largest = np.sort(np.abs(weights))[-3:]  # 1% of the entries
    for epsilon, expected in ((0.99 * f / largest[-1], 1.0), (1.01 * f / largest.mean(), 0.0)):
        adversarial = pgd(logits_fn, x, np.array([1]), KEY, epsilon=epsilon, norm="l1")
        assert accuracy(adversarial, [1], logits_fn) == expected


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_attacks_match_the_closed_form_of_a_linear_network(attack):
    rng = np.random.default_rng(0)
    weights, x = rng.normal(size=300), images(20) * 0.5 + 0.25
    f = x.reshape(20, -1) @ weights - 1.0
    logits_fn = linear_victim(weights, -1.0)
    distance = np.abs(f) / np.abs(weights).sum()  # Linf, to the boundary
    assert distance.max() < 0.25  # the bounds do not limit the attack
    for share, expected in ((0.99, 1.0), (1.01, 0.0)):
        adversarial = attack(logits_fn, x, (f > 0).astype(int), KEY, epsilon=share * distance)
        assert accuracy(adversarial, f > 0, logits_fn) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((4, 8, 8, 3), np.uint8)}, "divide uint8 by 255"),
        ({"labels": np.zeros(3, int)}, "labels must be 4 integers"),
        ({"labels": np.zeros(4)}, r"labels must be 4 integers.*float"),
        ({"ids": np.zeros(3, int)}, "ids must be 4 integers"),
        ({"epsilon": np.zeros(3)}, "epsilon must be a number or 4 numbers"),
        ({"step_size": np.zeros(3)}, "step_size must be a number or 4"),
        ({"norm": "l7"}, "unsupported norm 'l7': choose from linf, l2, l1"),
        ({"loss": "cw"}, "no loss 'cw'; choose from ce, dlr, margin"),
        ({"num_steps": 0}, "at least 1"),
        ({"loss": "dlr", "logits_fn": linear_victim(np.ones(192), 0)}, "needs 3 classes"),
        ({"logits_fn": lambda x: x.mean((1, 2, 3))}, r"logits_fn must return \[batch, classes\]"),
        ({"logits_fn": []}, "wrap it"),
    ],
)
def test_invalid_arguments_raise_a_one_line_error(change, message):
    arguments = {
        "logits_fn": linear_victim(np.ones(192), 0),
        "images": np.zeros((4, 8, 8, 3), np.float32),
        "labels": np.zeros(4, int),
        "key": KEY,
        "epsilon": 0.1,
    }
    with pytest.raises(RequestError, match=message) as error:
        pgd(**{**arguments, **change})
    assert "\n" not in str(error.value)
