"""The training step: a pure function of what trains, what does not, a batch and random keys.

All that a researcher changes is handed to it: the objective, how parameters are made of those that
train, the optimizer. Batch statistics, padding, augmentation and averages are its own.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import get_opaque_trace_state

from tljax.data.augment import augment as augmented
from tljax.data.augment import mix
from tljax.data.options import AugmentConfig
from tljax.metrics.classification import class_shares
from tljax.metrics.sums import Weighted, add_up
from tljax.models import Model, Output, apply
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array, Batch, Variables
from tljax.train.freeze import combine
from tljax.train.objectives import Objective, cross_entropy

Tree = TypeVar("Tree")


class TrainState(NamedTuple):
    """Everything that a step changes: arrays only.

    Attributes:
        step: number of steps taken.
        params: the trainable parameters.
        batch_stats: running statistics of the stages that move them.
        opt_state: of the optimizer, for trainable leaves alone.
        ema: exponential moving average of ``params`` and ``batch_stats``; {} without one.
    """

    step: jax.Array
    params: Variables
    batch_stats: Variables
    opt_state: optax.OptState
    ema: Variables

    @property
    def changing(self) -> Variables:
        """The parameters and statistics, as `apply` names them."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    params: Variables,
    batch_stats: Variables,
    optimizer: optax.GradientTransformation,
    *,
    ema: bool = False,
) -> TrainState:
    """Make the state before the first step.

    Args:
        params: the trainable ones.
        batch_stats: of the stages that use batch statistics.
        optimizer: for ``params``.
        ema: keep a moving average.
    """
    kept = {"params": params, "batch_stats": batch_stats} if ema else {}
    # A copy: the step donates its state, and may not be given one buffer twice.
    kept = jax.tree.map(jnp.array, kept)
    return TrainState(jnp.int32(0), params, batch_stats, optimizer.init(params), kept)


Keys = tuple[jax.Array, jax.Array]
"""Of the epoch, from which every example draws its augmentation; and of the run, from which every
step draws noise and mixing."""

StepMetrics = dict[str, tuple[jax.Array, jax.Array]]
"""By name (sum, count): ``loss``, what is minimised; what the objective returned;
``gradient_norm``, of the trainable parameters, before any clipping; ``examples``, their number."""

RESERVED = {"loss", "gradient_norm", "examples", "step", "learning_rate", "images_per_second"}
"""Names of metrics that no objective may return."""

TrainStep = Callable[[TrainState, Variables, Batch, Keys], tuple[TrainState, StepMetrics]]

Materialize = Callable[[Variables, Variables], Variables]
"""``(trainable, frozen) -> params``: the parameters of the network. It may change the stages alone
that hold a trainable parameter: what comes before them is computed once."""


