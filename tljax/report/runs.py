"""Write the report and the model card of a run or an evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

from tljax.data.decode import decode
from tljax.data.examples import Source, Splits
from tljax.features.evaluate import Evaluation
from tljax.features.extract import Outputs
from tljax.metrics.calibration import Calibration, calibrate
from tljax.pretrained import Card
from tljax.report.card import RunFacts, model_card
from tljax.report.page import Mistake, Report, Sweep, write_report
from tljax.runtime.files import atomic_write
from tljax.runtime.settings import find_unused_settings, settings
from tljax.runtime.trees import flatten
from tljax.runtime.types import Preprocess
from tljax.studies.duplicates import find_duplicates
from tljax.train import run_directory
from tljax.train.adversary import EVALUATION_STEPS
from tljax.train.fit import FitResult
from tljax.train.history import best_epoch, first_epoch_drop
from tljax.train.options import FIT_CONDITIONS

MAX_IMAGES_COMPARED = 20_000
"""Largest number of images among which duplicates of training images are searched for."""


def worst_mistakes(
    evaluation: Evaluation, source: Source, classes: Sequence[str], count: int = 16
) -> list[Mistake]:
    """Return the most confident wrong predictions, with images of 224 x 224 pixels."""
    return [
        Mistake(
            decode(source.read(int(evaluation.indices[row])), Preprocess(224, 224)),
            source.names[int(evaluation.indices[row])],
            classes[int(evaluation.labels[row])],
            classes[int(evaluation.predicted[row])],
            float(evaluation.probability[row]),
        )
        for row in evaluation.worst(count)
    ]


def accuracies(result: FitResult) -> dict[str, Evaluation]:
    """Return the evaluations of a run by the name of their accuracy."""
    names = {"probe": "probe accuracy", "scratch": "trained accuracy"}
    evaluations = {
        "probe accuracy": result.probe_evaluation,
        names.get(result.config.recipe, "fine-tuned accuracy"): result.evaluation,
        "attacked accuracy": result.robust,
    }
    return {name: evaluation for name, evaluation in evaluations.items() if evaluation}


def remarks(result: FitResult) -> list[str]:
    """Return sentences that the reader of the accuracies must know."""
    history, remarks = result.history, []
    if len(history) > 1 and best_epoch(history) == 0:
        remarks.append("No epoch was better than the network before training, which was kept.")
    if drop := first_epoch_drop(history, result.evaluation.examples):
        remarks.append(
            f"In the first epoch the accuracy fell from {drop[0]:.1%} (probe) to"
            f" {drop[1]:.1%}: the first steps changed the features faster than the head adapted to"
            " them. A lower --learning-rate or --layer-decay makes the drop smaller."
        )
    return remarks


def write_training_report(
    workdir: Path,
    result: FitResult,
    splits: Splits,
    config: Mapping[str, Any],
    card: Card,
    seconds: float,
) -> None:
    """Write ``skipped.csv``, ``report.html`` and ``README.md`` of a run.

    Args:
        workdir: the run directory.
        result: what was trained and measured.
        splits: the images of the run.
        config: ``data``, ``seed``, ``batch_size`` and ``fit``, as requested.
        card: the card of the pretrained weights, with the classes of the new network.
        seconds: the duration of the run.
    """
    unused = find_unused_settings(result.config, FIT_CONDITIONS, settings(result.config))
    recipe = {
        path: str(value)
        for path, value in flatten(asdict(result.config)).items()
        if path.rpartition("/")[2] not in unused and value not in (None, ())
    }
    origins = {"probe": "tuned" if best_epoch(result.history) else "probe", "random": "scratch"}
    train_examples = len(splits.train) - len(result.skipped[0])
    validated = splits.val is not splits.train
    few = len(splits.train) + len(splits.val) <= MAX_IMAGES_COMPARED
    duplicates = None
    if validated and few:
        duplicates = find_duplicates(splits.train.examples, splits.val.examples)
    seen = "not searched for" if duplicates is None else str(len(duplicates))
    calibration = calibrated(result.logits)
    skipped = run_directory.skipped_rows(splits.train, result.skipped[0])
    if validated:
        skipped += run_directory.skipped_rows(splits.val, result.skipped[1])
    run_directory.write_csv(workdir / "skipped.csv", ("name", "reason"), skipped)
    headline = [(name, f"{measured.top1:.1%}") for name, measured in accuracies(result).items()]
    if calibration:
        headline.append(("calibration error", f"{calibration.before.error:.1%}"))
    headline.append(("seconds", f"{seconds:.0f}"))
    attack = f"PGD, {EVALUATION_STEPS} steps, epsilon {result.config.adversary.epsilon:g}/255"
    model, probe = result.model, result.probe
    result_remarks, environment = remarks(result), run_directory.environment()
    report = Report(
        title=f"{config['data']} with {card.source}",
        headline=headline,
        notes=(*splits.notes, *result_remarks),
        history=result.history,
        validated=validated,
        sweep=probe and Sweep(probe.l2_values, probe.held_out_accuracy, float(probe.l2)),
        classes=card.classes,
        confusion=result.evaluation.confusion,
        mistakes=worst_mistakes(result.evaluation, splits.val, card.classes),
        skipped=skipped,
        calibration=calibration,
        duplicates=[
            (splits.val.names[pair.val], splits.train.names[pair.train], *pair[2:])
            for pair in duplicates or ()
        ],
        details={
            "Data": {
                "training images": str(train_examples),
                "validation images": str(result.evaluation.examples) if validated else "none",
                "classes": str(len(card.classes)),
                "skipped images": str(len(skipped)),
                "validation images seen in training": seen,
            },
            "Network": {
                "architecture": model.name,
                "pretrained weights": card.source,
                "license of the weights": card.licence,
                "SHA-256 of the weights": card.sha256,
                "image size": f"{model.preprocess.size} px",
            },
            "Recipe": {name: str(config[name]) for name in ("seed", "batch_size")} | recipe,
            "Environment": environment,
        },
        next_steps=[
            f"tljax predict PHOTO.jpg --weights {quote(str(workdir))}",
            f"tljax evaluate --data FOLDER --weights {quote(str(workdir))}",
        ],
    )
    write_report(workdir / "report.html", report)
    facts = RunFacts(
        title=report.title,
        model=model.name,
        weights=card,
        preprocess=model.preprocess,
        data=str(config["data"]),
        train_examples=train_examples,
        recipe=recipe,
        confusion=result.evaluation.confusion,
        origin=origins.get(result.history[0]["phase"], "tuned"),
        validated=validated,
        remarks=result_remarks,
        attacked=result.robust and (result.robust.top1, attack),
        top5=result.evaluation.top5,
        calibration=calibration,
        chosen_on_validation=config["fit"]["recipe"] != "probe",
        seen_in_training=None if duplicates is None else len(duplicates),
        environment=environment,
        workdir=workdir,
    )
    with atomic_write(workdir / "README.md") as temporary:
        temporary.write_text(model_card(facts), "utf-8")


def calibrated(logits: Outputs) -> Calibration | None:
    """Return the calibration on labeled images; None if there are fewer than two."""
    return calibrate(logits.values, logits.labels) if len(logits.labels) > 1 else None


def write_evaluation_report(
    path: Path,
    title: str,
    evaluation: Evaluation,
    calibration: Calibration | None,
    source: Source,
    card: Card,
    notes: Sequence[str],
    skipped: Sequence[tuple[str, str]],
) -> None:
    """Write the report of ``tljax evaluate``.

    Args:
        path: the HTML file.
        title: its heading.
        evaluation: the result.
        calibration: None leaves its section out.
        source: the images of ``evaluation``.
        card: names the classes.
        notes: sentences that the reader must know.
        skipped: the images that could not be read, as (name, reason).
    """
    report = Report(
        title=title,
        headline=[
            ("top-1", f"{evaluation.top1:.1%}"),
            ("top-5", f"{evaluation.top5:.1%}"),
            ("images", str(evaluation.examples)),
        ],
        notes=notes,
        classes=card.classes,
        confusion=evaluation.confusion,
        mistakes=worst_mistakes(evaluation, source, card.classes),
        calibration=calibration,
        skipped=skipped,
        details={"Environment": run_directory.environment()},
    )
    write_report(path, report)
