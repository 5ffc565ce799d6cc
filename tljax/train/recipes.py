"""Recipes: the initial head and the phases of training that a recipe's name stands for."""

from dataclasses import replace
from typing import Literal, NamedTuple

import jax

from tljax.data.loader import num_batches
from tljax.models import Model, abstract_outputs, abstract_variables
from tljax.models.model import stochastic_depth_stages
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Variables
from tljax.train.adapt import adapter_paths, add_adapter
from tljax.train.freeze import (
    FROZEN,
    Table,
    freeze_table,
    label,
    trainable_stages,
    wholly_trained_stages,
)
from tljax.train.options import FitConfig


class Phase(NamedTuple):
    """Epochs of training with the same trainable parameters.

    Attributes:
        name: name in the history.
        table: learning rate multiple by path pattern, see `tljax.train.freeze`.
        epochs: number of epochs.
        epochs_before: number of epochs of all earlier phases.
        rates: learning rate multiple of every parameter; {} until the table is applied to a
            network.
    """

    name: str
    table: Table
    epochs: int
    epochs_before: int = 0
    rates: Variables = {}  # noqa: RUF012 - a field of a tuple, never mutated


class Plan(NamedTuple):
    """Phases of a recipe for a given network and number of images.

    Attributes:
        start: network before training. ``probe``: pretrained, with a linear probe as head;
            ``zeros``: pretrained, with a zero head; ``random``: randomly initialized.
        phases: phases in order; none for the recipe probe.
        config: configuration with all defaults filled in.
    """

    start: Literal["probe", "zeros", "random"]
    phases: tuple[Phase, ...]
    config: FitConfig


def make_plan(model: Model, config: FitConfig, examples: int, batch_size: int) -> Plan:
    """Fill in the defaults of a recipe and plan its phases.

    Args:
        model: network with a head for the classes of the data.
        config: requested configuration.
        examples: number of training images.
        batch_size: images per step; at most ``examples`` are used.

    Raises:
        RequestError: the model has no such stage, or options contradict each other.
    """
    recipe = config.recipe
    batch_size = min(batch_size, examples)
    if recipe == "bit":
        config = _hyperrule(config, examples, batch_size)
    scratch = recipe == "scratch"
    rate = config.optimizer.learning_rate
    adapts = config.adaptation.adapter != "none"
    if rate is None:
        rate = 1e-3 if scratch or adapts else 1e-4
    epochs = config.epochs or (30 if scratch else 10)
    config = replace(
        config,
        optimizer=replace(config.optimizer, learning_rate=rate),
        epochs=epochs,
        batch_norm=config.batch_norm or ("batch" if scratch else "running"),
        augment=config.augment or scratch,
    )
    if recipe in ("lp-ft", "probe") and not (config.freeze_to or config.train or adapts):
        config = replace(config, freeze_to=default_freeze_to(model))
    params, table = _params_and_table(model, config)
    if scratch and any(rate == FROZEN for _, rate in table):
        raise RequestError("--recipe scratch must train all stages: remove the options that freeze")
    if config.augment and config.cache_views == 0 and config.cache not in ("auto", "none"):
        raise RequestError("--augment changes the inputs that --cache needs: add --cache-views 8")
    mixed = config.augmentation.mixup or config.augmentation.cutmix
    if config.augment and config.cache_views and mixed:
        raise RequestError("Mixup and CutMix cannot mix cached views: choose --cache-views 0")
    _check_drop_path(model, config, table)
    if config.attacker is not None:
        _check_adversary(config, bool(mixed and config.augment))
    if recipe == "probe":
        return Plan("probe", (), config)
    if recipe == "gradual":
        return Plan("probe", _gradual(model, params, table, epochs), config)
    start = {"lp-ft": "probe", "scratch": "random"}.get(recipe, "zeros")
    return Plan(start, (Phase("train", table, epochs),), config)  # pyright: ignore[reportArgumentType]


