import jax
import numpy as np
import pytest
from engine import LOADING, config, splits
from tiny import MODEL

from tljax.data.loader import batch_rows
from tljax.models import init
from tljax.report.figures import learning_rates
from tljax.runtime.errors import RequestError
from tljax.studies.learning_rate import find_learning_rate
from tljax.train.objectives import cross_entropy

pytestmark = pytest.mark.usefixtures("compilation_cache")
SGD = config("finetune", optimizer="sgd")


def find(fit_config=SGD, data=None, **options):
    variables = jax.device_get(init(MODEL, jax.random.key(0)))
    data = data or splits(24)
    return find_learning_rate(MODEL, variables, data, fit_config, loading=LOADING, **options)


def test_the_suggested_rate_learns_and_a_rate_above_the_last_diverges():
    actual = find(highest=1e4)
    assert len(actual.rates) == len(actual.losses) < 100  # it stopped where the loss blew up
    lowest = actual.losses[np.isfinite(actual.losses)].min()
    assert not actual.losses[-1] < 4 * lowest
    assert lowest < 0.97 * actual.losses[0]
    assert actual.suggestion == pytest.approx(actual.rates[actual.losses == lowest][0] / 10)
    np.testing.assert_allclose(np.diff(np.log(actual.rates)), np.log(1e11) / 99)


def test_very_low_rates_do_not_change_the_loss():
    """The first loss of a head of zeros over three classes is log 3, whatever the images."""
    actual = find(highest=1e-6, steps=5)
    np.testing.assert_allclose(actual.losses, np.log(3), rtol=1e-3)
    assert len(actual.rates) == 5


def test_the_given_objective_is_minimized():
    def twice(forward, batch, key):
        losses, metrics = cross_entropy()(forward, batch, key)
        return 2 * losses, metrics

    actual = find(highest=1e-6, steps=3, objective=twice)
    np.testing.assert_allclose(actual.losses, 2 * np.log(3), rtol=1e-3)


@pytest.mark.slow
def test_the_result_depends_on_the_seed_only():
    first, again, other = find(steps=9), find(steps=9), find(steps=9, seed=1)
    np.testing.assert_array_equal(first.losses, again.losses)
    assert (first.losses != other.losses).any()


def test_a_probe_has_no_learning_rate():
    with pytest.raises(RequestError, match="--recipe probe has no learning rate"):
        find(config("probe"))


def test_weights_that_are_not_finite_are_refused():
    variables = jax.device_get(init(MODEL, jax.random.key(0)))
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), variables)
    with pytest.raises(RequestError, match="not finite at the first rate"):
        find_learning_rate(MODEL, broken, splits(24), SGD, loading=LOADING)


def test_a_batch_without_a_readable_image_does_not_end_the_search():
    """Its step has no loss and is skipped: the next step has the same rate."""
    first, *_ = batch_rows(24, LOADING.batch_size, 0, 1)
    actual = find(steps=9, data=splits(24, broken=set(first.tolist())))
    assert len(actual.losses) == 8
    assert np.isfinite(actual.losses).all()
    np.testing.assert_allclose(np.diff(np.log(actual.rates)), np.log(1e7) / 8)


def test_the_curve_can_be_drawn(tmp_path):
    learning_rates(find(highest=1e4)).savefig(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
