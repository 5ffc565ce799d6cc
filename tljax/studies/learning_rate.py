"""Learning rate range test (Smith 2017, https://arxiv.org/abs/1506.01186, section 3.3).

Unlike in the paper, the learning rate rises geometrically.
"""

from itertools import count, islice
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from tljax.data.augment import epoch_key
from tljax.data.examples import Splits
from tljax.data.options import Loading
from tljax.metrics.sums import means
from tljax.models import Model
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import is_main_process, shard
from tljax.runtime.progress import track
from tljax.runtime.types import Variables
from tljax.train.options import FitConfig
from tljax.train.setup import begin_phase, prepare

_SMOOTHING = 0.9  # decay per step of the moving average of the loss
_DIVERGED = 4.0  # multiple of the lowest loss at which the test stops


class RangeTest(NamedTuple):
    """Training loss as a function of the learning rate.

    Attributes:
        rates: ``[steps]`` rising learning rates.
        losses: ``[steps]`` smoothed training loss before the step at each rate, in nats.
        suggestion: suggested learning rate, a tenth of the rate with the lowest loss.
    """

    rates: Float[np.ndarray, " steps"]
    losses: Float[np.ndarray, " steps"]
    suggestion: float


def find_learning_rate(
    model: Model,
    variables: Variables,
    splits: Splits,
    config: FitConfig | None = None,
    *,
    loading: Loading | None = None,
    seed: int = 0,
    lowest: float = 1e-7,
    highest: float = 1.0,
    steps: int = 100,
    **run_options: Any,
) -> RangeTest:
    """Train for a few steps of the first phase while the learning rate rises, to suggest one.

    The test stops early when the loss is not finite or four times the lowest loss. The trained
    weights are discarded.

    Args:
        model: pretrained network, with any head.
        variables: variables of ``model``.
        splits: training and validation images.
        config: what to train, as for `tljax.train.fit.fit`; its learning rate and schedule are
            ignored.
        loading: as for ``fit``.
        seed: as for ``fit``.
        lowest: first learning rate.
        highest: last learning rate.
        steps: number of learning rates to try, one per step.
        run_options: ``objective``, ``materialize``, ``transform`` and ``new_head``, as for ``fit``.

    Raises:
        RequestError: as for ``fit``; or the recipe takes no steps, or the loss is not finite at the
            lowest learning rate.
    """
    run, inputs = prepare(model, variables, splits, config, loading, seed, **run_options)
    if not run.plan.phases:
        raise RequestError(f"--recipe {run.config.recipe} has no learning rate: it takes no steps")
    ratio = (highest / lowest) ** (1 / (steps - 1))
    state, frozen, step = begin_phase(
        run, inputs, run.plan.phases[0], run.variables, lambda step: lowest * ratio**step
    )
    run_key = jax.random.key(seed)
    losses: list[float] = []
    average = 0.0
    batches = ((epoch, b) for epoch in count(1) for b in inputs.batches(run.model, epoch))
    for epoch, batch in track(
        islice(batches, steps),
        description="learning rates",
        total=steps,
        unit="steps",
        quiet=not is_main_process(),
    ):
        keys = epoch_key(seed, epoch), run_key
        state, metrics = step(state, frozen, shard(batch, run.mesh), keys)
        if not metrics["examples"][0]:  # no image could be read, so nothing has changed
            continue
        average += (1 - _SMOOTHING) * (means(metrics)["loss"] - average)
        losses.append(average / (1 - _SMOOTHING ** (len(losses) + 1)))
        if not losses[-1] < _DIVERGED * min(losses):
            break
    finite = np.isfinite(losses)
    if finite.sum() < 2:
        raise RequestError("the loss is not finite at the first rate: check weights and images")
    rates = lowest * ratio ** np.arange(len(losses))
    suggestion = rates[np.argmin(np.where(finite, losses, np.inf))] / 10
    return RangeTest(rates, np.array(losses), float(suggestion))
