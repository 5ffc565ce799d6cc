"""Plots and grids: the positions of pixels, the data of lines, and unusual input."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from tljax.metrics.bootstrap import Interval
from tljax.metrics.calibration import Calibration, calibration_bins
from tljax.report.canvas import BLUE, VERMILION
from tljax.report.evaluation_figures import (
    confusion_matrix,
    label_precisions,
    predictions_and_residuals,
    reliability_diagram,
)
from tljax.report.figures import (
    Sweep,
    accuracy_and_speed,
    curves,
    robustness_curve,
    sweep_curve,
)
from tljax.report.grid import image_grid
from tljax.runtime.errors import RequestError
from tljax.runtime.settings import Kind
from tljax.studies.compare import Candidate

RED, GREEN, NAVY = (255, 0, 0), (0, 255, 0), (0, 0, 128)
FILL, WHITE = (242, 242, 242), (255, 255, 255)


def flat(height: int, width: int, color: tuple[int, int, int]) -> np.ndarray:
    return np.full((height, width, 3), color, np.uint8)


def render(figure: Figure) -> np.ndarray:
    """Return ``[height, width, 3]`` floats in [0, 1]; a missing glyph is an error."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


def has_color(picture: np.ndarray, color: str) -> bool:
    return bool((np.abs(picture - to_rgb(color)).max(-1) < 0.02).any())


# Grids


def test_grid_places_images_row_by_row():
    grid = image_grid(
        [flat(40, 40, RED), flat(30, 90, GREEN), flat(90, 30, NAVY)], columns=2, cell=40
    )
    assert grid.size == (2 + 2 * 42, 2 + 2 * 42)  # cells of 40 and gaps of 2
    centers = [(22, 22), (64, 22), (22, 64), (64, 64)]
    assert [grid.getpixel(at) for at in centers] == [RED, GREEN, NAVY, WHITE]
    # The wide image fills its cell from side to side, the tall one from top to bottom.
    assert [grid.getpixel(at) for at in [(44, 22), (83, 22), (64, 2)]] == [GREEN, GREEN, FILL]
    assert [grid.getpixel(at) for at in [(22, 44), (22, 83), (2, 64)]] == [NAVY, NAVY, FILL]
    assert [grid.getpixel(at) for at in [(1, 22), (42, 22), (85, 85)]] == [WHITE] * 3


