"""Results of every task: intervals, groups, calibration and metrics of each label or number."""

from dataclasses import replace

import numpy as np
import pytest
from made_up import KINDS, evaluation_of, results_of, source_of

from tljax.metrics.calibration import calibrate, calibrate_labels
from tljax.report.results import LABEL_HEADER, Results, calibrated, label_rows, summarize
from tljax.runtime.settings import Kind


@pytest.mark.parametrize("kind", KINDS)
def test_every_metric_is_within_its_interval(kind: Kind):
    results = results_of(kind, ("a", "b", "c"))
    assert results.intervals.keys() == results.evaluation.metrics.keys()
    for name, (low, high) in results.intervals.items():
        assert low < results.evaluation.metric(name) < high
    for name, (low, high) in results.per_name_intervals.items():
        assert (low < results.per_name[name]).all()
        assert (results.per_name[name] < high).all()
    assert bool(results.per_name_intervals) == (kind in ("multilabel", "regression"))
    assert results.how_intervals.endswith("by resampling 60 images.")


def test_an_interval_of_two_groups_is_that_of_groups():
    evaluation = evaluation_of("regression", 1)
    # Half of the images are right, and they are one group.
    evaluation.outputs.values[::2] = evaluation.task.standardize(evaluation.labels[::2])
    apart = summarize(evaluation, source_of(evaluation, "a"), ["a"])
    grouped = summarize(evaluation, source_of(evaluation, "a", groups=2), ["a"])
    assert grouped.groups == 2
    assert grouped.how_intervals.endswith("by resampling 2 groups.")
    low, high = grouped.intervals["mae"]
    assert low == pytest.approx(0, abs=1e-5)
    assert high == pytest.approx(2 * evaluation.metric("mae"), rel=1e-5)
    assert apart.intervals["mae"].low > low
    assert apart.intervals["mae"].high < high


def test_one_group_has_no_interval():
    results = results_of("classification", ("a", "b"), groups=1)
    assert results.how_intervals == ""
    assert [score.interval for score in results.scores] == [""] * 4
    assert all("(" not in score.text for score in results.scores)


def test_groups_are_those_of_the_evaluated_images():
    evaluation = evaluation_of("classification", 2, 60)
    outputs = evaluation.outputs._replace(indices=np.arange(60) + 40)
    source = source_of(evaluation_of("classification", 2, 100), "ab")
    source = replace(source, groups=np.arange(100, dtype=np.int32) // 10)
    assert summarize(replace(evaluation, outputs=outputs), source, "ab").groups == 6


def test_only_classes_and_labels_are_calibrated():
    classes, labels = evaluation_of("classification", 3), evaluation_of("multilabel", 3, blanks=0.2)
    for actual, expected in (
        (calibrated(classes), calibrate(classes.outputs.values, classes.labels)),
        (calibrated(labels), calibrate_labels(labels.outputs.values, labels.labels)),
    ):
        assert actual is not None
        assert actual.temperature == expected.temperature
    assert calibrated(evaluation_of("ordinal", 3)) is None
    assert calibrated(evaluation_of("regression", 3)) is None
    labels.labels[1:] = np.nan
    assert calibrated(labels) is None


def test_without_thresholds_a_label_applies_from_one_half_on():
    evaluation = evaluation_of("multilabel", 2)
    evaluation = replace(evaluation, task=replace(evaluation.task, thresholds=()))
    results = Results(evaluation, ("a", "b"), per_name=evaluation.per_name())
    column = LABEL_HEADER.index("threshold")
    assert [row[column] for row in label_rows(results)] == ["0.500", "0.500"]
