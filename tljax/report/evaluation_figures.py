# ruff: noqa: PLC0415 - matplotlib takes a second to import, so it is imported when a plot is drawn
"""Plots of predictions and their errors: one function for each kind of plot.

Every function returns a Matplotlib figure without global state, for the caller to save.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from scipy.ndimage import maximum_filter

from tljax.metrics.bootstrap import Interval
from tljax.metrics.calibration import Calibration, CalibrationBins
from tljax.report.canvas import (
    BLUE,
    PALE,
    VERMILION,
    new_figure,
    new_plot,
    shorten,
    show_percent,
    style_axes,
)
from tljax.report.grid import INK
from tljax.report.results import Confusion
from tljax.runtime.errors import RequestError

if TYPE_CHECKING:
    import matplotlib.figure

MAX_CLASSES_WITH_COUNTS = 20
MAX_CLASSES_WITH_NAMES = 60
MAX_LABELS = 40


def reliability_diagram(
    calibration: Calibration, xlabel: str = "confidence", ylabel: str = "accuracy"
) -> "matplotlib.figure.Figure":
    """Plot accuracy over confidence, before and after temperature scaling (Guo et al. 2017).

    The area of a dot is the share of the examples in its bin. On the diagonal the network is
    calibrated, below it overconfident. For several labels the axes are the probability of a label
    and how often it applies.
    """
    figure, axes = new_plot(4.6, 4.6, "Calibration")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=1, zorder=0)

    def draw(bins: CalibrationBins, name: str, color: str) -> None:
        filled = bins.examples > 0
        x, y = bins.confidence[filled], bins.accuracy[filled]
        area = 12 + 300 * bins.examples[filled] / bins.examples.sum()
        axes.plot(x, y, color=color, linewidth=1, label=f"{name}: error {bins.error:.1%}")
        axes.scatter(x, y, area, color=color, alpha=0.6, linewidths=0)

    draw(calibration.before, "uncalibrated", BLUE)
    draw(calibration.after, "after temperature scaling", VERMILION)
    axes.legend(loc="upper left", frameon=False, fontsize=10, labelcolor=INK)
    show_percent(axes.xaxis)
    show_percent(axes.yaxis)
    return figure


def confusion_matrix(matrix: Confusion, classes: Sequence[str]) -> "matplotlib.figure.Figure":
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

    figure = new_figure(side if with_counts else side + 1, side)
    axes = figure.subplots()
    # With the square root, a confusion of one example in a hundred does not look white.
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    axes.set_xlabel("predicted", fontsize=11, color=INK)
    axes.set_ylabel("true class", fontsize=11, color=INK)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=10 if with_counts else 8, labelcolor=INK)
    if count <= MAX_CLASSES_WITH_NAMES:
        names = [shorten(name) for name in classes]
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
        show_percent(bar.ax.yaxis)
    return figure


def label_precisions(
    names: Sequence[str],
    precisions: Float[np.ndarray, " labels"],
    interval: Interval | None,
    shares: Float[np.ndarray, " labels"],
) -> "matplotlib.figure.Figure":
    """Plot the average precision of up to 40 labels, the lowest ones at the top.

    Args:
        names: the name of each label.
        precisions: its average precision, in [0, 1]; labels with NaN are left out.
        interval: its 95% confidence interval; None draws none.
        shares: the share of the images to which the label applies, in [0, 1], which is the average
            precision of guessing.
    """
    lowest = np.argsort(precisions, kind="stable")[:MAX_LABELS]
    lowest = lowest[~np.isnan(precisions[lowest])]
    rows = np.arange(len(lowest))
    title = "Average precision" + (", the lowest" if len(lowest) == MAX_LABELS else "")
    figure, axes = new_plot(7, 1.2 + 0.26 * len(lowest), title)
    if interval is not None:
        axes.hlines(rows, interval.low[lowest], interval.high[lowest], color=BLUE, linewidth=1)
    axes.plot(precisions[lowest], rows, "o", color=BLUE, markersize=5, label="average precision")
    axes.plot(shares[lowest], rows, "|", color=PALE, markersize=9, label="guessing")
    axes.set(xlim=(-0.02, 1.02), ylim=(max(len(lowest), 1) - 0.5, -0.5))
    axes.set_yticks(rows, [shorten(names[i]) for i in map(int, lowest)], parse_math=False)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="0.92")
    show_percent(axes.xaxis)
    figure.legend(frameon=False, fontsize=10, labelcolor=INK, loc="outside upper right", ncols=2)
    return figure


def predictions_and_residuals(
    name: str,
    unit: str,
    predicted: Float[np.ndarray, " n"],
    truth: Float[np.ndarray, " n"],
) -> "matplotlib.figure.Figure":
    """Plot predictions over the true numbers, and beside it their residuals.

    On the diagonal, and at a residual of zero, predictions are correct.

    Args:
        name: what the number is.
        unit: its unit; empty if it is unknown.
        predicted: predictions, in that unit; those that are not finite are left out.
        truth: the true numbers; NaN where unknown.
    """
    drawn = np.isfinite(predicted) & np.isfinite(truth)
    predicted, truth = predicted[drawn].astype(float), truth[drawn].astype(float)
    title = ", ".join(map(shorten, filter(None, (name, unit))))
    figure = new_figure(9, 4)
    left, right = figure.subplots(1, 2)
    style_axes(left, title)
    style_axes(right, "")
    points = {"color": BLUE, "linestyle": "none", "marker": "o", "markeredgewidth": 0}
    size = float(np.clip(60 / max(len(truth), 1) ** 0.4, 1.5, 6))  # thousands stay apart
    left.plot(truth, predicted, **points, markersize=size, alpha=0.5)
    right.plot(truth, predicted - truth, **points, markersize=size, alpha=0.5)
    if len(truth):
        extremes = [truth.min(), truth.max()]
        left.plot(extremes, extremes, color=VERMILION, linewidth=1)
        right.plot(extremes, [0, 0], color=VERMILION, linewidth=1)
    left.set(xlabel="true", ylabel="predicted")
    right.set(xlabel="true", ylabel="predicted minus true")
    return figure
