"""The results of a network on labeled images, as the report and the model card state them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from tljax.data.examples import Source
from tljax.features.evaluate import Evaluation
from tljax.metrics.bootstrap import Interval
from tljax.metrics.calibration import Calibration, calibrate, calibrate_labels
from tljax.runtime.settings import Kind

Confusion = Integer[np.ndarray, "classes classes"]
"""The number of examples of class ``row`` that were predicted as class ``column``."""


class Score(NamedTuple):
    """A metric as text.

    Attributes:
        title: its name.
        value: such as ``95.9%``.
        interval: its confidence interval, such as ``93.1% to 98.2%``; empty if it has none.
        text: the value, with the interval in parentheses.
    """

    title: str
    value: str
    interval: str
    text: str


def score_of(evaluation: Evaluation, name: str, interval: Interval | None, title: str) -> Score:
    """Return a metric of an evaluation as text."""
    low_to_high = _format_interval(evaluation.metrics[name].format, interval)
    return Score(title, evaluation.format(name), low_to_high, evaluation.format(name, interval))


@dataclass(frozen=True, eq=False)
class Results:
    """An evaluation with everything that takes long to compute, so that it is computed once.

    Attributes:
        evaluation: metrics and predictions.
        names: the names of the classes, labels or numbers.
        intervals: 95% confidence intervals of the metrics by name, where they are affordable.
        per_name: metrics of each label or number, see `Evaluation.per_name`; empty for classes.
        per_name_intervals: 95% confidence intervals of ``average_precision`` of each label or of
            ``mae`` of each number; empty if they would take long.
        calibration: the calibration; None for tasks without one.
        groups: number of groups that the intervals are from; None if each image is its own.
    """

    evaluation: Evaluation
    names: Sequence[str]
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    per_name: Mapping[str, np.ndarray] = field(default_factory=dict)
    per_name_intervals: Mapping[str, Interval] = field(default_factory=dict)
    calibration: Calibration | None = None
    groups: int | None = None

    @property
    def kind(self) -> Kind:
        """Return the kind of the task."""
        return self.evaluation.task.kind

    @property
    def how_intervals(self) -> str:
        """Return a sentence on the confidence intervals; empty if there are none."""
        if not any(score.interval for score in self.scores):
            return ""
        drawn = f"{self.groups} groups" if self.groups else f"{self.evaluation.examples} images"
        return f"Ranges are 95% confidence intervals, by resampling {drawn}."

    @cached_property
    def scores(self) -> list["Score"]:
        """Return every metric as text."""
        return [
            score_of(self.evaluation, name, self.intervals.get(name), metric.title)
            for name, metric in self.evaluation.metrics.items()
        ]


def summarize(evaluation: Evaluation, source: Source, names: Sequence[str]) -> Results:
    """Compute the confidence intervals, the metrics of each label or number and the calibration.

    Args:
        evaluation: the evaluation of a network.
        source: the images, whose groups are resampled as a whole.
        names: the names of the network's classes, labels or numbers.
    """
    each = {"multilabel": ["average_precision"], "regression": ["mae"]}
    intervals, per_name_intervals = evaluation.bootstrap(
        source, evaluation.metrics, each.get(evaluation.task.kind, ())
    )
    return Results(
        evaluation,
        names,
        intervals,
        {} if evaluation.task.has_classes else evaluation.per_name(),
        per_name_intervals,
        calibrated(evaluation),
        None if source.groups is None else len(np.unique(source.groups[evaluation.indices])),
    )


def calibrated(evaluation: Evaluation) -> Calibration | None:
    """Return the calibration of classes or labels.

    Returns:
        None for ordered classes and numbers, and if fewer than two images have a label.
    """
    values, labels = evaluation.outputs.values, evaluation.labels
    if evaluation.task.kind == "classification" and len(labels) > 1:
        return calibrate(values, labels)
    if evaluation.task.kind == "multilabel" and (~np.isnan(labels)).any(1).sum() > 1:
        return calibrate_labels(values, labels)
    return None


def calibration_advice(results: Results) -> str:
    """Return a sentence on whether to divide the logits by the temperature."""
    calibration = results.calibration
    if calibration is None or calibration.loss_after >= calibration.loss_before:
        return "Dividing the logits by it does not make the probabilities better: leave them."
    thresholds = ", and the thresholds change with them" if results.kind == "multilabel" else ""
    return (
        f"Divide the logits by it for calibrated probabilities: the network does not{thresholds}."
    )


def _format_interval(format_: Callable[[Any], str], interval: Interval | None) -> str:
    """Return an interval as text, such as ``93.1% to 98.2%``; empty if it is undefined."""
    if interval is None or np.isnan(interval.low):
        return ""
    return f"{format_(interval.low)} to {format_(interval.high)}"


class ClassResult(NamedTuple):
    """The accuracy of one class.

    Attributes:
        name: the class.
        examples: number of its examples.
        correct: number of its examples that were classified correctly.
        most_confused_with: the most frequent wrong prediction; None without a mistake.
    """

    name: str
    examples: int
    correct: int
    most_confused_with: str | None


def per_class(confusion: Confusion, classes: Sequence[str]) -> list[ClassResult]:
    """Return the result of each class, the lowest accuracy first, classes without examples last."""
    wrong = _off_diagonal(confusion)
    results = [
        ClassResult(
            name,
            int(confusion[i].sum()),
            int(confusion[i, i]),
            classes[int(wrong[i].argmax())] if wrong[i].any() else None,
        )
        for i, name in enumerate(classes)
    ]
    return sorted(results, key=lambda r: (r.correct / r.examples if r.examples else 2, -r.examples))


def worst_pairs(confusion: Confusion, classes: Sequence[str]) -> list[tuple[str, str, int, float]]:
    """Return the pairs of classes that were confused, the most frequent first.

    Args:
        confusion: the number of examples of class ``row`` predicted as class ``column``.
        classes: the name of each class.

    Returns:
        For each pair the true class, the predicted class, the number of examples, and their share
        of the examples of the true class.
    """
    wrong = _off_diagonal(confusion)
    rows, columns = wrong.nonzero()
    examples = wrong[rows, columns]
    shares = examples / confusion.sum(1)[rows]
    return [
        (classes[int(rows[i])], classes[int(columns[i])], int(examples[i]), float(shares[i]))
        for i in np.lexsort((-shares, -examples))
    ]


def _off_diagonal(confusion: np.ndarray) -> np.ndarray:
    """Return the confusion matrix without the correct predictions."""
    return confusion - np.diag(np.diag(confusion))


LABEL_HEADER = (
    *("label", "average precision", "AUROC", "F1", "threshold", "precision", "recall"),
    *("apply", "known"),
)


def label_rows(results: Results) -> list[tuple[str, ...]]:
    """Return the cells of `LABEL_HEADER` for each label, the lowest average precision first.

    ``apply`` counts the images that the label applies to, ``known`` those for which it is known.
    """
    values, names = results.per_name, results.names
    thresholds = results.evaluation.task.thresholds or (0.5,) * len(names)
    interval = results.per_name_intervals.get("average_precision")
    rows = []
    for i in np.argsort(values["average_precision"], kind="stable").tolist():  # undefined ones last
        shares = ("average_precision", "auroc", "f1", "precision", "recall")
        average, auroc, f1, *others = (_share(float(values[name][i])) for name in shares)
        average += _in_parentheses(_share, interval, i)
        counts = str(values["positive"][i]), str(values["known"][i])
        rows.append((names[i], average, auroc, f1, f"{thresholds[i]:.3f}", *others, *counts))
    return rows


NUMBER_HEADER = (
    *("number", "unit", "mean absolute error", "root mean squared error", "R2"),
    *("lowest", "highest", "known"),
)


def number_rows(results: Results) -> list[tuple[str, ...]]:
    """Return the cells of `NUMBER_HEADER` for each number, in order.

    ``lowest`` and ``highest`` are of the true numbers, ``known`` counts the images that have one.
    """
    values, labels = results.per_name, results.evaluation.labels
    interval = results.per_name_intervals.get("mae")
    rows = []
    for i, name in enumerate(results.names):
        known = labels[:, i][~np.isnan(labels[:, i])]
        extremes = (known.min(), known.max()) if known.size else (np.nan, np.nan)
        mae, *others = (_digits(values[error][i]) for error in ("mae", "rmse", "r2"))
        mae += _in_parentheses(_digits, interval, i)
        texts = *others, *map(_digits, extremes), str(known.size)
        rows.append((name, unit_of(results, i), mae, *texts))
    return rows


def unit_of(results: Results, number: int) -> str:
    """Return the unit of a number; empty if it is unknown."""
    units = results.evaluation.task.units
    return units[number] if units else ""


def _share(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.1%}"


def _digits(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.3g}"


def _in_parentheses(format_: Callable[[Any], str], interval: Interval | None, column: int) -> str:
    if interval is None:
        return ""
    text = _format_interval(format_, Interval(interval.low[column], interval.high[column]))
    return text and f" ({text})"
