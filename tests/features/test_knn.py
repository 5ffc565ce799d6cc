import jax
import numpy as np
import pytest
from test_probe import CLASSES, DIMENSIONS, EXAMPLES, random, with_nan

from tljax.features import knn
from tljax.features.knn import knn_predict
from tljax.runtime.errors import RequestError

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.mark.parametrize("k", [1, 20, 1000])
def test_knn_equals_a_loop(k):
    train, labels = random()
    queries = np.random.default_rng(0).normal(size=(30, DIMENSIONS))
    expected = np.zeros((30, CLASSES))
    for row, query in enumerate(queries):
        cosine = train @ query / np.linalg.norm(train, axis=1) / np.linalg.norm(query)
        for neighbor in np.argsort(-cosine)[:k]:
            expected[row, labels[neighbor]] += np.exp(cosine[neighbor] / 0.07)
    expected /= expected.sum(1, keepdims=True)
    actual = knn_predict(train, labels, queries, num_classes=CLASSES, k=k)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_knn_in_blocks_equals_knn_at_once(monkeypatch):
    train, labels = random()
    whole = knn_predict(train, labels, train[:30], num_classes=CLASSES)
    monkeypatch.setattr(knn, "_MEMORY_BUDGET", 8 * EXAMPLES * 7)  # 7 queries at a time
    np.testing.assert_allclose(
        knn_predict(train, labels, train[:30], num_classes=CLASSES), whole, atol=1e-6
    )


def test_knn_uploads_the_training_features_once(monkeypatch):
    train, labels = random()
    monkeypatch.setattr(knn, "_MEMORY_BUDGET", 8 * EXAMPLES * 7)
    vote, seen = knn._vote, []

    def counting(*args, **options):
        seen.append(args[0])
        return vote(*args, **options)

    monkeypatch.setattr(knn, "_vote", counting)
    knn_predict(train, labels, train[:30], num_classes=CLASSES)
    assert len(seen) == 5
    assert all(isinstance(array, jax.Array) for array in seen[0])
    assert all(a is b for later in seen for a, b in zip(later, seen[0], strict=True))


def test_knn_of_a_zero_vector_is_finite():
    train, labels = random()
    probabilities = knn_predict(train, labels, np.zeros((1, DIMENSIONS)), num_classes=CLASSES)
    # All similarities are equal, so the first 20 examples have equal votes.
    np.testing.assert_allclose(
        probabilities[0], np.bincount(labels[:20], minlength=CLASSES) / 20, atol=1e-6
    )


def test_knn_refuses_values_that_are_not_finite():
    features, labels = random()
    with pytest.raises(RequestError, match="3 of"):
        knn_predict(features, labels, with_nan(features), num_classes=CLASSES)
