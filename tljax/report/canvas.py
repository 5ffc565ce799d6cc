# ruff: noqa: PLC0415 - matplotlib takes a second to import, so it is imported when a plot is drawn
"""The style of all plots: figures without global state, axes, annotations, percentages."""

from typing import TYPE_CHECKING, Any

from tljax.report.grid import INK, printable

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.axis
    import matplotlib.figure

# The blue and vermilion of Okabe and Ito (2008), which color-blind readers can tell apart.
BLUE, VERMILION = "#0072b2", "#d55e00"
PALE = "#767676"

LONGEST_NAME = 24  # characters on an axis


def shorten(name: str) -> str:
    """Return a name for an axis, printable and cut off after `LONGEST_NAME` characters."""
    name = printable(name)
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def new_figure(width: float, height: float) -> "matplotlib.figure.Figure":
    """Return an empty figure; sizes are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def new_plot(
    width: float, height: float, title: str
) -> "tuple[matplotlib.figure.Figure, matplotlib.axes.Axes]":
    """Return a figure, with sizes in inches, and its only axes."""
    figure = new_figure(width, height)
    axes = figure.subplots()
    style_axes(axes, title)
    return figure, axes


def style_axes(axes: "matplotlib.axes.Axes", title: str) -> None:
    """Set the title, which may be any text, and the look of axes."""
    axes.set_title(printable(title), loc="left", fontsize=12, color=INK, pad=8, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color("0.6")
    axes.tick_params(labelsize=10, color="0.6", labelcolor=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(fontsize=10, color=INK)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)


def show_percent(axis: "matplotlib.axis.Axis") -> None:
    """Write the shares at an axis as percentages."""
    axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")


def annotate(axes: "matplotlib.axes.Axes", text: str, *positions: Any, **options: Any) -> None:
    """Write a text, which may be any, at an offset in points."""
    axes.annotate(
        printable(text),
        *positions,
        textcoords="offset points",
        fontsize=9,
        parse_math=False,
        **options,
    )