@settings(deadline=None)
@given(
    arrays(np.uint8, st.tuples(st.integers(1, 24), st.integers(1, 24), st.just(3))),
    st.integers(48, 70),
)
def test_small_images_are_enlarged_exactly(image: np.ndarray, cell: int):
    factor = cell // max(image.shape[:2])
    expected = image.repeat(factor, 0).repeat(factor, 1)
    height, width = expected.shape[:2]
    gap = max(2, cell // 20)
    top, left = gap + (cell - height) // 2, gap + (cell - width) // 2
    grid = np.asarray(image_grid([image], cell=cell))
    np.testing.assert_array_equal(grid[top : top + height, left : left + width], expected)


def test_grid_is_nearly_square_and_never_wider_than_its_images():
    images = [flat(8, 8, RED)] * 10
    assert image_grid(images, cell=20).size == (2 + 4 * 22, 2 + 3 * 22)
    assert image_grid(images[:2], columns=5, cell=20).size == (2 + 2 * 22, 2 + 22)


def test_a_long_caption_stays_in_its_column():
    images = [flat(8, 8, RED)] * 2
    grid = np.asarray(image_grid(images, ["W" * 200, ""], columns=2, cell=100))
    below = grid[5 + 100 :].min(-1) < 200
    assert below[:, 5:105].any()
    assert not below[:, 105:].any()


def test_each_line_of_a_caption_has_its_place():
    image = flat(8, 8, RED)
    one, two = (image_grid([image], [text]) for text in ("a", "a\nb"))
    line_height = two.height - one.height
    assert line_height > 10
    # The first lines are the same picture; the second line is below.
    first = np.asarray(two)[: one.height - 8]
    np.testing.assert_array_equal(first, np.asarray(one)[: one.height - 8])
    assert (np.asarray(two)[one.height - 8 :] < 100).any()


@pytest.mark.parametrize("text", ["日", "\udce9", "\x07", "\u202e", "\U0001fae0"])
def test_characters_without_a_glyph_become_a_replacement_character(text: str):
    image = flat(8, 8, RED)
    assert image_grid([image], [text]) == image_grid([image], ["\ufffd"])
    assert image_grid([image], [text]) != image_grid([image], [""])


def test_composed_and_decomposed_accents_look_the_same():
    image = flat(8, 8, RED)
    composed, decomposed, plain = (
        image_grid([image], [text]) for text in ("é", "e\N{COMBINING ACUTE ACCENT}", "e")
    )
    assert composed == decomposed != plain


def test_grid_rejects_no_images_and_too_few_captions():
    with pytest.raises(RequestError, match="no images"):
        image_grid([])
    with pytest.raises(RequestError, match="1 captions for 2 images"):
        image_grid([flat(8, 8, RED)] * 2, ["one"])


# Curves


def test_curves_connect_missing_keys_and_break_at_nan():
    history = [
        {"epoch": 1, "train_loss": 3.0, "val_top1": 0.5},
        {"epoch": 2, "train_loss": float("nan")},
        {"epoch": 3, "train_loss": 1.0, "val_top1": 0.75},
        {"epoch": 4, "train_loss": None, "learning_rate": 0.1},
        {"step": 9, "train_loss": 7.0},
    ]
    loss, accuracy = curves(history).axes
    (line,) = loss.lines
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(line.get_ydata(), [3, np.nan, 1, np.nan])
    (line,) = accuracy.lines
    np.testing.assert_array_equal(line.get_xdata(), [1, 3])
    np.testing.assert_array_equal(line.get_ydata(), [0.5, 0.75])


@pytest.mark.parametrize("plain", ["train_cross_entropy", "train_squared_error"])
def test_training_and_validation_are_compared_by_the_same_loss(plain: str):
    # train_loss is of the objective, which may be smoothed.
    history = [
        {"epoch": 1, "train_loss": 3.0, plain: 2.0, "val_loss": 2.5},
        {"epoch": 2, "train_loss": 2.0, "val_loss": 1.5},  # from an older run
    ]
    training, validation = curves(history).axes[0].lines
    np.testing.assert_array_equal(training.get_ydata(), [2, 2])
    np.testing.assert_array_equal(validation.get_ydata(), [2.5, 1.5])


@pytest.mark.parametrize(
    ("kind", "name", "title", "tick"),
    [
        ("classification", "top1", "Top-1 accuracy", "50%"),
        ("multilabel", "map", "mAP", "50%"),
        ("regression", "mae", "Mean absolute error", "0.50"),
        ("ordinal", "kappa", "Quadratic kappa", "0.50"),
    ],
)
def test_the_second_panel_shows_the_most_important_metric_of_the_task(
    kind: Kind, name: str, title: str, tick: str
):
    values = [0.25, 0.5]
    history = [
        {"epoch": i, f"val_{name}": value, "val_macro_f1": 0.1} for i, value in enumerate(values)
    ]
    figure = curves(history, kind=kind)
    render(figure)
    axes = figure.axes[1]
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_ydata(), values)
    assert axes.get_title("left") == title
    assert tick in [label.get_text() for label in axes.get_yticklabels()]


def test_a_line_separates_phases():
    history = [
        {"epoch": epoch, "phase": phase, "val_loss": 1 / epoch, "val_top1": 0.5}
        for epoch, phase in enumerate(["probe", "probe", "fine-tune $x", "fine-tune $x"], 1)
    ]
    figure = curves(history)
    for axes in figure.axes:
        lines = [np.asarray(line.get_xydata()) for line in axes.lines]
        (x,) = (line[0, 0] for line in lines if line[0, 0] == line[-1, 0])
        assert x == 2.5
        assert [text.get_text() for text in axes.texts] == ["probe", "fine-tune $x"]
    render(figure)


def test_without_validation_images_no_curve_is_called_validation():
    history = [{"epoch": 1, "train_loss": 1.0, "val_loss": 0.9, "val_robust_loss": 1.2}]
    names = [
        [
            text.get_text()
            for text in curves(history, validated=validated).axes[0].get_legend().get_texts()
        ]
        for validated in (True, False)
    ]
    assert names == [
        ["training", "validation", "validation, attacked"],
        ["training", "training, after the epoch", "training, after the epoch, attacked"],
    ]


def test_one_phase_needs_no_line():
    (loss, _) = curves([{"epoch": e, "phase": "probe", "train_loss": e} for e in (1, 2)]).axes
    assert len(loss.lines) == 1
    assert not loss.texts


def test_a_single_epoch_is_visible():
    figure = curves([{"epoch": 3, "train_loss": 0.7}])
    picture = render(figure)
    (axes, _) = figure.axes
    height, width = picture.shape[:2]
    x, y = axes.transData.transform((3, 0.7)).round().astype(int)
    assert 0 < x < width
    around = picture[height - y - 3 : height - y + 3, x - 3 : x + 3]
    assert has_color(around, BLUE)


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"train_loss": 1.0}],
        [{"epoch": 1}],
        [{"epoch": 1, "val_loss": float("nan"), "train_top1": None}],
        [{"epoch": 1, "train_loss": float("inf")}],
    ],
)
def test_without_data_the_plot_says_not_logged(history: list):
    figure = curves(history)
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["not logged"] * 2
    render(figure)


