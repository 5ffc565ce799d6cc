"""Properties of all attacks, for any network, images and radius."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.tree_util import Partial
from victims import accuracy, examples, victim

from tljax.attack import (
    apgd,
    apgd_t,
    auto_attack,
    bim,
    carlini_wagner,
    deepfool,
    eot,
    fab_t,
    fgsm,
    mi_fgsm,
    pgd,
    square,
)
from tljax.attack.norms import NORMS

SHAPE, CLASSES = (4, 5, 3), 5
CASES = [(SHAPE, CLASSES), ((3, 2, 1), 4), ((9,), 6)]
traces = []


def one(weights, head, image):
    # With sums instead of matrix products, rounding does not depend on the batch size.
    hidden = jnp.maximum(jnp.sum((image.reshape(-1, 1) - 0.4) * weights, 0), 0)
    logits = jnp.sum(hidden[:, None] * head, 0)
    return jnp.where(jnp.mean(image) > 0.75, 0.0, logits)  # constant logits for bright images


def forward(weights, head, images):
    traces.append(images.shape)
    return lax.map(partial(one, weights, head), images)


def network(seed=0, shape=SHAPE, classes=CLASSES):
    """Return a random network whose weights are arguments, so that one compilation serves all."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(math.prod(shape), 12)), rng.normal(size=(12, classes))
    return Partial(forward, *(jnp.asarray(w, jnp.float32) for w in weights))


@jax.jit
def predict(images, logits_fn=None):
    return (logits_fn or network())(images).argmax(-1)


def noisy(images, key):
    return network()(images + 0.05 * jax.random.normal(key, images.shape))


ATTACKS = {
    "fgsm-start": ("linf", partial(fgsm, random_start=True)),
    "bim": ("linf", partial(bim, num_steps=3, loss="margin")),
    "mi-fgsm-l2": ("l2", partial(mi_fgsm, num_steps=3, norm="l2")),
    "pgd": ("linf", partial(pgd, num_steps=4, restarts=2, loss="dlr")),
    "pgd-l2": ("l2", partial(pgd, num_steps=4, norm="l2")),
    "pgd-l1": ("l1", partial(pgd, num_steps=4, norm="l1")),
    "apgd": ("linf", partial(apgd, num_steps=8, stop_early=True)),
    "apgd-l2": ("l2", partial(apgd, num_steps=8, norm="l2", loss="dlr", restarts=2)),
    "apgd-t": ("linf", partial(apgd_t, num_steps=5, num_targets=2, stop_early=True)),
    "fab-t": ("linf", partial(fab_t, num_steps=5, num_targets=2)),
    "fab-t-l2": ("l2", partial(fab_t, num_steps=5, num_targets=2, norm="l2", stop_early=True)),
    "square": ("linf", partial(square, num_queries=20)),
    "square-l2": ("l2", partial(square, num_queries=20, norm="l2", rescale=False)),
    "deepfool": ("l2", partial(deepfool, num_steps=4)),
    "deepfool-linf": ("linf", partial(deepfool, num_steps=4, norm="linf")),
    "cw": ("l2", partial(carlini_wagner, num_steps=20, search_steps=3, first_constant=1.0)),
}


def length(norm, delta):
    return np.asarray(NORMS[norm].length(jnp.asarray(delta)))


@pytest.mark.parametrize(
    "name",
    [n if n == "apgd" else pytest.param(n, marks=pytest.mark.slow) for n in ATTACKS],
)
def test_every_attack_stays_in_the_ball_and_does_not_depend_on_the_batch(name):
    norm, attack = ATTACKS[name]
    compiled = set()

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 2**31 - 1),
        case=st.sampled_from(CASES[:2] if name.startswith("square") else CASES),
        radius=st.floats(1e-4, 0.5),
        on_bounds=st.booleans(),
    )
    def check(seed, case, radius, on_bounds):
        shape, classes = case
        rng, logits_fn = np.random.default_rng(seed), network(seed, shape, classes)
        x = rng.uniform(0, 0.7, (3, *shape)).astype("f")
        x[2] = 0.98  # so bright that the logits stay constant
        if on_bounds:
            x[0] = x[0] > 0.35
        y = np.asarray(predict(x, logits_fn))
        scale = {"linf": 1, "l2": 4, "l1": 2}[norm]
        epsilon = np.array([radius, 0, 0.5 * radius], "f") * scale
        key = jax.random.key(seed)
        before = len(traces)
        result = np.asarray(attack(logits_fn, x, y, key, epsilon=epsilon))
        assert (
            len(traces) == before or shape not in compiled
        )  # new values do not trigger compilation
        compiled.add(shape)

        assert result.dtype == np.float32
        assert np.isfinite(result).all()
        assert result.min() >= 0
        assert result.max() <= 1
        assert (length(norm, result.astype("f8") - x) <= epsilon + 1e-6).all()
        assert result[1].tobytes() == x[1].tobytes()  # epsilon 0
        again = np.asarray(attack(logits_fn, x, y, key, epsilon=epsilon))
        assert again.tobytes() == result.tobytes()
        # Attacked alone, the result is the same up to the rounding of fused multiply-adds.
        for i in (0, 2):
            alone = attack(logits_fn, x[i : i + 1], y[i : i + 1], key, epsilon=epsilon[i : i + 1])
            np.testing.assert_allclose(alone[0], result[i], rtol=0, atol=1e-6)

    check()


