"""Attacks on networks whose robustness is proven or published.

More misclassified images than the proof allows mean that an attack left the ball or the bounds;
fewer than the best known attack achieves mean that the attacks are weak.
"""

from functools import partial

import jax
import numpy as np
import pytest
import torch
import torchattacks
from robust_networks import PROVEN, TRADES, load_examples, load_network, load_weights
from torch import nn
from victims import to_numpy, to_torch

from tljax.attack import apgd, apgd_t, ensemble, evaluate

KEY = jax.random.key(0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Override the fixture of conftest.py: these networks take longer to run than to compile."""


def count_correct(name: str, attacks) -> int:
    known, logits_fn = PROVEN[name], load_network(name)
    result = evaluate(
        logits_fn, load_examples(known.data), KEY,
        epsilons=[known.epsilon], attacks=attacks, survivors_only=True, batch_size=70,
    )  # fmt: skip
    assert result.clean.sum() == known.clean
    assert result.flags == {}
    print(name, {part: int(outcome.right.sum()) for part, outcome in result.outcomes.items()})
    return int(result.right.sum())


@pytest.mark.slow
def test_targeted_apgd_is_as_strong_as_the_best_known_attack():
    name = "cifar_cnn_a_adv"
    attacks = {"apgd-t": partial(apgd_t, num_steps=20, num_targets=3, stop_early=True)}
    assert PROVEN[name].proven <= count_correct(name, attacks) <= PROVEN[name].known + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", PROVEN)
def test_autoattack_lies_between_the_proven_bound_and_the_best_known_attack(name):
    assert PROVEN[name].proven <= count_correct(name, ensemble(10)) <= PROVEN[name].known + 1


def torch_trades() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10),
    ).eval()  # fmt: skip
    weights = load_weights(TRADES)
    names = [f"feature_extractor.conv{i}" for i in range(1, 5)]
    names += [f"classifier.fc{i}" for i in range(1, 4)]
    layers = [layer for layer in net if hasattr(layer, "weight")]
    for name, layer in zip(names, layers, strict=True):
        values = {part: torch.from_numpy(weights[f"{name}.{part}"]) for part in ("weight", "bias")}
        layer.load_state_dict(values)
    return net.requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-t"])
def test_apgd_fools_the_same_images_as_torchattacks(attack):
    images, labels = load_examples("mnist_test", 200)
    logits_fn, network = load_network(TRADES), torch_trades()
    x, y = to_torch(images), torch.from_numpy(labels.astype(np.int64))
    np.testing.assert_allclose(logits_fn(images), network(x), rtol=0, atol=1e-4)
    options = {"norm": "Linf", "eps": 0.3, "n_restarts": 1}
    if attack == "apgd-ce":
        actual = apgd(logits_fn, images, labels, KEY, epsilon=0.3, num_steps=100)
        expected = torchattacks.APGD(network, **options, steps=100, loss="ce")
    else:
        actual = apgd_t(logits_fn, images, labels, KEY, epsilon=0.3, num_steps=30)
        expected = torchattacks.APGDT(network, **options, steps=30, n_classes=10)
    assert np.abs(np.asarray(actual) - images).max() <= 0.3 + 1e-6
    adversarial = (actual, to_numpy(expected(x, y)))
    fooled = [np.asarray(logits_fn(result).argmax(-1)) != labels for result in adversarial]
    print(f"{attack}: {[int(each.sum()) for each in fooled]} of {len(labels)} fooled")
    assert (fooled[0] != fooled[1]).sum() <= 2
