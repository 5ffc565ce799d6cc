"""Write the report and the model card of a run or an evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

from tljax.data.examples import Source, Splits
from tljax.data.table_files import is_table
from tljax.features.evaluate import METRICS, Evaluation
from tljax.features.probe import Probe
from tljax.pretrained import Card
from tljax.report.card import RunFacts, model_card
from tljax.report.figures import Sweep
from tljax.report.mistakes import worst_mistakes
from tljax.report.page import Report, interpolation_header, interpolation_rows, write_report
from tljax.report.results import Results, Score, score_of, summarize
from tljax.runtime.files import atomic_write
from tljax.runtime.settings import Kind, find_unused_settings, settings
from tljax.runtime.trees import flatten
from tljax.studies.duplicates import find_duplicates
from tljax.studies.interpolation import Line
from tljax.train import run_directory
from tljax.train.adversary import EVALUATION_STEPS
from tljax.train.fit import FitResult
from tljax.train.history import first_epoch_drop
from tljax.train.options import FIT_CONDITIONS

MAX_IMAGES_COMPARED = 20_000
"""Largest number of images among which duplicates of training images are searched for."""


def accuracies(result: FitResult) -> dict[str, Evaluation]:
    """Return the evaluations of a run by the name of their most important metric."""
    kind = result.task.kind
    name = result.evaluation.main_metric
    metric = "accuracy" if kind == "classification" else METRICS[kind][name].title
    trained = {"probe": "probe", "scratch": "trained"}.get(result.config.recipe, "fine-tuned")
    evaluations = {
        f"probe {metric}": result.probe_evaluation,
        f"{trained} {metric}": result.evaluation,
        f"attacked {metric}": result.robust,
    }
    return {name: evaluation for name, evaluation in evaluations.items() if evaluation}


def remarks(result: FitResult, line: Line | None = None) -> list[str]:
    """Return sentences that the reader of the accuracies must know.

    Args:
        result: what was trained and measured.
        line: networks between the start and the end of the run, of which the best is ``result``.
    """
    history, remarks = result.history, []
    if line is not None:
        remarks.append(
            f"The network is the sum of {line.chosen.weight:g} times the network after fine-tuning"
            f" and {1 - line.chosen.weight:.6g} times the one before it: the best of"
            f" {len(line.points)} such sums on the validation images (WiSE-FT)."
        )
    elif len(history) > 1 and result.best_epoch == 0:
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
    line: Line | None = None,
) -> dict[str, str]:
    """Write ``skipped.csv``, ``report.html`` and ``README.md`` of a run.

    With ``line``, write ``interpolation.csv``, too.

    Args:
        workdir: the run directory.
        result: what was trained and measured.
        splits: the images of the run.
        config: ``data``, ``labels``, ``seed``, ``batch_size`` and ``fit``, as requested.
        card: the card of the pretrained weights, with the classes of the new network.
        seconds: the duration of the run.
        line: networks between the start and the end of the run, of which the best is ``result``.

    Returns:
        What to print, as text by name: the most important metric of each evaluation of the run,
        with its 95% confidence interval, and the number of validation images that are also
        training images, if there are any.
    """
    unused = find_unused_settings(result.config, FIT_CONDITIONS, settings(result.config))
    recipe = {
        path: str(value)
        for path, value in flatten(asdict(result.config)).items()
        if path.rpartition("/")[2] not in unused and value not in (None, ())
    }
    labels = config.get("labels", {})
    recipe |= {name: str(value) for name, value in labels.items() if value is not None}
    if result.probe is not None:
        recipe["L2 penalty of the probe"] = f"{result.probe.l2:.2g}"
    tuned = "tuned" if result.best_epoch else "probe"
    origin = {"probe": tuned, "random": "scratch"}.get(result.history[0]["phase"], "tuned")
    train_examples = len(splits.train) - len(result.skipped[0])
    validated = splits.val is not splits.train
    few = len(splits.train) + len(splits.val) <= MAX_IMAGES_COMPARED
    duplicates = None
    if validated and few:
        duplicates = find_duplicates(splits.train.examples, splits.val.examples)
    seen = "not searched for" if duplicates is None else str(len(duplicates))
    skipped = run_directory.skipped_rows(splits.train, result.skipped[0])
    if validated:
        skipped += run_directory.skipped_rows(splits.val, result.skipped[1])
    run_directory.write_csv(workdir / "skipped.csv", ("name", "reason"), skipped)
    results = summarize(result.evaluation, splits.val, card.classes)
    headline = _headline(result, splits.val, results)
    attack = f"PGD, {EVALUATION_STEPS} steps, epsilon {result.config.adversary.epsilon:g}/255"
    model, probe = result.model, result.probe
    result_remarks, environment = remarks(result, line), run_directory.environment()
    if line is not None:
        rows = interpolation_rows(line)
        run_directory.write_csv(workdir / "interpolation.csv", interpolation_header(line), rows)
    report = Report(
        title=f"{config['data']} with {card.source}",
        headline=[
            *(score[:3] for score in (*headline, *results.scores[1:])),
            *_calibration_error(results),
            ("seconds", f"{seconds:.0f}", ""),
        ],
        caption=results.how_intervals,
        notes=(*splits.notes, *result_remarks),
        history=result.history,
        kind=result.task.kind,
        validated=validated,
        sweep=probe and _sweep(probe),
        line=line,
        results=results,
        mistakes=worst_mistakes(result.evaluation, splits.val, card.classes),
        skipped=skipped,
        duplicates=[
            (splits.val.names[pair.val], splits.train.names[pair.train], *pair[2:])
            for pair in duplicates or ()
        ],
        details={
            "Data": {
                "training images": str(train_examples),
                "validation images": str(result.evaluation.examples) if validated else "none",
                _NAMES[result.task.kind]: str(len(card.classes)),
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
            f"tljax evaluate --data {_data_kind(config['data'])} --weights {quote(str(workdir))}",
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
        results=results,
        origin=origin,
        validated=validated,
        remarks=result_remarks,
        attacked=result.robust and (result.robust.top1, attack),
        chosen_by="" if result.config.recipe == "probe" else _chosen_by(result),
        seen_in_training=None if duplicates is None else len(duplicates),
        environment=environment,
        workdir=workdir,
    )
    with atomic_write(workdir / "README.md") as temporary:
        temporary.write_text(model_card(facts), "utf-8")
    lines = {score.title: score.text for score in headline}
    if duplicates:
        count = len({pair.val for pair in duplicates})
        lines["seen in training"] = (
            f"{count} validation images, or very similar ones: see the report"
        )
    return lines


def _data_kind(data: str) -> str:
    """Return what to evaluate on: a table after training from one."""
    return "TABLE.csv" if is_table(Path(data)) else "FOLDER"


_NAMES: dict[Kind, str] = {
    "classification": "classes",
    "multilabel": "labels",
    "regression": "numbers",
    "ordinal": "ordered classes",
}


def _headline(result: FitResult, val: Source, results: Results) -> list[Score]:
    """Return the most important metric of each evaluation."""
    name = result.evaluation.main_metric
    scores = []
    for title, evaluation in accuracies(result).items():
        same = evaluation is results.evaluation
        intervals = results.intervals if same else evaluation.intervals(val, [name])
        scores.append(score_of(evaluation, name, intervals.get(name), title))
    return scores


def _calibration_error(results: Results) -> list[tuple[str, str, str]]:
    """Return an entry of the headline, if there is a calibration."""
    calibration = results.calibration
    return [("calibration error", f"{calibration.before.error:.1%}", "")] if calibration else []


def _sweep(probe: Probe) -> Sweep:
    accuracy = probe.held_out_accuracy
    is_loss = accuracy is None
    held_out = probe.held_out_loss if is_loss else accuracy
    return Sweep(probe.l2_values, held_out, float(probe.l2), is_loss)


def _chosen_by(result: FitResult) -> str:
    """Return the title of the metric by which the best epoch was chosen."""
    if result.robust:
        return "accuracy under attack"
    choose_by = result.config.choose_by or ""
    metric = METRICS[result.task.kind].get(choose_by)
    return metric.title if metric else choose_by


def write_evaluation_report(
    path: Path,
    title: str,
    results: Results,
    source: Source,
    notes: Sequence[str],
    skipped: Sequence[tuple[str, str]],
) -> None:
    """Write the report of ``tljax evaluate``.

    Args:
        path: the HTML file.
        title: its heading.
        results: the results, see `summarize`.
        source: the images of ``results``.
        notes: sentences that the reader must know.
        skipped: the images that could not be read, as (name, reason).
    """
    evaluation = results.evaluation
    report = Report(
        title=title,
        headline=[
            *(score[:3] for score in results.scores),
            *_calibration_error(results),
            ("images", str(evaluation.examples), ""),
        ],
        caption=results.how_intervals,
        notes=notes,
        results=results,
        mistakes=worst_mistakes(evaluation, source, results.names),
        skipped=skipped,
        details={"Environment": run_directory.environment()},
    )
    write_report(path, report)
