"""The page about a run: one HTML file that needs nothing else, no network and no JavaScript."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image

from tljax.metrics.calibration import Calibration
from tljax.report.figures import (
    LogEntry,
    confusion_matrix,
    curves,
    reliability_diagram,
    sweep_curve,
)
from tljax.runtime.files import written_whole

if TYPE_CHECKING:
    import matplotlib.figure

MOST_ROWS_IN_SIGHT = 20  # longer tables fold the rest away
LARGEST_PIXEL_ART = 64  # the side, in pixels, up to which an image is enlarged with hard edges
PHOTO_SIDE = 320  # twice the width at which the page shows a photo


class Mistake(NamedTuple):
    """A wrong prediction.

    Attributes:
        image: ``[height, width, 3]`` RGB.
        name: which image it was, such as its path.
        label: the true class.
        predicted: the class the network said.
        probability: the network's probability for ``predicted``, in [0, 1].
    """

    image: UInt8[np.ndarray, "_height _width 3"]
    name: str
    label: str
    predicted: str
    probability: float


class SeenInTraining(NamedTuple):
    """A validation image that is also in the training set; see `tljax.studies.duplicates`.

    Attributes:
        val: which image it is, such as its path.
        train: which training image it equals.
        kind: ``exact``, ``near`` or ``mirrored``.
        similarity: at most 1.
    """

    val: str
    train: str
    kind: str
    similarity: float


class Sweep(NamedTuple):
    """How the L2 penalty of a linear probe was chosen; see `tljax.report.figures.sweep_curve`."""

    l2_values: Sequence[float] | Float[np.ndarray, " sweep"]
    held_out_accuracy: Sequence[float] | Float[np.ndarray, " sweep"]
    chosen: float


class ClassResult(NamedTuple):
    """How well one class was recognised.

    Attributes:
        name: the class.
        examples: how many examples it had.
        correct: how many of them were recognised.
        taken_for: the wrong class that was predicted most often; None if there was no mistake.
    """

    name: str
    examples: int
    correct: int
    taken_for: str | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the page shows. What is left out has no section.

    Attributes:
        title: what was done.
        headline: the few numbers that matter, as (label, value).
        notes: sentences that the reader must know, such as a warning about a tiny split.
        history: what was logged; see `tljax.report.figures.curves`.
        validated: whether there were validation images, apart from those of training.
        sweep: how the probe's L2 penalty was chosen.
        classes: the name of each class.
        confusion: the number of examples of class ``row`` predicted as class ``column``.
        mistakes: wrong predictions, the worst first.
        calibration: how far confidence and accuracy are apart.
        duplicates: the validation images that were seen in training.
        skipped: the images that could not be used, as (name, reason).
        details: for each group, such as "model" or "environment", its keys and values.
        next_steps: shell commands to go on with.
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
    duplicates: Sequence[SeenInTraining] = ()
    skipped: Sequence[tuple[str, str]] = ()
    details: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    next_steps: Sequence[str] = ()


def per_class(
    confusion: Integer[np.ndarray, "classes classes"], classes: Sequence[str]
) -> list[ClassResult]:
    """The result of each class, the lowest accuracy first; classes without examples come last."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
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


def write_report(path: Path, report: Report) -> None:
    """Writes the report as one HTML file; an older file stays whole until the new one is complete.

    Raises:
        RequestError: if the confusion matrix does not fit the classes.
        OSError: if the file cannot be written.
    """
    body = "".join(
        (
            f"<h1>{_text(report.title)}</h1>\n",
            _headline(report.headline),
            "".join(f'<p class="note">{_text(note)}</p>\n' for note in report.notes),
            _section("Training", _training(report)),
            _section("Confusion matrix", _confusion(report)),
            _section("Classes", _classes(report)),
            _section("Worst mistakes", _mistakes(report.mistakes)),
            _section("Calibration", _calibration(report.calibration)),
            _section("Seen in training", _duplicates(report.duplicates)),
            _section("Skipped files", _table(("file", "reason"), map(_cells, report.skipped))),
            _section("Details", _details(report.details)),
            _section("What to do next", "".join(map(_command, report.next_steps))),
        )
    )
    style = files("tljax.report").joinpath("page.css").read_text("utf-8")
    page = _PAGE.format(title=_text(report.title), style=style, body=body)
    with written_whole(path) as temporary:
        temporary.write_text(page, "utf-8")


def _text(text: str) -> str:
    """Makes any string safe to show, also the name of a file that is not valid Unicode."""
    return html.escape(text.encode("utf-8", "backslashreplace").decode())


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}</section>\n" if body else ""


def _headline(headline: Sequence[tuple[str, str]]) -> str:
    figures = "".join(
        f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>\n" for label, value in headline
    )
    return figures and f'<dl class="headline">\n{figures}</dl>\n'