def test_the_random_start_depends_on_id_and_key_alone():
    x, y = (a[:4] for a in examples())
    attack = partial(pgd, victim(), x, y, epsilon=0.1, num_steps=1, step_size=0.0)
    key = jax.random.key(0)
    result = np.asarray(attack(key, ids=np.array([7, 8, 7, 9]))) - x
    np.testing.assert_array_equal(result == 0, 0)
    other = np.asarray(attack(key, ids=np.array([8, 7, 9, 7]))) - x
    for i in range(4):  # clipping depends on the image, not on the id
        both = (np.abs(x[i] - 0.5) < 0.39) & (np.abs(x[i ^ 1] - 0.5) < 0.39)
        np.testing.assert_allclose(result[i][both], other[i ^ 1][both], atol=1e-6)
    assert np.abs(result - (np.asarray(attack(jax.random.key(1))) - x)).max() > 0.05
    assert np.abs(result[0] - result[1]).max() > 0.05


@pytest.mark.slow
def test_a_scalar_epsilon_equals_a_vector_and_jit_does_not_change_the_result():
    x, y = examples()
    for attack in (partial(pgd, num_steps=5), partial(apgd, num_steps=5)):
        key = jax.random.key(0)
        result = np.asarray(attack(logits_fn_of_victim, x, y, key, epsilon=0.01))
        vector = attack(logits_fn_of_victim, x, y, key, epsilon=np.full(len(x), 0.01, "f"))
        np.testing.assert_array_equal(result, vector)
        within = jax.jit(lambda x, a=attack, k=key: a(logits_fn_of_victim, x, y, k, epsilon=0.01))
        np.testing.assert_array_equal(result, within(x))


def logits_fn_of_victim(images):
    return victim()(images)


@pytest.mark.slow
def test_attacks_run_with_jit_disabled():
    x, y = (a[:6] for a in examples())
    attack = partial(pgd, victim(), x, y, jax.random.key(0), epsilon=0.01, num_steps=2)
    compiled = attack()
    with jax.disable_jit():
        np.testing.assert_allclose(attack(), compiled, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_eot_averages_over_a_randomized_network():
    x = np.random.default_rng(3).uniform(0, 0.7, (5, *SHAPE)).astype("f")
    randomized = eot(noisy, jax.random.key(1), samples=8)
    logits = randomized(jnp.asarray(x))
    assert logits.shape == (8, 5, CLASSES)
    assert jnp.std(logits, axis=0).min() > 1e-3
    np.testing.assert_allclose(randomized(jnp.asarray(x[3:4]))[:, 0], logits[:, 3], atol=1e-6)
    y = np.asarray(logits.mean(0).argmax(-1))
    result = np.asarray(apgd(randomized, x, y, jax.random.key(0), epsilon=0.05, num_steps=8))
    alone = apgd(randomized, x[3:4], y[3:4], jax.random.key(0), epsilon=0.05, num_steps=8)
    np.testing.assert_allclose(alone[0], result[3], atol=1e-6)
    assert accuracy(result, y, lambda x: randomized(x).mean(0)) < 1


@pytest.mark.slow
def test_the_gradient_of_a_randomized_network_is_the_mean_over_samples():
    from tljax.attack.losses import loss_and_gradient, make_goal

    keys = jax.random.split(jax.random.key(0), 6)
    x, y = jnp.full((2, *SHAPE), 0.3), jnp.array([0, 1])
    objective = make_goal("ce", y).objective

    @jax.jit
    def compare(keys):
        each = jax.vmap(lambda k: loss_and_gradient(lambda x: noisy(x, k), objective, x))(keys)
        return each, loss_and_gradient(
            lambda x: jnp.stack([noisy(x, k) for k in keys]), objective, x
        )

    each, both = compare(keys)
    np.testing.assert_allclose(both.gradient, each.gradient.mean(0), atol=1e-5)
    np.testing.assert_allclose(both.loss, each.loss.mean(0), rtol=1e-5)


@pytest.mark.slow
def test_auto_attack_changes_only_images_that_it_fools():
    x = np.random.default_rng(3).uniform(0, 0.7, (6, *SHAPE)).astype("f")
    y = np.array(predict(x))
    y[0] = (y[0] + 1) % CLASSES  # misclassified: not attacked
    key, options = jax.random.key(0), {"num_steps": 6, "num_queries": 10}
    result = np.asarray(auto_attack(network(), x, y, key, epsilon=0.02, **options))
    np.testing.assert_array_equal(result[0], x[0])
    assert np.abs(result - x).max() <= 0.02 + 1e-6
    fooled = np.asarray(predict(result)) != y
    np.testing.assert_array_equal(result[~fooled], x[~fooled])
    assert fooled.sum() > 1
