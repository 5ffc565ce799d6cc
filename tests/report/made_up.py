"""Made-up evaluations and results of every task, without a network."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tljax.data.examples import Source
from tljax.features.evaluate import Evaluation, choose_thresholds, evaluate
from tljax.features.extract import Outputs
from tljax.report.results import Results, summarize
from tljax.runtime.settings import Kind
from tljax.runtime.task import Task

KINDS: tuple[Kind, ...] = ("classification", "ordinal", "multilabel", "regression")


def source_of(evaluation: Evaluation, names: Sequence[str], groups: int = 0) -> Source:
    """Return images of noise for an evaluation, in ``groups`` groups if there are any."""
    rng = np.random.default_rng(0)
    count = evaluation.examples
    return Source(
        rng.integers(0, 256, (count, 16, 16, 3), np.uint8),
        evaluation.labels,
        tuple(names),
        [f"val/{i}.jpg" for i in range(count)],
        task=evaluation.task,
        groups=np.arange(count, dtype=np.int32) % groups if groups else None,
    )


def of_predictions(
    labels: Sequence[int], predicted: Sequence[int], classes: int, kind: Kind = "classification"
) -> Evaluation:
    """Return an evaluation with these predictions."""
    above = np.asarray(predicted)[:, None] > np.arange(classes - 1)
    values = np.where(above, 2.0, -2.0) if kind == "ordinal" else 3 * np.eye(classes)[predicted]
    indices = np.arange(len(labels))
    return Evaluation(Outputs(values, np.asarray(labels, np.int32), indices, {}), Task(kind))


def of_confusion(
    confusion: np.ndarray, names: Sequence[str], kind: Kind = "classification"
) -> Results:
    """Return the results of predictions with this confusion matrix, without intervals."""
    rows, columns = confusion.nonzero()
    counts = confusion[rows, columns]
    labels, predicted = np.repeat(rows, counts), np.repeat(columns, counts)
    evaluation = of_predictions(labels.tolist(), predicted.tolist(), len(confusion), kind)
    return Results(evaluation, names)


def evaluation_of(kind: Kind, names: int, count: int = 60, blanks: float = 0.0) -> Evaluation:
    """Return an evaluation of predictions that are mostly right, with a share of unknown labels."""
    rng = np.random.default_rng(0)
    indices, task = np.arange(count), Task(kind)
    if kind in ("classification", "ordinal"):
        labels = np.arange(count) % names
        wrong = rng.random(count) < 0.25
        return of_predictions(labels.tolist(), ((labels + wrong) % names).tolist(), names, kind)
    noise = rng.normal(0, 1, (count, names))
    if kind == "regression":
        task = Task(kind, mean=(40.0,) * names, scale=(10.0,) * names, units=("years",) * names)
        values = rng.normal(0, 1, (count, names))
        labels = 40 + 10 * (values + 0.3 * noise)
    else:
        labels = (rng.random((count, names)) < 0.4).astype(np.float32)
        values = 3 * labels - 1.5 + noise
    labels[rng.random(labels.shape) < blanks] = np.nan
    evaluation = evaluate(Outputs(values, labels.astype(np.float32), indices, {}), task)
    return choose_thresholds(evaluation)


def results_of(
    kind: Kind,
    names: Sequence[str],
    count: int = 60,
    blanks: float = 0.0,
    groups: int = 0,
    units: tuple[str, ...] = (),
) -> Results:
    """Return the results of `evaluation_of`, with everything in them."""
    evaluation = evaluation_of(kind, len(names), count, blanks)
    if units:
        evaluation = replace(evaluation, task=replace(evaluation.task, units=units))
    return summarize(evaluation, source_of(evaluation, names, groups), names)
