"""Attacks on networks with several labels per image, compared with torch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.metrics import average_precision_score
from victims import CLASSES, images, linear_victim, to_numpy, to_torch, torch_victim, victim

from tljax.attack import (
    apgd,
    apgd_t,
    bim,
    check_network,
    evaluate_labels,
    fgsm,
    mi_fgsm,
    pgd,
    round_inward,
    square,
)
from tljax.attack.contract import as_float
from tljax.attack.losses import binary_cross_entropy
from tljax.attack.norms import NORMS
from tljax.runtime.errors import RequestError

KEY, EPSILON, COUNT = jax.random.key(0), 4 / 255, 12
ATTACKS = [fgsm, bim, mi_fgsm, pgd, partial(apgd, num_steps=10)]
NAMES = ["fgsm", "bim", "mi-fgsm", "pgd", "apgd"]


def data() -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels, most of them as predicted, a fifth of them unknown."""
    x, rng = images(COUNT), np.random.default_rng(0)
    predicted = np.asarray(victim()(x)) >= 0
    labels = (predicted ^ (rng.random(predicted.shape) < 0.1)).astype(np.float32)
    labels[rng.random(labels.shape) < 0.2] = np.nan
    labels[3] = np.nan
    return x, labels


def pixels() -> np.ndarray:
    return np.round(images(COUNT) * 255).astype(np.uint8)


def torch_losses(logits: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    """Return the mean loss of the known labels of each image; 0 if there are none."""
    y = torch.from_numpy(labels)
    known = ~torch.isnan(y)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.where(known, y, 0.0), reduction="none"
    )
    return torch.stack(
        [row[k].mean() if k.any() else 0 * row.sum() for row, k in zip(losses, known, strict=True)]
    )


def torch_pgd(x, labels, start, epsilon, step, num_steps, sign=1.0) -> np.ndarray:
    origin, x = to_torch(x), to_torch(start)
    for _ in range(num_steps):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(torch_losses(torch_victim()(x), labels).sum(), x)
        x = x.detach() + sign * step * gradient.sign()
        x = (origin + (x - origin).clamp(-epsilon, epsilon)).clamp(0, 1)
    return to_numpy(x)


def test_the_loss_is_that_of_torch_without_unknown_labels():
    x, labels = data()
    logits = victim()(x) * 5
    expected = torch_losses(torch.from_numpy(np.array(logits)), labels).numpy()
    assert expected[3] == 0
    np.testing.assert_allclose(binary_cross_entropy(logits, labels), expected, rtol=1e-6)
    targeted = binary_cross_entropy(logits, jnp.full_like(labels, jnp.nan), jnp.asarray(labels))
    np.testing.assert_allclose(targeted, -expected, rtol=1e-6)


@pytest.mark.parametrize("targeted", [False, True])
def test_pgd_matches_a_loop_in_torch_from_the_same_start(targeted):
    x, labels = data()
    ids = jnp.arange(COUNT)
    keys = jax.vmap(partial(jax.random.fold_in, KEY))(ids)
    start = np.clip(x + EPSILON * np.asarray(NORMS["linf"].inside(keys, x.shape[1:])), 0, 1)
    assert np.abs(start - x).max() > EPSILON / 2
    expected = torch_pgd(x, labels, start, EPSILON, 1 / 255, 10, sign=-1.0 if targeted else 1.0)
    known = (np.full_like(labels, np.nan), labels) if targeted else (labels, None)
    actual = pgd(
        victim(), x, known[0], KEY, epsilon=EPSILON, step_size=1 / 255, num_steps=10, ids=ids,
        loss="bce", targets=known[1],
    )  # fmt: skip
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
def test_every_gradient_attack_raises_the_loss(attack):
    x, labels = data()
    adversarial = attack(victim(), x, labels, KEY, epsilon=EPSILON, loss="bce")
    assert np.abs(np.asarray(adversarial) - x).max() <= EPSILON + 1e-6
    before, after = (binary_cross_entropy(victim()(z), labels) for z in (x, adversarial))
    rows = np.arange(COUNT) != 3
    assert (np.asarray(after)[rows] > np.asarray(before)[rows] + 0.05).all()


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
def test_unknown_labels_change_nothing(attack):
    """A network without the outputs whose labels are unknown is attacked in the same way."""
    x, labels = data()
    labels[:, ::2] = np.nan
    run = partial(attack, images=x, key=KEY, epsilon=EPSILON, loss="bce")
    some = run(victim(), labels=labels)
    np.testing.assert_allclose(some, run(odd_labels, labels=labels[:, 1::2]), rtol=0, atol=1e-6)


