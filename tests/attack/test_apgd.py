"""APGD and the losses of attacks, compared with torchattacks and the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchattacks
from victims import (
    CLASSES,
    accuracy,
    examples,
    images,
    linear_victim,
    to_numpy,
    torch_examples,
    torch_victim,
    victim,
)

from tljax.attack import apgd, apgd_t, pgd
from tljax.attack.apgd import checkpoints
from tljax.attack.losses import LOSSES, cross_entropy, dlr, margin
from tljax.runtime.errors import RequestError

KEY = jax.random.key(0)
LOGITS = jnp.array([[3.0, 1, 2, -1]])


def test_loss_values_match_hand_computed_ones():
    at = [jnp.array([i]) for i in range(4)]
    assert dlr(LOGITS, at[0]) == -0.5
    assert dlr(LOGITS, at[1]) == 1.0
    np.testing.assert_allclose(dlr(LOGITS, at[0], at[2]), -1 / 3, rtol=1e-6)
    np.testing.assert_allclose(dlr(LOGITS, at[1], at[2]), 1 / 3, rtol=1e-6)
    assert margin(LOGITS, at[0]) == -1
    assert margin(LOGITS, at[1]) == 2
    assert margin(LOGITS, at[0], at[1]) == -2
    expected = -np.log(np.exp(3) / np.exp(np.asarray(LOGITS)).sum())
    np.testing.assert_allclose(cross_entropy(LOGITS, at[0]), expected, rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(LOGITS, at[1], at[0]), -expected, rtol=1e-6)


def test_dlr_and_its_gradient_match_torchattacks():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (200, 7)).astype("f"), rng.integers(0, 7, 200)
    z = torch.tensor(logits, requires_grad=True)
    for targets in (None, (labels + 2) % 7):
        if targets is None:
            loss = torchattacks.APGD(torch_victim()).dlr_loss(z, torch.tensor(labels))
        else:
            attack = torchattacks.APGDT(torch_victim())
            loss = attack.dlr_loss_targeted(z, torch.tensor(labels), torch.tensor(targets))
        (expected,) = torch.autograd.grad(loss.sum(), z)
        np.testing.assert_allclose(
            dlr(logits, labels, targets), loss.detach(), rtol=1e-6, atol=1e-6
        )
        gradient = jax.jit(jax.grad(lambda z, t=targets: dlr(z, labels, t).sum()))(logits)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_dlr_is_invariant_to_scale_and_shift_and_needs_enough_classes():
    labels = jnp.array([1])
    np.testing.assert_allclose(dlr(LOGITS * 1e4 + 7, labels), dlr(LOGITS, labels), rtol=1e-5)
    with pytest.raises(RequestError, match="the dlr loss needs 3 classes, the network has 2"):
        dlr(LOGITS[:, :2], labels)
    with pytest.raises(RequestError, match="targeted dlr loss needs 4 classes"):
        dlr(LOGITS[:, :3], labels, labels)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_equal_logits_have_finite_gradients(loss):
    labels, others = jnp.array([0]), jnp.array([1])
    if loss == "bce":
        labels, others = jax.nn.one_hot(labels, 5), jnp.full((1, 5), jnp.nan)
    for targets in (None, others):
        gradient_fn = jax.jit(jax.grad(lambda z, t=targets: LOSSES[loss](z, labels, t).sum()))
        gradient = gradient_fn(jnp.zeros((1, 5)))
        assert jnp.isfinite(gradient).all()


def test_checkpoints_match_the_paper():
    assert np.flatnonzero(checkpoints(100)).tolist() == [21, 40, 56, 69, 79, 86, 92, 98]
    windows = checkpoints(100)
    assert windows[windows > 0].tolist() == [22, 19, 16, 13, 10, 7, 6, 6]
    assert np.flatnonzero(checkpoints(3)).tolist() == [0, 1, 2]


def within_two_errors(actual: float, expected: float, n: int) -> bool:
    return abs(actual - expected) <= 2 * np.sqrt(max(expected * (1 - expected), 1 / n) / n)


@pytest.mark.parametrize(
    ("norm", "loss"),
    [
        ("linf", "ce"),
        *(
            pytest.param(norm, loss, marks=pytest.mark.slow)
            for norm in ("linf", "l2")
            for loss in ("ce", "dlr", "targeted")
            if (norm, loss) != ("linf", "ce")
        ),
    ],
)
def test_robust_accuracy_matches_torchattacks(norm, loss):
    (x, y), labels = torch_examples(), examples()[1]
    epsilon = {"linf": 1 / 255, "l2": 0.06}[norm]
    options = {"norm": norm.capitalize(), "eps": epsilon, "steps": 20}
    if loss == "targeted":
        reference = torchattacks.APGDT(torch_victim(), **options, n_classes=CLASSES)
        actual = apgd_t(victim(), *examples(), KEY, epsilon=epsilon, norm=norm, num_steps=20)
    else:
        reference = torchattacks.APGD(torch_victim(), **options, loss=loss)
        actual = apgd(
            victim(), *examples(), KEY, epsilon=epsilon, norm=norm, loss=loss, num_steps=20
        )
    result, expected = accuracy(actual, labels), accuracy(to_numpy(reference(x, y)), labels)
    print(f"{norm} {loss}: {result} (torchattacks {expected})")
    assert 0.2 < expected < 0.8  # neither 0 nor 1
    assert within_two_errors(result, expected, len(labels))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_is_at_least_as_strong_as_pgd_with_equal_steps(norm):
    for epsilon in {"linf": (0.5 / 255, 1 / 255, 2 / 255), "l2": (0.03, 0.06, 0.12)}[norm]:
        # APGD computes one more gradient than it takes steps.
        weaker = pgd(victim(), *examples(), KEY, epsilon=epsilon, norm=norm, num_steps=21)
        actual = apgd(victim(), *examples(), KEY, epsilon=epsilon, norm=norm, num_steps=20)
        assert accuracy(actual, examples()[1]) <= accuracy(weaker, examples()[1])


@pytest.mark.slow
def test_stopping_early_fools_the_same_images():
    for attack, options in ((apgd, {}), (apgd_t, {"num_targets": 3})):
        options |= {"epsilon": 1.2 / 255, "num_steps": 20}
        late = victim()(attack(victim(), *examples(), KEY, **options)).argmax(-1)
        early = victim()(attack(victim(), *examples(), KEY, stop_early=True, **options)).argmax(-1)
        labels = examples()[1]
        np.testing.assert_array_equal(late != labels, early != labels)


@pytest.mark.slow
def test_more_restarts_increase_the_loss():
    labels = examples()[1]
    once, often = (
        victim()(apgd(victim(), *examples(), KEY, epsilon=1 / 255, num_steps=1, restarts=restarts))
        for restarts in (1, 8)
    )
    unfooled = np.asarray(often.argmax(-1) == labels)
    gain = np.asarray(cross_entropy(often, labels) - cross_entropy(once, labels))[unfooled]
    assert np.asarray(once.argmax(-1) == labels)[
        unfooled
    ].all()  # eight starts fool all images that one start fools
    # The first start is the same, so no best loss decreases, and most increase.
    assert gain.min() > -1e-6
    assert (gain > 1e-6).mean() > 0.5


@pytest.mark.slow
def test_targeted_apgd_reaches_the_targets():
    targets = (examples()[1] + 1) % CLASSES
    actual = apgd(victim(), *examples(), KEY, epsilon=8 / 255, targets=targets, num_steps=20)
    assert accuracy(actual, targets) > 0.7


def test_apgd_matches_the_closed_form_of_a_linear_network():
    rng = np.random.default_rng(0)
    weights, x = rng.normal(size=300), images(20) * 0.5 + 0.25
    f = x.reshape(20, -1) @ weights - 1.0
    logits_fn = linear_victim(weights, -1.0)
    distance = np.abs(f) / np.abs(weights).sum()
    for share, expected in ((0.99, 1.0), (1.01, 0.0)):
        adversarial = apgd(
            logits_fn, x, (f > 0).astype(int), KEY, epsilon=share * distance, num_steps=50
        )
        assert accuracy(adversarial, f > 0, logits_fn) == expected
