"""The meaning of outputs: probabilities, numbers and their inverse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tljax.runtime.errors import RequestError
from tljax.runtime.task import Task

OUTPUTS = np.random.default_rng(0).normal(0, 3, (50, 4)).astype(np.float32)


def test_classes_and_labels_are_the_probabilities_of_torch():
    outputs = torch.from_numpy(OUTPUTS)
    np.testing.assert_allclose(Task().decode(OUTPUTS), outputs.softmax(1), atol=1e-6)
    np.testing.assert_allclose(Task("multilabel").decode(OUTPUTS), outputs.sigmoid(), atol=1e-6)


def test_numbers_are_in_the_units_of_the_training_data():
    task = Task("regression", mean=(1.0, -2.0, 0.0, 5.0), scale=(2.0, 1.0, 10.0, 0.5))
    decoded = task.decode(OUTPUTS)
    np.testing.assert_allclose(decoded[:, 2], 10 * OUTPUTS[:, 2], rtol=1e-6)
    np.testing.assert_allclose((decoded - task.mean) / task.scale, OUTPUTS, atol=1e-5)
    np.testing.assert_array_equal(Task("regression").decode(OUTPUTS), OUTPUTS)
    big = Task("regression", mean=(1.7e9,), scale=(40.0,), units=("s",))
    assert big.decode(np.float32([[0.5]])) == 1.7e9 + 20
    assert big.format_number(1.7e9 + 20, 0) == "1700000020.0 s"


def test_a_kind_that_does_not_exist_is_refused():
    with pytest.raises(RequestError, match="no task 'multi'; choose from classification, mult"):
        Task("multi")  # pyright: ignore[reportArgumentType]


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_probabilities_of_ordered_classes_are_a_distribution(seed: int, outputs: int):
    logits = np.random.default_rng(seed).normal(0, 4, (5, outputs))
    probabilities = Task("ordinal").decode(logits)
    assert probabilities.shape == (5, outputs + 1)
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(1), 1)


def test_decreasing_cumulative_probabilities_are_kept():
    logits = np.array([[2.0, 0.0, -1.0]])
    above = 1 / (1 + np.exp(-logits))
    expected = [
        [1 - above[0, 0], above[0, 0] - above[0, 1], above[0, 1] - above[0, 2], above[0, 2]]
    ]
    np.testing.assert_allclose(Task("ordinal").decode(logits), expected)


def test_a_label_applies_from_its_threshold_on():
    probabilities = np.array([[0.5, 0.2], [0.49, 0.3]])
    assert Task("multilabel").applies(probabilities).tolist() == [[True, False], [False, False]]
    task = Task("multilabel", thresholds=(0.49, 0.3))
    assert task.applies(probabilities).tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize(("kind", "outputs"), [("classification", 3), ("ordinal", 2)])
def test_ordered_classes_need_an_output_less(kind: str, outputs: int):
    assert Task(kind).num_outputs(3) == outputs  # pyright: ignore[reportArgumentType]