def test_a_diverged_run_can_be_plotted():
    losses = [1.0, 1e30, float("inf"), float("nan")]
    render(curves([{"epoch": i, "train_loss": loss} for i, loss in enumerate(losses)]))


# The sweep


def test_sweep_marks_the_chosen_penalty():
    figure = sweep_curve(Sweep([10.0, 0.001, 0.1], np.array([0.7, 0.8, 0.9]), 0.1))
    (axes,) = figure.axes
    line, chosen = axes.lines
    assert axes.get_xscale() == "log"
    np.testing.assert_array_equal(line.get_xydata(), [[0.001, 0.8], [0.1, 0.9], [10, 0.7]])
    np.testing.assert_array_equal(chosen.get_xydata(), [[0.1, 0.9]])
    render(figure)


def test_a_sweep_without_accuracies_shows_losses():
    figure = sweep_curve(Sweep([10.0, 0.001, 0.1], np.array([0.7, 90.0, 0.5]), 0.1, is_loss=True))
    (axes,) = figure.axes
    assert (axes.get_ylabel(), axes.get_yscale()) == ("held-out loss", "log")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["chosen: 0.1, 0.5"]
    render(figure)


# Calibration


def test_the_reliability_diagram_shows_the_filled_bins():
    confidence = np.array([0.5, 0.9, 0.9, 0.9])
    before = calibration_bins(confidence, np.array([1, 0, 0, 1]))
    after = calibration_bins(np.full(4, 0.4), np.array([1, 0, 0, 1]))
    figure = reliability_diagram(Calibration(2.0, before, after, 1.0, 0.5))
    (axes,) = figure.axes
    diagonal, *lines = axes.lines
    np.testing.assert_array_equal(diagonal.get_xydata(), [[0, 0], [1, 1]])
    np.testing.assert_allclose(lines[0].get_xydata(), [[0.5, 1], [0.9, 1 / 3]])
    np.testing.assert_allclose(lines[1].get_xydata(), [[0.4, 0.5]])
    one, three = axes.collections[0].get_sizes()
    assert three > one > 0
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["uncalibrated: error 55.0%", "after temperature scaling: error 10.0%"]
    render(figure)


# The confusion matrix


def test_confusion_shares_are_of_rows_and_counts_are_written():
    matrix = np.array([[3, 1, 0], [0, 0, 0], [0, 5, 5]])
    figure = confusion_matrix(matrix, ["a", "empty", "c"])
    (axes,) = figure.axes
    np.testing.assert_allclose(
        np.asarray(axes.images[0].get_array()), [[0.75, 0.25, 0], [0, 0, 0], [0, 0.5, 0.5]]
    )
    written = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "3", (1, 0): "1", (1, 2): "5", (2, 2): "5"}  # (column, row)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "empty", "c"]
    render(figure)


@pytest.mark.parametrize(
    ("count", "cell_text", "names"), [(20, True, True), (21, False, True), (61, False, False)]
)
def test_many_classes_have_no_counts_and_more_have_no_names(
    count: int, cell_text: bool, names: bool
):
    axes = confusion_matrix(np.eye(count, dtype=int), [f"n{i}" for i in range(count)]).axes[0]
    assert bool(axes.texts) == cell_text
    assert ([t.get_text() for t in axes.get_xticklabels()] == [f"n{i}" for i in range(count)]) == (
        names
    )


def test_one_confusion_among_a_thousand_classes_can_be_seen():
    matrix = 50 * np.eye(1000, dtype=int)
    clean = render(confusion_matrix(matrix, [""] * 1000))
    matrix[200, 800] = 1
    changed = np.abs(render(confusion_matrix(matrix, [""] * 1000)) - clean).max(-1) > 0.03
    rows, columns = changed.nonzero()
    assert len(rows) >= 9
    assert np.ptp(rows) < 8
    assert np.ptp(columns) < 8


@pytest.mark.parametrize("name", ["$\\frac{", "日本", "caf\udce9", "a\nb", "", "x" * 500])
def test_any_class_name_can_be_drawn(name: str):
    picture = render(confusion_matrix(np.eye(2, dtype=int), [name, "b"]))
    assert max(picture.shape) < 600


def test_confusion_must_fit_its_classes():
    with pytest.raises(RequestError, match=r"\(2, 3\) for 2 classes; expected \(2, 2\)"):
        confusion_matrix(np.zeros((2, 3), int), ["a", "b"])


# Labels and numbers


