"""Adversarial training: the attack, and the robustness of the trained network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import LOADING, config, source, splits, train
from tiny import MODEL, random_variables

from tljax.attack import pgd
from tljax.data.options import AugmentConfig
from tljax.features.evaluate import evaluate
from tljax.models import apply
from tljax.runtime.errors import RequestError
from tljax.train.adversary import EVALUATION_STEPS, attacked, robust_logits
from tljax.train.history import best_epoch
from tljax.train.options import AdversaryConfig
from tljax.train.recipes import make_plan

pytestmark = pytest.mark.usefixtures("compilation_cache")
FAST, PGD = AdversaryConfig("fast", 16.0), AdversaryConfig("pgd", 16.0, 3)


def logits_fn(images):
    return apply(MODEL, random_variables(), images).logits


@pytest.mark.parametrize("settings", [FAST, PGD])
def test_attacked_images_stay_in_the_ball_and_have_a_higher_loss(settings):
    data = source(8)
    images = np.stack([data.read(i) for i in range(8)])
    labels = np.append(data.labels[:7], -1)  # the last one is padding
    moved = attacked(settings, logits_fn, images, labels, jax.random.key(0), np.arange(8))
    clean = images.astype(np.float32) / 255
    assert jnp.abs(moved - clean).max() <= 16 / 255 + 1e-6
    assert jnp.abs(moved - clean).max() > 8 / 255
    assert moved.min() >= 0
    assert moved.max() <= 1

    def loss(x):
        return -jax.nn.log_softmax(logits_fn(x))[np.arange(7), labels[:7]].mean()

    assert loss(moved[:7]) > loss(clean[:7]) + 0.01


def test_robust_logits_are_those_of_pgd():
    data = source(7, broken=(2,))
    actual = robust_logits(MODEL, random_variables(), data, LOADING, FAST, seed=3)
    retained = np.array([0, 1, 3, 4, 5, 6])
    assert actual.indices.tolist() == retained.tolist()
    assert list(actual.skipped) == [2]
    images = np.stack([data.read(i) for i in retained]).astype(np.float32) / 255
    moved = pgd(
        logits_fn,
        images,
        data.labels[retained],
        jax.random.key(3),
        epsilon=16 / 255,
        ids=retained,
        num_steps=EVALUATION_STEPS,
    )
    np.testing.assert_allclose(actual.values, logits_fn(moved), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", [FAST, PGD])
@pytest.mark.slow
def test_adversarial_training_raises_robust_accuracy(settings):
    fit_config = {"epochs": 8, "rate": 0.02}
    data = splits(24, (), ())
    plain = train(config(**fit_config), data)
    hardened = train(config(adversary=settings, **fit_config), data)
    assert plain.robust is None
    before = evaluate(robust_logits(plain.model, plain.variables, data.val, LOADING, settings, 0))
    assert hardened.robust.loss < before.loss
    entry = hardened.history[best_epoch(hardened.history)]
    assert entry["val_robust_loss"] == pytest.approx(hardened.robust.loss, rel=1e-5)
    assert entry["val_robust_top1"] == max(e["val_robust_top1"] for e in hardened.history)


@pytest.mark.slow
def test_adversarial_training_is_reproducible():
    first, again = (train(config(adversary=FAST)) for _ in range(2))
    assert first.history == again.history


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "probe"}, "a probe takes no steps"),
        ({"cache": "disk"}, "remove --cache options"),
        ({"augment": True, "cache_views": 2}, "remove --cache options"),
        ({"augment": True, "augmentation": AugmentConfig(mixup=0.2)}, "disable Mixup"),
    ],
)
def test_options_that_exclude_an_attack_are_refused(options, message):
    options = config(**{"recipe": "finetune", "adversary": FAST, **options})
    with pytest.raises(RequestError, match=message):
        make_plan(MODEL, options, 100, 10)


def test_an_epsilon_of_zero_and_zero_steps_are_refused():
    with pytest.raises(RequestError, match="--epsilon 0"):
        AdversaryConfig("fast", 0.0)
    with pytest.raises(RequestError, match="--attack-steps 0"):
        AdversaryConfig("pgd", 1.0, 0)
