"""Networks between the start and the end of fine-tuning (Wortsman et al. 2022, arXiv 2109.01903).

On the line between both, accuracy on shifted images is often higher than at the end, at the same
accuracy on images like those of training (WiSE-FT).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from tljax.data.examples import Source
from tljax.data.options import Loading
from tljax.features.evaluate import Evaluation, choose_thresholds, evaluate
from tljax.features.extract import compute_features
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Variables
from tljax.train.fit import FitResult
from tljax.train.history import best_epoch, validation_metrics

MAX_POINTS = 101


class Point(NamedTuple):
    """A network on the line.

    Attributes:
        weight: weight of the end; 0 is the start, 1 the end.
        evaluation: evaluation on the validation images.
        shifted: evaluation on the shifted images; None without any.
    """

    weight: float
    evaluation: Evaluation
    shifted: Evaluation | None


class Line(NamedTuple):
    """Networks between the start and the end of fine-tuning.

    Attributes:
        points: the networks, by increasing weight of the end.
        best: index of the best point on the validation images.
        choose_by: name of the metric by which it is the best.
    """

    points: tuple[Point, ...]
    best: int
    choose_by: str

    @property
    def chosen(self) -> Point:
        """Return the best point."""
        return self.points[self.best]


def parse_weights(text: str) -> tuple[float, ...]:
    """Return the weights of ``FROM:TO:STEP``; ``0:1:0.25`` is 0, 0.25, 0.5, 0.75 and 1.

    Raises:
        RequestError: the text has another form, or a weight is not in [0, 1].
    """
    try:
        first, last, step = map(float, text.split(":"))
    except ValueError:
        first = last = step = float("nan")
    if not (0 <= first <= last <= 1 and step > 0):
        raise RequestError(
            f"--interpolate {text}: write FROM:TO:STEP with numbers from 0 to 1, such as 0:1:0.1"
        )
    count = int((last - first) / step + 1e-6) + 1
    if count > MAX_POINTS:
        raise RequestError(f"--interpolate {text}: {count} networks are too many: raise the step")
    return tuple(round(first + i * step, 6) for i in range(count))


def interpolate(start: Variables, end: Variables, weight: float) -> Variables:
    """Return ``(1 - weight) * start + weight * end``; both ends and equal leaves stay exact.

    The running statistics of batch norms are interpolated like parameters.

    Args:
        start: variables of a network.
        end: variables of a network with the same stages.
        weight: weight of the end, in [0, 1].
    """

    def between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        exact = {0.0: a, 1.0: b}.get(weight)
        return np.where(a == b, a, (1 - weight) * a + weight * b) if exact is None else exact

    return jax.tree.map(between, start, end)


def evaluate_line(
    result: FitResult,
    val: Source,
    weights: Sequence[float],
    loading: Loading,
    shifted: Source | None = None,
) -> Line:
    """Evaluate networks between the start and the end of a run.

    Args:
        result: the run. Its end is its best epoch, or the last one if no epoch was better than the
            start. Its best metric on the validation images chooses the best point, at a tie
            the one that is closer to the start.
        val: validation images of the run.
        weights: weights of the end, in increasing order.
        loading: options of how images are read.
        shifted: images of another distribution with the same classes, labels or numbers.

    Raises:
        RequestError: no image can be read.
    """
    choose_by = result.config.choose_by
    assert choose_by is not None  # `check_task` fills it in
    points: list[Point] = []
    for weight in weights:
        variables = _between(result, weight)
        evaluations = [
            evaluate(
                compute_features(
                    *(result.model, variables, source, loading),
                    stop=None,
                    description=f"{part} at {weight:g}",
                ),
                result.task,
            )
            for part, source in (("validation", val), ("shifted", shifted))
            if source is not None
        ]
        points.append(Point(weight, evaluations[0], evaluations[1] if shifted else None))
    entries = [validation_metrics(point.evaluation, None, choose_by) for point in points]
    return Line(tuple(points), best_epoch(entries, choose_by), choose_by)


def _between(result: FitResult, weight: float) -> Variables:
    end = result.variables if result.best_epoch > 0 else result.final
    return interpolate(result.initial, end, weight)


def with_chosen(result: FitResult, line: Line) -> FitResult:
    """Return the result of a run with the best network on the line in place of the best epoch."""
    evaluation = choose_thresholds(line.chosen.evaluation)
    return result._replace(
        variables=_between(result, line.chosen.weight),
        evaluation=evaluation,
        logits=evaluation.outputs,
        task=evaluation.task,
    )
