# ruff: noqa: PLC0415 - matplotlib takes a second to import: only what draws a plot should wait for it
"""Plots of a run: curves, the L2 sweep, the confusion matrix and others.

Matplotlib figures that belong to no global state; the caller saves them:
``curves(history).savefig("curves.svg")``.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Integer

from tljax.metrics.calibration import Calibration, CalibrationBins
from tljax.report.grid import INK, printable
from tljax.runtime.errors import RequestError
from tljax.runtime.files import written_whole
from tljax.studies.compare import Candidate
from tljax.studies.learning_rate import RangeTest

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.axis
    import matplotlib.figure

# The blue and vermilion of Okabe and Ito (2008), which colour-blind readers tell apart.
BLUE, VERMILION = "#0072b2", "#d55e00"
PALE = "#767676"

MOST_CLASSES_WITH_COUNTS = 20
MOST_CLASSES_WITH_NAMES = 60
LONGEST_CLASS_NAME = 24  # characters on an axis

LogEntry = Mapping[str, Any]
"""One logged row: ``epoch`` and whatever was measured then; see `curves`."""


def curves(history: Sequence[LogEntry], *, validated: bool = True) -> "matplotlib.figure.Figure":
    """Draws loss and accuracy over the epochs, side by side.

    Args:
        history: what was logged, in order. Each row holds ``epoch``, which counts on through all
            phases and may be a fraction, and any of ``train_loss``, ``val_loss``, ``train_top1``,
            ``val_top1``, ``val_robust_loss``, ``val_robust_top1`` (accuracies in [0, 1]) and
            ``phase``. A missing key means not measured then; a NaN or None leaves a gap in the
            line. Where there is a ``train_cross_entropy`` it is drawn instead of ``train_loss``,
            which may be smoothed or weighed and does not compare with the others. Other keys and
            rows without an epoch are ignored.
        validated: whether ``val`` is of validation images, and not of those of training.
    """
    history = [
        {**entry, "train_loss": entry["train_cross_entropy"]}
        if "train_cross_entropy" in entry
        else entry
        for entry in history
        if entry.get("epoch") is not None
    ]
    phases = _phases(history)
    figure = _figure(9, 3.4)
    panels = figure.subplots(1, 2, sharex=True)
    measured = "validation" if validated else "training, after the epoch"
    for axes, title, metric in zip(panels, ("Loss", "Accuracy"), ("loss", "top1"), strict=True):
        _style(axes, title)
        for split, name, colour in _SPLITS:
            key = f"{split}_{metric}"
            entries = [entry for entry in history if key in entry]
            values = np.array([entry[key] for entry in entries], float)
            if np.isfinite(values).any():
                epochs = np.array([entry["epoch"] for entry in entries], float)
                marker = "o" if len(values) <= 40 else None
                label = name.format(measured)
                axes.plot(epochs, values, color=colour, marker=marker, markersize=4, label=label)
        if axes.lines:
            axes.set_xlabel("epoch")
            axes.legend(frameon=False, fontsize=10, labelcolor=INK)
            _mark_phases(axes, phases)
        else:
            axes.tick_params(bottom=False, labelbottom=False, left=False, labelleft=False)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=PALE)
    _percent(panels[1].yaxis)
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    epochs = {float(entry["epoch"]) for entry in history}
    if len(epochs) == 1:
        panels[0].set_xlim(min(epochs) - 1, max(epochs) + 1)
    return figure


_SPLITS = (
    ("train", "training", BLUE),
    ("val", "{}", VERMILION),
    ("val_robust", "{}, attacked", PALE),
)


def _phases(history: Sequence[LogEntry]) -> list[tuple[float, str]]:
    """The name of each phase and the epoch where it begins, halfway between two logged ones."""
    named = [
        (float(entry["epoch"]), str(entry["phase"])) for entry in history if entry.get("phase")
    ]
    return named[:1] + [
        ((last + first) / 2, name)
        for (last, before), (first, name) in pairwise(named)
        if name != before
    ]


def _mark_phases(axes: "matplotlib.axes.Axes", phases: Sequence[tuple[float, str]]) -> None:
    """Draws a faint line between two phases, with their names above."""
    if len(phases) < 2:
        return
    axes.set_title(axes.get_title("left"), loc="left", pad=20)
    for x, _ in phases[1:]:
        axes.axvline(x, color="0.8", linewidth=1, zorder=0)
    # The first phase may be a single epoch: its name ends at the line instead of beginning there.
    labels = [
        (phases[1][0], phases[0][1], -3, "right"),
        *((x, name, 3, "left") for x, name in phases[1:]),
    ]
    for x, name, shift, side in labels:
        axes.annotate(
            printable(name),
            (x, 1),
            (shift, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha=side,
            fontsize=9,
            color=PALE,
            parse_math=False,
        )


def sweep_curve(
    l2_values: Sequence[float] | Float[np.ndarray, " sweep"],
    held_out_accuracy: Sequence[float] | Float[np.ndarray, " sweep"],
    chosen: float,
) -> "matplotlib.figure.Figure":
    """Draws the held-out accuracy of a linear probe over the strength of its L2 penalty.

    Args:
        l2_values: the penalties that were tried, positive, in any order.
        held_out_accuracy: the accuracy at each, in [0, 1].
        chosen: the penalty that the final probe uses, one of ``l2_values``.
    """
    order = np.argsort(l2_values)
    l2 = np.asarray(l2_values, float)[order]
    accuracy = np.asarray(held_out_accuracy, float)[order]
    best = int(np.argmin(np.abs(l2 - chosen)))

    figure = _figure(5, 3.4)
    axes = figure.subplots()
    _style(axes, "L2 sweep of the probe")
    axes.set_xscale("log")
    axes.set_xlabel("L2 penalty")
    axes.set_ylabel("held-out accuracy", fontsize=10, color=INK)
    axes.plot(l2, accuracy, color=BLUE, marker="o", markersize=4)
    axes.plot(
        l2[best],
        accuracy[best],
        color=VERMILION,
        marker="D",
        markersize=8,
        linestyle="none",
        label=f"chosen: {l2[best]:.2g}, {accuracy[best]:.1%}",
    )
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    _percent(axes.yaxis)
    return figure


def learning_rates(test: RangeTest) -> "matplotlib.figure.Figure":
    """The smoothed training loss over the learning rate, and the rate that is suggested."""
    figure = _figure(6, 3.4)
    axes = figure.add_subplot()
    axes.plot(test.rates, test.losses, color=BLUE)
    axes.axvline(test.suggestion, color=VERMILION, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    lowest = np.nanmin(test.losses)
    axes.set_ylim(0.95 * lowest, 1.05 * max(test.losses[0], 2 * lowest))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss, smoothed")
    _style(axes, f"suggested: {test.suggestion:.1e}")
    return figure


def robustness_curve(
    epsilons: Sequence[float] | Float[np.ndarray, " radii"],
    clean: float,
    robust: Mapping[str, Sequence[tuple[float, float]]],
) -> "matplotlib.figure.Figure":
    """Draws the accuracy under each attack over epsilon, with bars of one standard error.

    Args:
        epsilons: ascending, in units of 1/255.
        clean: accuracy without an attack, in [0, 1]; the curves begin there.
        robust: for each attack (accuracy, standard error) at every epsilon.
    """
    figure = _figure(6, 3.6)
    axes = figure.subplots()
    _style(axes, "Accuracy under attack")
    radii = [0, *epsilons] if epsilons[0] > 0 else list(epsilons)
    colours = (BLUE, VERMILION, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
    for number, (name, shares) in enumerate(robust.items()):
        start = [(clean, 0.0)] * (len(radii) - len(shares))
        values, errors = np.array([*start, *shares], float).T
        axes.errorbar(
            radii,
            values,
            errors,
            color=colours[number % len(colours)],
            marker="osD^v<>"[number % 7],
            markersize=4,
            capsize=2,
            label=name,
        )
    axes.set_xlabel("epsilon, in units of 1/255")
    axes.set_ylabel("accuracy", fontsize=10, color=INK)
    axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    _percent(axes.yaxis)
    return figure


def accuracy_and_speed(candidates: Sequence[Candidate]) -> "matplotlib.figure.Figure":
    """Draws the accuracy of networks over their speed; the area of a dot is its parameters.

    Up and to the right is better. A line joins those that no other beats in both.
    """
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    _style(axes, "Accuracy against speed")
    best = [
        one
        for one in sorted(candidates, key=lambda one: one.images_per_second)
        if not any(
            other.val_top1 > one.val_top1 and other.images_per_second > one.images_per_second
            for other in candidates
        )
    ]
    axes.plot(
        [one.images_per_second for one in best],
        [one.val_top1 for one in best],
        color="0.8",
        linewidth=1,
        zorder=0,
    )
    for one in candidates:
        at = one.images_per_second, one.val_top1
        colour = BLUE if one in best else PALE
        axes.errorbar(*at, yerr=one.error, color=colour, linewidth=1, capsize=2)
        axes.scatter(*at, 20 + 4 * one.parameters / 1e6, color=colour, alpha=0.6, linewidths=0)
        axes.annotate(
            _shorten(printable(one.name)),
            at,
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=9,
            color=INK,
            parse_math=False,  # pyright: ignore[reportArgumentType]
        )
    axes.set_xscale("log")
    for format_axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        format_axis(lambda value, _: f"{value:g}")
    axes.set_xlabel("images/s of the features")
    axes.set_ylabel("accuracy of a linear probe", fontsize=10, color=INK)
    axes.margins(x=0.15, y=0.15)
    _percent(axes.yaxis)
    return figure


def write_figure(path: Path, figure: "matplotlib.figure.Figure") -> None:
    """Writes a whole PNG file or none."""
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def reliability_diagram(found: Calibration) -> "matplotlib.figure.Figure":
    """Draws accuracy over confidence, before and after temperature scaling (Guo et al. 2017).

    A dot is a bin, its area the share of the examples; on the diagonal the network is right as
    often as it says. Below it, it is too sure of itself.
    """
    figure = _figure(4.6, 4.6)
    axes = figure.subplots()
    _style(axes, "Calibration")
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=1, zorder=0)

    def draw(bins: CalibrationBins, name: str, colour: str) -> None:
        filled = bins.examples > 0
        x, y = bins.confidence[filled], bins.accuracy[filled]
        area = 12 + 300 * bins.examples[filled] / bins.examples.sum()
        axes.plot(x, y, color=colour, linewidth=1, label=f"{name}: error {bins.error:.1%}")
        axes.scatter(x, y, area, color=colour, alpha=0.6, linewidths=0)

    draw(found.before, "as it is", BLUE)
    draw(found.after, "after temperature scaling", VERMILION)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", xlabel="confidence")
    axes.set_ylabel("accuracy", fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    _percent(axes.xaxis)
    _percent(axes.yaxis)
    return figure


def confusion_matrix(
    matrix: Integer[np.ndarray, "classes classes"], classes: Sequence[str]
) -> "matplotlib.figure.Figure":
    """Draws which class was taken for which.

    The colour is the share of a row, that is, of the examples of one class. Up to 20 classes have
    their counts written into the cells (zeros are left blank), up to 60 their names at the axes.
    From 400 on, where a cell would be too fine to see, each is drawn a few cells wide, and where
    two meet the larger share shows.

    Args:
        matrix: the number of examples of class ``row`` that were predicted as class ``column``.
        classes: the name of each class.

    Raises:
        RequestError: if the matrix is not square with one row for each class.
    """
    from matplotlib.colors import PowerNorm

    count = len(classes)
    if matrix.shape != (count, count):
        raise RequestError(
            f"confusion matrix: got shape {matrix.shape} for {count} classes; "
            f"expected {(count, count)}"
        )
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    if blur := count // 400:
        window = 2 * blur + 1
        padded = np.pad(share, blur)
        share = np.lib.stride_tricks.sliding_window_view(padded, (window, window)).max((2, 3))
    with_counts = count <= MOST_CLASSES_WITH_COUNTS
    cell = min(0.9, max(0.45, 3 / count)) if with_counts else 7 / count  # inches
    side = count * cell + 1.6

    figure = _figure(side if with_counts else side + 1, side)
    axes = figure.subplots()
    # The square root shows a confusion of one example in a hundred, which would else look white.
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    axes.set_xlabel("predicted", fontsize=11, color=INK)
    axes.set_ylabel("true class", fontsize=11, color=INK)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=10 if with_counts else 8, labelcolor=INK)
    if count <= MOST_CLASSES_WITH_NAMES:
        names = [_shorten(printable(name)) for name in classes]
        upright = 0.09 * max(map(len, names)) > cell
        axes.set_xticks(range(count), names, rotation=90 if upright else 0, parse_math=False)
        axes.set_yticks(range(count), names, parse_math=False)
    if with_counts:
        for row, column in zip(*matrix.nonzero(), strict=True):
            colour = "white" if share[row, column] > 0.4 else INK
            text = str(matrix[row, column])
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    else:
        bar = figure.colorbar(image, shrink=0.5, aspect=30, pad=0.02, ticks=[0, 0.01, 0.1, 0.5, 1])
        bar.set_label("share of the class", fontsize=10, color=INK)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=9, labelcolor=INK)
        _percent(bar.ax.yaxis)
    return figure


def _shorten(name: str) -> str:
    return name if len(name) <= LONGEST_CLASS_NAME else name[: LONGEST_CLASS_NAME - 1] + "…"


def _figure(width: float, height: float) -> "matplotlib.figure.Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _style(axes: "matplotlib.axes.Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color("0.6")
    axes.tick_params(labelsize=10, color="0.6", labelcolor=INK)
    axes.xaxis.label.set(fontsize=10, color=INK)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)


def _percent(axis: "matplotlib.axis.Axis") -> None:
    axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
