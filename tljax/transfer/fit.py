"""The training engine: a recipe's phases over the images of two sources."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from tljax.config import FitConfig, Loading
from tljax.data.augment import epoch_key
from tljax.data.loader import num_batches
from tljax.data.sources import Splits
from tljax.errors import RequestError
from tljax.models import Model, init, replace_head
from tljax.parallel import agree, data_mesh, is_writer, replicate, shard
from tljax.progress import track
from tljax.transfer.checkpoint import Checkpoint, Checkpoints
from tljax.transfer.evaluate import Evaluation, evaluate
from tljax.transfer.features import Features
from tljax.transfer.freeze import combine, first_trainable_stage, label, partition, training_stages
from tljax.transfer.inputs import Inputs, open_inputs
from tljax.transfer.metrics import Metrics
from tljax.transfer.optimizer import build_optimizer, learning_rate_schedule
from tljax.transfer.probe import Probe, fit_probe
from tljax.transfer.recipes import Phase, make_plan
from tljax.transfer.step import StepConfig, TrainState, init_state, make_train_step
from tljax.types import Variables

History = list[dict[str, Any]]

MIN_DELTA = 1e-3
"""Nats by which the validation loss must fall to count as better at the same accuracy."""

NewHead = Callable[[Model, Variables, int], tuple[Model, Variables]]


class FitResult(NamedTuple):
    """A trained network.

    Attributes:
        model: with a head for the classes of the data.
        variables: of the best epoch on the validation set, what training started from being epoch
            0; on the host.
        probe: the linear probe, with its sweep; None for a recipe without.
        probe_evaluation: of the probe on the validation set.
        evaluation: of ``variables`` on the validation set.
        logits: of ``variables``, of the validation set.
        history: one entry an epoch.
        skipped: reason by position, for the unreadable images of train and val.
        config: as asked, with every default filled in.
    """

    model: Model
    variables: Variables
    probe: Probe | None
    probe_evaluation: Evaluation | None
    evaluation: Evaluation
    logits: Features
    history: History
    skipped: tuple[dict[int, str], dict[int, str]]
    config: FitConfig


@dataclass(frozen=True)
class _Run:
    """What all phases share."""

    model: Model
    splits: Splits
    config: FitConfig
    loading: Loading
    seed: int
    mesh: Mesh
    checkpoints: Checkpoints | None
    checkpoint_seconds: float
    log: Callable[[History], None]
    transform: optax.GradientTransformation | None

    @property
    def steps_per_epoch(self) -> int:
        return num_batches(len(self.splits.train), self.loading.batch_size)


class _Progress(NamedTuple):
    """What one phase hands to the next."""

    variables: Variables
    best: Variables
    history: History
    epochs: int


def fit(
    model: Model,
    variables: Variables,
    splits: Splits,
    config: FitConfig | None = None,
    *,
    loading: Loading | None = None,
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
    checkpoint_seconds: float = 600,
    log: Callable[[History], None] = lambda _: None,
    new_head: NewHead | None = None,
    transform: optax.GradientTransformation | None = None,
) -> FitResult:
    """Trains a new head, and more as the recipe says.

    The same arguments give the same bytes, and so does a run that was killed and goes on from its
    checkpoints.

    Args:
        model: pretrained, with any head.
        variables: of ``model``.
        splits: what to learn from and what to measure on.
        config: see `FitConfig`.
        loading: how images are read; its batch size is that of training.
        seed: of everything random.
        checkpoints: where to save, and from where to go on; None saves nothing.
        checkpoint_seconds: from one save to the next within an epoch; every epoch ends with one.
        log: called with the whole history whenever it has grown.
        new_head: ``(model, variables, classes) -> (model, variables)``, for another head than a
            linear one; not for the recipes that start with a probe.
        transform: what gradients go through before the optimizer: a regularisation, say.

    Raises:
        RequestError: the configuration does not fit the model or the data.
    """
    loading = loading or Loading()
    plan = make_plan(model, config or FitConfig(), len(splits.train), loading.batch_size)
    config = plan.config
    model = replace(model, dtype=config.precision)
    classes, head = len(splits.train.classes), model.stages[-1].name
    if new_head is None:
        new_head = partial(replace_head, dropout=config.dropout)
    model, variables = new_head(model, variables, classes)
    tables = [label(variables["params"], phase.table) for phase in plan.phases]
    if plan.start == "probe" and variables["params"][head].keys() != {"kernel", "bias"}:
        raise RequestError(f"--recipe {config.recipe} starts with a probe, so its head is linear")
    if plan.start == "random":
        variables = init(model, jax.random.key(seed))
    start = first_trainable_stage(model, tables[0]) if tables else head
    inputs = open_inputs(model, variables, splits, config, loading, seed, start)
    probe = None
    if plan.start == "probe":
        features = inputs.pooled(model, variables)
        probe = fit_probe(features.values, features.labels, num_classes=classes, seed=seed)
        kernel, bias = np.asarray(probe.kernel), np.asarray(probe.bias)
        variables["params"][head] = {"kernel": kernel, "bias": bias}

    mesh = data_mesh(loading.devices)
    run = _Run(
        model, splits, config, loading, seed, mesh, checkpoints, checkpoint_seconds, log, transform
    )
    first = evaluate(inputs.logits(model, variables))
    history: History = [{"phase": plan.start, "epoch": 0, **_scores(first)}]
    log(history)
    saved = checkpoints.restore() if checkpoints else None
    for note in saved.notes if saved else ():
        print(f"{note}: going on from the one before", file=sys.stderr)
    progress = _Progress(variables, variables, history, 0)
    for number, (phase, labels) in enumerate(zip(plan.phases, tables, strict=True)):
        if saved is not None and number < saved.position["phase"]:
            progress = progress._replace(epochs=progress.epochs + phase.epochs)
            continue
        start = first_trainable_stage(model, labels)
        if inputs.start not in (None, start):
            inputs = open_inputs(model, variables, splits, config, loading, seed, start)
        progress = _train(run, inputs, number, phase, labels, progress, saved)
        saved = None
    if checkpoints:
        checkpoints.close()

    best = jax.device_get(progress.best)
    logits = inputs.logits(model, best)
    return FitResult(
        model,
        best,
        probe,
        first if probe is not None else None,
        evaluate(logits),
        logits,
        progress.history,
        inputs.everyones_skipped(),
        config,
    )


def _train(
    run: _Run,
    inputs: Inputs,
    number: int,
    phase: Phase,
    labels: Variables,
    progress: _Progress,
    saved: Checkpoint | None,
) -> _Progress:
    """One phase, from its beginning or from what was saved in it."""
    model, config = run.model, run.config
    training = training_stages(labels) if config.batch_norm == "batch" else frozenset[str]()
    if config.dropout:
        training |= training_stages(labels) & {model.stages[-1].name}

    def trained(variables: Variables) -> tuple[Variables, Variables]:
        params = partition(variables["params"], labels)[0]
        stats = {k: v for k, v in variables["batch_stats"].items() if k in training}
        return params, stats

    def whole(params: Variables, stats: Variables) -> Variables:
        return {
            "params": combine(params, frozen["params"]),
            "batch_stats": {**progress.variables["batch_stats"], **stats},
        }

    total_steps = phase.epochs * run.steps_per_epoch
    optimizer = build_optimizer(config.optimizer, labels, total_steps)
    if run.transform is not None:
        optimizer = optax.chain(run.transform, optimizer)
    schedule = learning_rate_schedule(config.optimizer, total_steps)
    frozen = replicate(
        {
            "params": partition(progress.variables["params"], labels)[1],
            "batch_stats": {
                k: v for k, v in progress.variables["batch_stats"].items() if k not in training
            },
        },
        run.mesh,
    )
    params, stats = trained(progress.variables)
    state = init_state(params, stats, optimizer, average=config.average > 0)
    best, history, epoch, batch = trained(progress.best), progress.history, 1, 0
    if saved is not None:
        state, best = saved.fill((state, best))
        history, epoch, batch = (saved.position[name] for name in ("history", "epoch", "batch"))
        for part, before in zip(inputs.skipped, saved.position["skipped"], strict=True):
            part.update(before)
        run.log(history)
    state = replicate(state, run.mesh)
    step = make_train_step(
        model,
        optimizer,
        StepConfig(
            training,
            config.label_smoothing,
            _class_weights(run),
            config.average,
            config.accumulate,
            config.augmentation if config.augment and inputs.start is None else None,
        ),
        start=inputs.start,
    )
    run_key = jax.random.fold_in(jax.random.key(run.seed), number)

    for epoch in range(epoch, phase.epochs + 1):  # noqa: B020 - from where it stands
        if _patience_is_over(history, phase, config.patience):
            break
        passed = progress.epochs + epoch
        position = {"phase": number, "epoch": epoch, "pass": passed, "history": history}
        keys = epoch_key(run.seed, passed), run_key
        state = _epoch(run, inputs, step, state, frozen, keys, best, position, batch)
        batch = 0
        means = state.metrics.means()
        average = state.average or {"params": state.params, "batch_stats": state.batch_stats}
        now = whole(average["params"], average["batch_stats"])
        evaluation = evaluate(inputs.logits(model, now))
        entry = {
            "phase": phase.name,
            "epoch": passed,
            "learning_rate": float(np.asarray(schedule(int(state.step) - 1))),
            "train_loss": means["loss"],
            "train_top1": means["top1"],
            **_scores(evaluation),
        }
        history = [*history, entry]
        if best_epoch(history) == len(history) - 1:
            best = jax.device_get(trained(now))
        run.log(history)
        state = state._replace(metrics=replicate(Metrics.zero(), run.mesh))
        after = {"epoch": epoch + 1, "pass": passed + 1, "batch": 0, "history": history}
        _save(run, inputs, {**position, **after}, state, best)
    return _Progress(
        whole(state.params, state.batch_stats),
        whole(*best),
        history,
        progress.epochs + phase.epochs,
    )


def _epoch(
    run: _Run,
    inputs: Inputs,
    step: Any,
    state: TrainState,
    frozen: Variables,
    keys: tuple[jax.Array, jax.Array],
    best: tuple[Variables, Variables],
    position: dict[str, Any],
    first: int,
) -> TrainState:
    """The batches of an epoch from ``first`` on."""
    began = saved = time.monotonic()
    waited = 0.0
    epoch = position["pass"]
    batches = track(
        inputs.batches(run.model, epoch, first),
        description=f"epoch {epoch}",
        total=len(run.splits.train) - first * run.loading.batch_size,
        size=lambda batch: int((batch.indices >= 0).sum()) * jax.process_count(),
        quiet=not is_writer(),
    )
    asked = time.monotonic()
    for done, batch in enumerate(batches, start=first + 1):
        if state.step.is_ready():  # pyright: ignore[reportAttributeAccessIssue]
            waited += time.monotonic() - asked
        on_devices = shard(batch, run.mesh)
        # One step ahead and no more: batches must not pile up on the device.
        jax.block_until_ready(state.step)
        state = step(state, frozen, on_devices, keys)
        if run.checkpoints and agree(time.monotonic() - saved >= run.checkpoint_seconds):
            _save(run, inputs, {**position, "batch": done}, state, best)
            saved = time.monotonic()
        asked = time.monotonic()
    seconds = time.monotonic() - began
    if inputs.start is None and is_writer():
        print(f"  {waited / seconds:.0%} of the time waiting for data", file=sys.stderr)
    return state


def _save(
    run: _Run,
    inputs: Inputs,
    position: dict[str, Any],
    state: TrainState,
    best: tuple[Variables, Variables],
) -> None:
    if run.checkpoints:
        skipped = [sorted(part.items()) for part in inputs.everyones_skipped()]
        # One more than there are steps: an epoch's end is saved too.
        number = position["pass"] * (run.steps_per_epoch + 1) + position["batch"]
        run.checkpoints.save(number, {**position, "skipped": skipped}, (state, best))


def _class_weights(run: _Run) -> tuple[float, ...]:
    """Weights that make every class count alike, of mean 1 over the images."""
    if run.config.class_weights == "none":
        return ()
    labels = run.splits.train.labels
    counts = np.bincount(labels, minlength=len(run.splits.train.classes))
    return tuple((len(labels) / (len(counts) * np.maximum(counts, 1))).tolist())


def _scores(evaluation: Evaluation) -> dict[str, float]:
    return {"val_loss": evaluation.loss, "val_top1": evaluation.top1}


def best_epoch(history: History) -> int:
    """Which entry counts: the highest accuracy; where equal, a loss lower by at least `MIN_DELTA`.

    Without that margin a network that has nothing left to learn would be preferred for being ever
    more certain.
    """
    best = 0
    for i, entry in enumerate(history):
        gain = entry["val_top1"] - history[best]["val_top1"]
        if gain > 0 or (gain == 0 and entry["val_loss"] < history[best]["val_loss"] - MIN_DELTA):
            best = i
    return best


def _patience_is_over(history: History, phase: Phase, patience: int) -> bool:
    mine = sum(entry["phase"] == phase.name for entry in history)
    return 0 < patience <= min(mine, len(history) - 1 - best_epoch(history))
