"""Bootstrap confidence intervals, of many metrics at once.

Examples, or whole groups of them, are drawn with replacement; percentiles of a metric over the
draws are its interval. A draw is not a copy of the data but a weight per example, the number of
times it was drawn, so that metrics handle many draws in one call.

Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. Groups: Field and Welsh,
"Bootstrapping clustered data", Journal of the Royal Statistical Society B 69, 2007.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from tljax.runtime.errors import RequestError

MAX_COST = 500_000_000
"""Highest ``draws * n * columns`` for which `is_affordable` returns True: about half a minute."""

_CHUNK = 2**19
"""Weights in memory at once; metrics make about eight arrays of this size, 32 MB in float64."""


class Interval(NamedTuple):
    """Confidence interval of a metric; both are NaN where the metric is mostly undefined.

    Attributes:
        low: ``[...]`` as the metric.
        high: ``[...]`` as the metric.
    """

    low: Any
    high: Any


def is_affordable(n: int, columns: int = 1, draws: int = 1000) -> bool:
    """Tell whether a bootstrap takes less than about half a minute, before it is begun.

    Args:
        n: number of examples.
        columns: number of labels or classes for which the metric ranks the examples (average
            precision, AUROC) or of numbers (R2); 1 for accuracy, F1 and the like.
        draws: number of draws.
    """
    return draws * n * columns <= MAX_COST


def bootstrap_intervals(
    metrics: Callable[[Float[np.ndarray, "draws n"]], Mapping[str, Any]],
    n: int,
    *,
    groups: Shaped[np.ndarray, " n"] | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Estimate percentile confidence intervals of metrics from the same resamples.

    For example::

        def metrics(counts):
            per_label = average_precision(scores, targets, counts)
            return {"average_precision": per_label, "map": mean_of_defined(per_label)}

        intervals = bootstrap_intervals(metrics, len(scores), groups=patients)

    Data with weights of their own are measured with ``counts * weights``. Draws in which a metric
    is undefined (NaN) are left out; if they are more than half of all, its interval is NaN.

    Intervals are approximate. They are too narrow with few examples or fewer than some 20 groups,
    and have no width where every draw gives the same value, such as an accuracy of 1.

    Cost, per draw and example: about 10 ns to draw, a few ns for a metric that ranks nothing, and
    about 50 ns per label for average precision or AUROC. Memory stays below 64 MB unless a single
    draw needs more, from some million examples on. See `is_affordable`.

    Args:
        metrics: takes how often each example was drawn, ``[draws, n]`` float64, and returns arrays
            ``[draws, ...]`` by name. It is called with a few draws at a time.
        n: number of examples.
        groups: ``[n]`` integers or strings. Whole groups are drawn, because examples of one
            (patient, site, video) resemble each other. By default each example is its own group.
        draws: number of resamples.
        level: nominal probability that the interval covers the true value, in (0, 1).
        seed: seed of the draws; the result depends on nothing else that is random.

    Returns:
        An interval for every name. All are NaN with fewer than two groups, which do not tell how
        much groups differ.

    Raises:
        RequestError: the level is not in (0, 1), draws are fewer than 1, or there is not one group
            per example.
    """
    if not (0 < level < 1 and draws >= 1):
        raise RequestError(
            "a bootstrap needs a level between 0 and 1 and at least 1 draw;"
            f" got {level} and {draws}"
        )
    members = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    if members.shape != (n,):
        raise RequestError(f"{n} examples need {n} groups; got shape {list(members.shape)}")
    count = int(members.max(initial=-1)) + 1
    if count < 2:
        values = metrics(np.ones((1, n)))
        return {
            name: Interval(*[np.full(np.shape(x)[1:], np.nan)[()]] * 2)
            for name, x in values.items()
        }
    parts = [metrics(weights) for weights in _draw(members, count, draws, seed)]
    values = {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}
    return {name: _interval(x, level) for name, x in values.items()}


def _draw(members: np.ndarray, count: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each example is drawn, for a few draws at a time."""
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // len(members))
    for start in range(0, draws, size):
        counts = np.empty((min(size, draws - start), count))
        for row in counts:
            row[:] = np.bincount(rng.integers(count, size=count), minlength=count)
        yield counts if count == len(members) else counts[:, members]


def _interval(values: np.ndarray, level: float) -> Interval:
    """Return the percentiles of the values ``[draws, ...]`` that are defined."""
    columns = values.reshape(len(values), -1).astype(np.float64)
    bounds = np.full((2, columns.shape[1]), np.nan)
    defined = 2 * np.isnan(columns).sum(0) <= len(values)
    if defined.any():
        tail = (1 - level) / 2
        bounds[:, defined] = np.nanquantile(columns[:, defined], [tail, 1 - tail], axis=0)
    low, high = bounds.reshape(2, *values.shape[1:])
    return Interval(low[()], high[()])
