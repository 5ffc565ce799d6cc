"""The report of a run: one HTML file that needs no other file and no network."""

import base64
import hashlib
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image

from tljax.metrics.calibration import Calibration
from tljax.report.figures import (
    MAX_CLASSES_WITH_COUNTS,
    LogEntry,
    confusion_matrix,
    curves,
    reliability_diagram,
    sweep_curve,
)
from tljax.runtime.files import atomic_write

if TYPE_CHECKING:
    import matplotlib.figure

MAX_ROWS = 1_000  # per table, so that a report of many classes stays small
MAX_ROWS_WITHOUT_FILTER = 20  # a longer table scrolls and can be filtered
LARGEST_PIXEL_ART = 64  # largest side, in pixels, of an image that is enlarged with hard edges
PHOTO_SIDE = 320  # twice the width at which the page shows a photo


class Mistake(NamedTuple):
    """A wrong prediction.

    Attributes:
        image: ``[height, width, 3]`` RGB.
        name: the name of the image, such as its path.
        label: the true class.
        predicted: the predicted class.
        probability: the network's probability of ``predicted``, in [0, 1].
    """

    image: UInt8[np.ndarray, "_height _width 3"]
    name: str
    label: str
    predicted: str
    probability: float


class Sweep(NamedTuple):
    """Held-out accuracies of a linear probe; see `tljax.report.figures.sweep_curve`."""

    l2_values: Sequence[float] | Float[np.ndarray, " sweep"]
    held_out_accuracy: Sequence[float] | Float[np.ndarray, " sweep"]
    chosen: float


class ClassResult(NamedTuple):
    """The accuracy of one class.

    Attributes:
        name: the class.
        examples: number of its examples.
        correct: number of its examples that were classified correctly.
        most_confused_with: the most frequent wrong prediction; None without a mistake.
    """

    name: str
    examples: int
    correct: int
    most_confused_with: str | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """The contents of the page. An empty field has no section.

    Attributes:
        title: the heading of the page.
        headline: the most important numbers, as (label, value).
        notes: sentences that the reader must know, such as a warning about a tiny split.
        history: the log of the training, one entry per epoch; see `tljax.report.figures.curves`.
        validated: True if the validation images are not the training images.
        sweep: the accuracies from which the probe's L2 penalty was chosen.
        classes: the name of each class.
        confusion: the number of examples of class ``row`` predicted as class ``column``.
        mistakes: wrong predictions, the most confident first.
        calibration: the calibration before and after temperature scaling.
        duplicates: the validation images that are also in the training set, as (validation image,
            training image, kind, similarity); see `tljax.studies.duplicates.Duplicate`.
        skipped: the images that could not be used, as (name, reason).
        details: for each group, such as "model" or "environment", its keys and values.
        next_steps: shell commands that the reader may want to run next.
    """

    title: str
    headline: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    history: Sequence[LogEntry] = ()
    validated: bool = True
    sweep: Sweep | None = None
    classes: Sequence[str] = ()
    confusion: Integer[np.ndarray, "classes classes"] | None = None
    mistakes: Sequence[Mistake] = ()
    calibration: Calibration | None = None
    duplicates: Sequence[tuple[str, str, str, float]] = ()
    skipped: Sequence[tuple[str, str]] = ()
    details: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    next_steps: Sequence[str] = ()


def per_class(
    confusion: Integer[np.ndarray, "classes classes"], classes: Sequence[str]
) -> list[ClassResult]:
    """Return the result of each class, the lowest accuracy first, classes without examples last."""
    wrong = _off_diagonal(confusion)
    results = [
        ClassResult(
            name,
            int(confusion[i].sum()),
            int(confusion[i, i]),
            classes[int(wrong[i].argmax())] if wrong[i].any() else None,
        )
        for i, name in enumerate(classes)
    ]
    return sorted(results, key=lambda r: (r.correct / r.examples if r.examples else 2, -r.examples))


def _off_diagonal(confusion: np.ndarray) -> np.ndarray:
    """Return the confusion matrix without the correct predictions."""
    return confusion - np.diag(np.diag(confusion))


