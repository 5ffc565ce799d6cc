# ruff: noqa: PLC0415 - matplotlib takes a second to import, so it is imported when a plot is drawn
"""Plots of a run: training curves, the L2 sweep, the confusion matrix and others.

Every function returns a Matplotlib figure without global state, for the caller to save:
``curves(history).savefig("curves.svg")``.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Integer
from scipy.ndimage import maximum_filter

from tljax.metrics.calibration import Calibration, CalibrationBins
from tljax.report.grid import INK, printable
from tljax.runtime.errors import RequestError
from tljax.runtime.files import atomic_write
from tljax.studies.compare import Candidate
from tljax.studies.learning_rate import RangeTest

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.axis
    import matplotlib.figure

# The blue and vermilion of Okabe and Ito (2008), which color-blind readers can tell apart.
BLUE, VERMILION = "#0072b2", "#d55e00"
PALE = "#767676"

MAX_CLASSES_WITH_COUNTS = 20
MAX_CLASSES_WITH_NAMES = 60
LONGEST_CLASS_NAME = 24  # characters on an axis

LogEntry = Mapping[str, Any]
"""An entry of the log: ``epoch`` and the measurements of that epoch; see `curves`."""


def curves(history: Sequence[LogEntry], *, validated: bool = True) -> "matplotlib.figure.Figure":
    """Plot loss and accuracy over the epochs, side by side.

    Args:
        history: the log, in order. Each entry has ``epoch``, which increases through all phases and
            may be a fraction, and any of ``train_loss``, ``val_loss``, ``train_top1``,
            ``val_top1``, ``val_robust_loss``, ``val_robust_top1`` (accuracies in [0, 1]) and
            ``phase``. A missing key means not measured then; a NaN or None leaves a gap in the
            line. ``train_cross_entropy`` is plotted instead of ``train_loss`` where it exists,
            because a smoothed or weighted loss is not comparable with ``val_loss``. Other keys and
            entries without an epoch are ignored.
        validated: False if ``val`` was measured on the training images.
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
        for split, name, color in _SPLITS:
            key = f"{split}_{metric}"
            entries = [entry for entry in history if key in entry]
            values = np.array([entry[key] for entry in entries], float)
            if np.isfinite(values).any():
                epochs = np.array([entry["epoch"] for entry in entries], float)
                marker = "o" if len(values) <= 40 else None
                label = name.format(measured)
                axes.plot(epochs, values, color=color, marker=marker, markersize=4, label=label)
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
    """Return the start, halfway between two epochs, and the name of each phase."""
    named = [
        (float(entry["epoch"]), str(entry["phase"])) for entry in history if entry.get("phase")
    ]
    return named[:1] + [
        ((last + first) / 2, name)
        for (last, before), (first, name) in pairwise(named)
        if name != before
    ]


def _mark_phases(axes: "matplotlib.axes.Axes", phases: Sequence[tuple[float, str]]) -> None:
    """Draw a faint line between two phases, with their names above."""
    if len(phases) < 2:
        return
    axes.set_title(axes.get_title("left"), loc="left", pad=20)
    for number, (start, name) in enumerate(phases):
        if number:
            axes.axvline(start, color="0.8", linewidth=1, zorder=0)
        # The first phase may be a single epoch, so its name ends at the line.
        side = "left" if number else "right"
        position = phases[max(number, 1)][0], 1
        offset = (3 if number else -3), 3
        coordinates = "data", "axes fraction"
        _annotate(axes, name, position, offset, xycoords=coordinates, ha=side, color=PALE)


def _annotate(axes: "matplotlib.axes.Axes", text: str, *positions: Any, **options: Any) -> None:
    axes.annotate(
        printable(text),
        *positions,
        textcoords="offset points",
        fontsize=9,
        parse_math=False,
        **options,
    )