class Forward:
    """The network as an objective sees it: its parameters, and the frozen prefix, are inside.

    A call may be repeated, on other inputs, and differentiated by its input. Batch statistics move
    the running ones call by call; a call inside a transformation of the objective's own, such as
    the gradient of an attack, moves none.

    Attributes:
        model: the network.
        start: the stage that ``batch.inputs`` enter; None for photographs.
        batch_stats: the running statistics, after the last call.
    """

    def __init__(
        self,
        model: Model,
        variables: Variables,
        mask: Array,
        key: jax.Array,
        *,
        start: str | None,
        batch_statistics: Collection[str],
        noise: Collection[str],
    ) -> None:
        """Close over what a step knows; see `make_train_step`."""
        self.model, self.start = model, start
        self.batch_stats = variables["batch_stats"]
        self._params, self._mask, self._key = variables["params"], mask, key
        self._batch_statistics, self._noise = batch_statistics, noise
        self._first_stats, self._calls = self.batch_stats, 0
        self._trace = get_opaque_trace_state(convention="flax")

    def __call__(
        self, inputs: Array, *, capture: Collection[str] = (), noise: bool = True
    ) -> Output:
        """Run the network in training: on batch statistics and with noise where the stages have it.

        Args:
            inputs: ``[batch, ...]`` like ``batch.inputs``: photographs, or the activations that
                were cached. Rows that do not count enter as zeros.
            capture: stages whose outputs are returned as well.
            noise: whether dropout and stochastic depth draw; every call draws anew, but not every
                turn of a loop of JAX's around one.

        Returns:
            ``logits``, or whatever the last stage returns, zero in the rows that do not count.
        """
        key = jax.random.fold_in(self._key, self._calls) if self._calls else self._key
        self._calls += 1
        output = apply(
            self.model,
            {"params": self._params, "batch_stats": self.batch_stats},
            inputs,
            start=self.start,
            batch_statistics=self._batch_statistics,
            noise=self._noise if noise else (),
            capture=capture,
            key=key,
            mask=self._mask,
        )
        if self._trace == get_opaque_trace_state(convention="flax"):
            self.batch_stats = output.batch_stats
        # Before the loss: the gradient of what is not selected afterwards may still be nan.
        return jax.tree.map(
            lambda x: jnp.where(jnp.expand_dims(self._mask, range(1, x.ndim)), x, 0),
            output._replace(batch_stats={}),
        )

    def evaluate(self, inputs: Array, *, capture: Collection[str] = ()) -> Output:
        """Run the network as it is evaluated: on running statistics, without noise.

        The parameters are constants: a gradient reaches ``inputs`` alone, as attacks need it.
        """
        variables = {"params": self._params, "batch_stats": self._first_stats}
        constants = jax.lax.stop_gradient(variables)
        return apply(self.model, constants, inputs, start=self.start, capture=capture)


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    objective: Objective | None = None,
    materialize: Materialize = combine,
    *,
    start: str | None = None,
    batch_statistics: Collection[str] = frozenset(),
    noise: Collection[str] = frozenset(),
    ema_decay: float = 0.0,
    accumulate: int = 1,
    augment: AugmentConfig | None = None,
) -> TrainStep:
    """Make a jitted ``step(state, frozen, batch, keys) -> (state, metrics)``; it donates the state.

    The gradient is taken with respect to ``state.params`` alone, so a frozen stage costs its
    forward pass at most, and with ``start`` not even that. ``frozen`` holds the parameters and the
    running statistics that stay.

    A row that ``batch.mask`` leaves out changes nothing, whatever it holds. Of a batch in which no
    row counts only ``state.step`` moves: no weight decays and no momentum carries on.

    Args:
        model: the network.
        optimizer: for the trainable parameters. One that takes extra arguments is given ``value``,
            the mean loss, and ``grad_fn(params, *_)``, the gradient of the same batch elsewhere.
        objective: what is minimised, the mean of its losses; by default `cross_entropy`.
        materialize: makes the parameters of the network of ``state.params`` and those of
            ``frozen``; by default both together.
        start: ``batch.inputs`` are activations that enter this stage; by default photographs.
        batch_statistics: stages whose batch norms use those of the batch. ``state.batch_stats``
            holds theirs.
        noise: stages whose dropout and stochastic depth draw.
        ema_decay: of the moving average, per step; 0 keeps none. It starts lower, so that the first
            steps are forgotten: ``min(ema_decay, (1 + step) / (10 + step))``.
        accumulate: the batch goes through in so many parts; only the memory it takes depends on
            it, and batch statistics, which are those of a part.
        augment: of photographs, on the device; None for activations and for the central crop.
            Mixup and CutMix turn class indices into shares ``[batch, classes]``.
    """
    objective = objective or cross_entropy()
    optimizer = optax.with_extra_args_support(optimizer)

    def total_loss(
        params: Variables, batch_stats: Variables, frozen: Variables, batch: Batch, keys: Keys
    ) -> tuple[jax.Array, tuple[Variables, StepMetrics]]:
        """Sum the losses; statistics and metrics beside it."""
        if augment is not None:
            batch = _varied(batch, model, keys, augment)
        forward = Forward(
            model,
            {
                "params": materialize(params, frozen["params"]),
                "batch_stats": {**frozen["batch_stats"], **batch_stats},
            },
            *(batch.mask, keys[1]),
            start=start,
            batch_statistics=batch_statistics,
            noise=noise,
        )
        losses, named = _checked(objective(forward, batch, keys[1]), len(batch.mask))
        metrics = {name: add_up(x, batch.mask) for name, x in {"loss": losses, **named}.items()}
        stats = {name: forward.batch_stats[name] for name in batch_stats}
        return metrics["loss"][0], (stats, metrics)

    def summed(
        params: Variables, batch_stats: Variables, frozen: Variables, batch: Batch, keys: Keys
    ) -> tuple[Variables, Variables, StepMetrics]:
        """Sum the gradients of a batch, part by part; statistics and metrics beside it."""
        differentiate = jax.grad(total_loss, has_aux=True)
        if accumulate == 1:
            sums, (stats, metrics) = differentiate(params, batch_stats, frozen, batch, keys)
            return sums, stats, metrics
        # Strided parts, so that every device keeps the rows it has.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add(carry: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            sums, stats, metrics = carry
            batch, i = part
            of_part = (keys[0], jax.random.fold_in(keys[1], i))
            more, (moved, found) = differentiate(params, stats, frozen, batch, of_part)
            sums, metrics = jax.tree.map(jnp.add, (sums, metrics), (more, found))
            return _if(batch.mask.any(), (sums, moved, metrics), carry), None

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(differentiate, params, batch_stats, frozen, first, keys)
        sums, (_, metrics) = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        carry = sums, batch_stats, metrics
        return jax.lax.scan(add, carry, (parts, jnp.arange(accumulate)))[0]

    def step(
        state: TrainState, frozen: Variables, batch: Batch, keys: Keys
    ) -> tuple[TrainState, StepMetrics]:
        keys = (keys[0], jax.random.fold_in(keys[1], state.step))

        def gradient(params: Variables) -> tuple[Variables, Variables, StepMetrics]:
            sums, stats, metrics = summed(params, state.batch_stats, frozen, batch, keys)
            weight = metrics["loss"][1]
            # All examples may be of classes without weight.
            return (
                jax.tree.map(lambda g: g / jnp.where(weight > 0, weight, 1), sums),
                stats,
                metrics,
            )

        grads, batch_stats, metrics = gradient(state.params)
        loss, weight = metrics["loss"]
        one = jnp.float32(1)
        metrics |= {
            "gradient_norm": (optax.tree.norm(grads), one),
            "examples": (batch.mask.sum(dtype=jnp.float32), one),
        }
        updates, opt_state = optimizer.update(
            grads,
            state.opt_state,
            state.params,
            value=loss / jnp.where(weight > 0, weight, 1),
            grad_fn=lambda params, *_: gradient(params)[0],
        )
        params = cast("Variables", optax.apply_updates(state.params, updates))
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        now = {"params": params, "batch_stats": batch_stats}
        ema = (
            jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, now)
            if state.ema
            else {}
        )
        moved = TrainState(state.step, params, batch_stats, opt_state, ema)
        return _if(batch.mask.any(), moved, state)._replace(step=state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def _checked(returned: Any, examples: int) -> tuple[Any, Mapping[str, Any]]:
    """Refuse what would be broadcast, or count padding: everything has one value an example."""
    if not (
        isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)
    ):
        raise RequestError("an objective returns a pair: losses, and a dict of metrics")
    losses, named = returned
    if taken := [name for name in named if name in RESERVED or not isinstance(name, str)]:
        raise RequestError(f"an objective's metric cannot be called {taken[0]!r}")
    for name, values in {"losses": losses, **named}.items():
        for part in values if isinstance(values, Weighted) else (values,):
            if jnp.shape(part) != (examples,):
                raise RequestError(
                    f"an objective returned {name} of shape {jnp.shape(part)}, not ({examples},): "
                    "one value for each example"
                )
    return losses, named


def _varied(batch: Batch, model: Model, keys: Keys, config: AugmentConfig) -> Batch:
    """Augment photographs one by one, then mix them."""
    size = model.preprocess.size
    inputs = augmented(batch.inputs, batch.indices, keys[0], size, config)
    if not (config.mixup or config.cutmix):
        return batch._replace(inputs=inputs)
    shares = class_shares(batch.targets, model.num_classes)
    inputs, shares = mix(inputs, shares, batch.mask, keys[1], config)
    return batch._replace(inputs=inputs, targets=shares)


def _if(condition: Any, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
