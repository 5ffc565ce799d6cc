"""The line between the start and the end of a run, its best network, and how both are reported."""

import csv
import re
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest
from engine import LOADING, config, source, train

from tljax.data.examples import Splits
from tljax.features.evaluate import evaluate
from tljax.features.extract import compute_features
from tljax.pretrained import Card
from tljax.report.figures import interpolation_curve
from tljax.report.runs import write_training_report
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten
from tljax.studies.interpolation import (
    Line,
    evaluate_line,
    interpolate,
    parse_weights,
    with_chosen,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

SPLITS = Splits(source(24), source(12, 1), ())
SHIFTED = source(9, 2)
WEIGHTS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def result():
    options = {"freeze_to": "stem", "batch_norm": "batch", "choose_by": "loss", "epochs": 6}
    result = train(config("lp-ft", optimizer="sgd", **options), SPLITS)
    assert result.best_epoch > 0
    return result


@pytest.fixture(scope="module")
def line(result) -> Line:
    return evaluate_line(result, SPLITS.val, WEIGHTS, LOADING, SHIFTED)


def test_weights_are_read_from_text():
    assert parse_weights("0:1:0.1") == tuple(i / 10 for i in range(11))
    assert parse_weights("0.25:0.7:0.2") == (0.25, 0.45, 0.65)
    assert parse_weights("0.5:0.5:1") == (0.5,)
    for text in ("", "0:1", "0:1:0", "1:0:0.1", "0:2:0.5", "0:1:x", "-1:1:1", "nan:1:1"):
        with pytest.raises(RequestError, match=re.escape(f"--interpolate {text}: write FROM:TO")):
            parse_weights(text)
    with pytest.raises(RequestError, match="1001 networks are too many"):
        parse_weights("0:1:0.001")


def test_the_ends_and_equal_leaves_are_exact(result):
    start, end = result.initial, result.variables
    for weight, expected in ((0.0, start), (1.0, end)):
        jax.tree.map(np.testing.assert_array_equal, interpolate(start, end, weight), expected)
    middle = flatten(interpolate(start, end, 0.3))
    changed = 0
    for path, leaf in middle.items():
        a, b = flatten(start)[path], flatten(end)[path]
        assert leaf.dtype == np.float32
        if "/stem/" in path:
            assert leaf.tobytes() == np.asarray(a).tobytes() == np.asarray(b).tobytes()
        np.testing.assert_allclose(leaf, a + 0.3 * (b - a), rtol=1e-4, atol=1e-6, err_msg=path)
        changed += not np.array_equal(a, b)
    assert changed == 7  # three parameters and two statistics of layer1, and the head's two


def test_the_line_starts_at_the_probe_and_ends_at_the_best_epoch(result, line):
    assert [point.weight for point in line.points] == list(WEIGHTS)
    start, middle, end = line.points
    assert start.evaluation.top1 == result.probe_evaluation.top1
    assert start.evaluation.loss == pytest.approx(result.probe_evaluation.loss, rel=1e-5)
    assert end.evaluation.loss == pytest.approx(result.evaluation.loss, rel=1e-5)
    variables = interpolate(result.initial, result.variables, 0.5)
    for source_, evaluation in ((SPLITS.val, middle.evaluation), (SHIFTED, middle.shifted)):
        outputs = compute_features(result.model, variables, source_, LOADING, stop=None)
        assert evaluation.loss == pytest.approx(evaluate(outputs).loss, rel=1e-5)


@pytest.mark.parametrize("choose_by", ["loss", "top1"])
def test_the_best_point_is_that_of_the_chosen_metric(result, choose_by):
    result = result._replace(config=replace(result.config, choose_by=choose_by))
    line = evaluate_line(result, SPLITS.val, WEIGHTS, LOADING)
    sign = -1 if choose_by == "loss" else 1
    values = [sign * point.evaluation.metric(choose_by) for point in line.points]
    assert values[line.best] >= max(values) - 1e-3
    chosen = with_chosen(result, line)
    expected = interpolate(result.initial, result.variables, WEIGHTS[line.best])
    jax.tree.map(np.testing.assert_array_equal, chosen.variables, expected)
    assert chosen.evaluation.loss == line.chosen.evaluation.loss
    assert chosen.history == result.history


def test_the_line_leads_to_the_last_epoch_if_none_was_better_than_the_start():
    options = {"freeze_to": "stem", "batch_norm": "batch", "ema_decay": 0.5, "epochs": 1}
    result = train(config("lp-ft", optimizer="sgd", rate=1.0, **options), SPLITS)
    assert result.best_epoch == 0
    jax.tree.map(np.testing.assert_array_equal, result.variables, result.initial)
    points = evaluate_line(result, SPLITS.val, WEIGHTS, LOADING).points
    assert points[0].evaluation.loss == pytest.approx(result.evaluation.loss, rel=1e-5)
    assert points[-1].evaluation.loss == pytest.approx(result.history[-1]["val_loss"], rel=1e-5)
    assert points[-1].evaluation.loss > 2 * points[0].evaluation.loss


def test_the_plot_shows_shifted_over_validation_accuracy(line):
    (axes,) = interpolation_curve(line).axes
    x, y = axes.lines[0].get_data()
    assert list(x) == [point.evaluation.top1 for point in line.points]
    assert list(y) == [point.shifted.top1 for point in line.points]
    alone = line._replace(points=tuple(p._replace(shifted=None) for p in line.points))
    (axes,) = interpolation_curve(alone).axes
    assert [list(values) for values in axes.lines[0].get_data()] == [list(WEIGHTS), list(x)]


def test_the_report_and_a_table_show_the_line(result, line, tmp_path):
    fit_config = config("lp-ft")
    options = {"data": "noise", "seed": 0, "batch_size": 4, "fit": asdict(fit_config)}
    card = Card(("a", "b", "c"), "tiny.web", "MIT", "ab" * 32, "tljax", task=result.task)
    chosen = with_chosen(result, line)
    write_training_report(tmp_path, chosen, SPLITS, options, card, 1.0, line)
    rows = list(csv.reader((tmp_path / "interpolation.csv").read_text().splitlines()))
    assert rows[0] == ["weight of the end", "top-1 accuracy, validation", "top-1 accuracy, shifted"]
    assert [row[0] for row in rows[1:]] == ["0", "0.5", "1"]
    assert rows[2][2] == f"{line.points[1].shifted.top1:.1%}"
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Interpolation</h2>" in page
    weight = f"The network is the sum of {line.chosen.weight:g} times the network after"
    assert weight in page
    assert weight in (tmp_path / "README.md").read_text().replace("\\", "")
