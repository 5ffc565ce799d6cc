"""Measures a network on a folder of class folders; classes are matched by name."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tljax.commands import cli


@dataclass(frozen=True)
class Config(cli.Common):
    """Measure a network on labelled images."""

    data: str | None = None
    """A folder of class folders, or digits; by default the validation part of the run's data."""
    workdir: Path | None = None
    """A run directory: its network is measured, and the report goes to its eval/ folder."""

    conditions = cli.WEIGHTS_OF_RUN


def run(config: Config) -> dict[str, Any]:
    """Prints accuracies; with a run directory also writes a page with the mistakes."""
    from tljax.data.loader import refuse_none
    from tljax.data.sources import ambiguous, match_classes, open_labelled
    from tljax.features.evaluate import evaluate, settle
    from tljax.features.extract import compute_features
    from tljax.pretrained.catalog import names_like
    from tljax.report.runs import calibrated, percent, write_evaluation_report
    from tljax.runtime.errors import RequestError
    from tljax.train import run_directory

    of_data: tuple[str, ...] = ()
    if config.data:
        source = open_labelled(config.data)
    elif config.workdir:
        source, of_data = run_directory.open_validation(config.workdir)
    else:
        raise RequestError("name what to measure on: --data FOLDER, or --workdir RUN")
    model, variables, card = config.load(config.workdir).with_classes()
    names = names_like(card.classes, source.classes)
    same = ambiguous(source.classes, names)
    source, notes = match_classes(source, names)
    notes = (*of_data, *notes)
    print("\n".join(notes))

    began = time.perf_counter()
    logits = compute_features(
        model, variables, source, config.loading, stop=None, description="evaluate"
    )
    seconds = time.perf_counter() - began
    refuse_none(source, logits.skipped)
    logits = logits._replace(labels=settle(logits.labels, logits.values, same))
    evaluation = evaluate(logits)
    for label, value in (("top-1", evaluation.top1), ("top-5", evaluation.top5)):
        print(f"{label}  {percent(value)}  of {evaluation.examples} images")
    calibration = calibrated(logits)
    if calibration:
        before, after = calibration.before.error, calibration.after.error
        print(f"calibration error  {percent(before)}, {percent(after)} after temperature scaling")
    for line in run_directory.skipped_lines(source, logits.skipped):
        print(line)
    if config.workdir:
        page = config.workdir / "eval" / "report.html"
        skipped = run_directory.skipped_rows(source, logits.skipped)
        title = f"Evaluation of {config.workdir} on {config.data or 'its own data'}"
        write_evaluation_report(page, title, evaluation, calibration, source, card, notes, skipped)
        print(f"report {page}")
    return {
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "examples": evaluation.examples,
        "calibration_error": calibration and calibration.before.error,
        "images_per_second": round(evaluation.examples / seconds, 1),
    }


def main() -> None:
    """Run ``tljax evaluate``."""
    cli.main(Config, run)
