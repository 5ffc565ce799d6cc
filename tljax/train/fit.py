"""The training engine: a recipe's phases over the images of two sources."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from tljax.data.augment import epoch_key
from tljax.data.options import Loading
from tljax.data.sources import Splits
from tljax.features.evaluate import Evaluation, evaluate
from tljax.features.extract import Features
from tljax.features.probe import Probe
from tljax.metrics.classification import Metrics
from tljax.models import Model
from tljax.runtime.errors import DivergenceError, RequestError, StoppedError
from tljax.runtime.parallel import Preemption, agree, is_writer, replicate, shard
from tljax.runtime.progress import track
from tljax.runtime.types import Variables
from tljax.train.adversary import robust_logits
from tljax.train.checkpoint import Checkpoint, Checkpoints
from tljax.train.freeze import first_trainable_stage
from tljax.train.inputs import Inputs
from tljax.train.memory import within_memory
from tljax.train.options import FitConfig
from tljax.train.recipes import Phase
from tljax.train.setup import NewHead, Setup, divide, first_state, prepare
from tljax.train.step import TrainState, TrainStep
from tljax.train.trace import traced

History = list[dict[str, Any]]

MIN_DELTA = 1e-3
"""Nats by which the validation loss must fall to count as better at the same accuracy."""


class FitResult(NamedTuple):
    """A trained network.

    Attributes:
        model: with a head for the classes of the data.
        variables: of the best epoch on the validation set, what training started from being epoch
            0; on the host.
        probe: the linear probe, with its sweep; None for a recipe without.
        probe_evaluation: of the probe on the validation set.
        evaluation: of ``variables`` on the validation set.
        robust: of ``variables`` on the attacked validation set; None without an adversary.
        logits: of ``variables``, of the validation set.
        history: one entry an epoch. ``train_loss`` is what training minimises, weight decay left
            aside; ``train_cross_entropy`` is the plain cross-entropy of the same images, as
            ``val_loss`` is of the validation images.
        skipped: reason by position, for the unreadable images of train and val.
        config: as asked, with every default filled in.
    """

    model: Model
    variables: Variables
    probe: Probe | None
    probe_evaluation: Evaluation | None
    evaluation: Evaluation
    robust: Evaluation | None
    logits: Features
    history: History
    skipped: tuple[dict[int, str], dict[int, str]]
    config: FitConfig


@dataclass(frozen=True)
class _Run:
    """What all phases share."""

    setup: Setup
    checkpoints: Checkpoints | None
    checkpoint_seconds: float
    log: Callable[[History], None]
    profile: Path | None
    preemption: Preemption
    watched: bool
    """Whether a step may be saved or be the last: of several processes, all ask each other then."""


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
    profile: Path | None = None,
    preemption: Preemption | None = None,
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
        checkpoints: where to save, and from where to go on; None saves nothing. Whoever opened
            them closes them, and hears then of a write that failed.
        checkpoint_seconds: from one save to the next within an epoch; every epoch ends with one.
        log: called with the whole history whenever it has grown.
        profile: a folder for the trace of some steps of the first epoch; see `traced`.
        preemption: what asks to stop after the next step, whose state is saved.
        new_head: ``(model, variables, classes) -> (model, variables)``, for another head than a
            linear one; not for the recipes that start with a probe.
        transform: what gradients go through before the optimizer: a regularisation, say.

    Raises:
        RequestError: the configuration does not fit the model or the data, or the loss is no finite
            number before the first step.
        DivergenceError: it is none afterwards. What was saved before stays.
        StoppedError: ``preemption`` asked for it.
    """
    setup, inputs = prepare(model, variables, splits, config, loading, seed, new_head, transform)
    model, variables, plan = setup.model, setup.variables, setup.plan
    watched = checkpoints is not None or preemption is not None
    preemption = preemption or Preemption()
    run = _Run(setup, checkpoints, checkpoint_seconds, log, profile, preemption, watched)
    first = evaluate(inputs.logits(model, variables))
    robust = _robust(setup, variables)
    history: History = [{"phase": plan.start, "epoch": 0, **_scores(first, robust)}]
    if bad := _not_finite(history[0]):
        raise RequestError(f"{bad} before the first step: check the weights and the images")
    saved = checkpoints.restore() if checkpoints else None
    if saved is None:  # else what was logged before is longer
        log(history)
    for note in saved.notes if saved else ():
        print(f"{note}: going on from the one before", file=sys.stderr)
    progress = _Progress(variables, variables, history, 0)
    for number, (phase, labels) in enumerate(zip(plan.phases, setup.labels, strict=True)):
        if saved is not None and number < saved.position["phase"]:
            progress = progress._replace(epochs=progress.epochs + phase.epochs)
            continue
        start = first_trainable_stage(model, labels)
        if inputs.start not in (None, start):
            inputs = setup.open_inputs(start)
        with preemption.deferred():
            progress = _train(run, inputs, number, phase, labels, progress, saved)
        saved = None

    best = jax.device_get(progress.best)
    logits = inputs.logits(model, best)
    return FitResult(
        model,
        best,
        setup.probe,
        first if setup.probe is not None else None,
        evaluate(logits),
        _robust(setup, best),
        logits,
        progress.history,
        inputs.everyones_skipped(),
        setup.config,
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
    setup = run.setup
    model, config = setup.model, setup.config
    schedule = setup.schedule(number)
    division = divide(setup, labels)
    state, frozen, step = first_state(setup, inputs, division, progress.variables, schedule)
    best, history, epoch, batch = division.split(progress.best)[0], progress.history, 1, 0
    if saved is not None:
        state, best = saved.fill((state, best))
        state = replicate(state, setup.mesh)
        history, epoch, batch = (saved.position[name] for name in ("history", "epoch", "batch"))
        for part, before in zip(inputs.skipped, saved.position["skipped"], strict=True):
            part.update(before)
        run.log(history)
    run_key = jax.random.fold_in(jax.random.key(setup.seed), number)

    for epoch in range(epoch, phase.epochs + 1):  # noqa: B020 - from where it stands
        if _patience_is_over(history, phase, config.patience):
            break
        passed = progress.epochs + epoch
        position = {"phase": number, "epoch": epoch, "pass": passed, "history": history}
        keys = epoch_key(setup.seed, passed), run_key
        state = _epoch(run, inputs, step, state, frozen, keys, best, position, batch)
        inputs.refuse_lost_class()
        batch = 0
        means = state.metrics.means()
        changing = state.average or state.changing
        now = division.join(changing, frozen)
        evaluation = evaluate(inputs.logits(model, now))
        entry = {
            "phase": phase.name,
            "epoch": passed,
            "learning_rate": float(np.asarray(schedule(int(state.step) - 1))),
            "train_loss": means["loss"],
            "train_cross_entropy": means["cross_entropy"],
            "train_top1": means["top1"],
            **_scores(evaluation, _robust(setup, now)),
        }
        if bad := _not_finite(entry):
            raise _diverged(run, number, state, bad)
        history = [*history, entry]
        if best_epoch(history) == len(history) - 1:
            best = jax.device_get(changing)
        run.log(history)
        state = state._replace(metrics=replicate(Metrics.zero(), setup.mesh))
        after = {"epoch": epoch + 1, "pass": passed + 1, "batch": 0, "history": history}
        _save(run, inputs, {**position, **after}, state, best)
    _, frozen = division.split(progress.variables)  # as they were, in full precision
    return _Progress(
        division.join(state.changing, frozen),
        division.join(best, frozen),
        history,
        progress.epochs + phase.epochs,
    )


def _epoch(
    run: _Run,
    inputs: Inputs,
    step: TrainStep,
    state: TrainState,
    frozen: Variables,
    keys: tuple[jax.Array, jax.Array],
    best: Variables,
    position: dict[str, Any],
    first: int,
) -> TrainState:
    """The batches of an epoch from ``first`` on."""
    setup, config = run.setup, run.setup.config
    multiple = setup.mesh.size * config.accumulate
    began = saved = time.monotonic()
    waited = 0.0
    epoch = position["pass"]
    batches = inputs.batches(setup.model, epoch, first)
    if run.profile and epoch == 1:
        batches = traced(batches, run.profile)
    batches = track(
        batches,
        description=f"epoch {epoch}",
        total=len(setup.splits.train) - first * setup.loading.batch_size,
        size=lambda batch: int((batch.indices >= 0).sum()) * jax.process_count(),
        quiet=not is_writer(),
    )
    asked = time.monotonic()
    for done, batch in enumerate(batches, start=first + 1):
        if state.step.is_ready():  # pyright: ignore[reportAttributeAccessIssue]
            waited += time.monotonic() - asked
        arguments = state, frozen, shard(batch, setup.mesh), keys
        with within_memory(step, arguments, multiple, config.accumulate):
            # One step ahead and no more: batches must not pile up on the device.
            jax.block_until_ready(state.step)
            state = step(*arguments)
        late = time.monotonic() - saved >= run.checkpoint_seconds
        due, stop = agree(late, run.preemption.asked) if run.watched else (False, False)
        if due or stop:
            _save(run, inputs, {**position, "batch": done}, state, best)
            saved = time.monotonic()
        if stop:
            raise StoppedError
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
    best: Variables,
) -> None:
    if run.checkpoints:
        changing = state.params, state.batch_stats, state.average, state.metrics.loss
        if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(changing)):
            raise _diverged(run, position["phase"], state, "a parameter or the loss is not finite")
        skipped = [sorted(part.items()) for part in inputs.everyones_skipped()]
        # One more than there are steps: an epoch's end is saved too.
        number = position["pass"] * (run.setup.steps_per_epoch + 1) + position["batch"]
        run.checkpoints.save(number, {**position, "skipped": skipped}, (state, best))


