"""Optimizers from a configuration: one learning rate schedule, one group per rate multiple."""

from collections.abc import Callable, Hashable

import optax

from tljax.runtime.trees import flatten, unflatten
from tljax.runtime.types import Variables
from tljax.train.freeze import FROZEN
from tljax.train.options import OptimizerConfig

OptimizerWrapper = Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs]


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step; it is above 0 at every step.

    Args:
        config: peak learning rate, 1e-4 if it is None, schedule and warm-up.
        total_steps: number of steps of the phase.
    """
    peak = 1e-4 if config.learning_rate is None else config.learning_rate
    if config.schedule == "one-cycle":
        return optax.cosine_onecycle_schedule(max(2, total_steps), peak, 0.25)
    warmup = max(1, round(config.warmup * total_steps))
    decay_steps = max(1, total_steps - warmup + 1)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps),
        "constant": lambda: optax.constant_schedule(peak),
        "exponential": lambda: optax.exponential_decay(peak, decay_steps, 0.01),
        "step": lambda: optax.piecewise_constant_schedule(
            peak, {round(share * total_steps) - warmup + 1: 0.1 for share in (0.3, 0.6, 0.9)}
        ),
    }
    rising = optax.linear_schedule(peak / warmup, peak, warmup - 1)
    return optax.join_schedules((rising, after[config.schedule]()), (warmup - 1,))


def build_optimizer(
    config: OptimizerConfig, labels: Variables, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Build an optimizer: clipping by the global norm, then `optax.multi_transform` over rates.

    Args:
        config: optimizer, weight decay, momentum and clipping.
        labels: rate of every parameter of the network, as a multiple of the learning rate. The
            optimizer is initialized and updated with the trainable ones only.
        schedule: learning rate as a function of the step.
    """
    rates = flatten(labels)

    def group(rate: float) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(config.weight_decay, mask=_kernels)
        adam = optax.scale_by_adam()
        steps = {
            # Coupled: the decay is part of the gradient that enters the momentum.
            "sgd": (decay, optax.trace(config.momentum, nesterov=True)),
            "adam": (decay, adam),
            "adamw": (adam, decay),
            "lamb": (adam, decay, optax.scale_by_trust_ratio()),
        }[config.optimizer]
        return optax.chain(*steps, optax.scale_by_learning_rate(lambda s: rate * schedule(s)))

    groups: dict[Hashable, optax.GradientTransformation] = {FROZEN: optax.set_to_zero()}
    groups |= {rate: group(rate) for rate in set(rates.values()) - {FROZEN}}

    def trainable_labels(params: Variables) -> Variables:
        return unflatten({path: rates[path] for path in flatten(params)})

    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optax.multi_transform(groups, trainable_labels))


def _kernels(params: Variables) -> Variables:
    return unflatten({path: path.endswith("kernel") for path in flatten(params)})