def _params_and_table(model: Model, config: FitConfig) -> tuple[Variables, Table]:
    """Return the shapes of all parameters, with those of an adapter, and their table of rates."""
    variables = jax.eval_shape(
        lambda variables: add_adapter(model, variables, config, jax.random.key(0)),
        abstract_variables(model),
    )
    table = freeze_table(
        model,
        freeze_to=config.freeze_to,
        train=config.train,
        rates=config.rates,
        layer_decay=config.layer_decay,
        adapter=adapter_paths(model, variables, config),
    )
    return variables["params"], table


def _check_adversary(config: FitConfig, mixed: bool) -> None:
    attack = config.adversary.attack
    if config.recipe == "probe":
        raise RequestError(f"--attack {attack}: a probe takes no steps: choose --recipe lp-ft")
    if config.cache not in ("auto", "none") or config.cache_views:
        raise RequestError(
            f"--attack {attack} changes images at every step: remove --cache options"
        )
    if mixed:
        raise RequestError(f"--attack {attack} needs one label per image: disable Mixup and CutMix")


def _check_drop_path(model: Model, config: FitConfig, table: Table) -> None:
    if not config.drop_path:
        return
    dropping = stochastic_depth_stages(model)
    trained = wholly_trained_stages(label(abstract_variables(model)["params"], table))
    if not dropping & trained:
        which = "the trained stages have" if dropping else f"{model.name} has"
        raise RequestError(
            f"--drop-path {config.drop_path:g}: {which} no stochastic depth: leave it out"
        )


def default_freeze_to(model: Model) -> str:
    """Return the last stage before the lowest resolution, or before the last two blocks of tokens.

    The stages after it hold most of the parameters but take little compute: it is ``layer3`` of a
    ResNet, ``stage5`` of an EfficientNet and ``block10`` of a ViT with twelve blocks. For a model
    without either it is the last stage before the head.
    """
    names, maps = model.stage_names, model.map_stages
    outputs = abstract_outputs(model, abstract_variables(model), maps)
    lowest = min((output.shape[1] for output in outputs.values()), default=0)
    blocks = [name for name in model.spatial_stages if name.startswith("block")]
    at_lowest = [name for name in maps if outputs[name].shape[1] == lowest]
    first, *_ = at_lowest or blocks[-2:] or names[-1:]
    return names[max(names.index(first) - 1, 0)]


def _gradual(model: Model, params: Variables, table: Table, epochs: int) -> tuple[Phase, ...]:
    """Plan the phases of gradual unfreezing, from the last two stages to all trainable ones."""
    stages = trainable_stages(model, label(params, table))
    steps = range(len(stages) - 2, -1, -1)
    if not steps:
        raise RequestError("--recipe gradual needs at least two trainable stages: freeze fewer")
    if len(steps) > epochs:
        raise RequestError(
            f"--recipe gradual unfreezes {len(steps)} stages in as many phases: set --epochs to at "
            f"least {len(steps)}, or --freeze-to to a later stage"
        )
    phases = []
    for number, first in enumerate(steps):
        frozen = [(f"{name}/*", FROZEN) for name in stages[:first]]
        share = epochs // len(steps) + (number < epochs % len(steps))
        phases.append(Phase(f"from {stages[first]}", (*frozen, *table), share))
    return tuple(phases)


def _hyperrule(config: FitConfig, examples: int, batch_size: int) -> FitConfig:
    """Apply the BiT-HyperRule (Kolesnikov et al. 2020, arXiv 1912.11370, section 3.3)."""
    steps = 500 if examples < 20_000 else 10_000 if examples < 500_000 else 20_000
    rate = config.optimizer.learning_rate
    optimizer = replace(
        config.optimizer,
        optimizer="sgd",
        learning_rate=0.003 * batch_size / 512 if rate is None else rate,
        weight_decay=0.0,
        schedule="step",
        warmup=min(500, steps // 5) / steps,
        clip_norm=0.0,
    )
    mixup = 0.1 if examples >= 20_000 else 0.0
    augmentation = replace(config.augmentation, crop="random", mixup=mixup)
    epochs = config.epochs or -(-steps // num_batches(examples, batch_size))
    return replace(
        config, optimizer=optimizer, augment=True, augmentation=augmentation, epochs=epochs
    )
