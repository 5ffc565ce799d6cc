"""Labels whose name several classes share."""

import numpy as np

from tljax.features.evaluate import resolve_ambiguous_labels


def test_the_most_probable_class_of_the_same_name_becomes_the_label() -> None:
    logits = np.array([[9, 1, 5, 2], [9, 2, 5, 1], [0, 1, 2, 9], [0, 1, 2, 3]])
    labels = np.array([1, 1, 3, 2])
    assert resolve_ambiguous_labels(labels, logits, {"crane": [1, 3]}).tolist() == [3, 1, 3, 2]
    assert resolve_ambiguous_labels(labels, logits, {}).tolist() == labels.tolist()
    assert labels.tolist() == [1, 1, 3, 2]
