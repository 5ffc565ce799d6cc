"""A learning rate by trying them all once: the range test of Smith (2017).

https://arxiv.org/abs/1506.01186, section 3.3, with the rates rising geometrically.
"""

from collections.abc import Iterator
from itertools import count, islice
from typing import Any, NamedTuple

import jax
import numpy as np

from tljax.data.augment import epoch_key
from tljax.data.options import Loading
from tljax.data.sources import Splits
from tljax.metrics.sums import means
from tljax.models import Model
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import is_writer, shard
from tljax.runtime.progress import track
from tljax.runtime.types import Batch, Variables
from tljax.train.inputs import Inputs
from tljax.train.options import FitConfig
from tljax.train.setup import Run, begin_phase, prepare

_SMOOTHING = 0.9  # of the losses, by an exponential moving average over steps
_DIVERGED = 4.0  # times the lowest loss: there is nothing more to learn


class RangeTest(NamedTuple):
    """What became of the loss as the learning rate rose.

    Attributes:
        rates: ``[steps]`` learning rates, rising.
        losses: ``[steps]`` training loss before the step at each rate, smoothed, in nats.
        suggestion: a tenth of the rate at which the loss was lowest.
    """

    rates: np.ndarray
    losses: np.ndarray
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
    **handed_over: Any,
) -> RangeTest:
    """Trains for a few steps, from the start of the first phase, while the learning rate rises.

    It stops when the loss is no number or four times the lowest. Nothing of it is kept.

    Args:
        model: pretrained, with any head.
        variables: of ``model``.
        splits: what to learn from.
        config: as for `tljax.train.fit.fit`; its learning rate and schedule do not matter.
        loading: as for ``fit``.
        seed: as for ``fit``.
        lowest: the first learning rate.
        highest: the last one.
        steps: how many rates to try.
        handed_over: ``objective``, ``new_head``, ``materialize`` and ``transform``, as for ``fit``.

    Raises:
        RequestError: as ``fit``, the recipe has no learning rate, or even the lowest diverges.
    """
    run, inputs = prepare(model, variables, splits, config, loading, seed, **handed_over)
    if not run.plan.phases:
        raise RequestError(f"--recipe {run.config.recipe} is solved: it has no learning rate")
    ratio = (highest / lowest) ** (1 / (steps - 1))
    state, frozen, step = begin_phase(
        run, inputs, run.plan.phases[0], run.variables, lambda step: lowest * ratio**step
    )
    run_key = jax.random.key(seed)
    losses: list[float] = []
    average = 0.0
    for epoch, batch in track(
        islice(_batches(run, inputs), steps),
        description="learning rates",
        total=steps,
        size=lambda _: 1,
        unit="steps",
        quiet=not is_writer(),
    ):
        keys = epoch_key(seed, epoch), run_key
        state, metrics = step(state, frozen, shard(batch, run.mesh), keys)
        if not metrics["examples"][0]:  # none could be read, so nothing has moved
            continue
        average += (1 - _SMOOTHING) * (means(metrics)["loss"] - average)
        losses.append(average / (1 - _SMOOTHING ** (len(losses) + 1)))
        if not losses[-1] < _DIVERGED * min(losses):
            break
    finite = np.isfinite(losses)
    if finite.sum() < 2:
        raise RequestError("the loss is no number from the start: check the weights and the images")
    rates = lowest * ratio ** np.arange(len(losses))
    suggestion = rates[np.argmin(np.where(finite, losses, np.inf))] / 10
    return RangeTest(rates, np.array(losses), float(suggestion))


def _batches(run: Run, inputs: Inputs) -> Iterator[tuple[int, Batch]]:
    for epoch in count(1):
        for batch in inputs.batches(run.model, epoch):
            yield epoch, batch
