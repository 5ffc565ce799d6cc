"""The jitted training step: gradients of what trains, and of nothing else."""

from collections.abc import Callable, Collection
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from tljax.models import Model, apply
from tljax.transfer.freeze import combine
from tljax.transfer.metrics import Metrics, measure
from tljax.types import Array, Batch, Variables


class TrainState(NamedTuple):
    """Everything that a step changes: arrays only.

    Attributes:
        step: number of steps taken.
        params: the trainable parameters.
        batch_stats: running statistics of all stages.
        opt_state: of the optimizer, for trainable leaves alone.
        key: random key of the run; a step folds its number in.
    """

    step: Array
    params: Variables
    batch_stats: Variables
    opt_state: optax.OptState
    key: jax.Array


def init_state(
    params: Variables,
    batch_stats: Variables,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
) -> TrainState:
    """The state before the first step; ``params`` are the trainable ones."""
    return TrainState(jnp.int32(0), params, batch_stats, optimizer.init(params), key)


TrainStep = Callable[[TrainState, Variables, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    start: str | None = None,
    train: Collection[str] = frozenset(),
    label_smoothing: float = 0.0,
) -> TrainStep:
    """A jitted ``step(state, frozen, batch) -> (state, metrics)``; the old state is donated.

    The gradient is taken with respect to ``state.params`` alone, so a frozen stage costs its
    forward pass at most, and with ``start`` not even that.

    Args:
        model: the network.
        optimizer: for the trainable parameters.
        start: ``batch.images`` are activations that enter this stage; by default photographs.
        train: stages in training mode (batch statistics, dropout).
        label_smoothing: share of the target that is spread over all classes.
    """

    def loss_fn(
        params: Variables, frozen: Variables, state: TrainState, batch: Batch
    ) -> tuple[jax.Array, tuple[Variables, Metrics]]:
        variables = {"params": combine(params, frozen), "batch_stats": state.batch_stats}
        key = jax.random.fold_in(state.key, state.step)
        output = apply(model, variables, batch.images, start=start, train=train, key=key)
        metrics = measure(output.logits, batch.labels, batch.mask)
        targets = jax.nn.one_hot(batch.labels, output.logits.shape[-1])
        targets = optax.smooth_labels(targets, label_smoothing)
        losses = optax.softmax_cross_entropy(output.logits, targets)
        loss = jnp.where(batch.mask, losses, 0).sum() / jnp.maximum(batch.mask.sum(), 1)
        return loss, (output.batch_stats, metrics)

    def step(state: TrainState, frozen: Variables, batch: Batch) -> tuple[TrainState, Metrics]:
        gradient = jax.grad(loss_fn, has_aux=True)
        grads, (batch_stats, metrics) = gradient(state.params, frozen, state, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast("Variables", optax.apply_updates(state.params, updates))
        return TrainState(state.step + 1, params, batch_stats, opt_state, state.key), metrics

    return jax.jit(step, donate_argnums=0)
