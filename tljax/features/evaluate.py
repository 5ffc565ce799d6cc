"""Metrics, predictions and worst mistakes from the outputs of a network for a data set."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from tljax.data.examples import Source, find_ambiguous_names, match_classes
from tljax.features.extract import Outputs
from tljax.metrics import classification, multilabel, regression
from tljax.metrics.bootstrap import Interval, bootstrap_intervals, is_affordable
from tljax.metrics.weighted import mean_of_defined
from tljax.pretrained.catalog import match_class_names
from tljax.runtime.errors import RequestError
from tljax.runtime.settings import Kind
from tljax.runtime.task import CLASSIFICATION, Task


class Metric(NamedTuple):
    """A metric of a task; its mean over labels or numbers where there are several.

    Attributes:
        title: its name in reports.
        compute: function of an evaluation and of the weight of each example, ``[..., n]`` or None
            for equal weights, that returns ``[...]``; or the name of the metric of each label or
            number of which it is the mean, see `Evaluation.per_name`.
        is_share: whether it is a share of the examples, shown as a percentage.
        is_error: whether lower is better.
        by_name: whether its cost in a bootstrap grows with the number of labels or numbers.
    """

    title: str
    compute: Callable[["Evaluation", Any], Any] | str
    is_share: bool = True
    is_error: bool = False
    by_name: bool = False

    def format(self, value: float) -> str:
        """Return a value as text: a percentage, or three significant digits."""
        return f"{value:.1%}" if self.is_share else f"{value:.3g}"

    def format_with(self, value: float, interval: Interval | None) -> str:
        """Return a value and its confidence interval, if that is defined, as text."""
        if interval is None or np.isnan(interval.low):
            return self.format(value)
        return f"{self.format(value)} ({self.format(interval.low)} to {self.format(interval.high)})"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics and predictions of a network on the labeled images that could be read.

    Metrics are computed when they are asked for.

    Attributes:
        outputs: the outputs of the network, with labels and positions in the source.
        task: what the outputs mean.
    """

    outputs: Outputs
    task: Task = CLASSIFICATION

    @property
    def examples(self) -> int:
        """Return the number of images, ``n``."""
        return len(self.outputs.labels)

    @property
    def labels(self) -> Shaped[np.ndarray, "n ..."]:
        """Return the labels; see `tljax.data.examples.Source`."""
        return self.outputs.labels

    @property
    def indices(self) -> Int[np.ndarray, " n"]:
        """Return the position of each image in its source, ``[n]``."""
        return self.outputs.indices

    @cached_property
    def decoded(self) -> Float[np.ndarray, "n names"]:
        """Return probabilities of classes or labels, or numbers; see `Task.decode`."""
        return self.task.decode(self.outputs.values)

    @cached_property
    def predicted(self) -> Shaped[np.ndarray, "n ..."]:
        """Return predictions in the form of the labels; see `Task.predict`."""
        return self.task.predict(self.outputs.values)

    @property
    def probability(self) -> Float[np.ndarray, " n"]:
        """Return the probability of the predicted class, ``[n]``."""
        return self.decoded[np.arange(self.examples), self.predicted]

    @cached_property
    def loss(self) -> float:
        """Return the plain loss of the task.

        It is the mean cross-entropy in nats, of every known label or threshold between ordered
        classes where there are several; for numbers the mean squared error after standardization.
        """
        values, labels = self.outputs.values, self.labels
        if self.task.kind == "classification":
            losses = classification.cross_entropies(values, labels)
            return float(losses.sum()) / self.examples
        if self.task.kind == "ordinal":
            labels = labels[:, None] > np.arange(values.shape[1])
        known = ~np.isnan(labels)
        if self.task.kind == "regression":
            losses = (values - self.task.standardize(labels)) ** 2
        else:
            losses = np.logaddexp(0, values) - np.where(known, labels, 0) * values
        return (
            float(np.mean(losses, where=known, dtype=np.float64)) if known.any() else float("nan")
        )

    @cached_property
    def rank(self) -> Int[np.ndarray, " n"]:
        """Return the number of classes ranked above the label, ``[n]``."""
        return np.asarray(classification.ranks(self.outputs.values, self.labels))

    @property
    def top1(self) -> float:
        """Return the fraction of images whose label is the predicted class."""
        return self.metric("top1")

    @property
    def top5(self) -> float:
        """Return the fraction of images whose label is among the five most probable classes."""
        return self.metric("top5")

    @cached_property
    def confusion(self) -> Int[np.ndarray, "classes classes"]:
        """Return the counts of label (row) and prediction (column), ``[classes, classes]``."""
        counts = np.zeros((self.decoded.shape[1],) * 2, np.int64)
        np.add.at(counts, (self.labels, self.predicted), 1)
        return counts

    def metric(self, name: str) -> float:
        """Compute a metric of the task, once: ``loss``, or a name in `METRICS`."""
        if name == "loss":
            return self.loss
        if name not in self._computed:
            self._computed[name] = float(self._measure([name])[name])
        return self._computed[name]

    @cached_property
    def _computed(self) -> dict[str, float]:
        return {}

    @property
    def metrics(self) -> dict[str, Metric]:
        """Return the metrics of the task by name, the most important one first.

        They lack top-5 accuracy of up to five classes, and errors of several numbers, whose mean
        would mix their units; see `per_name`.
        """
        names = self.outputs.values.shape[1] + (self.task.kind == "ordinal")
        several_numbers = self.task.kind == "regression" and names > 1
        left_out = ("top5",) * (names <= 5) + ("mae", "rmse") * several_numbers
        metrics = METRICS[self.task.kind].items()
        return {name: metric for name, metric in metrics if name not in left_out}

    @property
    def main_metric(self) -> str:
        """Return the name of the most important metric."""
        return next(iter(self.metrics))

    def format(self, name: str, interval: Interval | None = None) -> str:
        """Return a metric as text, with its unit if it is a number with one, and an interval."""
        text = METRICS[self.task.kind][name].format_with(self.metric(name), interval)
        units = set(self.task.units)
        in_unit = self.task.kind == "regression" and name in ("mae", "rmse") and len(units) == 1
        return f"{text} {units.pop()}".rstrip() if in_unit else text

    def intervals(self, source: Source, names: Iterable[str] | None = None) -> dict[str, Interval]:
        """Compute bootstrap confidence intervals of metrics, of 95%.

        Args:
            source: the images, whose groups are drawn as a whole.
            names: names of the metrics, by default all; those that would take minutes are left out.
        """
        return self.bootstrap(source, self.metrics if names is None else names)[0]

    def bootstrap(
        self, source: Source, names: Iterable[str], each: Iterable[str] = ()
    ) -> tuple[dict[str, Interval], dict[str, Interval]]:
        """Compute confidence intervals as `intervals`, and those of each label or number.

        Args:
            source: the images.
            names: names of the metrics.
            each: names of metrics of `per_name`, whose intervals are arrays ``[names]``. They are
                left out if they take more than a fifth of what the others may take.
        """
        metrics, columns = self.metrics, self.decoded.shape[1]
        names = [
            name
            for name in names
            if is_affordable(self.examples, columns if metrics[name].by_name else 1)
        ]
        each = each if is_affordable(5 * self.examples, columns) else ()

        groups = None if source.groups is None else source.groups[self.indices]
        intervals = bootstrap_intervals(
            lambda counts: self._measure(names, counts, each), self.examples, groups=groups
        )
        return (
            {name: intervals[name] for name in names},
            {name: intervals[_each(name)] for name in each},
        )

    def _measure(
        self, names: Iterable[str], weights: Any = None, each: Iterable[str] = ()
    ) -> dict[str, Any]:
        """Compute metrics by name, and those of each label or number by `_each` of their name."""
        chosen = {name: METRICS[self.task.kind][name].compute for name in names}
        wanted = {*each, *(one for one in chosen.values() if isinstance(one, str))}
        per_name = self.per_name(weights, wanted) if wanted else {}
        means = {
            name: mean_of_defined(per_name[compute])
            if isinstance(compute, str)
            else compute(self, weights)
            for name, compute in chosen.items()
        }
        return means | {_each(name): per_name[name] for name in each}

    def per_name(
        self,
        weights: Float[np.ndarray, "... n"] | None = None,
        wanted: Collection[str] = ("average_precision", "auroc", "f1", "known"),
    ) -> dict[str, Float[np.ndarray, "... names"]]:
        """Compute the metrics of each label or number, ``[..., names]`` each.

        Args:
            weights: ``[..., n]`` weight of each example; by default equal.
            wanted: the metrics of labels that are computed, ``f1`` with ``precision`` and
                ``recall``, ``known`` with ``positive``, which count examples and have no weights;
                those of numbers are always ``mae``, ``rmse`` and ``r2``.
        """
        decoded, labels = self.decoded, self.labels
        if self.task.kind == "regression":
            return regression.regression_metrics(decoded, labels, weights)._asdict()
        ranked = {"average_precision": multilabel.average_precision, "auroc": multilabel.auroc}
        values = {
            name: metric(decoded, labels, weights)
            for name, metric in ranked.items()
            if name in wanted
        }
        if "f1" in wanted:
            thresholds = np.asarray(self.task.thresholds or 0.5)
            values |= multilabel.threshold_metrics(decoded, labels, thresholds, weights)._asdict()
        if "known" in wanted:
            values |= {"known": np.isfinite(labels).sum(0), "positive": (labels == 1).sum(0)}
        return values

    @cached_property
    def errors(self) -> Float[np.ndarray, "n names"]:
        """Return how wrong the prediction of each label or number is; 0 where that is unknown.

        It is the distance of the probability from the truth where the decision about a label is
        wrong, and the error of a number in standard deviations.
        """
        errors = np.abs(self.task.standardize(self.decoded) - self.task.standardize(self.labels))
        if self.task.kind == "multilabel":
            errors = np.where(self.predicted != self.labels, errors, 0)
        return np.nan_to_num(errors)

    def worst(self, count: int) -> Int[np.ndarray, " rows"]:
        """Return the rows of up to ``count`` mistakes, the worst ones first.

        The worst mistake is the most confident wrong class, the known label whose probability is
        farthest from the truth, or the largest error in standard deviations of its number.
        """
        if self.task.kind == "classification":
            wrong = np.flatnonzero(self.predicted != self.labels)
            return wrong[np.argsort(-self.probability[wrong], kind="stable")][:count]
        if self.task.kind == "ordinal":
            errors = np.abs(self.predicted - self.labels).astype(np.float64)
        else:
            errors = self.errors.max(1)
        return np.argsort(-errors, kind="stable")[: min(count, np.count_nonzero(errors))]


