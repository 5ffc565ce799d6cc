"""The worst mistakes of a network, with their images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from tljax.data.examples import Source, join_names
from tljax.data.pictures import decode_picture
from tljax.features.evaluate import Evaluation


class Mistake(NamedTuple):
    """A wrong prediction, which reads "SUBJECT is TRUTH, VERB PREDICTION (DETAIL)".

    Attributes:
        image: ``[height, width, 3]`` RGB.
        name: the name of the image, such as its path.
        truth: the true class, the labels that apply, or the true number.
        prediction: the predicted class, the label in question, or the predicted number.
        detail: the probability of the prediction; empty for numbers.
        verb: ``predicted``; ``missed`` for a label that applies and was not predicted.
        subject: the name of the number; empty if there is only one, and for classes and labels.
    """

    image: UInt8[np.ndarray, "_height _width 3"]
    name: str
    truth: str
    prediction: str
    detail: str = ""
    verb: str = "predicted"
    subject: str = ""


def worst_mistakes(
    evaluation: Evaluation, source: Source, names: Sequence[str], count: int = 16
) -> list[Mistake]:
    """Return the worst mistakes, see `Evaluation.worst`, with images of 224 x 224 pixels.

    Args:
        evaluation: the evaluation of a network.
        source: the images of the evaluation.
        names: the names of the network's classes, labels or numbers.
        count: the largest number of mistakes.
    """
    describe = {"multilabel": _label, "regression": _number}.get(evaluation.task.kind, _class)
    mistakes = []
    for row in evaluation.worst(count):
        index = int(evaluation.indices[row])
        image = decode_picture(source.read(index), 224)
        mistake = Mistake(image, source.names[index], "", "")
        mistakes.append(mistake._replace(**describe(evaluation, int(row), names)))
    return mistakes


def _class(evaluation: Evaluation, row: int, names: Sequence[str]) -> dict[str, str]:
    return {
        "truth": names[int(evaluation.labels[row])],
        "prediction": names[int(evaluation.predicted[row])],
        "detail": f"{evaluation.probability[row]:.1%}",
    }


def _label(evaluation: Evaluation, row: int, names: Sequence[str]) -> dict[str, str]:
    probabilities, labels = evaluation.decoded[row], evaluation.labels[row]
    label = int(evaluation.errors[row].argmax())
    return {
        "truth": join_names([names[i] for i in np.flatnonzero(labels == 1).tolist()]),
        "prediction": names[label],
        "detail": f"{probabilities[label]:.1%}",
        "verb": "missed" if labels[label] else "predicted",
    }


def _number(evaluation: Evaluation, row: int, names: Sequence[str]) -> dict[str, str]:
    task = evaluation.task
    predicted, truth = evaluation.decoded[row], evaluation.labels[row]
    number = int(evaluation.errors[row].argmax())
    return {
        "truth": task.format_number(truth[number], number),
        "prediction": task.format_number(predicted[number], number),
        "subject": names[number] if len(names) > 1 else "",
    }
