"""The jitted training step: gradients of what trains, and of nothing else."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import optax

from tljax.data.augment import augment, mix
from tljax.data.options import AugmentConfig
from tljax.metrics.classification import Metrics, measure
from tljax.models import Model, apply
from tljax.runtime.types import Batch, Variables
from tljax.train.adversary import attacked
from tljax.train.freeze import combine
from tljax.train.options import AdversaryConfig

Tree = TypeVar("Tree")


class TrainState(NamedTuple):
    """Everything that a step changes: arrays only.

    Attributes:
        step: number of steps taken.
        params: the trainable parameters.
        batch_stats: running statistics of the stages that move them.
        opt_state: of the optimizer, for trainable leaves alone.
        average: exponential moving average of ``params`` and ``batch_stats``; {} without one.
        metrics: sums since the caller last reset them: no step waits for the host.
    """

    step: jax.Array
    params: Variables
    batch_stats: Variables
    opt_state: optax.OptState
    average: Variables
    metrics: Metrics

    @property
    def changing(self) -> Variables:
        """The parameters and statistics, as `apply` names them."""
        return {"params": self.params, "batch_stats": self.batch_stats}


@dataclass(frozen=True)
class StepConfig:
    """What a training step does with a batch.

    Attributes:
        train: stages in training mode (batch statistics, dropout).
        label_smoothing: share of the target that is spread over all classes.
        class_weights: weight of each class in the loss; empty weighs all alike.
        average: decay of the moving average, per step; 0 keeps none. It starts lower, so that the
            first steps are forgotten: ``min(average, (1 + step) / (10 + step))``.
        accumulate: the batch goes through in so many parts; only the memory it takes depends on
            it, and batch statistics, which are those of a part.
        augment: of the images; None for activations and for the central crop.
        adversary: what attacks the images, on running statistics; None for nobody.
    """

    train: frozenset[str] = frozenset()
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    average: float = 0.0
    accumulate: int = 1
    augment: AugmentConfig | None = None
    adversary: AdversaryConfig | None = None


def init_state(
    params: Variables,
    batch_stats: Variables,
    optimizer: optax.GradientTransformation,
    *,
    average: bool = False,
) -> TrainState:
    """The state before the first step.

    Args:
        params: the trainable ones.
        batch_stats: of the stages in training mode.
        optimizer: for ``params``.
        average: keep a moving average.
    """
    kept = {"params": params, "batch_stats": batch_stats} if average else {}
    # A copy: the step donates its state, and may not be given one buffer twice.
    kept = jax.tree.map(jnp.array, kept)
    return TrainState(
        jnp.int32(0), params, batch_stats, optimizer.init(params), kept, Metrics.zero()
    )


Keys = tuple[jax.Array, jax.Array]
"""Of the epoch, from which every example draws its augmentation; and of the run, from which every
step draws dropout and mixing."""

TrainStep = Callable[[TrainState, Variables, Batch, Keys], TrainState]


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    config: StepConfig = StepConfig(),
    *,
    start: str | None = None,
) -> TrainStep:
    """A jitted ``step(state, frozen, batch, keys) -> state``; the old state is donated.

    The gradient is taken with respect to ``state.params`` alone, so a frozen stage costs its
    forward pass at most, and with ``start`` not even that. ``frozen`` holds the parameters and the
    running statistics that stay.

    A row that ``batch.mask`` leaves out changes nothing, whatever it holds. Of a batch in which no
    row counts only ``state.step`` moves: no weight decays and no momentum carries on.

    Args:
        model: the network.
        optimizer: for the trainable parameters.
        config: see `StepConfig`.
        start: ``batch.images`` are activations that enter this stage; by default photographs.
    """

    def loss_fn(
        params: Variables, batch_stats: Variables, frozen: Variables, batch: Batch, keys: Keys
    ) -> tuple[jax.Array, tuple[Variables, Metrics]]:
        """Summed loss; statistics and metrics beside it."""
        variables = {
            "params": combine(params, frozen["params"]),
            "batch_stats": {**frozen["batch_stats"], **batch_stats},
        }
        images = batch.images
        classes = model.num_classes
        targets = jax.nn.one_hot(batch.labels, classes)
        targets = optax.smooth_labels(targets, config.label_smoothing)
        if config.augment is not None:
            size = model.preprocess.size
            images = augment(images, batch.indices, keys[0], size, config.augment)
            images, targets = mix(images, targets, batch.mask, keys[1], config.augment)
        if config.adversary is not None:
            still = jax.lax.stop_gradient(variables)
            images = attacked(
                config.adversary,
                lambda x: apply(model, still, x).logits,
                images,
                batch.labels,
                keys[1],
                batch.indices,
            )
        output = apply(
            model,
            variables,
            images,
            start=start,
            batch_statistics=config.train,
            noise=config.train,
            key=keys[1],
            mask=batch.mask,
        )
        # Before the loss: the gradient of what is not selected afterwards may still be nan.
        logits = jnp.where(batch.mask[:, None], output.logits, 0)
        weights = jnp.asarray(config.class_weights or (1.0,) * classes)
        weight = jnp.where(batch.mask, targets @ weights, 0).sum()
        losses = -jnp.sum(weights * targets * jax.nn.log_softmax(logits), axis=1)
        loss = jnp.where(batch.mask, losses, 0).sum()
        stats = {name: output.batch_stats[name] for name in batch_stats}
        metrics = measure(logits, batch.labels, batch.mask)._replace(loss=loss, weight=weight)
        return loss, (stats, metrics)

    def gradient(
        state: TrainState, frozen: Variables, batch: Batch, keys: Keys
    ) -> tuple[Variables, Variables, Metrics]:
        """Summed gradients, statistics and metrics of a batch."""
        run = jax.grad(loss_fn, has_aux=True)
        if config.accumulate == 1:
            sums, (stats, metrics) = run(state.params, state.batch_stats, frozen, batch, keys)
            return sums, stats, metrics
        # Strided parts, so that every device keeps the rows it has.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, config.accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add(
            carry: tuple[Variables, Variables, Metrics], part: tuple[Batch, jax.Array]
        ) -> tuple[tuple[Variables, Variables, Metrics], None]:
            sums, stats, metrics = carry
            batch, i = part
            of_part = (keys[0], jax.random.fold_in(keys[1], i))
            more, (moved, m) = run(state.params, stats, frozen, batch, of_part)
            added = jax.tree.map(jnp.add, sums, more), moved, metrics.merge(m)
            return _if(batch.mask.any(), added, carry), None

        carry = jax.tree.map(jnp.zeros_like, state.params), state.batch_stats, Metrics.zero()
        return jax.lax.scan(add, carry, (parts, jnp.arange(config.accumulate)))[0]

    def step(state: TrainState, frozen: Variables, batch: Batch, keys: Keys) -> TrainState:
        keys = (keys[0], jax.random.fold_in(keys[1], state.step))
        sums, batch_stats, metrics = gradient(state, frozen, batch, keys)
        # All examples may be of classes without weight.
        grads = jax.tree.map(lambda g: g / jnp.where(metrics.weight > 0, metrics.weight, 1), sums)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast("Variables", optax.apply_updates(state.params, updates))
        decay = jnp.minimum(config.average, (1 + state.step) / (10 + state.step))
        now = {"params": params, "batch_stats": batch_stats}
        average = (
            jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.average, now)
            if state.average
            else {}
        )
        metrics = state.metrics.merge(metrics)
        moved = TrainState(state.step, params, batch_stats, opt_state, average, metrics)
        return _if(batch.mask.any(), moved, state)._replace(step=state.step + 1)

    return jax.jit(step, donate_argnums=0)


def _if(condition: Any, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
