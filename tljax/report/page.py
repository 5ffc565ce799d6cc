"""The report of a run: one HTML file that needs no other file and no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tljax.report.evaluation_figures import (
    MAX_CLASSES_WITH_COUNTS,
    confusion_matrix,
    label_precisions,
    predictions_and_residuals,
    reliability_diagram,
)
from tljax.report.figures import LogEntry, Sweep, curves, interpolation_curve, sweep_curve
from tljax.report.markup import cells, escape, numbers, page, photo, plot, table
from tljax.report.mistakes import Mistake
from tljax.report.results import (
    LABEL_HEADER,
    NUMBER_HEADER,
    Results,
    calibration_advice,
    label_rows,
    number_rows,
    per_class,
    unit_of,
    worst_pairs,
)
from tljax.runtime.files import atomic_write
from tljax.runtime.settings import Kind
from tljax.studies.interpolation import Line

MAX_NUMBERS_PLOTTED = 8


@dataclass(frozen=True, kw_only=True)
class Report:
    """The contents of the page. An empty field has no section.

    Attributes:
        title: the heading of the page.
        headline: the most important values, as (label, value, interval); "" for no interval.
        caption: what the intervals of the headline are.
        notes: sentences that the reader must know, such as a warning about a tiny split.
        history: the log of the training, one entry per epoch; see `tljax.report.figures.curves`.
        kind: kind of the task.
        validated: True if the validation images are not the training images.
        sweep: the held-out scores from which the probe's L2 penalty was chosen.
        line: the networks between the start and the end of fine-tuning.
        results: the results on the validation images.
        mistakes: the worst mistakes, the worst one first.
        duplicates: the validation images that are also in the training set, as (validation image,
            training image, kind, similarity); see `tljax.studies.duplicates.Duplicate`.
        skipped: the images that could not be used, as (name, reason).
        details: for each group, such as "model" or "environment", its keys and values.
        next_steps: shell commands that the reader may want to run next.
    """

    title: str
    headline: Sequence[tuple[str, str, str]] = ()
    caption: str = ""
    notes: Sequence[str] = ()
    history: Sequence[LogEntry] = ()
    kind: Kind = "classification"
    validated: bool = True
    sweep: Sweep | None = None
    line: Line | None = None
    results: Results | None = None
    mistakes: Sequence[Mistake] = ()
    duplicates: Sequence[tuple[str, str, str, float]] = ()
    skipped: Sequence[tuple[str, str]] = ()
    details: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    next_steps: Sequence[str] = ()


def write_report(path: Path, report: Report) -> None:
    """Write the report as one HTML file; an older file is replaced once the new one is complete.

    Raises:
        RequestError: if the results do not fit the classes or the file cannot be written.
    """
    sections = {
        "Training": _training(report),
        "Interpolation": _interpolation(report.line) if report.line else "",
        **(_results(report.results) if report.results else {}),
        "Worst mistakes": _mistakes(report.mistakes),
        "Calibration": _calibration(report.results) if report.results else "",
        "Seen in training": _duplicates(report.duplicates),
        "Skipped files": table(
            "Skipped files", ("file", "reason"), [cells(*row) for row in report.skipped]
        ),
        "Details": _details(report.details),
        "What to do next": "".join(f"<pre>{escape(line)}</pre>\n" for line in report.next_steps),
    }
    notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in report.notes)
    body = "".join(
        f"<section>\n<h2>{title}</h2>\n{content}</section>\n"
        for title, content in sections.items()
        if content
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page(report.title, _headline(report) + notes + body), "utf-8")


def _headline(report: Report) -> str:
    figures = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd>"
        + (f'<dd class="interval">{escape(interval)}</dd>' if interval else "")
        + "</div>\n"
        for label, value, interval in report.headline
    )
    caption = f'<p class="caption">{escape(report.caption)}</p>\n' if report.caption else ""
    return (figures and f'<dl class="headline">\n{figures}</dl>\n') + caption


def _training(report: Report) -> str:
    body = ""
    if report.history:
        figure = curves(report.history, validated=report.validated, kind=report.kind)
        body += plot(figure, "Loss and metric after each epoch")
    if report.sweep:
        body += plot(sweep_curve(report.sweep), "Held-out score for each L2 penalty")
    return body


def _interpolation(line: Line) -> str:
    """Return the plot of the line, and a table of its points."""
    rows = [numbers(*texts) for texts in interpolation_rows(line)]
    figure = plot(interpolation_curve(line), "Metric between the start and the end of fine-tuning")
    return figure + table("Networks between both", interpolation_header(line), rows)


def interpolation_header(line: Line) -> tuple[str, ...]:
    """Return the names of the columns of `interpolation_rows`."""
    evaluation = line.points[0].evaluation
    title = evaluation.metrics[evaluation.main_metric].title
    shifted = line.points[0].shifted is not None
    return ("weight of the end", f"{title}, validation", *((f"{title}, shifted",) * shifted))


def interpolation_rows(line: Line) -> list[tuple[str, ...]]:
    """Return the weight and the main metric of every point as text."""
    return [
        (
            f"{point.weight:g}",
            *(part.format(part.main_metric) for part in (point.evaluation, point.shifted) if part),
        )
        for point in line.points
    ]


def _results(results: Results) -> dict[str, str]:
    """Return the sections of a task by their title."""
    if results.kind == "multilabel":
        return {"Labels": _labels(results)}
    if results.kind == "regression":
        return {"Numbers": _numbers_section(results)}
    return {"Confusion matrix": _confusion(results), "Classes": _classes(results)}


def _confusion(results: Results) -> str:
    confusion, classes = results.evaluation.confusion, results.names
    description = f"Confusion matrix of {len(classes)} classes: true in rows, predicted in columns"
    image = plot(confusion_matrix(confusion, classes), description)
    if len(classes) <= MAX_CLASSES_WITH_COUNTS:
        return image
    rows = [
        cells(label, predicted) + numbers(f"{examples}", f"{share:.1%}")
        for label, predicted, examples, share in worst_pairs(confusion, classes)
    ]
    header = "true class", "predicted as", "images", "share of the class"
    return image + table("Confused classes, the most frequent first", header, rows)


def _classes(results: Results) -> str:
    rows = []
    for result in per_class(results.evaluation.confusion, results.names):
        share = result.correct / max(result.examples, 1)
        accuracy = f"{share:.1%}" if result.examples else "none"
        rows.append(
            cells(result.name)
            + numbers(f"{result.correct} of {result.examples}", accuracy)
            + f'<td class="bar"><i style="width:{share:.1%}"></i></td>'
            + cells(result.most_confused_with or "")
        )
    header = "class", "correct", "accuracy", "", "most often taken for"
    return table("Classes, the lowest accuracy first", header, rows)


def _labels(results: Results) -> str:
    values = results.per_name
    figure = label_precisions(
        results.names,
        values["average_precision"],
        results.per_name_intervals.get("average_precision"),
        values["positive"] / values["known"].clip(1),
    )
    rows = [cells(name) + numbers(*texts) for name, *texts in label_rows(results)]
    return plot(figure, "Average precision of each label") + table(
        "Labels, the lowest average precision first", LABEL_HEADER, rows
    )


def _numbers_section(results: Results) -> str:
    evaluation = results.evaluation
    rows = [cells(name, unit) + numbers(*texts) for name, unit, *texts in number_rows(results)]
    plots = (
        plot(
            predictions_and_residuals(
                name, unit_of(results, i), evaluation.decoded[:, i], evaluation.labels[:, i]
            ),
            f"Predicted over true {name}, and residuals",
        )
        for i, name in enumerate(results.names[:MAX_NUMBERS_PLOTTED])
    )
    return table("Numbers", NUMBER_HEADER, rows) + "".join(plots)


def _mistakes(mistakes: Sequence[Mistake]) -> str:
    figures = "".join(map(_mistake, mistakes))
    return figures and f'<div class="photos">\n{figures}</div>\n'


def _mistake(mistake: Mistake) -> str:
    subject = f"{escape(mistake.subject)} " if mistake.subject else ""
    detail = f" ({escape(mistake.detail)})" if mistake.detail else ""
    return (
        f"<figure>{photo(mistake.image, f'Image labeled {mistake.truth}')}"
        f"<figcaption><bdi>{escape(mistake.name)}</bdi> "
        f"{subject}is <b>{escape(mistake.truth)}</b>,"
        f" {mistake.verb} <b>{escape(mistake.prediction)}</b>{detail}</figcaption></figure>\n"
    )


def _calibration(results: Results) -> str:
    calibration = results.calibration
    if calibration is None:
        return ""
    axes = ("probability of a label", "applies") if results.kind == "multilabel" else ()
    image = plot(reliability_diagram(calibration, *axes), "Accuracy over confidence")
    return (
        f"{image}<p>The temperature is {calibration.temperature:.3g}. {calibration_advice(results)}"
        " The orange line was measured with temperatures that were fitted to other images.</p>\n"
    )


def _duplicates(duplicates: Sequence[tuple[str, str, str, float]]) -> str:
    header = "validation image", "training image", "kind", "similarity"
    rows = [cells(*names) + numbers(f"{similarity:.3f}") for *names, similarity in duplicates]
    return table("Validation images seen in training", header, rows)


def _details(details: Mapping[str, Mapping[str, str]]) -> str:
    groups = "".join(
        f"<div><h3>{escape(name)}</h3>\n"
        f"{table(name, (), [cells(*item) for item in group.items()])}</div>\n"
        for name, group in details.items()
    )
    return groups and f'<div class="details">\n{groups}</div>\n'