def test_labels_are_drawn_from_the_lowest_average_precision_on():
    names, precisions = ["a", "never", "$c$"], np.array([0.9, np.nan, 0.5])
    interval = Interval(np.array([0.8, np.nan, 0.4]), np.array([0.95, np.nan, 0.7]))
    figure = label_precisions(names, precisions, interval, np.array([0.2, 0, 0.3]))
    (axes,) = figure.axes
    dots, guessing = axes.lines
    assert [label.get_text() for label in axes.get_yticklabels()] == ["$c$", "a"]
    np.testing.assert_array_equal(dots.get_xdata(), [0.5, 0.9])
    np.testing.assert_array_equal(guessing.get_xdata(), [0.3, 0.2])
    bars = axes.collections[0].get_segments()
    np.testing.assert_array_equal(bars, [[[0.4, 0], [0.7, 0]], [[0.8, 1], [0.95, 1]]])
    bottom, top = axes.get_ylim()
    assert bottom > top  # the lowest is at the top
    render(figure)


def test_of_many_labels_the_forty_lowest_are_drawn():
    precisions = np.linspace(1, 0, 100)
    names = [f"n{i}" for i in range(100)]
    figure = label_precisions(names, precisions, None, precisions / 2)
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == [f"n{i}" for i in range(99, 59, -1)]
    assert axes.get_title("left") == "Average precision, the lowest"
    render(figure)


@pytest.mark.parametrize("count", [0, 1])
def test_few_labels_and_no_defined_one_can_be_drawn(count: int):
    precisions = np.array([np.nan, 0.5])[: 1 + count]
    render(label_precisions(["a", "b"], precisions, None, precisions))


def test_predictions_and_residuals_leave_out_what_is_unknown():
    truth = np.array([1, 2, np.nan, 4, 10], np.float32)
    predicted = np.array([1.5, 2, 3, np.inf, 7])
    figure = predictions_and_residuals("age$", "years", predicted, truth)
    left, right = figure.axes
    assert left.get_title("left") == "age$, years"
    np.testing.assert_allclose(left.lines[0].get_xydata(), [[1, 1.5], [2, 2], [10, 7]])
    np.testing.assert_allclose(left.lines[1].get_xydata(), [[1, 1], [10, 10]])
    np.testing.assert_allclose(right.lines[0].get_xydata(), [[1, 0.5], [2, 0], [10, -3]])
    np.testing.assert_allclose(right.lines[1].get_xydata(), [[1, 0], [10, 0]])
    assert has_color(render(figure), VERMILION)


def test_a_number_that_is_nowhere_known_has_empty_plots():
    nothing = np.full(3, np.nan)
    render(predictions_and_residuals("日本", "", nothing, nothing))


# Others


def test_matplotlib_is_imported_when_a_plot_is_drawn_and_pyplot_never():
    code = (
        "import sys, tljax.report.figures as report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "report.curves([]).savefig('/dev/null', format='png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_robustness_begins_at_the_clean_accuracy():
    figure = robustness_curve([0.5, 2], 0.9, {"fgsm": [(0.5, 0.1), (0.2, 0.05)], "_": [(1, 0)] * 2})
    axes = figure.axes[0]
    first, second = (container.lines[0] for container in axes.containers)
    assert first.get_xydata().tolist() == [[0, 0.9], [0.5, 0.5], [2, 0.2]]
    assert second.get_ydata().tolist() == [0.9, 1, 1]
    assert has_color(render(figure), BLUE)
    at_zero = robustness_curve([0, 2], 0.9, {"fgsm": [(0.9, 0), (0.2, 0.05)]})
    assert len(at_zero.axes[0].containers[0].lines[0].get_xdata()) == 2


def candidate(name: str, metric: str, value: float, error: float, speed: float) -> Candidate:
    interval = Interval(value - error, value + error / 2)
    return Candidate(name, name, metric, value, interval, speed, 5_000_000, 512, 224)


def test_accuracy_and_speed_joins_the_networks_that_no_other_exceeds() -> None:
    figure = accuracy_and_speed(
        [
            candidate("good", "top1", 0.9, 0.02, 10),
            candidate("$slow_", "top1", 0.7, 0.02, 5),
            candidate("fast", "top1", 0.8, float("nan"), 100),
        ]
    )
    (axes,) = figure.axes
    joined, *bars = (line.get_xydata().tolist() for line in axes.lines)
    assert joined == [[10, 0.9], [100, 0.8]]
    # Without an interval, there is no bar.
    np.testing.assert_allclose(bars, [[[10, 0.88], [10, 0.91]], [[5, 0.68], [5, 0.71]]])
    assert axes.get_title("left") == "Top-1 accuracy against speed"
    assert [text.get_text() for text in axes.texts] == ["good", "$slow_", "fast"]
    assert has_color(render(figure), BLUE)


def test_of_errors_the_lower_is_the_better() -> None:
    figure = accuracy_and_speed(
        [candidate(f"{value}", "mae", value, 1, speed) for value, speed in ((9, 10), (20, 5))]
    )
    (axes,) = figure.axes
    assert axes.lines[0].get_xydata().tolist() == [[10, 9]]
    assert axes.get_ylabel() == "mean absolute error of a linear probe"
    render(figure)
