"""What a run would train, what it would cost and what it would cache, before it does."""

import io
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from tljax.data.augment import epoch_key
from tljax.data.loader import num_batches
from tljax.data.sources import Splits
from tljax.models import Model, abstract_variables, apply, replace_head
from tljax.runtime.trees import flatten
from tljax.runtime.types import Batch, Variables
from tljax.train.adversary import adversarial
from tljax.train.freeze import FROZEN, first_trainable_stage, label, partition
from tljax.train.inputs import cache_bytes, cache_place
from tljax.train.objectives import cross_entropy
from tljax.train.optimizer import build_optimizer
from tljax.train.options import FitConfig
from tljax.train.recipes import make_plan
from tljax.train.step import init_state, make_train_step


def dry_run(model: Model, splits: Splits, config: FitConfig, batch_size: int) -> str:
    """The plan as a page of text: a table for each phase, and what its steps cost.

    Args:
        model: pretrained, with any head.
        splits: what would be learned from.
        config: what was asked.
        batch_size: images a step.

    Raises:
        RequestError: as `tljax.train.fit.fit` would.
    """
    model, variables = replace_head(
        model, abstract_variables(model), len(splits.train.classes), after=config.head_after
    )
    variables = jax.eval_shape(lambda: variables)
    batch_size = min(batch_size, len(splits.train))
    plan = make_plan(model, config, len(splits.train), batch_size)
    console = Console(file=io.StringIO(), width=100)
    console.print(
        f"{plan.config.recipe}: {len(splits.train)} training and {len(splits.val)} validation "
        f"images, {num_batches(len(splits.train), batch_size)} steps of {batch_size} an epoch"
    )
    if plan.start == "probe":
        console.print("first a linear probe: the head, solved to its optimum on frozen features")
    everything = jax.tree.map(lambda _: 1.0, variables["params"])
    full = step_flops(model, variables, everything, plan.config, batch_size, None)
    for phase in plan.phases:
        labels = label(variables["params"], phase.table)
        console.print(_table(model, variables["params"], labels, phase.name, plan.config))
        start = first_trainable_stage(model, labels)
        place = cache_place(model, splits, plan.config, start)
        entering = None if place == "none" else start
        flops = step_flops(model, variables, labels, plan.config, batch_size, entering)
        console.print(
            f"{phase.epochs} epochs; a step takes {flops / 1e9:.1f} GFLOP, "
            f"{flops / full:.0%} of training everything"
        )
        if entering:
            size = cache_bytes(model, splits, plan.config, start) / 2**20
            console.print(f"cached in {place}: what enters {start}, {size:,.0f} MiB")
        else:
            console.print("nothing is cached: every step begins at the photographs")
    return console.file.getvalue().rstrip()  # pyright: ignore[reportAttributeAccessIssue]


def _table(
    model: Model, params: Variables, labels: Variables, name: str, config: FitConfig
) -> Table:
    """One row a stage and rate."""
    shapes, rates = flatten(params), flatten(labels)
    rows: dict[tuple[str, float], list[str]] = {}
    for path in shapes:
        rows.setdefault((path.split("/")[0], rates[path]), []).append(path)
    table = Table(title=f"phase: {name}", title_justify="left")
    for column in ("stage", "parameters", "learning rate", "optimizer memory, MiB"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    peak = config.optimizer.learning_rate or 0.0
    trained = partition(params, labels)[0]
    state = jax.eval_shape(
        build_optimizer(config.optimizer, labels, optax.constant_schedule(0.0)).init, trained
    )
    per_byte = _bytes(state) / _bytes(trained)
    for (stage, rate), paths in sorted(rows.items(), key=lambda row: model.position(row[0][0])):
        count = sum(int(np.prod(shapes[path].shape)) for path in paths)
        if rate == FROZEN:
            table.add_row(stage, f"{count:,}", "frozen", "0")
            continue
        memory = f"{per_byte * count * 4 / 2**20:.1f}"
        table.add_row(stage, f"{count:,}", f"{rate * peak:.2g}", memory)
    return table


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
    """Floating-point operations of one training step, as XLA counts them before it optimises.

    Args:
        model: with a head for the classes of the data.
        variables: of ``model``; shapes are enough.
        labels: the rate of every parameter.
        config: for the optimizer.
        batch_size: images a step.
        start: the stage that cached activations enter; None for photographs.
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
    step = make_train_step(model, optimizer, objective, start=start)
    keys = jax.eval_shape(lambda: (epoch_key(0, 0), jax.random.key(0)))
    still = {"params": frozen, "batch_stats": variables["batch_stats"]}
    lowered = step.lower(state, still, batch, keys)  # pyright: ignore[reportFunctionMemberAccess]
    return float(lowered.cost_analysis()["flops"])
