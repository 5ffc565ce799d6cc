"""Per-example classification metrics at the edges of their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from tljax.metrics.classification import class_shares, ranks, standard_error


def test_equal_logits_are_ranked_by_class_index():
    logits = jnp.array([[2.0, 1.0, 2.0], [2.0, 1.0, 2.0], [2.0, 1.0, 2.0]])
    assert ranks(logits, jnp.arange(3)).tolist() == [0, 2, 1]


def test_a_label_is_never_correct_if_its_logit_or_another_is_nan():
    logits = jnp.array([[jnp.nan, 1.0], [1.0, jnp.nan], [jnp.nan, jnp.nan]])
    assert (ranks(logits, jnp.zeros(3, int)) > 0).all()


def test_class_indices_are_one_hot_encoded_and_probabilities_are_unchanged():
    expected = np.array([[0, 1, 0], [0, 0, 0]], np.float32)
    np.testing.assert_array_equal(class_shares(jnp.array([1, -1]), 3), expected)
    np.testing.assert_array_equal(class_shares(expected / 2, 3), expected / 2)


@pytest.mark.parametrize("correct", [0, 3, 10])
def test_the_standard_error_is_that_of_the_mean_of_the_examples(correct: int):
    outcomes = np.arange(10) < correct
    expected = outcomes.std() / np.sqrt(len(outcomes))
    assert standard_error(outcomes.mean(), len(outcomes)) == pytest.approx(expected, abs=1e-15)