def write_report(path: Path, report: Report) -> None:
    """Write the report as one HTML file; an older file is replaced once the new one is complete.

    Raises:
        RequestError: if the confusion matrix does not fit the classes or the file cannot be
            written.
    """
    sections = {
        "Training": _training(report),
        "Confusion matrix": _confusion(report),
        "Classes": _classes(report),
        "Worst mistakes": _mistakes(report.mistakes),
        "Calibration": _calibration(report.calibration),
        "Seen in training": _duplicates(report.duplicates),
        "Skipped files": _table(
            "Skipped files", ("file", "reason"), [_cells(*row) for row in report.skipped]
        ),
        "Details": _details(report.details),
        "What to do next": "".join(f"<pre>{_text(line)}</pre>\n" for line in report.next_steps),
    }
    notes = "".join(f'<p class="note">{_text(note)}</p>\n' for note in report.notes)
    body = "".join(
        f"<section>\n<h2>{title}</h2>\n{content}</section>\n"
        for title, content in sections.items()
        if content
    )
    style, script = (
        files("tljax.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js")
    )
    page = _PAGE.format(
        title=_text(report.title),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        body=_headline(report.headline) + notes + body,
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, "utf-8")


def encodable(text: str) -> str:
    """Escape the bytes of a file name that are not Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


def _text(text: str) -> str:
    return html.escape(encodable(text))


def _headline(headline: Sequence[tuple[str, str]]) -> str:
    figures = "".join(
        f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>\n" for label, value in headline
    )
    return figures and f'<dl class="headline">\n{figures}</dl>\n'


def _training(report: Report) -> str:
    body = ""
    if report.history:
        figure = curves(report.history, validated=report.validated)
        body += _plot(figure, "Loss and accuracy after each epoch")
    if report.sweep:
        body += _plot(sweep_curve(*report.sweep), "Held-out accuracy for each L2 penalty")
    return body


def _confusion(report: Report) -> str:
    if report.confusion is None:
        return ""
    description = f"Confusion matrix of {len(report.classes)} classes: true in rows, predicted in"
    plot = _plot(confusion_matrix(report.confusion, report.classes), f"{description} columns")
    if len(report.classes) <= MAX_CLASSES_WITH_COUNTS:
        return plot
    rows = [
        _cells(label, predicted) + _numbers(f"{examples}", f"{share:.1%}")
        for label, predicted, examples, share in worst_pairs(report.confusion, report.classes)
    ]
    header = "true class", "predicted as", "images", "share of the class"
    return plot + _table("Confused classes, the most frequent first", header, rows)


def worst_pairs(
    confusion: Integer[np.ndarray, "classes classes"], classes: Sequence[str]
) -> list[tuple[str, str, int, float]]:
    """Return the pairs of classes that were confused, the most frequent first.

    Args:
        confusion: the number of examples of class ``row`` predicted as class ``column``.
        classes: the name of each class.

    Returns:
        For each pair the true class, the predicted class, the number of examples, and their share
        of the examples of the true class.
    """
    wrong = _off_diagonal(confusion)
    rows, columns = wrong.nonzero()
    examples = wrong[rows, columns]
    shares = examples / confusion.sum(1)[rows]
    return [
        (classes[int(rows[i])], classes[int(columns[i])], int(examples[i]), float(shares[i]))
        for i in np.lexsort((-shares, -examples))
    ]


def _classes(report: Report) -> str:
    if report.confusion is None:
        return ""
    rows = []
    for result in per_class(report.confusion, report.classes):
        share = result.correct / max(result.examples, 1)
        accuracy = f"{share:.1%}" if result.examples else "none"
        rows.append(
            _cells(result.name)
            + _numbers(f"{result.correct} of {result.examples}", accuracy)
            + f'<td class="bar"><i style="width:{share:.1%}"></i></td>'
            + _cells(result.most_confused_with or "")
        )
    header = "class", "correct", "accuracy", "", "most often taken for"
    return _table("Classes, the lowest accuracy first", header, rows)


def _mistakes(mistakes: Sequence[Mistake]) -> str:
    figures = "".join(
        f"<figure>{_photo(mistake.image, f'Image of class {mistake.label}')}"
        f"<figcaption><bdi>{_text(mistake.name)}</bdi> "
        f"is <b>{_text(mistake.label)}</b>, predicted <b>{_text(mistake.predicted)}</b> "
        f"({mistake.probability:.1%})</figcaption></figure>\n"
        for mistake in mistakes
    )
    return figures and f'<div class="photos">\n{figures}</div>\n'


def _calibration(calibration: Calibration | None) -> str:
    if calibration is None:
        return ""
    plot = _plot(reliability_diagram(calibration), "Accuracy over confidence")
    return (
        f"{plot}<p>Divide the logits by the temperature {calibration.temperature:.3g} to calibrate"
        " the probabilities. The orange line was measured with temperatures that were fitted to"
        " other images.</p>\n"
    )


def _duplicates(duplicates: Sequence[tuple[str, str, str, float]]) -> str:
    header = "validation image", "training image", "kind", "similarity"
    rows = [_cells(*names) + _numbers(f"{similarity:.3f}") for *names, similarity in duplicates]
    return _table("Validation images seen in training", header, rows)


def _details(details: Mapping[str, Mapping[str, str]]) -> str:
    groups = "".join(
        f"<div><h3>{_text(name)}</h3>\n"
        f"{_table(name, (), [_cells(*item) for item in group.items()])}</div>\n"
        for name, group in details.items()
    )
    return groups and f'<div class="details">\n{groups}</div>\n'


def _cells(*texts: str) -> str:
    return "".join(f"<td>{_text(text)}</td>" for text in texts)


def _numbers(*texts: str) -> str:
    return "".join(f'<td class="number">{text}</td>' for text in texts)


def _table(title: str, header: Sequence[str], rows: Sequence[str]) -> str:
    """Return a table in a box that scrolls, with a field to filter its rows if there are many.

    Args:
        title: the contents and the order of the rows.
        header: the heading of each column; without one the table has no filter.
        rows: for each row, its cells in HTML; only the first `MAX_ROWS` are shown.
    """
    if not rows:
        return ""
    head = "".join(f"<th>{text}</th>" for text in header)
    head = head and f"<thead><tr>{head}</tr></thead>\n"
    body = "".join(f"<tr>{cells}</tr>\n" for cells in rows[:MAX_ROWS])
    box = _box("table", title, f"<table>\n{head}<tbody>\n{body}</tbody></table>")
    if len(rows) <= MAX_ROWS_WITHOUT_FILTER or not header:
        return box
    cut = f", {MAX_ROWS:,} shown" if len(rows) > MAX_ROWS else ""
    label = _text(title)
    return (
        f'<p class="filter">{label}: {len(rows):,} rows{cut}<input type="search" hidden'
        f' placeholder="filter" aria-label="Filter the rows: {label}"></p>\n{box}'
    )


def _box(kind: str, label: str, content: str) -> str:
    """Return a box that scrolls, also by keyboard."""
    label = _text(label)
    return f'<div class="{kind}" role="group" tabindex="0" aria-label="{label}">{content}</div>\n'


def _plot(figure: "matplotlib.figure.Figure", description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=192, transparent=True)
    width, height = np.round(96 * figure.get_size_inches()).astype(int)
    # On a narrow screen, a plot scrolls instead of becoming too small to read.
    size = f'width="{width}" height="{height}" style="min-width:{0.6 * width:.0f}px"'
    image = f'<img {size} alt="{description}" src="{_data_uri(buffer, "png")}">'
    return _box("plot", "Plot", image)


def _photo(pixels: UInt8[np.ndarray, "_height _width 3"], description: str) -> str:
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    alt = _text(description)
    if max(image.size) <= LARGEST_PIXEL_ART:
        image.save(buffer, "PNG")
        return f'<img class="pixels" alt="{alt}" src="{_data_uri(buffer, "png")}">'
    image.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    image.save(buffer, "JPEG", quality=85)
    return f'<img alt="{alt}" src="{_data_uri(buffer, "jpeg")}">'


def _data_uri(buffer: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# The policy allows no script but the one of this package and no request: a name that should ever
# slip through unescaped can neither run nor fetch anything.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}<script>{script}</script>
</body>
</html>
"""
