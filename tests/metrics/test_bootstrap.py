"""Bootstrap intervals: coverage of simulated truths, groups, and agreement with SciPy."""

import tracemalloc

import numpy as np
import pytest
from scipy import stats

from tljax.metrics import bootstrap
from tljax.metrics.bootstrap import Interval, bootstrap_intervals, is_affordable
from tljax.metrics.multilabel import average_precision
from tljax.metrics.weighted import mean_of_defined
from tljax.runtime.errors import RequestError


def mean_of(values: np.ndarray):
    """Make a metric: the weighted mean of values ``[n]``, or of each column of ``[n, columns]``."""
    return lambda counts: {
        "mean": (counts @ values) / counts.sum(1).reshape(-1, *[1] * (values.ndim - 1))
    }


def coverage(interval: Interval, truth: float) -> float:
    return float(((interval.low <= truth) & (truth <= interval.high)).mean())


def width(interval: Interval) -> float:
    return float(np.mean(interval.high - interval.low))


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_intervals_cover_the_probability_of_a_coin_as_often_as_they_claim(level: float, seed: int):
    # One column is one experiment of 200 tosses; the draws are shared, the tosses are not.
    tosses = (np.random.default_rng(seed).random((200, 2000)) < 0.3).astype(float)
    (interval,) = bootstrap_intervals(mean_of(tosses), 200, level=level, seed=seed).values()
    assert coverage(interval, 0.3) == pytest.approx(level, abs=0.025)


def test_intervals_over_groups_cover_the_truth_where_those_over_examples_do_not():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), rng.integers(1, 9, 60))
    values = rng.normal(size=(60, 1000))[groups] + 0.5 * rng.normal(size=(len(groups), 1000))
    by_group = bootstrap_intervals(mean_of(values), len(groups), groups=groups)["mean"]
    by_example = bootstrap_intervals(mean_of(values), len(groups))["mean"]
    assert coverage(by_group, 0) == pytest.approx(0.95, abs=0.03)
    assert coverage(by_example, 0) < 0.75
    assert width(by_group) > 1.5 * width(by_example)


def test_groups_of_one_example_give_the_interval_of_examples():
    values = np.random.default_rng(0).normal(size=50)
    patients = [f"patient {i:02d}" for i in range(50)]
    grouped = bootstrap_intervals(mean_of(values), 50, groups=np.array(patients))
    assert grouped == bootstrap_intervals(mean_of(values), 50)


def test_whole_groups_are_drawn():
    groups = np.array([7, 3, 7, 7, 3, 5])
    seen = []

    def metrics(counts: np.ndarray):
        seen.append(counts)
        return {"mean": counts.mean(1)}

    bootstrap_intervals(metrics, 6, groups=groups, draws=200)
    counts = np.concatenate(seen)
    assert counts.shape == (200, 6)
    for group in (3, 5, 7):
        assert (np.ptp(counts[:, groups == group], axis=1) == 0).all()
    assert (counts[:, [0, 1, 5]].sum(1) == 3).all()  # as many groups as there are
    assert counts[:, [0, 1, 5]].mean(0) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_is_the_percentile_interval_of_scipy_up_to_sampling(level: float):
    values = np.random.default_rng(0).exponential(size=40)

    def metrics(counts: np.ndarray):
        mean = (counts @ values) / 40
        return {"mean": mean, "deviation": np.sqrt((counts @ values**2) / 40 - mean**2)}

    ours = bootstrap_intervals(metrics, 40, draws=20_000, level=level)
    for name, statistic in (("mean", np.mean), ("deviation", np.std)):
        theirs = stats.bootstrap(
            (values,),
            statistic,
            n_resamples=20_000,
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(1),
        )
        # A percentile of 20,000 draws has a standard error of about 2% of the standard error.
        tolerance = 0.1 * theirs.standard_error
        assert np.array(ours[name]) == pytest.approx(
            np.array(theirs.confidence_interval), abs=tolerance
        )


