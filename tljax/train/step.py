"""The training step: a pure function of trainable state, frozen variables, a batch and random keys.

The objective, the parametrization and the optimizer are arguments. The step itself handles batch
statistics, padding, augmentation, gradient accumulation and the moving average.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Bool, Shaped

from tljax.data.augment import augment as augmented
from tljax.data.augment import mix
from tljax.data.options import AugmentConfig
from tljax.metrics.classification import class_shares
from tljax.metrics.sums import Weighted, masked_sum
from tljax.models import Model, Output, apply
from tljax.models.model import AroundStage
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Array, Batch, Variables
from tljax.train.freeze import combine
from tljax.train.objectives import Objective, cross_entropy

Tree = TypeVar("Tree")


class TrainState(NamedTuple):
    """State that a training step updates: arrays only.

    Attributes:
        step: number of steps taken.
        params: trainable parameters.
        batch_stats: running statistics of the stages that use batch statistics.
        opt_state: optimizer state of the trainable parameters.
        ema: exponential moving average of ``params`` and ``batch_stats``; {} without one.
    """

    step: jax.Array
    params: Variables
    batch_stats: Variables
    opt_state: optax.OptState
    ema: Variables

    @property
    def changing(self) -> Variables:
        """Return the trainable parameters and the updated statistics, as `split` orders them."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    params: Variables,
    batch_stats: Variables,
    optimizer: optax.GradientTransformation,
    *,
    ema: bool = False,
) -> TrainState:
    """Return the training state before the first step.

    Args:
        params: trainable parameters.
        batch_stats: running statistics of the stages that use batch statistics.
        optimizer: optimizer of ``params``.
        ema: whether to keep an exponential moving average, for a step with ``ema_decay > 0``.
    """
    average = {"params": params, "batch_stats": batch_stats} if ema else {}
    # Copied, because the step donates its state and no buffer can be donated twice.
    average = jax.tree.map(jnp.array, average)
    return TrainState(jnp.int32(0), params, batch_stats, optimizer.init(params), average)


Keys = tuple[jax.Array, jax.Array]
"""Key of the epoch, for the augmentation of each example, and key of the run, for the noise and
mixing of each step."""

StepMetrics = dict[str, tuple[jax.Array, jax.Array]]
"""(sum, count) by name: ``loss``, the minimized loss; the metrics of the objective;
``gradient_norm``, the global norm over trainable parameters before clipping; ``examples``, the
number of examples that count."""

RESERVED = {"loss", "gradient_norm", "examples", "step", "learning_rate", "images_per_second"}
"""Metric names that an objective must not return."""

TrainStep = Callable[[TrainState, Variables, Batch, Keys], tuple[TrainState, StepMetrics]]

Materialize = Callable[[Variables, Variables], Variables]
"""``(trainable, frozen) -> params`` of the whole network. Only stages with a trainable parameter
may differ from ``frozen``, because the activations of earlier stages may be cached."""

ParameterNoise = Callable[[Variables, jax.Array], Variables]
"""``(trainable, key) -> trainable``, a random change of the trainable parameters."""

_NOISE_STREAM = 2**32 - 1
"""Number that no call and no stage has, for the key of the parameter noise."""


def no_noise(trainable: Variables, _: jax.Array) -> Variables:
    """Return the parameters as they are: the default `ParameterNoise`."""
    return trainable


