"""From the results of a run to its page."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

from tljax.data.decode import decode
from tljax.data.sources import Source, Splits
from tljax.features.evaluate import Evaluation
from tljax.features.extract import Outputs
from tljax.metrics.calibration import Calibration, calibrate
from tljax.pretrained import Card
from tljax.report.card import RunFacts, model_card
from tljax.report.page import Mistake, Report, SeenInTraining, Sweep, write_report
from tljax.runtime.files import written_whole
from tljax.runtime.settings import idle, settings
from tljax.runtime.trees import flatten
from tljax.runtime.types import Preprocess
from tljax.studies.duplicates import find_duplicates
from tljax.train import run_directory
from tljax.train.adversary import PROOF_STEPS
from tljax.train.fit import FitResult, best_epoch
from tljax.train.options import FIT_CONDITIONS

LOOKED_THROUGH = 20_000
"""Data sets of up to so many images are searched for validation images that are in the training."""


def percent(share: float) -> str:
    """``0.9481`` as ``94.8%``."""
    return f"{100 * share:.1f}%"


def worst_mistakes(
    evaluation: Evaluation, source: Source, classes: Sequence[str], count: int = 16
) -> list[Mistake]:
    """The most confident wrong predictions with their pictures, cut to a square."""
    mistakes = []
    for row in evaluation.worst(count):
        index, label, predicted = (
            int(column[row])
            for column in (evaluation.indices, evaluation.labels, evaluation.predicted)
        )
        mistakes.append(
            Mistake(
                decode(source.read(index), Preprocess(224, 224)),
                source.names[index],
                classes[label],
                classes[predicted],
                float(evaluation.probability[row]),
            )
        )
    return mistakes


def accuracies(result: FitResult) -> dict[str, Evaluation]:
    """Names what was measured of a run."""
    names = {"probe": "probe accuracy", "scratch": "trained accuracy"}
    found = {
        "probe accuracy": result.probe_evaluation,
        names.get(result.config.recipe, "fine-tuned accuracy"): result.evaluation,
        "attacked accuracy": result.robust,
    }
    return {name: evaluation for name, evaluation in found.items() if evaluation}


def remarks(result: FitResult) -> Sequence[str]:
    """Says what those accuracies do not."""
    in_vain = len(result.history) > 1 and best_epoch(result.history) == 0
    return ("No epoch was better than what training started from, which is kept.",) * in_vain


def write_training_report(
    workdir: Path,
    result: FitResult,
    splits: Splits,
    config: Mapping[str, Any],
    card: Card,
    seconds: float,
) -> None:
    """Writes ``skipped.csv``, ``report.html`` and ``README.md`` of a run."""
    unused = idle(result.config, FIT_CONDITIONS, settings(result.config))
    recipe = {
        path: str(value)
        for path, value in flatten(asdict(result.config)).items()
        if path.rpartition("/")[2] not in unused and value not in (None, ())
    }
    origins = {"probe": "tuned" if best_epoch(result.history) else "probe", "random": "scratch"}
    trained_on = len(splits.train) - len(result.skipped[0])
    validated = splits.val is not splits.train
    sources = (splits.train, splits.val)[: 1 + validated]
    looked = validated and len(splits.train) + len(splits.val) <= LOOKED_THROUGH
    seen = find_duplicates(splits.train.examples, splits.val.examples) if looked else None
    calibration = calibrated(result.logits)
    skipped = [
        row
        for source, reasons in zip(sources, result.skipped, strict=False)
        for row in run_directory.skipped_rows(source, reasons)
    ]
    run_directory.write_csv(workdir / "skipped.csv", ("name", "reason"), skipped)
    headline = [(name, percent(found.top1)) for name, found in accuracies(result).items()]
    if calibration:
        headline.append(("calibration error", percent(calibration.before.error)))
    headline.append(("seconds", f"{seconds:.0f}"))
    attack = f"PGD, {PROOF_STEPS} steps, epsilon {result.config.adversary.epsilon:g}/255"
    model, probe = result.model, result.probe
    report = Report(
        title=f"{config['data']} with {card.source}",
        headline=headline,
        notes=(*splits.notes, *remarks(result)),
        history=result.history,
        validated=validated,
        sweep=probe and Sweep(probe.l2_values, probe.held_out_accuracy, float(probe.l2)),
        classes=card.classes,
        confusion=result.evaluation.confusion,
        mistakes=worst_mistakes(result.evaluation, splits.val, card.classes),
        skipped=skipped,
        calibration=calibration,
        duplicates=[
            SeenInTraining(
                splits.val.names[d.val], splits.train.names[d.train], d.kind, d.similarity
            )
            for d in seen or ()
        ],
        details={
            "Data": {
                "training images": str(trained_on),
                "validation images": str(result.evaluation.examples) if validated else "none",
                "classes": str(len(card.classes)),
                "skipped images": str(len(skipped)),
                "validation images seen in training": "not looked for"
                if seen is None
                else str(len(seen)),
            },
            "Network": {
                "architecture": model.name,
                "pretrained weights": card.source,
                "licence of the weights": card.licence,
                "SHA-256 of the weights": card.sha256,
                "image size": f"{model.preprocess.size} px",
            },
            "Recipe": {name: str(config[name]) for name in ("seed", "batch_size")} | recipe,
            "Environment": run_directory.environment(),
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
        train_examples=trained_on,
        recipe=recipe,
        confusion=result.evaluation.confusion,
        origin=origins.get(result.history[0]["phase"], "tuned"),
        validated=validated,
        remarks=remarks(result),
        attacked=result.robust and (result.robust.top1, attack),
        top5=result.evaluation.top5,
        calibration=calibration,
        chosen_on_validation=config["fit"]["recipe"] != "probe",
        seen_in_training=None if seen is None else len(seen),
        environment=run_directory.environment(),
        workdir=workdir,
    )
    with written_whole(workdir / "README.md") as temporary:
        temporary.write_text(model_card(facts), "utf-8")


def calibrated(logits: Outputs) -> Calibration | None:
    """Calibration on labelled images; None where there are fewer than two."""
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
    """Writes the page of ``tljax evaluate``."""
    report = Report(
        title=title,
        headline=[
            ("top-1", percent(evaluation.top1)),
            ("top-5", percent(evaluation.top5)),
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