def _training(report: Report) -> str:
    body = ""
    if report.history:
        body += _plot(
            curves(report.history, validated=report.validated), "Loss and accuracy over the epochs"
        )
    if report.sweep:
        body += _plot(sweep_curve(*report.sweep), "Held-out accuracy over the L2 penalty")
    return body


def _confusion(report: Report) -> str:
    if report.confusion is None:
        return ""
    return _plot(confusion_matrix(report.confusion, report.classes), "True and predicted classes")


def _classes(report: Report) -> str:
    if report.confusion is None:
        return ""
    rows = []
    for result in per_class(report.confusion, report.classes):
        share = result.correct / max(result.examples, 1)
        accuracy = f"{share:.1%}" if result.examples else "none"
        rows.append(
            f"<td>{_text(result.name)}</td>"
            f'<td class="number">{result.correct} of {result.examples}</td>'
            f'<td class="number">{accuracy}</td>'
            f'<td class="bar"><i style="width:{share:.1%}"></i></td>'
            f"<td>{_text(result.taken_for or '')}</td>"
        )
    return _table(("class", "correct", "accuracy", "", "most often taken for"), rows)


def _mistakes(mistakes: Sequence[Mistake]) -> str:
    figures = "".join(
        f"<figure>{_photo(mistake.image)}<figcaption><bdi>{_text(mistake.name)}:</bdi> "
        f"was <b>{_text(mistake.label)}</b>, said <b>{_text(mistake.predicted)}</b> "
        f"({mistake.probability:.1%})</figcaption></figure>\n"
        for mistake in mistakes
    )
    return figures and f'<div class="photos">\n{figures}</div>\n'


def _calibration(found: Calibration | None) -> str:
    if found is None:
        return ""
    plot = _plot(reliability_diagram(found), "Accuracy over confidence")
    return (
        f"{plot}<p>Dividing the logits by the temperature {found.temperature:.3g} makes the network"
        " as sure as it is right. The orange line was measured with temperatures fitted on other"
        " images than its own.</p>\n"
    )


def _duplicates(duplicates: Sequence[SeenInTraining]) -> str:
    rows = (
        f'{_cells((one.val, one.train, one.kind))}<td class="number">{one.similarity:.3f}</td>'
        for one in duplicates
    )
    return _table(("validation image", "training image", "kind", "similarity"), rows)


def _details(details: Mapping[str, Mapping[str, str]]) -> str:
    groups = "".join(
        f"<div><h3>{_text(name)}</h3>\n{_table((), map(_cells, group.items()))}</div>\n"
        for name, group in details.items()
    )
    return groups and f'<div class="details">\n{groups}</div>\n'


def _command(command: str) -> str:
    return f"<pre>{_text(command)}</pre>\n"


def _cells(texts: Sequence[str]) -> str:
    return "".join(f"<td>{_text(text)}</td>" for text in texts)


def _table(header: Sequence[str], rows: Iterable[str]) -> str:
    """A table whose later rows are folded away; ``rows`` are cells in HTML."""
    rows = list(rows)
    if not rows:
        return ""
    head = "".join(f"<th>{title}</th>" for title in header)
    head = f"<thead><tr>{head}</tr></thead>\n" if head else ""

    def table(rows: Sequence[str]) -> str:
        body = "".join(f"<tr>{cells}</tr>\n" for cells in rows)
        return f'<div class="table"><table>\n{head}<tbody>\n{body}</tbody></table></div>\n'

    shown, folded = rows[:MOST_ROWS_IN_SIGHT], rows[MOST_ROWS_IN_SIGHT:]
    if not folded:
        return table(shown)
    summary = f"<summary>{len(folded)} more</summary>"
    return f"{table(shown)}<details>{summary}\n{table(folded)}</details>\n"


def _plot(figure: "matplotlib.figure.Figure", description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=192, transparent=True)
    width, height = np.round(96 * figure.get_size_inches()).astype(int)
    size = f'width="{width}" height="{height}" alt="{description}"'
    return f'<div class="plot"><img {size} src="{_data_uri(buffer, "png")}"></div>\n'


def _photo(pixels: UInt8[np.ndarray, "_height _width 3"]) -> str:
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if max(image.size) <= LARGEST_PIXEL_ART:
        image.save(buffer, "PNG")
        return f'<img class="pixels" alt="" src="{_data_uri(buffer, "png")}">'
    image.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    image.save(buffer, "JPEG", quality=85)
    return f'<img alt="" src="{_data_uri(buffer, "jpeg")}">'


def _data_uri(buffer: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# The policy forbids whatever the page does not need: should a name ever slip through unescaped, it
# still cannot run or fetch anything.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}</body>
</html>
"""