class Forward:
    """The network with its parameters, as an objective calls it.

    An objective may call it several times, on any inputs, and differentiate it by its inputs. Each
    call updates the running statistics, except inside a JAX transformation that the objective
    applies itself, such as the gradient of an attack.

    Attributes:
        model: the network.
        start: stage that ``batch.inputs`` enter; None for images.
        batch_stats: running statistics after the last call.
    """

    def __init__(
        self,
        model: Model,
        variables: Variables,
        mask: Bool[Array, " batch"],
        key: jax.Array,
        *,
        start: str | None,
        batch_statistics: Collection[str],
        noise: Collection[str],
        around_stage: AroundStage | None = None,
    ) -> None:
        """Bind the variables, the mask and the random key; see `make_train_step`."""
        self.model, self.start = model, start
        self.batch_stats = variables["batch_stats"]
        self._params, self._mask, self._key = variables["params"], mask, key
        self._batch_statistics, self._noise = batch_statistics, noise
        self._around_stage = around_stage
        self._first_stats, self._calls = self.batch_stats, 0
        self._trace = get_opaque_trace_state(convention="flax")

    def __call__(
        self,
        inputs: Shaped[Array, "batch ..."],
        *,
        capture: Collection[str] = (),
        noise: bool = True,
    ) -> Output:
        """Run the network in training mode, with batch statistics and noise where configured.

        Args:
            inputs: ``[batch, ...]`` like ``batch.inputs``: images or cached activations. Rows
                that are masked out enter as zeros.
            capture: names of stages whose outputs to return as well.
            noise: whether to apply dropout and stochastic depth. Every call draws new noise, but
                the iterations of a JAX loop around a call share it.

        Returns:
            ``logits``, or what the last stage returns instead, and ``captured``; zero in the rows
            that are masked out.
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
            around_stage=self._around_stage,
        )
        if self._trace == get_opaque_trace_state(convention="flax"):
            self.batch_stats = output.batch_stats
        # Before the loss, since masking a loss that is not finite still makes its gradient nan.
        return jax.tree.map(
            lambda x: jnp.where(jnp.expand_dims(self._mask, range(1, x.ndim)), x, 0),
            output._replace(batch_stats={}),
        )

    def evaluate(
        self, inputs: Shaped[Array, "batch ..."], *, capture: Collection[str] = ()
    ) -> Output:
        """Run the network in inference mode: on running statistics, without noise.

        Gradients flow to ``inputs`` only, as attacks need them, not to the parameters.

        Args:
            inputs: ``[batch, ...]`` like ``batch.inputs``.
            capture: names of stages whose outputs to return as well.
        """
        variables = {"params": self._params, "batch_stats": self._first_stats}
        constants = jax.lax.stop_gradient(variables)
        return apply(
            self.model,
            constants,
            inputs,
            start=self.start,
            capture=capture,
            around_stage=self._around_stage,
        )


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
    around_stage: AroundStage | None = None,
    compiler_options: dict[str, Any] | None = None,
    parameter_noise: ParameterNoise = no_noise,
) -> TrainStep:
    """Make a jitted ``step(state, frozen, batch, keys) -> (state, metrics)``; it donates ``state``.

    The gradient is taken with respect to ``state.params`` only, so a frozen stage costs its forward
    pass at most, and with ``start`` not even that. ``frozen`` holds the frozen parameters and
    running statistics, see `tljax.train.freeze.split`.

    Rows that ``batch.mask`` leaves out have no effect, whatever they hold. A batch without any
    valid row changes ``state.step`` only: it applies no weight decay and no momentum.

    Args:
        model: the network.
        optimizer: optimizer of the trainable parameters. If it takes extra arguments, it gets
            ``value``, the mean loss, and ``grad_fn(params, *_)``, the gradient of the mean loss
            of the same batch at other parameters.
        objective: ``(forward, batch, key) -> (losses, metrics)``, of which the mean loss is
            minimized; by default `cross_entropy`.
        materialize: ``(trainable, frozen) -> params``, the parametrization of the network; by
            default the union of both.
        start: stage that ``batch.inputs`` enter as activations; by default they are images.
        batch_statistics: stages whose batch normalization uses the statistics of the batch;
            ``state.batch_stats`` holds their running statistics.
        noise: stages that apply dropout and stochastic depth.
        ema_decay: decay per step of the exponential moving average; 0 disables it. The effective
            decay is ``min(ema_decay, (1 + step) / (10 + step))``, so that the average forgets the
            first steps.
        accumulate: number of parts the batch is split into for gradient accumulation. The result
            is the same, except that batch statistics are those of a part.
        augment: augmentation of images on the device, which crops them if the batch has boxes; None
            for activations and for no augmentation. Mixup and CutMix turn class indices into class
            shares ``[batch, classes]``.
        around_stage: transformation of the function of every stage, as for `apply`; to save memory,
            `jax.checkpoint` computes the activations within a stage again in the backward pass.
        compiler_options: options of XLA's compiler, as for `jax.jit`.
        parameter_noise: ``(trainable, key) -> trainable``, a random change of the trainable
            parameters for one step (for one part of it with ``accumulate``), such as the dropout of
            LoRA; it is differentiated. By default there is none.

    Raises:
        RequestError: at the first step, if the objective returns values of a wrong shape or name,
            or if the state has a moving average and ``ema_decay`` is 0, or the reverse.
    """
    objective = objective or cross_entropy()
    optimizer = optax.with_extra_args_support(optimizer)

    def total_loss(
        params: Variables, batch_stats: Variables, frozen: Variables, batch: Batch, keys: Keys
    ) -> tuple[jax.Array, tuple[Variables, StepMetrics]]:
        """Return the sum of the losses, and (statistics, metrics)."""
        if augment is not None:
            batch = _augmented(batch, model, keys, augment)
        params = parameter_noise(params, jax.random.fold_in(keys[1], _NOISE_STREAM))
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
            around_stage=around_stage,
        )
        losses, named = _checked(objective(forward, batch, keys[1]), len(batch.mask))
        metrics = {name: masked_sum(x, batch.mask) for name, x in {"loss": losses, **named}.items()}
        stats = {name: forward.batch_stats[name] for name in batch_stats}
        return metrics["loss"][0], (stats, metrics)

    def gradient_sums(
        params: Variables, batch_stats: Variables, frozen: Variables, batch: Batch, keys: Keys
    ) -> tuple[Variables, Variables, StepMetrics]:
        """Return the gradient of the summed losses of all parts, statistics and metrics."""
        differentiate = jax.grad(total_loss, has_aux=True)
        if accumulate == 1:
            sums, (stats, metrics) = differentiate(params, batch_stats, frozen, batch, keys)
            return sums, stats, metrics
        # Strided, so that rows stay on their device.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add(carry: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            sums, stats, metrics = carry
            batch, i = part
            part_keys = (keys[0], jax.random.fold_in(keys[1], i))
            grads, (new_stats, new) = differentiate(params, stats, frozen, batch, part_keys)
            sums, metrics = jax.tree.map(jnp.add, (sums, metrics), (grads, new))
            return _where(batch.mask.any(), (sums, new_stats, metrics), carry), None

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(differentiate, params, batch_stats, frozen, first, keys)
        sums, (_, metrics) = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        carry = sums, batch_stats, metrics
        return jax.lax.scan(add, carry, (parts, jnp.arange(accumulate)))[0]

    def step(
        state: TrainState, frozen: Variables, batch: Batch, keys: Keys
    ) -> tuple[TrainState, StepMetrics]:
        if bool(state.ema) != (ema_decay > 0):
            raise RequestError(
                f"the state does not fit ema_decay={ema_decay:g}: call init_state with "
                f"ema={ema_decay > 0}"
            )
        keys = (keys[0], jax.random.fold_in(keys[1], state.step))

        def gradient(params: Variables) -> tuple[Variables, Variables, StepMetrics]:
            sums, stats, metrics = gradient_sums(params, state.batch_stats, frozen, batch, keys)
            weight = metrics["loss"][1]
            # The weight is 0 where all classes of the batch have weight 0.
            mean = jax.tree.map(lambda g: g / jnp.where(weight > 0, weight, 1), sums)
            return mean, stats, metrics

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
        updated = TrainState(state.step, params, batch_stats, opt_state, {})
        if state.ema:
            ema = jax.tree.map(
                lambda old, new: decay * old + (1 - decay) * new, state.ema, updated.changing
            )
            updated = updated._replace(ema=ema)
        return _where(batch.mask.any(), updated, state)._replace(step=state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options)


def _checked(returned: Any, batch_size: int) -> tuple[Any, Mapping[str, Any]]:
    """Check that an objective returned one value per example, under names that are free."""
    if not (
        isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)
    ):
        raise RequestError("an objective must return a pair: losses and a dict of metrics")
    losses, named = returned
    if invalid := [name for name in named if name in RESERVED or not isinstance(name, str)]:
        raise RequestError(f"an objective's metric must not be called {invalid[0]!r}: rename it")
    for name, values in {"losses": losses, **named}.items():
        for part in values if isinstance(values, Weighted) else (values,):
            if jnp.shape(part) != (batch_size,):
                raise RequestError(
                    f"an objective returned {name} of shape {jnp.shape(part)} instead of "
                    f"({batch_size},): return one value per example"
                )
    return losses, named


def _augmented(batch: Batch, model: Model, keys: Keys, config: AugmentConfig) -> Batch:
    """Augment each image, then apply Mixup and CutMix."""
    preprocess = model.preprocess
    crop = batch.boxes, preprocess.interpolation
    inputs = augmented(batch.inputs, batch.indices, keys[0], preprocess.size, config, *crop)
    batch = batch._replace(inputs=inputs, boxes=None)
    if not (config.mixup or config.cutmix):
        return batch
    shares = class_shares(batch.targets, model.num_classes)
    inputs, shares = mix(inputs, shares, batch.mask, keys[1], config)
    return batch._replace(inputs=inputs, targets=shares)


def _where(condition: Any, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
