"""The worst mistakes say what is wrong with them."""

import numpy as np
from made_up import of_predictions, source_of

from tljax.features.evaluate import Evaluation
from tljax.features.extract import Outputs
from tljax.report.mistakes import Mistake, worst_mistakes
from tljax.runtime.settings import Kind
from tljax.runtime.task import Task

NAMES = ("cat", "dog", "outdoor")


def evaluation(kind: Kind, values: list, labels: list, **task) -> Evaluation:
    arrays = np.array(values, np.float64), np.array(labels, np.float32)
    return Evaluation(Outputs(*arrays, np.arange(len(labels)), {}), Task(kind, **task))


def mistakes(evaluation: Evaluation, names=NAMES) -> list[tuple]:
    found = worst_mistakes(evaluation, source_of(evaluation, names), names)
    assert all(mistake.image.shape == (224, 224, 3) for mistake in found)
    return [mistake[1:] for mistake in found]


def test_a_class_has_the_probability_of_the_prediction():
    wrong = of_predictions([0, 1, 2], [0, 2, 2], 3)
    share = 1 / (1 + 2 * np.exp(-3))
    assert mistakes(wrong) == [("val/1.jpg", "dog", "outdoor", f"{share:.1%}", "predicted", "")]


def test_of_ordered_classes_the_farthest_comes_first():
    wrong = of_predictions([0, 0, 2], [1, 2, 2], 3, "ordinal")
    assert [mistake[:3] for mistake in mistakes(wrong)] == [
        ("val/1.jpg", "cat", "outdoor"),
        ("val/0.jpg", "cat", "dog"),
    ]


def test_a_label_is_predicted_wrongly_or_missed():
    wrong = evaluation(
        "multilabel",
        [[3, 1, 3], [-4, -3, 2], [3, -3, -3], [3, 3, 3]],
        [[1, 0, 1], [1, 0, 1], [1, 0, np.nan], [1, np.nan, np.nan]],
    )
    assert mistakes(wrong) == [
        ("val/1.jpg", "cat, outdoor", "cat", "1.8%", "missed", ""),
        ("val/0.jpg", "cat, outdoor", "dog", "73.1%", "predicted", ""),
    ]


def test_a_label_is_judged_by_its_threshold():
    values, labels = [[1.0], [1.0]], [[1], [0]]
    strict = evaluation("multilabel", values, labels, thresholds=(0.9,))
    assert [mistake[1:5] for mistake in mistakes(strict, ["cat"])] == [
        ("cat", "cat", "73.1%", "missed")
    ]
    loose = evaluation("multilabel", values, labels, thresholds=(0.5,))
    assert [mistake[1:5] for mistake in mistakes(loose, ["cat"])] == [
        ("none", "cat", "73.1%", "predicted")
    ]


def test_a_number_has_its_unit_and_name():
    units = {"mean": (40.0, 0.0), "scale": (10.0, 1.0), "units": ("years", "")}
    wrong = evaluation("regression", [[0, 5], [1, 2]], [[50, 4], [20, np.nan]], **units)
    assert mistakes(wrong, ("age", "count")) == [
        ("val/1.jpg", "20.0 years", "50.0 years", "", "predicted", "age"),
        ("val/0.jpg", "50.0 years", "40.0 years", "", "predicted", "age"),
    ]
    alone = evaluation("regression", [[0.0]], [[1.0]], units=("degrees",))
    assert mistakes(alone, ("angle",))[0][1:] == ("1 degrees", "0 degrees", "", "predicted", "")


def test_a_mistake_is_a_prediction_by_default():
    assert Mistake(np.zeros((1, 1, 3), np.uint8), "a", "b", "c").verb == "predicted"
