"""The command ``tljax evaluate``: measure accuracy on labeled images."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tljax.commands import cli


@dataclass(frozen=True)
class Config(cli.Common):
    """Measure the accuracy of a network on labeled images. Classes are matched by name.

    Attributes:
        data: Labeled images: a folder of class folders, digits, tfds:NAME or hf:NAME, of which the
            validation part is used. By default the validation images of the run of --workdir.
        workdir: Run directory whose network is measured instead of --weights. A report is written
            to its eval/ folder.
    """

    data: str | None = None
    workdir: Path | None = None

    conditions = cli.WORKDIR_CONDITIONS


def run(config: Config) -> dict[str, Any]:
    """Print accuracies; with a run directory also write a report of the mistakes."""
    from tljax.data.loader import require_readable_image
    from tljax.data.sources import open_labeled
    from tljax.features.evaluate import evaluate, match_network, resolve_ambiguous_labels
    from tljax.features.extract import compute_features
    from tljax.report.runs import calibrated, write_evaluation_report
    from tljax.runtime.errors import RequestError
    from tljax.train import run_directory

    if config.data:
        source, data_notes = open_labeled(config.data), ()
    elif config.workdir:
        source, data_notes = run_directory.open_validation(config.workdir)
    else:
        raise RequestError("no images to measure on: add --data FOLDER or --workdir RUN")
    model, variables, card = config.load(config.workdir).require_classes()
    source, same, class_notes = match_network(source, card.classes)
    notes = (*data_notes, *class_notes)
    print("\n".join(notes))

    began = time.perf_counter()
    logits = compute_features(
        model, variables, source, config.loading, stop=None, description="evaluate"
    )
    seconds = time.perf_counter() - began
    require_readable_image(source, logits.skipped)
    logits = logits._replace(labels=resolve_ambiguous_labels(logits.labels, logits.values, same))
    evaluation = evaluate(logits)
    for label, value in (("top-1", evaluation.top1), ("top-5", evaluation.top5)):
        print(f"{label}  {value:.1%}  of {evaluation.examples} images")
    calibration = calibrated(logits)
    if calibration:
        before, after = calibration.before.error, calibration.after.error
        print(f"calibration error  {before:.1%}, {after:.1%} after temperature scaling")
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
