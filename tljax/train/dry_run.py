"""Dry run: what would be trained, what it would cost, and what would be cached."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from tljax.data.augment import epoch_key
from tljax.data.examples import Splits
from tljax.data.loader import num_batches
from tljax.data.options import Loading
from tljax.models import (
    Model,
    abstract_activations,
    abstract_images,
    abstract_variables,
    replace_head,
)
from tljax.runtime.parallel import fsdp_sharding
from tljax.runtime.tables import format_table
from tljax.runtime.trees import flatten
from tljax.runtime.types import Batch, Variables
from tljax.train.adapt import adapter_functions, add_adapter
from tljax.train.adversary import adversarial
from tljax.train.freeze import FROZEN, first_trainable_stage, label, partition
from tljax.train.inputs import Inputs, cache_bytes, cache_location
from tljax.train.objectives import cross_entropy
from tljax.train.optimizer import build_optimizer
from tljax.train.options import FitConfig
from tljax.train.recipes import make_plan
from tljax.train.setup import training_mesh
from tljax.train.step import init_state, make_train_step
from tljax.train.throughput import describe_rates, loading_rate, matmul_rate, transfer_rate

Shape = tuple[int, ...]


def dry_run(model: Model, splits: Splits, config: FitConfig, loading: Loading) -> str:
    """Return the plan of a run as text: per phase its parameters, memory, cost and cache.

    Args:
        model: pretrained network, with any head.
        splits: training and validation images.
        config: what to train.
        loading: number of images per step, and of devices.

    Raises:
        RequestError: as for `tljax.train.fit.fit`.
    """
    source = splits.train
    outputs = source.task.num_outputs(len(source.classes))
    model, variables = replace_head(
        model, abstract_variables(model), outputs, after=config.head_after
    )
    variables = jax.eval_shape(lambda: variables)
    mesh = training_mesh(config, loading)
    batch_size = min(loading.batch_size, len(splits.train))
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
    inputs = Inputs(splits, plan.config, loading, 0, None, (), None, ({}, {}))
    rates = cache(lambda: _measure_rates(model, inputs, mesh))  # only if a phase needs them
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
            _device_memory(variables["params"], labels, plan.config, mesh),
            f"{phase.epochs} epochs; a step takes {cost}",
            f"cached in {place}: the activations that enter {start}, {size:,.0f} MiB"
            if cached
            else "nothing is cached: every step starts from the images\n"
            + describe_rates(*rates()[:2], batch_size / flops * rates()[2]),
        ]
    return "\n".join(lines)


def _measure_rates(model: Model, inputs: Inputs, mesh: Mesh) -> tuple[float, float, float]:
    """Return images per second of loading and of transfer, and FLOP/s of a matrix product."""
    loading = loading_rate(inputs.batches(model, epoch=1))
    transfer = transfer_rate(next(inputs.batches(model, epoch=1)), mesh)
    return loading, transfer, matmul_rate(model.dtype, mesh.size)


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


def _device_memory(params: Variables, labels: Variables, config: FitConfig, mesh: Mesh) -> str:
    """Return one line of text: the bytes of parameters and optimizer state on every device."""
    trainable, frozen = partition(params, labels)
    frozen = jax.tree.map(lambda x: x.update(dtype=jnp.dtype(config.frozen_dtype)), frozen)
    optimizer = build_optimizer(config.optimizer, labels, optax.constant_schedule(0.0))
    ema = config.ema_decay > 0
    state = jax.eval_shape(lambda p: init_state(p, {}, optimizer, ema=ema), trainable)
    parts = {"parameters": (trainable, frozen), "optimizer state": state.opt_state}
    if ema:
        parts["moving average"] = state.ema
    shape = (lambda x: fsdp_sharding(x, mesh).shard_shape(x)) if config.fsdp else None
    sizes = (f"{name} {_bytes(x, shape) / 2**20:,.1f} MiB" for name, x in parts.items())
    where = f"each of {mesh.size} devices" if mesh.size > 1 else "the device"
    return f"memory on {where}: {', '.join(sizes)}"


def _bytes(tree: Any, shape: Callable[[Shape], Shape] | None = None) -> int:
    """Return the bytes of all arrays but scalars, or those of the parts of a given shape."""
    leaves = [x for x in jax.tree.leaves(tree) if x.ndim]
    return sum(math.prod(shape(x.shape) if shape else x.shape) * x.dtype.itemsize for x in leaves)


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
        config: optimizer, adapter, attack and recomputation.
        batch_size: images per step.
        start: stage that cached activations enter; None for images.
    """
    params, frozen = partition(variables["params"], labels)
    optimizer = build_optimizer(config.optimizer, labels, optax.constant_schedule(0.0))
    images = abstract_images(model, batch_size)
    if start is not None:
        images = abstract_activations(model, variables, start, batch_size)
    rows = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    mask = jax.ShapeDtypeStruct((batch_size,), bool)
    batch = Batch(*cast("tuple[Any, ...]", (images, rows, mask, rows)))
    state = jax.eval_shape(lambda p: init_state(p, {}, optimizer), params)
    objective = cross_entropy()
    if config.attacker is not None:
        objective = adversarial(objective, config.attacker)
    memory = {"around_stage": jax.checkpoint if config.remat else None}
    options = {"start": start, **memory, **adapter_functions(config)}
    step = make_train_step(model, optimizer, objective, **options)
    keys = jax.eval_shape(lambda: (epoch_key(0, 0), jax.random.key(0)))
    frozen_variables = {"params": frozen, "batch_stats": variables["batch_stats"]}
    lowered = step.lower(state, frozen_variables, batch, keys)  # pyright: ignore[reportFunctionMemberAccess]
    return float(lowered.cost_analysis()["flops"])