def _each(name: str) -> str:
    """Return a key for a metric of each number, which may be called as its mean is."""
    return f"each {name}"


def _of_classes(metric: Callable[..., Any]) -> Callable[[Evaluation, Any], Any]:
    return lambda x, weights: metric(x.predicted, x.labels, weights)


def _top_k(k: int) -> Callable[[Evaluation, Any], Any]:
    def compute(x: Evaluation, weights: Any) -> Any:
        return classification.accuracy(x.rank // k > 0, np.zeros_like(x.rank), weights)

    return compute


_CLASSES = {
    "balanced_accuracy": Metric("balanced accuracy", _of_classes(classification.balanced_accuracy)),
    "macro_f1": Metric("macro F1", _of_classes(classification.macro_f1)),
}
METRICS: Mapping[Kind, Mapping[str, Metric]] = {
    "classification": {
        "top1": Metric("top-1 accuracy", _top_k(1)),
        "top5": Metric("top-5 accuracy", _top_k(5)),
        **_CLASSES,
        "auroc": Metric(
            "AUROC, one versus rest",
            lambda x, weights: classification.macro_auroc(x.decoded, x.labels, weights),
            by_name=True,
        ),
    },
    "multilabel": {
        "map": Metric("mAP", "average_precision", by_name=True),
        "auroc": Metric("AUROC", "auroc", by_name=True),
        "macro_f1": Metric("macro F1", "f1"),
    },
    "regression": {
        "mae": Metric("mean absolute error", "mae", is_share=False, is_error=True, by_name=True),
        "rmse": Metric(
            "root mean squared error", "rmse", is_share=False, is_error=True, by_name=True
        ),
        "r2": Metric("R2", "r2", is_share=False, by_name=True),
    },
    "ordinal": {
        "kappa": Metric(
            "quadratic kappa", _of_classes(classification.quadratic_kappa), is_share=False
        ),
        "top1": Metric("accuracy", _of_classes(classification.accuracy)),
        **_CLASSES,
        "mae": Metric(
            "mean distance in classes",
            _of_classes(classification.mean_class_distance),
            is_share=False,
            is_error=True,
        ),
    },
}
"""The metrics of each kind of task by name, the most important one first."""


def choose_thresholds(evaluation: Evaluation) -> Evaluation:
    """Return the evaluation with the thresholds that have the highest F1 on its images.

    Tasks other than ``multilabel`` have no thresholds: their evaluation is returned unchanged.
    """
    if evaluation.task.kind != "multilabel":
        return evaluation
    thresholds = multilabel.best_thresholds(evaluation.decoded, evaluation.labels)
    task = replace(evaluation.task, thresholds=tuple(thresholds.tolist()))
    return Evaluation(evaluation.outputs, task)


def evaluate(outputs: Outputs, task: Task = CLASSIFICATION) -> Evaluation:
    """Evaluate the outputs for a source, as `compute_features(stop=None)` returns them.

    Of several processes each has some, and all get the evaluation of all; see `Outputs.whole`.
    """
    return Evaluation(outputs.whole(), task)


def match_network(
    source: Source, classes: tuple[str, ...], task: Task = CLASSIFICATION
) -> tuple[Source, dict[str, list[int]], tuple[str, ...]]:
    """Label a source by the classes, labels or numbers of a network, which have the same names.

    Args:
        source: examples labeled with their own list of classes.
        classes: the names of the network, in the order of its outputs.
        task: what the network predicts.

    Returns:
        The examples of known classes; names that several of the network's classes share, for
        `resolve_ambiguous_labels`; and notes to print, one line each.

    Raises:
        RequestError: no example belongs to a class of the network, or its labels are of another
            kind than what the network predicts.
    """
    kind = source.task.kind
    if kind != task.kind and not (source.task.has_classes and task.has_classes):
        raise RequestError(
            f"the labels are of the task {kind}, and the network predicts {task.kind}: choose "
            f"other labels with --target, or read them as --task {task.kind}"
        )
    if task.kind != "classification":
        matched, notes = match_classes(source, classes)
        return replace(matched, task=task), {}, notes
    names = match_class_names(classes, source.classes)
    matched, notes = match_classes(source, names)
    return matched, find_ambiguous_names(source.classes, names), notes


def resolve_ambiguous_labels(
    labels: np.ndarray, logits: np.ndarray, same: Mapping[str, Sequence[int]]
) -> np.ndarray:
    """Replace each label that may mean any of several classes by the most probable one of them.

    Args:
        labels: ``[n]`` class indices.
        logits: ``[n, classes]``.
        same: indices of the classes that share a name, by name; see `match_network`.

    Returns:
        ``[n]`` class indices.
    """
    labels = labels.copy()
    for indices in same.values():
        rows = np.isin(labels, indices)
        labels[rows] = np.take(indices, logits[rows][:, indices].argmax(1))
    return labels