def _not_finite(entry: Mapping[str, Any]) -> str | None:
    numbers = ((name, value) for name, value in entry.items() if isinstance(value, float))
    return next((f"{name} is {value}" for name, value in numbers if not np.isfinite(value)), None)


def _diverged(run: _Run, phase: int, state: TrainState, what: str) -> DivergenceError:
    step = int(state.step)
    rate = float(np.asarray(run.setup.schedule(phase)(step - 1)))
    clip = "lower" if run.setup.config.optimizer.clip_norm else "set"
    kept = "; what was saved before is kept" if run.checkpoints else ""
    return DivergenceError(
        f"training diverged: {what} after step {step}, at a learning rate of {rate:.1e}: lower "
        f"--learning-rate, {clip} --clip-norm, or lengthen --warmup{kept}"
    )


def _robust(setup: Setup, variables: Variables) -> Evaluation | None:
    """On the attacked validation set, if training is attacked."""
    attacker = setup.config.attacker
    if attacker is None:
        return None
    return evaluate(
        robust_logits(setup.model, variables, setup.splits.val, setup.loading, attacker, setup.seed)
    )


def _scores(evaluation: Evaluation, robust: Evaluation | None) -> dict[str, float]:
    scores = {"val_loss": evaluation.loss, "val_top1": evaluation.top1}
    if robust is not None:
        scores |= {"val_robust_loss": robust.loss, "val_robust_top1": robust.top1}
    return scores


def best_epoch(history: History) -> int:
    """Which entry counts: the highest accuracy; where equal, a loss lower by at least `MIN_DELTA`.

    Without that margin a network that has nothing left to learn would be preferred for being ever
    more certain. With an adversary it is the robust accuracy that counts, and its loss.
    """
    kind = "val_robust" if "val_robust_top1" in history[0] else "val"
    top1, loss = ([entry[f"{kind}_{name}"] for entry in history] for name in ("top1", "loss"))
    best = 0
    for i in range(len(history)):
        gain = top1[i] - top1[best]
        if gain > 0 or (gain == 0 and loss[i] < loss[best] - MIN_DELTA):
            best = i
    return best


def _patience_is_over(history: History, phase: Phase, patience: int) -> bool:
    mine = sum(entry["phase"] == phase.name for entry in history)
    return 0 < patience <= min(mine, len(history) - 1 - best_epoch(history))