def sweep_curve(
    l2_values: Sequence[float] | Float[np.ndarray, " sweep"],
    held_out_accuracy: Sequence[float] | Float[np.ndarray, " sweep"],
    chosen: float,
) -> "matplotlib.figure.Figure":
    """Plot the held-out accuracy of a linear probe over its L2 penalty.

    Args:
        l2_values: the penalties that were tried, positive, in any order.
        held_out_accuracy: the accuracy at each, in [0, 1].
        chosen: the penalty of the final probe, one of ``l2_values``.
    """
    order = np.argsort(l2_values)
    l2 = np.asarray(l2_values, float)[order]
    accuracy = np.asarray(held_out_accuracy, float)[order]
    best = int(np.argmin(np.abs(l2 - chosen)))

    figure, axes = _plot(5, 3.4, "L2 sweep of the probe")
    axes.set(xscale="log", xlabel="L2 penalty", ylabel="held-out accuracy")
    axes.plot(l2, accuracy, color=BLUE, marker="o", markersize=4)
    label = f"chosen: {l2[best]:.2g}, {accuracy[best]:.1%}"
    axes.plot(l2[best], accuracy[best], "D", color=VERMILION, markersize=8, label=label)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    _percent(axes.yaxis)
    return figure


def learning_rates(test: RangeTest) -> "matplotlib.figure.Figure":
    """Plot the smoothed training loss over the learning rate, with the suggested learning rate."""
    figure, axes = _plot(6, 3.4, f"suggested: {test.suggestion:.1e}")
    axes.plot(test.rates, test.losses, color=BLUE)
    axes.axvline(test.suggestion, color=VERMILION, linestyle="--", linewidth=1)
    lowest = np.nanmin(test.losses)
    axes.set_ylim(0.95 * lowest, 1.05 * max(test.losses[0], 2 * lowest))
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss, smoothed")
    return figure


