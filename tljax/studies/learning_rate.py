"""A learning rate by trying them all once: the range test of Smith (2017).

https://arxiv.org/abs/1506.01186, section 3.3, with the rates rising geometrically.
"""

from collections.abc import Iterator
from itertools import count, islice
from typing import NamedTuple

import jax
import numpy as np
import optax

from tljax.data.augment import epoch_key
from tljax.data.options import Loading
from tljax.data.sources import Splits
from tljax.metrics.classification import Metrics
from tljax.models import Model
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import is_writer, replicate, shard
from tljax.runtime.progress import track
from tljax.runtime.types import Batch, Variables
from tljax.train.inputs import Inputs
from tljax.train.options import FitConfig
from tljax.train.setup import NewHead, Setup, divide, first_state, prepare

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
    new_head: NewHead | None = None,
    transform: optax.GradientTransformation | None = None,
    lowest: float = 1e-7,
    highest: float = 1.0,
    steps: int = 100,
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
        new_head: as for ``fit``.
        transform: as for ``fit``.
        lowest: the first learning rate.
        highest: the last one.
        steps: how many rates to try.

    Raises:
        RequestError: as ``fit``, the recipe has no learning rate, or even the lowest diverges.
    """
    setup, inputs = prepare(model, variables, splits, config, loading, seed, new_head, transform)
    if not setup.labels:
        raise RequestError(f"--recipe {setup.config.recipe} is solved: it has no learning rate")
    ratio = (highest / lowest) ** (1 / (steps - 1))
    division = divide(setup, setup.labels[0])
    state, frozen, step = first_state(
        setup, inputs, division, setup.variables, lambda step: lowest * ratio**step
    )
    run_key = jax.random.key(seed)
    losses: list[float] = []
    average = 0.0
    for epoch, batch in track(
        islice(_batches(setup, inputs), steps),
        description="learning rates",
        total=steps,
        size=lambda _: 1,
        unit="steps",
        quiet=not is_writer(),
    ):
        state = step(state, frozen, shard(batch, setup.mesh), (epoch_key(seed, epoch), run_key))
        if not state.metrics.examples:  # none could be read, so nothing has moved
            continue
        average += (1 - _SMOOTHING) * (state.metrics.means()["loss"] - average)
        losses.append(average / (1 - _SMOOTHING ** (len(losses) + 1)))
        if not losses[-1] < _DIVERGED * min(losses):
            break
        state = state._replace(metrics=replicate(Metrics.zero(), setup.mesh))
    finite = np.isfinite(losses)
    if finite.sum() < 2:
        raise RequestError("the loss is no number from the start: check the weights and the images")
    rates = lowest * ratio ** np.arange(len(losses))
    suggestion = rates[np.argmin(np.where(finite, losses, np.inf))] / 10
    return RangeTest(rates, np.array(losses), float(suggestion))


def _batches(setup: Setup, inputs: Inputs) -> Iterator[tuple[int, Batch]]:
    for epoch in count(1):
        for batch in inputs.batches(setup.model, epoch):
            yield epoch, batch
