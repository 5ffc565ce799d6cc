"""What a recipe's name means: where training starts, and which phases follow."""

from dataclasses import replace
from typing import Literal, NamedTuple

import jax

from tljax.data.loader import num_batches
from tljax.models import Model, abstract_variables, apply
from tljax.runtime.errors import RequestError
from tljax.runtime.types import Variables
from tljax.train.freeze import Table, freeze_table, label, trainable_stages
from tljax.train.options import FitConfig


class Phase(NamedTuple):
    """One stretch of training with the same parameters free.

    Attributes:
        name: in the history.
        table: see `tljax.train.freeze`.
        epochs: passes over the data.
        before: epochs of the phases before it.
        rates: of every parameter, as the table says for a network's; {} until there is one.
    """

    name: str
    table: Table
    epochs: int
    before: int = 0
    rates: Variables = {}  # noqa: RUF012 - a field of a tuple, never written to


class Plan(NamedTuple):
    """A recipe, spelled out for a network and a number of images.

    Attributes:
        start: ``probe``: pretrained, with the best linear head; ``zeros``: pretrained, with a head
            of zeros; ``random``: nothing pretrained.
        phases: in order; none for a probe.
        config: with every default filled in.
    """

    start: Literal["probe", "zeros", "random"]
    phases: tuple[Phase, ...]
    config: FitConfig


def make_plan(model: Model, config: FitConfig, examples: int, batch_size: int) -> Plan:
    """Spells a recipe out.

    Args:
        model: the network.
        config: what was asked.
        examples: number of training images.
        batch_size: images a step; no more than there are.

    Raises:
        RequestError: a stage that the model does not have, or wishes that exclude each other.
    """
    recipe = config.recipe
    batch_size = min(batch_size, examples)
    if recipe == "bit":
        config = _hyperrule(config, examples, batch_size)
    scratch = recipe == "scratch"
    rate = config.optimizer.learning_rate
    if rate is None:
        rate = 1e-3 if scratch else 1e-4
    epochs = config.epochs or (30 if scratch else 10)
    config = replace(
        config,
        optimizer=replace(config.optimizer, learning_rate=rate),
        epochs=epochs,
        batch_norm=config.batch_norm or ("batch" if scratch else "running"),
        augment=config.augment or scratch,
    )
    if recipe in ("lp-ft", "probe") and not (config.freeze_to or config.train):
        config = replace(config, freeze_to=default_freeze_to(model))
    table = freeze_table(
        model,
        freeze_to=config.freeze_to,
        train=config.train,
        rates=config.rates,
        layer_decay=config.layer_decay,
    )
    if scratch and any(rate == 0 for _, rate in table):
        raise RequestError("--recipe scratch trains everything: random weights cannot stay frozen")
    if config.augment and config.cache_views == 0 and config.cache not in ("auto", "none"):
        raise RequestError("--augment draws afresh in every epoch: --cache-views 8 keeps 8 draws")
    mixed = config.augmentation.mixup or config.augmentation.cutmix
    if config.augment and config.cache_views and mixed:
        raise RequestError("mixup and CutMix mix photographs, not cached views: --cache-views 0")
    if config.attacker is not None:
        _check_adversary(config, bool(mixed and config.augment))
    if recipe == "probe":
        return Plan("probe", (), config)
    if recipe == "gradual":
        return Plan("probe", _gradual(model, table, epochs), config)
    start = {"lp-ft": "probe", "scratch": "random"}.get(recipe, "zeros")
    return Plan(start, (Phase("train", table, epochs),), config)  # pyright: ignore[reportArgumentType]


def _check_adversary(config: FitConfig, mixed: bool) -> None:
    attack = config.adversary.attack
    if config.recipe == "probe":
        raise RequestError(f"--attack {attack}: a probe is solved on clean images; --recipe lp-ft")
    if config.cache not in ("auto", "none") or config.cache_views:
        raise RequestError(f"--attack {attack} moves every image afresh: nothing can be cached")
    if mixed:
        raise RequestError(f"--attack {attack} needs one label an image: no mixup, no CutMix")


def default_freeze_to(model: Model) -> str:
    """The last stage before the lowest resolution: most parameters come after it, little compute.

    ``layer3`` of a ResNet, ``stage5`` of an EfficientNet. Without feature maps it is the last
    stage before the head.
    """
    size = model.preprocess.size
    image = jax.ShapeDtypeStruct((1, size, size, 3), "uint8")
    names, maps = model.stage_names, model.map_stages
    outputs = jax.eval_shape(
        lambda variables, x: apply(model, variables, x, capture=maps).captured,
        abstract_variables(model),
        image,
    )
    lowest = min((output.shape[1] for output in outputs.values()), default=0)
    first = next((name for name in maps if outputs[name].shape[1] == lowest), names[-1])
    return names[max(names.index(first) - 1, 0)]


def _gradual(model: Model, table: Table, epochs: int) -> tuple[Phase, ...]:
    """From the last two stages that train down to the first; the probe has trained the head."""
    stages = trainable_stages(model, label(abstract_variables(model)["params"], table))
    steps = range(len(stages) - 2, -1, -1)
    if not steps:
        raise RequestError("--recipe gradual unfreezes stages: let at least two of them train")
    if len(steps) > epochs:
        raise RequestError(
            f"--recipe gradual unfreezes {len(steps)} stages: give it --epochs {len(steps)} or "
            "more, or --freeze-to a later stage"
        )
    phases = []
    for number, first in enumerate(steps):
        still = [(f"{name}/*", 0.0) for name in stages[:first]]
        share = epochs // len(steps) + (number < epochs % len(steps))
        phases.append(Phase(f"from {stages[first]}", (*still, *table), share))
    return tuple(phases)


def _hyperrule(config: FitConfig, examples: int, batch_size: int) -> FitConfig:
    """BiT's: everything follows from the number of examples (section 3.3 of the paper)."""
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
    augmentation = replace(config.augmentation, mixup=0.1 if examples >= 20_000 else 0.0)
    epochs = config.epochs or -(-steps // num_batches(examples, batch_size))
    return replace(
        config, optimizer=optimizer, augment=True, augmentation=augmentation, epochs=epochs
    )