def robustness_curve(
    epsilons: Sequence[float] | Float[np.ndarray, " radii"],
    clean: float,
    robust: Mapping[str, Sequence[tuple[float, float]]],
) -> "matplotlib.figure.Figure":
    """Plot the accuracy under each attack over epsilon, with bars of one standard error.

    Args:
        epsilons: ascending, in units of 1/255.
        clean: accuracy without an attack, in [0, 1], plotted at epsilon 0.
        robust: for each attack, (accuracy, standard error) at every epsilon.
    """
    figure, axes = _plot(6, 3.6, "Accuracy under attack")
    axes.set(xlabel="epsilon, in units of 1/255", ylabel="accuracy", ylim=(-0.02, 1.02))
    radii = [0, *epsilons] if epsilons[0] > 0 else list(epsilons)
    colors = (BLUE, VERMILION, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
    styles = zip(cycle(colors), cycle("osD^v<>"), strict=True)
    for (name, shares), (color, marker) in zip(robust.items(), styles, strict=False):
        start = [(clean, 0.0)] * (len(radii) - len(shares))
        values, errors = np.array([*start, *shares], float).T
        axes.errorbar(
            radii, values, errors, color=color, marker=marker, markersize=4, capsize=2, label=name
        )
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    _percent(axes.yaxis)
    return figure


def accuracy_and_speed(candidates: Sequence[Candidate]) -> "matplotlib.figure.Figure":
    """Plot the accuracy of networks over their speed; the area of a dot shows its parameters.

    A line joins the networks that no other network exceeds in both accuracy and speed.
    """
    figure, axes = _plot(7, 4.5, "Accuracy against speed")
    pareto = [
        network
        for network in sorted(candidates, key=lambda network: network.images_per_second)
        if not any(
            other.val_top1 > network.val_top1
            and other.images_per_second > network.images_per_second
            for other in candidates
        )
    ]
    speeds = [network.images_per_second for network in pareto]
    axes.plot(speeds, [network.val_top1 for network in pareto], color="0.8", linewidth=1, zorder=0)
    for network in candidates:
        position = network.images_per_second, network.val_top1
        color = BLUE if network in pareto else PALE
        axes.errorbar(*position, yerr=network.error, color=color, linewidth=1, capsize=2)
        area = 20 + 4 * network.parameters / 1e6
        axes.scatter(*position, area, color=color, alpha=0.6, linewidths=0)
        _annotate(axes, _shorten(network.name), position, (6, 4), color=INK)
    axes.set(xscale="log", xlabel="feature extraction, images/s", ylabel="linear probe accuracy")
    for format_axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        format_axis(lambda value, _: f"{value:g}")
    axes.margins(x=0.15, y=0.15)
    _percent(axes.yaxis)
    return figure


def write_figure(path: Path, figure: "matplotlib.figure.Figure") -> None:
    """Write a figure as a PNG file; the file appears when it is complete."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def reliability_diagram(calibration: Calibration) -> "matplotlib.figure.Figure":
    """Plot accuracy over confidence, before and after temperature scaling (Guo et al. 2017).

    The area of a dot is the share of the examples in its bin. On the diagonal the network is
    calibrated, below it overconfident.
    """
    figure, axes = _plot(4.6, 4.6, "Calibration")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axes.set(xlabel="confidence", ylabel="accuracy")
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=1, zorder=0)

    def draw(bins: CalibrationBins, name: str, color: str) -> None:
        filled = bins.examples > 0
        x, y = bins.confidence[filled], bins.accuracy[filled]
        area = 12 + 300 * bins.examples[filled] / bins.examples.sum()
        axes.plot(x, y, color=color, linewidth=1, label=f"{name}: error {bins.error:.1%}")
        axes.scatter(x, y, area, color=color, alpha=0.6, linewidths=0)

    draw(calibration.before, "uncalibrated", BLUE)
    draw(calibration.after, "after temperature scaling", VERMILION)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    _percent(axes.xaxis)
    _percent(axes.yaxis)
    return figure


def confusion_matrix(
    matrix: Integer[np.ndarray, "classes classes"], classes: Sequence[str]
) -> "matplotlib.figure.Figure":
    """Draw a confusion matrix.

    The color of a cell is its share of the row, that is, of the examples of the true class. Up to
    20 classes have their counts in the cells (zeros are left blank), up to 60 their names at the
    axes. From 400 classes on, a cell is drawn several cells wide so that it can be seen; where two
    overlap, the larger share is shown.

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
    share = maximum_filter(share, 2 * (count // 400) + 1, mode="constant")
    with_counts = count <= MAX_CLASSES_WITH_COUNTS
    cell = min(0.9, max(0.45, 3 / count)) if with_counts else 7 / count  # inches
    side = count * cell + 1.6

    figure = _figure(side if with_counts else side + 1, side)
    axes = figure.subplots()
    # With the square root, a confusion of one example in a hundred does not look white.
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    axes.set_xlabel("predicted", fontsize=11, color=INK)
    axes.set_ylabel("true class", fontsize=11, color=INK)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=10 if with_counts else 8, labelcolor=INK)
    if count <= MAX_CLASSES_WITH_NAMES:
        names = [_shorten(printable(name)) for name in classes]
        upright = 0.09 * max(map(len, names)) > cell
        axes.set_xticks(range(count), names, rotation=90 if upright else 0, parse_math=False)
        axes.set_yticks(range(count), names, parse_math=False)
    if with_counts:
        for row, column in zip(*matrix.nonzero(), strict=True):
            color = "white" if share[row, column] > 0.4 else INK
            text = str(matrix[row, column])
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color=color)
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


def _plot(
    width: float, height: float, title: str
) -> "tuple[matplotlib.figure.Figure, matplotlib.axes.Axes]":
    figure = _figure(width, height)
    axes = figure.subplots()
    _style(axes, title)
    return figure, axes


def _style(axes: "matplotlib.axes.Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color("0.6")
    axes.tick_params(labelsize=10, color="0.6", labelcolor=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(fontsize=10, color=INK)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)


def _percent(axis: "matplotlib.axis.Axis") -> None:
    axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
