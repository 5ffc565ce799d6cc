"""The command ``tljax evaluate``: measure a network on labeled images."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tljax.commands import cli
from tljax.data.options import LabelOptions
from tljax.runtime.settings import settings


@dataclass(frozen=True)
class Config(cli.Common, cli.Classifier, cli.Distributed, cli.Trained):
    """Measure a network on labeled images. Classes, labels and numbers are matched by name.

    Attributes:
        data: Labeled images: a table, a folder of class folders, shards, the URL of a bucket,
            digits, tfds:NAME, hf:NAME or packed:FOLDER, of which the validation part is used. By
            default the validation images of the run of --workdir.
        labels: Options of the labels of --data; by default those of the run.
        workdir: Run directory whose network is measured instead of --weights. A report is written
            to its eval/ folder.
    """

    data: str | None = None
    labels: cli.Labels = field(default_factory=LabelOptions)
    workdir: Path | None = None

    conditions = (
        *cli.WORKDIR_CONDITIONS,
        (" ".join(settings(LabelOptions())), lambda s: s.data, "without --data"),
        *cli.LABEL_CONDITIONS,
    )


def run(config: Config) -> dict[str, Any]:
    """Print metrics; with a run directory also write a report of the mistakes."""
    from tljax.data.loader import require_readable_image
    from tljax.data.sources import open_labeled
    from tljax.features.evaluate import evaluate, match_network, resolve_ambiguous_labels
    from tljax.features.extract import compute_features
    from tljax.report.results import number_rows, summarize
    from tljax.report.runs import write_evaluation_report
    from tljax.runtime.errors import RequestError
    from tljax.runtime.parallel import is_main_process
    from tljax.train import run_directory

    if not (config.data or config.workdir):
        raise RequestError("no images to measure on: add --data FOLDER or --workdir RUN")
    validation = (
        config.workdir and not config.data and run_directory.open_validation(config.workdir)
    )
    model, variables, card = config.load(config.workdir).require_classes()
    labels = cli.labels_of(config.labels, config.data, config.workdir or config.weights, card)
    source, data_notes = validation or (open_labeled(config.data or "", labels), ())
    source, same, class_notes = match_network(source, card.classes, card.task)
    notes = (*data_notes, *class_notes)
    print("\n".join(notes))

    began = time.perf_counter()
    logits = compute_features(
        model, variables, source, config.loading, stop=None, description="evaluate"
    ).whole()
    seconds = time.perf_counter() - began
    require_readable_image(source, logits.skipped)
    if same:
        labels = resolve_ambiguous_labels(logits.labels, logits.values, same)
        logits = logits._replace(labels=labels)
    evaluation = evaluate(logits, card.task)
    results = summarize(evaluation, source, card.classes)
    intervals, calibration = results.intervals, results.calibration
    print(f"{evaluation.examples} images; in parentheses 95% confidence intervals")
    for name, metric in evaluation.metrics.items():
        print(f"{metric.title:24} {evaluation.format(name, intervals.get(name))}")
    if card.task.kind == "regression" and len(card.classes) > 1:
        for name, unit, error, *_ in number_rows(results):
            print(f"{f'mean absolute error of {name}':24} {error} {unit}".rstrip())
    if calibration:
        before, after = calibration.before.error, calibration.after.error
        print(f"{'calibration error':24} {before:.1%}, {after:.1%} after temperature scaling")
    for line in run_directory.skipped_lines(source, logits.skipped):
        print(line)
    if config.workdir and is_main_process():
        page = config.workdir / "eval" / "report.html"
        skipped = run_directory.skipped_rows(source, logits.skipped)
        title = f"Evaluation of {config.workdir} on {config.data or 'its own data'}"
        write_evaluation_report(page, title, results, source, notes, skipped)
        print(f"report {page}")
    return {
        "task": card.task.kind,
        **{name: evaluation.metric(name) for name in evaluation.metrics},
        "intervals": {name: list(interval) for name, interval in intervals.items()},
        "examples": evaluation.examples,
        "calibration_error": calibration and calibration.before.error,
        "images_per_second": round(evaluation.examples / seconds, 1),
    }
