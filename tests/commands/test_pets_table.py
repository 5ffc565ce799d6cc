"""Real photographs with 40 labels, a fifth of them unknown: metrics and probe of scikit-learn."""

import csv
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from scipy.special import log_expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    precision_recall_curve,
    roc_auc_score,
)

from tljax.commands import main
from tljax.data.options import LabelOptions, Loading
from tljax.data.sources import open_splits
from tljax.features.evaluate import evaluate
from tljax.features.extract import compute_features
from tljax.features.probe import fit_task_probe
from tljax.pretrained import load_pretrained

pytestmark = pytest.mark.slow

L2 = 0.01


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """Write a table of the species, folder and breed of each photograph, with blanks."""
    photographs = sorted((shared_data / "pets37").rglob("*.jpg"))
    breeds = sorted({path.parent.name for path in photographs})
    rng, rows = np.random.default_rng(0), []
    for path in photographs:
        breed, folder = path.parent.name, path.parent.parent.name
        cat = breed[0].isupper()  # the convention of the data set
        labels = [cat, not cat, folder == "train", *(breed == name for name in breeds)]
        cells = ["" if rng.random() < 0.2 else int(label) for label in labels]
        rows.append([path, "train" if rng.random() < 0.6 else "val", *cells])
    file = tmp_path_factory.mktemp("pets") / "pets.csv"
    with file.open("w", newline="") as stream:
        header = ["path", "split", "cat", "dog", "few", *breeds]
        csv.writer(stream).writerows([header, *rows])
    return file


@pytest.fixture(scope="module")
def run(table: Path, shared_weights: Path) -> tuple[Path, dict]:
    """Train a probe from the command line."""
    workdir, out = table.parent / "run", io.StringIO()
    command = ["tljax", "train", "--data", table, "--recipe", "probe", "--workdir", workdir]
    command += ["--weights", shared_weights / "resnet18.ktb_in1k.safetensors"]
    command += ["--image-size", 128, "--json"]
    with mock.patch("sys.argv", [*map(str, command)]), redirect_stdout(out):
        main()
    assert "3 labels" not in out.getvalue()
    assert "and 35 more: 40 labels, 20% of the values unknown" in out.getvalue()
    return workdir, json.loads(out.getvalue().splitlines()[-1])


def test_metrics_of_every_label_are_those_of_scikit_learn(table: Path, run: tuple[Path, dict]):
    workdir, printed = run
    model, variables, card = load_pretrained(workdir)
    val = open_splits(str(table), labels=LabelOptions()).val
    evaluation = evaluate(compute_features(model, variables, val, Loading(), stop=None), card.task)
    ours, scores = evaluation.per_name(), evaluation.decoded.astype(np.float64)
    assert len(card.task.thresholds) == len(card.classes) == 40
    precisions = []
    for label, threshold in enumerate(card.task.thresholds):
        known = ~np.isnan(evaluation.labels[:, label])
        truth, score = evaluation.labels[known, label], scores[known, label]
        precisions.append(average_precision_score(truth, score))
        assert ours["average_precision"][label] == pytest.approx(precisions[-1], abs=1e-6)
        assert ours["auroc"][label] == pytest.approx(roc_auc_score(truth, score), abs=1e-6)
        f1 = f1_score(truth, score >= threshold)
        assert ours["f1"][label] == pytest.approx(f1, abs=1e-6)
        precision, recall, _ = precision_recall_curve(truth, score)
        best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
        assert f1 == pytest.approx(best, abs=1e-6)
    assert evaluation.metric("map") == pytest.approx(np.mean(precisions), abs=1e-6)
    # Training applied the head to cached features, whose rounding differs.
    assert printed["val_map"] == pytest.approx(np.mean(precisions), abs=1e-4)


def test_the_probe_solves_one_logistic_regression_per_label(table: Path, run: tuple[Path, dict]):
    del run  # features are cached
    splits = open_splits(str(table), labels=LabelOptions())
    weights = load_pretrained(table.parent / "run")
    train = compute_features(*weights[:2], splits.train, Loading())
    probe = fit_task_probe("multilabel", train.values, train.labels, num_outputs=40, l2_values=[L2])
    features = train.values.astype(np.float64)
    mean, scale = features.mean(0), features.std(0)
    scale[scale == 0] = 1
    standardized = (features - mean) / scale
    kernel = np.asarray(probe.kernel, np.float64) * scale[:, None]
    bias = np.asarray(probe.bias, np.float64) + mean @ np.asarray(probe.kernel, np.float64)

    for label in range(40):
        known = ~np.isnan(train.labels[:, label])
        sign = 2 * train.labels[known, label] - 1
        x = standardized[known]

        def objective(w, b, x=x, sign=sign):
            return -log_expit(sign * (x @ w + b)).mean() + L2 / 2 * w @ w

        reference = LogisticRegression(C=1 / (len(x) * L2), tol=1e-10, max_iter=10_000)
        reference.fit(x, sign)
        expected = objective(reference.coef_[0], reference.intercept_[0])
        assert objective(kernel[:, label], bias[label]) == pytest.approx(expected, rel=1e-4)
