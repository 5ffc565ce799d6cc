"""Training through all phases of a recipe, keeping the best network."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from tljax.data.augment import epoch_key
from tljax.data.examples import Splits
from tljax.data.options import Loading
from tljax.features.evaluate import Evaluation, choose_thresholds, evaluate
from tljax.features.extract import Outputs
from tljax.features.probe import Probe
from tljax.models import Model, abstract_variables
from tljax.pretrained.rules import native_rules
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import Preemption, to_host
from tljax.runtime.task import Task
from tljax.runtime.trees import flatten
from tljax.runtime.types import Variables
from tljax.train.adversary import robust_logits
from tljax.train.checkpoint import Checkpoint, Checkpoints
from tljax.train.feed import Feed
from tljax.train.freeze import combine, first_trainable_stage, join, split
from tljax.train.history import History, best_epoch, non_finite_loss, validation_metrics
from tljax.train.inputs import Inputs
from tljax.train.loop import divergence_error, save, train_epoch
from tljax.train.objectives import Objective
from tljax.train.optimizer import OptimizerWrapper
from tljax.train.options import FitConfig
from tljax.train.recipes import Phase
from tljax.train.setup import NewHead, Run, begin_phase, prepare
from tljax.train.step import RESERVED, Materialize, TrainState


class FitResult(NamedTuple):
    """A trained network and how it was reached.

    Attributes:
        model: network with a head for the classes of the data.
        variables: variables of the best epoch on the validation set, as host arrays. Epoch 0 is
            the network before training.
        probe: linear probe with its sweep of L2 penalties; None for a recipe without a probe.
        probe_evaluation: evaluation of the probe on the validation set.
        evaluation: evaluation of ``variables`` on the validation set.
        robust: evaluation of ``variables`` on the attacked validation set; None without an attack.
        logits: logits of ``variables`` for the validation set.
        history: one entry per epoch, see `tljax.train.history.History`. ``train_loss`` is the
            minimized loss without weight decay; ``train_cross_entropy`` is the plain cross-entropy
            of the training images, which compares with ``val_loss``.
        skipped: {position: reason} of the unreadable training and validation images.
        config: the configuration with all defaults filled in.
        task: what the outputs mean: with the mean and scale of numbers, and with the thresholds of
            labels that have the highest F1 on the validation images.
        unmerged: ``variables`` before ``materialize``: with the factors of LoRA beside the kernels
            that they were added to.
        initial: variables before training, with the head that the recipe starts from, as host
            arrays.
        final: variables after the last epoch, as host arrays; those of the moving average, if there
            is one.
    """

    model: Model
    variables: Variables
    probe: Probe | None
    probe_evaluation: Evaluation | None
    evaluation: Evaluation
    robust: Evaluation | None
    logits: Outputs
    history: History
    skipped: tuple[dict[int, str], dict[int, str]]
    config: FitConfig
    task: Task
    unmerged: Variables
    initial: Variables
    final: Variables

    @property
    def best_epoch(self) -> int:
        """Return the index in ``history`` of the epoch that ``variables`` are of."""
        assert self.config.choose_by is not None  # `check_task` fills it in
        return best_epoch(self.history, self.config.choose_by)


def fit(
    model: Model,
    variables: Variables,
    splits: Splits,
    config: FitConfig | None = None,
    *,
    loading: Loading | None = None,
    seed: int = 0,
    objective: Objective | None = None,
    materialize: Materialize = combine,
    transform: optax.GradientTransformation | OptimizerWrapper | None = None,
    new_head: NewHead | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    log_every: int = 1,
    on_epoch: Callable[[History], None] = lambda _: None,
    checkpoints: Checkpoints | None = None,
    checkpoint_seconds: float = 600,
    profile: Path | None = None,
    preemption: Preemption | None = None,
) -> FitResult:
    """Train a new head for the classes of the data and, depending on the recipe, further stages.

    The same arguments on the same devices give the same bytes, also if the run was interrupted and
    resumed from its checkpoints.

    Args:
        model: pretrained network, with any head.
        variables: variables of ``model``.
        splits: training and validation images.
        config: what to train, see `FitConfig`; by default the recipe lp-ft.
        loading: options of how images are read, the batch size and the devices.
        seed: seed of the random number generator for initialization, shuffling, augmentation and
            dropout.
        objective: ``(forward, batch, key) -> (losses, metrics)``, the loss to minimize, see
            `tljax.train.objectives`; by default the cross-entropy that ``config`` describes.
        materialize: ``(trainable, frozen) -> params``, the parametrization of the network; by
            default the union of both.
        transform: an Optax transformation applied to gradients before the optimizer, such as a
            regularization; or a function that wraps the optimizer, such as sharpness-aware
            minimization, whose update gets the extra arguments ``value`` and ``grad_fn``.
        new_head: ``(model, variables, classes) -> (model, variables)``, to add another head than a
            linear one; not for recipes that start with a probe.
        on_step: called every ``log_every`` steps, in order but up to seconds later, with the number
            of steps taken and the means since its last call or the start of the epoch: ``loss``,
            the objective's metrics, ``learning_rate``, ``gradient_norm`` and
            ``images_per_second``. It cannot change the run.
        log_every: number of steps between calls of ``on_step``.
        on_epoch: called with the whole history after every epoch.
        checkpoints: where to save checkpoints and resume from; by default none are saved. The
            caller closes it, which raises if the last write failed.
        checkpoint_seconds: seconds between checkpoints within an epoch; every epoch ends with one.
        profile: folder for a profiler trace of some steps of the first epoch, see
            `tljax.train.trace.traced`.
        preemption: requests a stop after the next step, whose state is then saved.

    Returns:
        The best network on the validation set, its evaluation and the history.

    Raises:
        RequestError: the configuration does not fit the model or the data, or the loss is not
            finite before the first step.
        DivergenceError: the loss or a parameter is not finite later; earlier checkpoints remain.
        StoppedError: ``preemption`` requested a stop.
    """
    run, inputs = prepare(
        *(model, variables, splits, config, loading, seed, new_head),
        objective=objective,
        materialize=materialize,
        transform=transform,
        on_step=on_step,
        log_every=log_every,
        on_epoch=on_epoch,
        checkpoints=checkpoints,
        checkpoint_seconds=checkpoint_seconds,
        profile=profile,
        preemption=preemption,
    )
    model, variables, phases = run.model, run.variables, run.plan.phases

    def materialized(variables: Variables) -> Variables:
        if not phases:
            return variables
        return join(*split(variables, phases[-1].rates, ()), run.materialize)

    initial = materialized(variables)
    mismatch = f"materialize made variables that do not fit {model.name}"
    native_rules(flatten(initial), abstract_variables(model), mismatch)
    first = evaluate(inputs.logits(model, initial), run.task)
    robust = _robust_evaluation(run, initial)
    metrics = validation_metrics(first, robust, run.choose_by)
    history: History = [{"phase": run.plan.start, "epoch": 0, **metrics}]
    if problem := non_finite_loss(history[0]):
        raise RequestError(f"{problem} before the first step: check the weights and the images")
    saved = checkpoints.restore() if checkpoints else None
    if saved is None:  # a checkpoint holds a longer history
        run.report(history)
    for note in saved.notes if saved else ():
        print(f"note: {note}: resuming from the one before it", file=sys.stderr)
    best = final = variables
    for number, phase in enumerate(phases):
        if saved is not None and number < saved.position["phase"]:
            continue
        start = first_trainable_stage(model, phase.rates)
        if inputs.start not in (None, start):
            inputs = run.open_inputs(start)
        with (preemption or Preemption()).deferred():
            variables, final, best, history = train_phase(
                run, number, phase, inputs, variables, best, history, saved
            )
        saved = None

    unmerged = to_host(best)
    best = to_host(materialized(best))
    logits = inputs.logits(model, best)
    evaluation = choose_thresholds(evaluate(logits, run.task))
    return FitResult(
        model,
        best,
        run.probe,
        choose_thresholds(first) if run.probe is not None else None,
        evaluation,
        _robust_evaluation(run, best),
        logits,
        history,
        inputs.all_skipped(),
        run.config,
        evaluation.task,
        unmerged,
        to_host(initial),
        to_host(materialized(final)),
    )


def train_phase(
    run: Run,
    number: int,
    phase: Phase,
    inputs: Inputs,
    variables: Variables,
    best: Variables,
    history: History,
    saved: Checkpoint | None,
) -> tuple[Variables, Variables, Variables, History]:
    """Train one phase, from its start or from a checkpoint.

    Args:
        run: everything that is constant during the run.
        number: index of the phase.
        phase: what to train and for how long.
        inputs: inputs of the trained stages.
        variables: variables at the start of the phase.
        best: variables of the best epoch so far.
        history: history so far.
        saved: checkpoint within this phase, if any.

    Returns:
        The variables after the last step, those that were validated then (of the moving average, if
        there is one), those of the best epoch, and the history.

    Raises:
        DivergenceError: a loss or a parameter is not finite.
        StoppedError: the run was asked to stop, and is saved.
    """
    model, materialize = run.model, run.materialize
    schedule = run.schedule(phase)
    state, frozen, step = begin_phase(run, inputs, phase, variables, schedule)
    best = split(best, phase.rates, set(state.batch_stats))[0]
    epoch, batch, sums = 1, 0, {}
    if saved is not None:
        filled = saved.fill({**state._asdict(), "best": best})
        best, state = filled.pop("best"), TrainState(**filled)
        names = "history", "epoch", "batch", "sums"
        history, epoch, batch, sums = (saved.position[name] for name in names)
        for part, before in zip(inputs.skipped, saved.position["skipped"], strict=True):
            part.update(before)
        run.report(history)
    run_key = jax.random.fold_in(jax.random.key(run.seed), number)
    feed = Feed(run, inputs, step)

    for epoch in range(epoch, phase.epochs + 1):  # noqa: B020 - resumes where it stopped
        in_phase = sum(entry["phase"] == phase.name for entry in history)
        without_gain = len(history) - 1 - best_epoch(history, run.choose_by)
        if 0 < run.config.patience <= min(in_phase, without_gain):
            break
        total_epoch = phase.epochs_before + epoch
        position = {"phase": number, "epoch": epoch, "pass": total_epoch, "history": history}
        start = {**position, "batch": batch, "sums": sums}
        keys = epoch_key(run.seed, total_epoch), run_key
        state, means = train_epoch(run, phase, inputs, feed, state, frozen, keys, best, start)
        inputs.check_classes()
        batch, sums = 0, {}
        changing = state.ema or state.changing
        current = join(changing, frozen, materialize)
        evaluation = evaluate(inputs.logits(model, current), run.task)
        entry = {
            "phase": phase.name,
            "epoch": total_epoch,
            "learning_rate": float(np.asarray(schedule(int(state.step) - 1))),
            "train_loss": means["loss"],
            **{f"train_{name}": mean for name, mean in means.items() if name not in RESERVED},
            **validation_metrics(evaluation, _robust_evaluation(run, current), run.choose_by),
        }
        if problem := non_finite_loss(entry):
            raise divergence_error(run, phase, state, problem)
        history = [*history, entry]
        if best_epoch(history, run.choose_by) == len(history) - 1:
            best = to_host(changing)
        run.report(history)
        end = {"epoch": epoch + 1, "pass": total_epoch + 1, "history": history}
        save(run, phase, inputs, {**position, **end, "batch": 0, "sums": {}}, state, best)
    # The frozen variables of the steps may be of lower precision.
    _, frozen = split(variables, phase.rates, set(state.batch_stats))
    final = join(state.ema or state.changing, frozen)
    return join(state.changing, frozen), final, join(best, frozen), history


def _robust_evaluation(run: Run, variables: Variables) -> Evaluation | None:
    """Evaluate variables on the attacked validation set, if training is adversarial."""
    attacker = run.config.attacker
    if attacker is None:
        return None
    return evaluate(
        robust_logits(run.model, variables, run.splits.val, run.loading, attacker, run.seed)
    )
