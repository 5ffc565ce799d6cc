"""Recipes: how a pretrained network becomes a classifier of other images."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tljax.data.sources import Splits
from tljax.errors import RequestError
from tljax.models import Model, abstract_variables, apply, replace_head
from tljax.parallel import data_mesh, divisible, replicate, shard
from tljax.progress import track
from tljax.transfer.evaluate import Evaluation, evaluate
from tljax.transfer.features import (
    Features,
    Loading,
    advance,
    compute_features,
    feature_batches,
    feature_bytes,
)
from tljax.transfer.freeze import combine, first_trainable_stage, freeze_to, label, partition
from tljax.transfer.metrics import Metrics
from tljax.transfer.optimizer import OptimizerConfig, build_optimizer
from tljax.transfer.probe import Probe, fit_probe
from tljax.transfer.step import init_state, make_train_step
from tljax.types import Variables

History = list[dict[str, Any]]

MAX_ACTIVATIONS = 8 * 2**30
"""The activations of all images are held in memory up to this many bytes."""


@dataclass(frozen=True)
class FitConfig:
    """What to train and for how long.

    Attributes:
        recipe: ``probe`` fits a linear head on frozen features; ``lp-ft`` then fine-tunes the last
            stages from there (Kumar et al. 2022, which keeps the features from being distorted).
        freeze_to: last frozen stage of ``lp-ft``; by default everything before the lowest
            resolution is frozen.
        epochs: of fine-tuning.
        label_smoothing: share of the target that is spread over all classes.
        optimizer: see `OptimizerConfig`.
        seed: of everything random.
        loading: see `Loading`.
    """

    recipe: Literal["probe", "lp-ft"] = "lp-ft"
    freeze_to: str | None = None
    epochs: int = 10
    label_smoothing: float = 0.0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    loading: Loading = field(default_factory=Loading)


class FitResult(NamedTuple):
    """A trained network.

    Attributes:
        model: with a head for the classes of the data.
        variables: of the best epoch on the validation set, the probe being epoch 0; on the host.
        probe: the linear probe, with its sweep.
        probe_evaluation: of the probe on the validation set.
        evaluation: of ``variables`` on the validation set.
        history: one entry an epoch.
        skipped: reason by position, for the unreadable images of train and val.
    """

    model: Model
    variables: Variables
    probe: Probe
    probe_evaluation: Evaluation
    evaluation: Evaluation
    history: History
    skipped: tuple[dict[int, str], dict[int, str]]


def fit(
    model: Model,
    variables: Variables,
    splits: Splits,
    config: FitConfig,
    log: Callable[[dict[str, Any]], None] = lambda _: None,
) -> FitResult:
    """Trains a new head, and more as the recipe says.

    Args:
        model: pretrained, with any head.
        variables: of ``model``.
        splits: what to learn from and what to measure on.
        config: see `FitConfig`.
        log: called with every entry of the history as it is made.

    Raises:
        RequestError: the configuration does not fit the model or the data.
    """
    head = model.stages[-1].name
    # A stage that does not exist is said before the work begins.
    table = freeze_to(model, config.freeze_to or default_freeze_to(model))
    labels = label(abstract_variables(model)["params"], table)
    probe_only = config.recipe == "probe"
    start = head if probe_only else first_trainable_stage(model, labels)
    needed = feature_bytes(model, len(splits.train) + len(splits.val), start)
    if needed > MAX_ACTIVATIONS:
        raise RequestError(
            f"the activations that enter {start} take {needed / 2**30:.1f} GiB for these images, "
            f"more than {MAX_ACTIVATIONS / 2**30:.0f}; freeze more (--freeze-to), or --recipe probe"
        )

    train, val = (
        compute_features(
            model,
            variables,
            source,
            config.loading,
            stop=start,
            cache=probe_only,
            description=f"{part} up to {start}",
        )
        for part, source in (("train", splits.train), ("val", splits.val))
    )
    _check_readable(splits, train, val)
    result = _fit_probe(model, variables, splits, train, val, start, config)
    log(result.history[0])
    if not probe_only:
        result = _fine_tune(result, train, val, labels, config, log)
    return result


def _fit_probe(
    model: Model,
    variables: Variables,
    splits: Splits,
    train: Features,
    val: Features,
    start: str,
    config: FitConfig,
) -> FitResult:
    """The network with the head that is optimal on its frozen features."""
    head = model.stages[-1].name
    run = partial(advance, model, variables, loading=config.loading, start=start, stop=head)
    features = train if start == head else run(train)
    classes = len(splits.train.classes)
    probe = fit_probe(features.values, train.labels, num_classes=classes, seed=config.seed)
    model, variables = replace_head(model, variables, classes)
    variables["params"][head] = {"kernel": probe.kernel, "bias": probe.bias}
    evaluation = evaluate(advance(model, variables, val, config.loading, start=start))
    history = [{"phase": "probe", "epoch": 0, **_scores(evaluation)}]
    skipped = (train.skipped, val.skipped)
    return FitResult(model, variables, probe, evaluation, evaluation, history, skipped)


def _fine_tune(
    result: FitResult,
    train: Features,
    val: Features,
    labels: Variables,
    config: FitConfig,
    log: Callable[[dict[str, Any]], None],
) -> FitResult:
    """Trains what ``labels`` leave free, from the probe on, on the activations that enter it."""
    model = result.model
    start = first_trainable_stage(model, labels)
    mesh = data_mesh(config.loading.devices)
    batch_size = divisible(config.loading.batch_size, mesh)
    steps = -(-len(train.labels) // batch_size)
    optimizer = build_optimizer(config.optimizer, labels, config.epochs * steps)
    # A copy, because the step donates its state and `result` must live on.
    params, batch_stats = (
        replicate(jax.tree.map(jnp.array, result.variables[kind]), mesh)
        for kind in ("params", "batch_stats")
    )
    trainable, frozen = partition(params, labels)
    state = init_state(trainable, batch_stats, optimizer, jax.random.key(config.seed))
    train_step = make_train_step(
        model, optimizer, start=start, label_smoothing=config.label_smoothing
    )
    for epoch in range(1, config.epochs + 1):
        order = np.random.default_rng([config.seed, epoch]).permutation(len(train.labels))
        metrics = []
        for batch in track(
            feature_batches(train, order, batch_size),
            description=f"epoch {epoch} of {config.epochs}",
            total=len(order),
            size=lambda batch: int(batch.mask.sum()),
        ):
            state, sums = train_step(state, frozen, shard(batch, mesh))
            metrics.append(sums)
        variables = {"params": combine(state.params, frozen), "batch_stats": state.batch_stats}
        evaluation = evaluate(advance(model, variables, val, config.loading, start=start))
        means = functools.reduce(Metrics.merge, metrics).means()
        entry = {
            "phase": "fine-tune",
            "epoch": epoch,
            "train_loss": means["loss"],
            "train_top1": means["top1"],
            **_scores(evaluation),
        }
        log(entry)
        result.history.append(entry)
        if (evaluation.top1, -evaluation.loss) > (result.evaluation.top1, -result.evaluation.loss):
            result = result._replace(variables=jax.device_get(variables), evaluation=evaluation)
    return result


def default_freeze_to(model: Model) -> str:
    """The last stage before the lowest resolution: most parameters come after it, little compute.

    ``layer3`` of a ResNet, ``stage5`` of an EfficientNet.
    """
    size = model.preprocess.size
    image = jax.ShapeDtypeStruct((1, size, size, 3), "uint8")
    names = model.stage_names
    outputs = jax.eval_shape(
        lambda variables, x: apply(model, variables, x, capture=names).captured,
        abstract_variables(model),
        image,
    )
    heights = {name: output.shape[1] for name, output in outputs.items() if output.ndim == 4}
    lowest = min(heights.values())
    first = next(name for name in names if heights[name] == lowest)
    return names[max(names.index(first) - 1, 0)]


def _scores(evaluation: Evaluation) -> dict[str, float]:
    return {"val_loss": evaluation.loss, "val_top1": evaluation.top1}


def _check_readable(splits: Splits, train: Features, val: Features) -> None:
    """Every class needs an image to learn from, and the validation set one to measure on."""
    learned = set(train.labels.tolist())
    lost = [name for i, name in enumerate(splits.train.classes) if i not in learned]
    if lost:
        raise RequestError(f"no image of class '{lost[0]}' in the training data can be read")
    if not len(val.labels):
        raise RequestError("no image of the validation data can be read")