@jax.jit
def odd_labels(x):
    return victim()(x)[:, 1::2]


@pytest.mark.parametrize("attack", ATTACKS[2:], ids=NAMES[2:])
@pytest.mark.parametrize("applies", [False, True])
def test_a_label_is_made_to_apply_or_not(attack, applies):
    x, labels = data()
    logits = np.asarray(victim()(x))
    label = int(np.abs((logits >= 0).mean(0) - 0.5).argmin())
    targets = np.full_like(labels, np.nan)
    targets[:, label] = applies
    adversarial = attack(victim(), x, labels, KEY, epsilon=16 / 255, loss="bce", targets=targets)
    rows = (logits[:, label] >= 0) != applies
    reached = (np.asarray(victim()(adversarial))[rows, label] >= 0) == applies
    assert rows.sum() >= 3
    assert reached.mean() > 0.6


def test_the_attack_matches_the_closed_form_of_a_linear_network():
    rng = np.random.default_rng(0)
    weights, x = rng.normal(size=300), images(20) * 0.5 + 0.25
    f = x.reshape(20, -1) @ weights - 1.0
    logits_fn = linear_victim(weights, -1.0)  # the first logit is 0, whatever the image is
    distance = np.abs(f) / np.abs(weights).sum()
    labels = np.stack([np.full(20, np.nan), f > 0], axis=1)
    for share, expected in ((0.99, 1.0), (1.01, 0.0)):
        adversarial = pgd(logits_fn, x, labels, KEY, epsilon=share * distance, loss="bce")
        right = (np.asarray(logits_fn(adversarial))[:, 1] > 0) == (f > 0)
        assert right.mean() == expected


@pytest.mark.parametrize(
    ("attack", "change", "message"),
    [
        (pgd, {"labels": np.zeros(COUNT, int)}, r"labels must be .* \[12, 10\] .* int32 \[12\]"),
        (pgd, {"labels": np.zeros((COUNT, 3))}, r"for 12 images and 10 logits, got .* \[12, 3\]"),
        (pgd, {"labels": np.full((COUNT, 10), 0.5)}, "labels must be 0, 1 or NaN, got 0.5"),
        (fgsm, {"targets": np.full((COUNT, 10), 2)}, "targets must be 0, 1 or NaN, got 2"),
        (apgd, {"targets": np.zeros(COUNT, int)}, r"targets must be 0, 1 or NaN, \[12, 10\]"),
        (pgd, {"loss": "ce"}, "labels must be 12 integers"),
        (apgd_t, {}, "loss='bce' is for several labels, this attack for classes: use apgd"),
        (square, {"loss": None}, "labels must be 12 integers"),
    ],
)
def test_invalid_labels_raise_a_one_line_error(attack, change, message):
    x, labels = data()
    options = {"labels": labels, "loss": "bce", "epsilon": EPSILON, **change}
    options = {name: value for name, value in options.items() if value is not None}
    with pytest.raises(RequestError, match=message) as error:
        attack(victim(), x, options.pop("labels"), KEY, **options)
    assert "\n" not in str(error.value)


