"""Plots of training, of an L2 sweep, of attacks and of the comparison of networks.

Every function returns a Matplotlib figure without global state, for the caller to save:
``curves(history).savefig("curves.svg")``.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tljax.features.evaluate import METRICS
from tljax.report.canvas import (
    BLUE,
    PALE,
    VERMILION,
    annotate,
    new_figure,
    new_plot,
    shorten,
    show_percent,
    style_axes,
)
from tljax.report.grid import INK
from tljax.runtime.files import atomic_write
from tljax.runtime.settings import Kind
from tljax.studies.compare import Candidate
from tljax.studies.interpolation import Line
from tljax.studies.learning_rate import RangeTest

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

LogEntry = Mapping[str, Any]
"""An entry of the log: ``epoch`` and the measurements of that epoch; see `curves`."""


def curves(
    history: Sequence[LogEntry], *, validated: bool = True, kind: Kind = "classification"
) -> "matplotlib.figure.Figure":
    """Plot the loss and the most important metric of the task over the epochs, side by side.

    Args:
        history: the log, in order. Each entry has ``epoch``, which increases through all phases and
            may be a fraction, and any of ``train_loss``, ``val_loss``, ``val_robust_loss``,
            ``train_NAME``, ``val_NAME`` and ``val_robust_NAME`` of the metric's name, and
            ``phase``. A missing key means not measured then; a NaN or None leaves a gap in the
            line. ``train_cross_entropy`` or ``train_squared_error`` is plotted instead of
            ``train_loss`` where it exists, because a smoothed or weighted loss is not comparable
            with ``val_loss``. Other keys and entries without an epoch are ignored.
        validated: False if ``val`` was measured on the training images.
        kind: kind of the task.
    """
    history = [_with_plain_loss(entry) for entry in history if entry.get("epoch") is not None]
    metrics = METRICS[kind]
    logged = (name for name in metrics if any(f"val_{name}" in entry for entry in history))
    name = next(logged, next(iter(metrics)))
    metric = metrics[name]
    phases = _phases(history)
    figure = new_figure(9, 3.4)
    panels = figure.subplots(1, 2, sharex=True)
    measured = "validation" if validated else "training, after the epoch"
    for axes, title, key in zip(
        panels, ("Loss", _capitalize(metric.title)), ("loss", name), strict=True
    ):
        style_axes(axes, title)
        for split, label, color in _SPLITS:
            entries = [entry for entry in history if f"{split}_{key}" in entry]
            values = np.array([entry[f"{split}_{key}"] for entry in entries], float)
            if np.isfinite(values).any():
                epochs = np.array([entry["epoch"] for entry in entries], float)
                marker = "o" if len(values) <= 40 else None
                style = {"color": color, "marker": marker, "markersize": 4}
                axes.plot(epochs, values, label=label.format(measured), **style)
        if axes.lines:
            axes.set_xlabel("epoch")
            axes.legend(frameon=False, fontsize=10, labelcolor=INK)
            _mark_phases(axes, phases)
        else:
            axes.tick_params(bottom=False, labelbottom=False, left=False, labelleft=False)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=PALE)
    if metric.is_share:
        show_percent(panels[1].yaxis)
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    epochs = {float(entry["epoch"]) for entry in history}
    if len(epochs) == 1:
        panels[0].set_xlim(min(epochs) - 1, max(epochs) + 1)
    return figure


def _with_plain_loss(entry: LogEntry) -> LogEntry:
    """Return an entry whose training loss compares with the validation loss."""
    for name in ("train_cross_entropy", "train_squared_error"):
        if name in entry:
            return {**entry, "train_loss": entry[name]}
    return entry


def _capitalize(title: str) -> str:
    """Return a title with a capital first letter; mAP and R2 are unchanged."""
    return title[0].upper() + title[1:] if title[:2].islower() else title


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
        annotate(axes, name, position, offset, xycoords=coordinates, ha=side, color=PALE)


class Sweep(NamedTuple):
    """Held-out scores of a linear probe over its L2 penalty.

    Attributes:
        l2_values: the penalties that were tried, positive, in any order.
        held_out: the held-out accuracy at each, in [0, 1], or the held-out loss.
        chosen: the penalty of the final probe, one of ``l2_values``.
        is_loss: whether ``held_out`` is a loss.
    """

    l2_values: Sequence[float] | Float[np.ndarray, " sweep"]
    held_out: Sequence[float] | Float[np.ndarray, " sweep"]
    chosen: float
    is_loss: bool = False


def sweep_curve(sweep: Sweep) -> "matplotlib.figure.Figure":
    """Plot the held-out accuracy or loss of a linear probe over its L2 penalty."""
    order = np.argsort(sweep.l2_values)
    l2 = np.asarray(sweep.l2_values, float)[order]
    held_out = np.asarray(sweep.held_out, float)[order]
    best = int(np.argmin(np.abs(l2 - sweep.chosen)))

    figure, axes = new_plot(5, 3.4, "L2 sweep of the probe")
    axes.set(xscale="log", xlabel="L2 penalty")
    axes.set_ylabel("held-out loss" if sweep.is_loss else "held-out accuracy")
    axes.plot(l2, held_out, color=BLUE, marker="o", markersize=4)
    value = f"{held_out[best]:.3g}" if sweep.is_loss else f"{held_out[best]:.1%}"
    label = f"chosen: {l2[best]:.2g}, {value}"
    axes.plot(l2[best], held_out[best], "D", color=VERMILION, markersize=8, label=label)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    if not sweep.is_loss:
        show_percent(axes.yaxis)
    elif np.nanmax(held_out) > 10 * np.nanmin(held_out) > 0:
        axes.set_yscale("log")
    return figure


def learning_rates(test: RangeTest) -> "matplotlib.figure.Figure":
    """Plot the smoothed training loss over the learning rate, with the suggested learning rate."""
    figure, axes = new_plot(6, 3.4, f"suggested: {test.suggestion:.1e}")
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
    figure, axes = new_plot(6, 3.6, "Accuracy under attack")
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
    show_percent(axes.yaxis)
    return figure


def accuracy_and_speed(candidates: Sequence[Candidate]) -> "matplotlib.figure.Figure":
    """Plot the main metric of networks over their speed, with its 95% confidence interval.

    The area of a dot shows the number of parameters. A line joins the networks that no other
    network exceeds in both the metric and speed.
    """
    name = candidates[0].metric
    metric = next(metrics[name] for metrics in METRICS.values() if name in metrics)
    sign = -1 if metric.is_error else 1
    figure, axes = new_plot(7, 4.5, f"{_capitalize(metric.title)} against speed")
    pareto = [
        network
        for network in sorted(candidates, key=lambda network: network.images_per_second)
        if not any(
            sign * other.value > sign * network.value
            and other.images_per_second > network.images_per_second
            for other in candidates
        )
    ]
    speeds = [network.images_per_second for network in pareto]
    axes.plot(speeds, [network.value for network in pareto], color="0.8", linewidth=1, zorder=0)
    for network in candidates:
        position = network.images_per_second, network.value
        color = BLUE if network in pareto else PALE
        low, high = network.interval
        if np.isfinite(low):
            bar = {"color": color, "linewidth": 1}
            axes.plot([position[0]] * 2, [low, high], marker="_", **bar)
        area = 20 + 4 * network.parameters / 1e6
        axes.scatter(*position, area, color=color, alpha=0.6, linewidths=0)
        annotate(axes, shorten(network.name), position, (6, 4), color=INK)
    axes.set(xscale="log", xlabel="feature extraction, images/s")
    axes.set_ylabel(f"{metric.title} of a linear probe")
    for format_axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        format_axis(lambda value, _: f"{value:g}")
    axes.margins(x=0.15, y=0.15)
    if metric.is_share:
        show_percent(axes.yaxis)
    return figure


def interpolation_curve(line: Line) -> "matplotlib.figure.Figure":
    """Plot the main metric on shifted images over that on validation images along a line.

    Without shifted images, the metric on validation images is plotted over the weight.
    """
    first = line.points[0].evaluation
    name = first.main_metric
    metric = first.metrics[name]
    y = [(point.shifted or point.evaluation).metric(name) for point in line.points]
    shifted = line.points[0].shifted is not None
    x = [point.evaluation.metric(name) if shifted else point.weight for point in line.points]
    figure, axes = new_plot(6, 4, "Between the start and the end of fine-tuning")
    axes.plot(x, y, color=BLUE, marker="o", markersize=4)
    chosen = f"saved: {line.chosen.weight:g}"
    axes.plot(x[line.best], y[line.best], "D", color=VERMILION, markersize=8, label=chosen)
    if shifted:
        for index in {0, len(x) - 1}:
            weight = f"{line.points[index].weight:g}"
            annotate(axes, weight, (x[index], y[index]), (6, 4), color=INK)
    title = metric.title
    axes.set_xlabel(f"{title}, validation images" if shifted else "weight of the end")
    axes.set_ylabel(f"{title}, {'shifted' if shifted else 'validation'} images")
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    if metric.is_share:
        for axis in (axes.xaxis, axes.yaxis) if shifted else (axes.yaxis,):
            show_percent(axis)
    return figure


def write_figure(path: Path, figure: "matplotlib.figure.Figure") -> None:
    """Write a figure as a PNG file; the file appears when it is complete."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
