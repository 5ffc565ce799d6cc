"""From a configuration to an Optax transformation with one schedule a group."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import optax

from tljax.transfer.freeze import FROZEN
from tljax.trees import flatten, unflatten
from tljax.types import Variables


@dataclass(frozen=True)
class OptimizerConfig:
    """How the trainable parameters move.

    Attributes:
        name: ``sgd`` has Nesterov momentum; ``adamw`` decoupled weight decay.
        learning_rate: at its peak, for the head.
        backbone_scale: the rest of the network learns at this multiple of that.
        momentum: of ``sgd``.
        weight_decay: of kernels; never of norms and biases.
        warmup: share of the steps over which the learning rate rises linearly. It then falls
            along a cosine.
        clip_norm: largest global norm of the trainable gradient; 0 clips nothing.
    """

    name: Literal["sgd", "adamw"] = "adamw"
    learning_rate: float = 1e-4
    backbone_scale: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.1
    clip_norm: float = 1.0


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine to 0; the head's rate by step. No step has rate 0."""
    warmup = max(1, round(config.warmup * total_steps))
    rising = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, warmup - 1)
    falling = optax.cosine_decay_schedule(config.learning_rate, max(1, total_steps - warmup + 1))
    return optax.join_schedules((rising, falling), (warmup - 1,))


def build_optimizer(
    config: OptimizerConfig, labels: Variables, total_steps: int
) -> optax.GradientTransformation:
    """`optax.multi_transform` over the groups, after clipping by the global norm.

    Args:
        config: see `OptimizerConfig`.
        labels: the group of every parameter; those that are never given need no state.
        total_steps: length of the schedule.
    """
    schedule = learning_rate_schedule(config, total_steps)
    flat = flatten(labels)

    def group(scale: float) -> optax.GradientTransformation:
        if config.name == "sgd":
            inner = optax.trace(config.momentum, nesterov=True)
        else:
            inner = optax.scale_by_adam()
        decay = optax.add_decayed_weights(config.weight_decay, mask=_kernels)
        # Plain SGD couples the decay with the momentum; AdamW must not.
        steps = (decay, inner) if config.name == "sgd" else (inner, decay)
        return optax.chain(*steps, optax.scale_by_learning_rate(lambda s: scale * schedule(s)))

    groups: dict[Hashable, optax.GradientTransformation] = {FROZEN: optax.set_to_zero()}
    for name in set(flat.values()) - {FROZEN}:
        groups[name] = group(1.0 if name == "head" else config.backbone_scale)

    def of_groups(params: Variables) -> Variables:
        return unflatten({path: flat[path] for path in flatten(params)})

    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optax.multi_transform(groups, of_groups))


def _kernels(params: Variables) -> Variables:
    return unflatten({path: path.endswith("kernel") for path in flatten(params)})