def test_the_interval_of_average_precision_is_that_of_copied_examples():
    rng = np.random.default_rng(0)
    scores, targets = rng.random((40, 3)).round(1), (rng.random((40, 3)) < 0.4).astype(float)

    def by_copies(counts: np.ndarray):
        copies = [np.repeat(np.arange(40), row.astype(int)) for row in counts]
        return {"ap": np.stack([average_precision(scores[rows], targets[rows]) for rows in copies])}

    expected = bootstrap_intervals(by_copies, 40, draws=100)["ap"]
    ours = bootstrap_intervals(
        lambda counts: {"ap": average_precision(scores, targets, counts)}, 40, draws=100
    )["ap"]
    np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_the_interval_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(0).normal(size=30)
    first = bootstrap_intervals(mean_of(values), 30, seed=1)["mean"]
    assert bootstrap_intervals(mean_of(values), 30, seed=2)["mean"] != first
    assert bootstrap_intervals(mean_of(values), 30, seed=1)["mean"] == first
    monkeypatch.setattr(bootstrap, "_CHUNK", 70)  # two draws at a time
    assert bootstrap_intervals(mean_of(values), 30, seed=1)["mean"] == pytest.approx(first)


def test_draws_where_a_metric_is_undefined_are_left_out():
    def metrics(counts: np.ndarray):
        values = np.tile(np.arange(len(counts), dtype=float)[:, None], 3)
        values[: len(counts) // 2, 1] = np.nan
        values[: len(counts) // 2 + 1, 2] = np.nan
        return {"values": values}

    interval = bootstrap_intervals(metrics, 4, draws=1000, level=0.5)["values"]
    np.testing.assert_allclose(interval.low, [249.75, 624.75, np.nan])
    np.testing.assert_allclose(interval.high, [749.25, 874.25, np.nan])


def test_a_label_with_one_positive_has_an_interval_and_one_without_has_none():
    scores = np.linspace(0, 1, 30)[:, None].repeat(2, 1)
    targets = np.zeros((30, 2))
    targets[20, 0] = 1

    def metrics(counts: np.ndarray):
        per_label = average_precision(scores, targets, counts)
        return {"ap": per_label, "map": mean_of_defined(per_label)}

    intervals = bootstrap_intervals(metrics, 30)
    assert 0 < intervals["ap"].low[0] < intervals["ap"].high[0] < 1
    assert np.isnan([intervals["ap"].low[1], intervals["ap"].high[1]]).all()
    assert intervals["map"] == (intervals["ap"].low[0], intervals["ap"].high[0])


@pytest.mark.parametrize(("n", "groups"), [(5, np.zeros(5, int)), (1, None), (0, None)])
def test_fewer_than_two_groups_give_no_interval(n: int, groups: np.ndarray | None):
    intervals = bootstrap_intervals(
        lambda counts: {"one": counts.sum(1), "three": np.ones((len(counts), 3))}, n, groups=groups
    )
    assert np.shape(intervals["one"].low) == ()
    assert intervals["three"].high.shape == (3,)
    assert all(np.isnan(bound).all() for interval in intervals.values() for bound in interval)


def test_memory_stays_below_64_megabytes():
    n = 20_000
    rng = np.random.default_rng(0)
    scores, targets = rng.random((n, 2)), (rng.random((n, 2)) < 0.1).astype(float)
    groups = rng.integers(0, n // 3, n)
    tracemalloc.start()
    bootstrap_intervals(
        lambda counts: {"ap": average_precision(scores, targets, counts)},
        n,
        groups=groups,
        draws=100,  # 16 MB for one array of all draws
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


def test_a_bootstrap_that_takes_minutes_is_not_affordable():
    assert is_affordable(50_000)
    assert is_affordable(2000, columns=200)
    assert not is_affordable(50_000, columns=1000)


def test_impossible_requests_are_refused():
    metrics = mean_of(np.zeros(3))
    for level in (0, 1, 95):
        with pytest.raises(RequestError, match=f"got {level} and 1000"):
            bootstrap_intervals(metrics, 3, level=level)
    with pytest.raises(RequestError, match="at least 1 draw"):
        bootstrap_intervals(metrics, 3, draws=0)
    with pytest.raises(RequestError, match=r"3 examples need 3 groups; got shape \[4\]"):
        bootstrap_intervals(metrics, 3, groups=np.zeros(4, int))
