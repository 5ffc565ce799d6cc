"""Dry run: what would be trained, what it would cost, and what would be cached."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax.data.augment import epoch_key
from tljax.data.examples import Splits
from tljax.data.loader import num_batches
from tljax.models import Model, abstract_variables, apply, replace_head
from tljax.runtime.tables import format_table
from tljax.runtime.trees import flatten
from tljax.runtime.types import Batch, Variables
from tljax.train.adapt import adapter_functions, add_adapter
from tljax.train.adversary import adversarial
from tljax.train.freeze import FROZEN, first_trainable_stage, label, partition
from tljax.train.inputs import cache_bytes, cache_location
from tljax.train.objectives import cross_entropy
from tljax.train.optimizer import build_optimizer
from tljax.train.options import FitConfig
from tljax.train.recipes import make_plan
from tljax.train.step import init_state, make_train_step


def dry_run(model: Model, splits: Splits, config: FitConfig, batch_size: int) -> str:
    """Return the plan of a run as text: per phase its parameters, the cost of a step and the cache.

    Args:
        model: pretrained network, with any head.
        splits: training and validation images.
        config: what to train.
        batch_size: images per step.

    Raises:
        RequestError: as for `tljax.train.fit.fit`.
    """
    source = splits.train
    outputs = source.task.num_outputs(len(source.classes))
    model, variables = replace_head(
        model, abstract_variables(model), outputs, after=config.head_after
    )
    variables = jax.eval_shape(lambda: variables)
    batch_size = min(batch_size, len(splits.train))
    plan = make_plan(model, config, len(splits.train), batch_size)
    steps = num_batches(len(splits.train), batch_size)
    images = f"{len(splits.train)} training and {len(splits.val)} validation images"
    lines = [f"{config.recipe}: {images}, {steps} steps of {batch_size} an epoch"]
    if plan.start == "probe":
        lines.append("first a linear probe: the head, fitted to its optimum on frozen features")
    everything = jax.tree.map(lambda _: 1.0, variables["params"])
    full = step_flops(model, variables, everything, plan.config, batch_size, None)
    variables = jax.eval_shape(
        lambda v: add_adapter(model, v, plan.config, jax.random.key(0)), variables
    )
    for phase in plan.phases:
        labels = label(variables["params"], phase.table)
        start = first_trainable_stage(model, labels)
        place = cache_location(model, splits, plan.config, start)
        cached = None if place == "none" else start
        flops = step_flops(model, variables, labels, plan.config, batch_size, cached)
        cost = f"{flops / 1e9:.1f} GFLOP, {flops / full:.0%} of training all stages"
        size = cache_bytes(model, splits, plan.config, start) / 2**20
        lines += [
            f"phase: {phase.name}",
            _parameter_table(model, variables["params"], labels, plan.config),
            f"{phase.epochs} epochs; a step takes {cost}",
            f"cached in {place}: the activations that enter {start}, {size:,.0f} MiB"
            if cached
            else "nothing is cached: every step starts from the images",
        ]
    return "\n".join(lines)


def _parameter_table(model: Model, params: Variables, labels: Variables, config: FitConfig) -> str:
    """Return a text table with a row for each stage and learning rate."""
    rates = flatten(labels)
    counts: dict[tuple[str, float], int] = {}
    for path, leaf in flatten(params).items():
        group = path.split("/")[0], rates[path]
        counts[group] = counts.get(group, 0) + int(np.prod(leaf.shape))
    trainable = partition(params, labels)[0]
    optimizer = build_optimizer(config.optimizer, labels, optax.constant_schedule(0.0))
    bytes_per_parameter = 4 * _bytes(jax.eval_shape(optimizer.init, trainable)) / _bytes(trainable)
    peak = config.optimizer.learning_rate or 0.0
    rows = [
        (stage, f"{count:,}", "frozen", "0")
        if rate == FROZEN
        else (
            stage,
            f"{count:,}",
            f"{rate * peak:.2g}",
            f"{bytes_per_parameter * count / 2**20:.1f}",
        )
        for (stage, rate), count in sorted(
            counts.items(), key=lambda item: model.position(item[0][0])
        )
    ]
    return format_table(("stage", "parameters", "learning rate", "optimizer memory, MiB"), rows)


def _bytes(tree: Variables | optax.OptState) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree) if x.ndim)


def step_flops(
    model: Model,
    variables: Variables,
    labels: Variables,
    config: FitConfig,
    batch_size: int,
    start: str | None,
) -> float:
    """Return the floating-point operations of a training step, as XLA counts them unoptimized.

    Args:
        model: network with a head for the classes of the data.
        variables: variables of ``model``; shapes are enough.
        labels: learning rate multiple of every parameter.
        config: optimizer, adapter and attack.
        batch_size: images per step.
        start: stage that cached activations enter; None for images.
    """
    params, frozen = partition(variables["params"], labels)
    optimizer = build_optimizer(config.optimizer, labels, optax.constant_schedule(0.0))
    size = model.preprocess.size
    images = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8)
    if start is not None:
        images = jax.eval_shape(
            lambda v, x: apply(model, v, x, stop=start).value, variables, images
        )
    rows = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    mask = jax.ShapeDtypeStruct((batch_size,), bool)
    batch = Batch(*cast("tuple[Any, ...]", (images, rows, mask, rows)))
    state = jax.eval_shape(lambda p: init_state(p, {}, optimizer), params)
    objective = cross_entropy()
    if config.attacker is not None:
        objective = adversarial(objective, config.attacker)
    step = make_train_step(model, optimizer, objective, start=start, **adapter_functions(config))
    keys = jax.eval_shape(lambda: (epoch_key(0, 0), jax.random.key(0)))
    frozen_variables = {"params": frozen, "batch_stats": variables["batch_stats"]}
    lowered = step.lower(state, frozen_variables, batch, keys)  # pyright: ignore[reportFunctionMemberAccess]
    return float(lowered.cost_analysis()["flops"])
