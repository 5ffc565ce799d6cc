"""Attacks that minimize the perturbation, and Square, compared with other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchattacks
from scipy.optimize import minimize
from victims import (
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

from tljax.attack import carlini_wagner, deepfool, fab_t, square
from tljax.attack.fab import project_onto_plane
from tljax.attack.square import bump, side

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)


def l2(actual, count=None):
    x = examples()[0][:count]
    return np.sqrt(np.square(np.asarray(actual) - x).sum((1, 2, 3)))


def linear_problem():
    rng = np.random.default_rng(0)
    weights, x = rng.normal(size=300), images(20) * 0.5 + 0.25
    f = x.reshape(20, -1) @ weights - 1.0
    return linear_victim(weights, -1.0), x, f, weights


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_distances_match_the_closed_form_of_a_linear_network(norm):
    logits_fn, x, f, weights = linear_problem()
    dual = np.abs(weights).sum() if norm == "linf" else np.linalg.norm(weights)
    expected = np.abs(f) / dual
    attacks = {"fab": fab_t, "deepfool": deepfool}
    if norm == "l2":
        attacks["cw"] = carlini_wagner
    for name, attack in attacks.items():
        options = {"num_steps": 200, "search_steps": 12} if name == "cw" else {"norm": norm}
        result = attack(logits_fn, x, (f > 0).astype(int), KEY, epsilon=jnp.inf, **options)
        assert accuracy(result, f > 0, logits_fn) == 0, name
        away = (np.asarray(result) - x).reshape(20, -1)
        order = np.inf if norm == "linf" else 2
        ratio = np.linalg.norm(away, ord=order, axis=1) / expected
        print(f"{name} {norm}: {ratio.min():.4f} to {ratio.max():.4f} of the distance")
        assert ratio.min() > 0.999
        assert ratio.max() < 1.03


@pytest.mark.parametrize("norm", [pytest.param("linf", marks=pytest.mark.slow), "l2"])
def test_projection_onto_a_plane_matches_a_numerical_solver(norm):
    rng = np.random.default_rng(0)
    x, w = rng.uniform(0, 1, (12, 6)).astype("f"), rng.normal(size=(12, 6)).astype("f")
    value = rng.normal(0, 1.5, 12).astype("f")
    result = np.asarray(project_onto_plane(x, w, value, norm, (0.0, 1.0)))
    reachable = 0
    for x_, w_, value_, z in zip(x, w, value, result, strict=True):
        corner = np.where(w_ * value_ > 0, 0, 1)
        if abs(w_ @ (corner - x_)) < abs(value_):  # the plane is out of the bounds
            np.testing.assert_allclose(z, corner, atol=1e-6)
            continue
        reachable += 1
        np.testing.assert_allclose(value_ + w_ @ (z - x_), 0, atol=1e-5)
        assert ((z >= 0) & (z <= 1)).all()
        plane = {"type": "eq", "fun": lambda z, x_=x_, w_=w_, v=value_: v + w_ @ (z[:6] - x_)}
        if norm == "l2":
            best = minimize(
                lambda z, x_=x_: np.sum((z - x_) ** 2), x_, bounds=[(0, 1)] * 6, constraints=plane
            )
            assert np.sum((z - x_) ** 2) <= best.fun + 1e-4
        else:  # a seventh variable bounds the largest change
            near = [
                {"type": "ineq", "fun": lambda z, s=s, x_=x_: z[6] - s * (z[:6] - x_)}
                for s in (-1, 1)
            ]
            best = minimize(
                lambda z: z[6], [*x_, 1], bounds=[(0, 1)] * 7, constraints=[plane, *near]
            )
            assert np.abs(z - x_).max() <= best.fun + 1e-4
    assert reachable > 5


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_matches_torchattacks(norm):
    (x, y), labels = torch_examples(), examples()[1]
    epsilon = {"linf": 1 / 255, "l2": 0.06}[norm]
    options = {"steps": 20, "n_classes": 10, "multi_targeted": True}
    reference = torchattacks.FAB(torch_victim(), norm=norm.capitalize(), eps=epsilon, **options)
    result = to_numpy(reference(x, y))
    order = np.inf if norm == "linf" else 2
    away = np.linalg.norm((result - examples()[0]).reshape(len(labels), -1), ord=order, axis=1)
    predicted = np.asarray(victim()(result).argmax(-1))
    expected = 1 - np.mean((predicted != labels) & (away <= epsilon * (1 + 1e-5)))
    actual = fab_t(victim(), *examples(), KEY, epsilon=epsilon, norm=norm, num_steps=20)
    print(f"fab {norm}: {accuracy(actual, labels)} (torchattacks {expected})")
    assert abs(accuracy(actual, labels) - expected) <= 1 / len(labels) + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_deepfool_distances_match_foolbox(norm):
    x, y = torch_examples()
    name = {"linf": "LinfDeepFoolAttack", "l2": "L2DeepFoolAttack"}[norm]
    expected = getattr(foolbox.attacks, name)()(foolbox_victim(), x, y, epsilons=None)[1]
    actual = deepfool(victim(), *examples(), KEY, norm=norm)
    assert accuracy(actual, examples()[1]) == 0
    # foolbox adds 1e-4 to the length of each step.
    order = np.inf if norm == "linf" else 2
    lengths = [
        np.linalg.norm((result - examples()[0]).reshape(len(y), -1), ord=order, axis=1)
        for result in (np.asarray(actual), to_numpy(expected))
    ]
    ratio = np.median(lengths[0] / lengths[1])
    print(f"deepfool {norm}: median length {ratio:.4f} of foolbox's")
    assert 0.93 < ratio < 1.001


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 5])
def test_carlini_wagner_distances_match_foolbox(rounds):
    n = 12
    x, y = (t[:n] for t in torch_examples())
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=rounds, steps=100, abort_early=False, initial_const=0.1
    )
    expected = l2(to_numpy(attack(foolbox_victim(), x, y, epsilons=None)[1]), n)
    actual = carlini_wagner(
        victim(), *(a[:n] for a in examples()), KEY, num_steps=100, search_steps=rounds,
        first_constant=0.1, abort_early=False,
    )  # fmt: skip
    assert accuracy(actual, examples()[1][:n]) == 0
    off = np.abs(l2(actual, n) / expected - 1)
    print(f"C&W after {rounds}: {np.sort(off)[-2:]} from foolbox's length")
    # After the first round rounding may decide whether a step succeeds and halves the interval.
    assert (off > 1e-4).sum() <= (0 if rounds == 1 else 1)
    assert off.max() < 0.01


@pytest.mark.slow
def test_aborting_early_increases_carlini_wagner_distances_only_slightly():
    result = [
        carlini_wagner(
            victim(), *(a[:12] for a in examples()), KEY, num_steps=100, search_steps=5,
            first_constant=0.1, abort_early=abort_early,
        )
        for abort_early in (False, True)
    ]  # fmt: skip
    assert accuracy(result[1], examples()[1][:12]) == 0
    assert 1 <= np.median(l2(result[1], 12) / l2(result[0], 12)) < 1.05


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 1.5 / 255), ("l2", 0.1)])
@pytest.mark.parametrize("rescale", [True, False])
def test_square_is_as_strong_as_torchattacks(norm, epsilon, rescale):
    (x, y), labels = torch_examples(), examples()[1]
    options = {"norm": norm.capitalize(), "eps": epsilon, "n_queries": 100}
    reference = torchattacks.Square(torch_victim(), **options, resc_schedule=rescale)
    expected = accuracy(to_numpy(reference(x, y)), labels)
    actual = square(
        victim(), *examples(), KEY, epsilon=epsilon, norm=norm, num_queries=100, rescale=rescale
    )
    result = accuracy(actual, labels)
    print(f"square {norm}: {result} (torchattacks {expected})")
    assert 0.2 < expected < 0.8
    assert abs(result - expected) <= 2 * np.sqrt(2 * expected * (1 - expected) / len(labels))


@pytest.mark.slow
def test_square_sizes_match_torchattacks():
    attack = torchattacks.Square(torch.nn.Linear(1, 1), n_queries=5000)
    for query in (0, 5, 6, 25, 26, 100, 101, 250, 251, 1000, 1001, 3000, 3001, 4001, 4999):
        p = attack.p_selection(query)
        assert side(query, 5000, 0.8, 224, 224) == max(round(np.sqrt(p * 224 * 224)), 1)


def test_square_sizes_without_rescaling_match_torchattacks():
    attack = torchattacks.Square(torch.nn.Linear(1, 1), n_queries=5000, resc_schedule=False)
    for query in (0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001, 4999):
        p = attack.p_selection(query)
        assert side(query, 10000, 0.8, 224, 224) == max(round(np.sqrt(p * 224 * 224)), 1)


@pytest.mark.parametrize("length", [2, 3, 5, 6, 25])
def test_bumps_match_torchattacks(length):
    attack = torchattacks.Square(torch.nn.Linear(1, 1), norm="L2")
    attack.device = "cpu"
    torch.manual_seed(0)
    expected = attack.eta(length).numpy()
    rows, columns = jnp.arange(length)[:, None], jnp.arange(length)[None]
    actual = [np.asarray(bump(*at, length)) for at in ((rows, columns), (columns, rows))]
    assert min(np.abs(one - expected).max() for one in actual) < 1e-6


def test_square_in_l2_has_norm_epsilon_away_from_the_bounds():
    x = 0.4 + 0.2 * examples()[0]
    labels = np.asarray(victim()(x).argmax(-1))
    result = [
        square(victim(), x, labels, KEY, epsilon=0.15, norm="l2", num_queries=queries)
        for queries in (1, 60)
    ]
    for one in result:
        away = np.sqrt(np.square(np.asarray(one, "f8") - x).sum((1, 2, 3)))
        np.testing.assert_allclose(away, 0.15, rtol=1e-5)
    assert accuracy(result[1], labels) < accuracy(result[0], labels)
    changed = (np.asarray(result[1]) != np.asarray(result[0])).any((1, 2, 3))
    assert changed.any()


@pytest.mark.slow
def test_minimal_attacks_do_not_exceed_epsilon():
    for attack in (fab_t, deepfool):
        result = attack(victim(), *examples(), KEY, epsilon=0.03, norm="l2", num_steps=10)
        assert l2(result).max() <= 0.03 + 1e-6