def test_zeros_and_ones_of_any_dtype_are_labels():
    x, labels = data()
    labels = np.nan_to_num(labels)
    expected = fgsm(victim(), x, labels, KEY, epsilon=EPSILON, loss="bce")
    for dtype in (bool, int, np.float64):
        actual = fgsm(victim(), x, labels.astype(dtype), KEY, epsilon=EPSILON, loss="bce")
        np.testing.assert_array_equal(actual, expected)


@pytest.fixture(scope="module")
def result():
    thresholds = np.linspace(0.3, 0.7, CLASSES)
    attacks = {"fgsm": partial(fgsm, loss="bce"), "pgd": partial(pgd, loss="bce", num_steps=5)}
    return evaluate_labels(
        victim(), (pixels(), data()[1]), KEY,
        epsilons=[2 / 255, 0, 1 / 255], attacks=attacks, thresholds=thresholds, batch_size=5,
    )  # fmt: skip


def test_figures_match_attacks_run_directly_and_scikit_learn(result):
    x, labels = as_float(pixels()), data()[1]
    known, thresholds = ~np.isnan(labels), np.linspace(0.3, 0.7, CLASSES)
    np.testing.assert_allclose(result.epsilons, [0, 1 / 255, 2 / 255])
    attack = partial(pgd, loss="bce", num_steps=5)
    for k, epsilon in enumerate(result.epsilons):
        adversarial = attack(victim(), x, labels, KEY, epsilon=epsilon)
        for got, inputs in (
            (result.attacked["pgd"][k], adversarial),
            (result.rounded["pgd"][k], round_inward(adversarial, x)),
        ):
            probabilities = expit(np.asarray(victim()(inputs)))
            np.testing.assert_allclose(got, probabilities, rtol=0, atol=1e-5)
            figures = result.figures(got)
            right = (probabilities >= thresholds) == (labels == 1)
            assert figures.decisions == pytest.approx(right[known].mean())
            assert figures.images == pytest.approx(
                np.mean([r[k].all() for r, k in zip(right, known, strict=True)])
            )
            precisions = [
                average_precision_score(y[k], p[k])
                for y, p, k in zip(labels.T, got.T, known.T, strict=True)
                if (y == 1).any()
            ]
            assert figures.map == pytest.approx(np.mean(precisions), abs=1e-6)
    figures = [result.figures(values) for values in result.attacked["pgd"]]
    assert result.figures(result.clean) == figures[0]
    assert all(a > b for a, b in zip(figures[0], figures[2], strict=True))


def test_an_image_resists_while_all_its_known_labels_are_right(result):
    by_image = result.by_image()
    assert by_image.clean.mean() == result.figures(result.clean).images
    assert by_image.clean[3]  # of its labels none is known
    for name, attacked in result.attacked.items():
        expected = [result.figures(values).images for values in attacked]
        assert [share.value for share in by_image.accuracy(name)] == pytest.approx(expected)
    assert result.flags == {}


def test_an_image_resists_a_target_while_the_label_is_predicted_as_before(result):
    by_image = result.by_image(target=2)
    assert by_image.clean.all()
    before, after = (
        x[..., 2] >= result.thresholds[2] for x in (result.clean, result.attacked["pgd"])
    )
    np.testing.assert_array_equal(by_image.outcomes["pgd"].right, before == after)


def test_a_data_set_without_known_labels_is_refused():
    x, labels = data()
    run = partial(evaluate_labels, victim(), key=KEY, epsilons=[0.1], attacks={"fgsm": fgsm})
    with pytest.raises(RequestError, match="at least one image with a known label"):
        run(data=(x, labels * np.nan))
    with pytest.raises(RequestError, match=r"labels must be 0, 1 or NaN, \[12, 10\]"):
        run(data=(x, labels[:, 1:]))


def test_the_network_is_checked_for_labels_too():
    x, labels = data()
    assert check_network(victim(), x, labels) == {}
    flags = check_network(lambda x: 1e6 * victim()(x), x, labels)
    assert list(flags) == ["zero_gradient"]
    assert "DLR" not in flags["zero_gradient"]
