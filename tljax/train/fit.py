"""Training from the first phase of a recipe to the last, and the best network on the way."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from tljax.data.augment import epoch_key
from tljax.data.options import Loading
from tljax.data.sources import Splits
from tljax.features.evaluate import Evaluation, evaluate
from tljax.features.extract import Outputs
from tljax.features.probe import Probe
from tljax.models import Model, abstract_variables
from tljax.pretrained.rules import own_rules
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import Preemption, replicate
from tljax.runtime.trees import flatten
from tljax.runtime.types import Variables
from tljax.train.adversary import robust_logits
from tljax.train.checkpoint import Checkpoint, Checkpoints
from tljax.train.freeze import combine, first_trainable_stage, join, split
from tljax.train.inputs import Inputs
from tljax.train.loop import diverged, save, train_epoch
from tljax.train.objectives import Objective
from tljax.train.options import FitConfig
from tljax.train.recipes import Phase
from tljax.train.setup import (
    History,
    NewHead,
    Run,
    Wrapper,
    begin_phase,
    prepare,
)
from tljax.train.step import RESERVED, Materialize

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
            aside, and ``train_NAME`` each metric of the objective: ``train_cross_entropy`` is the
            plain cross-entropy of the same images, as ``val_loss`` is of the validation images.
        skipped: reason by position, for the unreadable images of train and val.
        config: as asked, with every default filled in.
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
    transform: optax.GradientTransformation | Wrapper | None = None,
    new_head: NewHead | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    log_every: int = 1,
    on_epoch: Callable[[History], None] = lambda _: None,
    checkpoints: Checkpoints | None = None,
    checkpoint_seconds: float = 600,
    profile: Path | None = None,
    preemption: Preemption | None = None,
) -> FitResult:
    """Train a new head, and more as the recipe says.

    The same arguments give the same bytes, and so does a run that was killed and goes on from its
    checkpoints.

    Args:
        model: pretrained, with any head.
        variables: of ``model``.
        splits: what to learn from and what to measure on.
        config: see `FitConfig`.
        loading: how images are read; its batch size is that of training.
        seed: of everything random.
        objective: ``(forward, batch, key) -> (losses, metrics)``, what a step minimises; see
            `tljax.train.objectives`. By default the cross-entropy that ``config`` describes.
        materialize: ``(trainable, frozen) -> params``: makes the parameters of the network.
        transform: an Optax transformation that gradients go through before the optimizer, such as a
            regularisation; or a function of the optimizer that returns another one, which is given
            ``value`` and ``grad_fn``, such as sharpness-aware minimisation.
        new_head: ``(model, variables, classes) -> (model, variables)``, for another head than a
            linear one; not for the recipes that start with a probe.
        on_step: called at every ``log_every``-th step, in order, up to seconds later, with the
            number of steps taken and the means since the call before it, or since the epoch began:
            ``loss``, the metrics of the objective, ``learning_rate``, ``gradient_norm`` and
            ``images_per_second``. What it does cannot change the run.
        log_every: steps from one call of ``on_step`` to the next.
        on_epoch: called with the whole history whenever it has grown.
        checkpoints: where to save, and from where to go on; None saves nothing. Whoever opened
            them closes them, and hears then of a write that failed.
        checkpoint_seconds: from one save to the next within an epoch; every epoch ends with one.
        profile: a folder for the trace of some steps of the first epoch; see `traced`.
        preemption: what asks to stop after the next step, whose state is saved.

    Raises:
        RequestError: the configuration does not fit the model or the data, or the loss is no finite
            number before the first step.
        DivergenceError: it is none afterwards. What was saved before stays.
        StoppedError: ``preemption`` asked for it.
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

    def made(variables: Variables) -> Variables:
        """Make the network's own of the parameters that train and those that do not."""
        return join(*split(variables, phases[-1].rates, ()), materialize) if phases else variables

    whole = made(variables)
    misfit = f"materialize made variables that do not fit {model.name}"
    own_rules(flatten(whole), abstract_variables(model), misfit)
    first = evaluate(inputs.logits(model, whole))
    history: History = [
        {"phase": run.plan.start, "epoch": 0, **_scores(first, _robust(run, whole))}
    ]
    if bad := _not_finite(history[0]):
        raise RequestError(f"{bad} before the first step: check the weights and the images")
    saved = checkpoints.restore() if checkpoints else None
    if saved is None:  # else what was logged before is longer
        run.tell(history)
    for note in saved.notes if saved else ():
        print(f"{note}: going on from the one before", file=sys.stderr)
    best = variables
    for number, phase in enumerate(phases):
        if saved is not None and number < saved.position["phase"]:
            continue
        start = first_trainable_stage(model, phase.rates)
        if inputs.start not in (None, start):
            inputs = run.open_inputs(start)
        with (preemption or Preemption()).deferred():
            variables, best, history = train_phase(
                run, number, phase, inputs, variables, best, history, saved
            )
        saved = None

    best = jax.device_get(made(best))
    logits = inputs.logits(model, best)
    return FitResult(
        model,
        best,
        run.probe,
        first if run.probe is not None else None,
        evaluate(logits),
        _robust(run, best),
        logits,
        history,
        inputs.everyones_skipped(),
        run.config,
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
) -> tuple[Variables, Variables, History]:
    """Train one phase, from its beginning or from what was saved in it.

    Args:
        run: what stays the same.
        number: of the phase.
        phase: what trains, and for how long.
        inputs: what enters the stages that train.
        variables: from which the phase starts.
        best: of all epochs before.
        history: of all epochs before.
        saved: within the phase.

    Returns:
        The variables after the last step, those of the best epoch, and the history.
    """
    model, materialize = run.model, run.materialize
    schedule = run.schedule(phase)
    state, frozen, step = begin_phase(run, inputs, phase, variables, schedule)
    moving = set(state.batch_stats)
    best = split(best, phase.rates, moving)[0]
    epoch, batch, sums = 1, 0, {}
    if saved is not None:
        state, best = saved.fill((state, best))
        state = replicate(state, run.mesh)
        names = "history", "epoch", "batch", "sums"
        history, epoch, batch, sums = (saved.position[name] for name in names)
        for part, before in zip(inputs.skipped, saved.position["skipped"], strict=True):
            part.update(before)
        run.tell(history)
    run_key = jax.random.fold_in(jax.random.key(run.seed), number)

    for epoch in range(epoch, phase.epochs + 1):  # noqa: B020 - from where it stands
        if _patience_is_over(history, phase, run.config.patience):
            break
        passed = phase.before + epoch
        position = {"phase": number, "epoch": epoch, "pass": passed, "history": history}
        at = {**position, "batch": batch, "sums": sums}
        keys = epoch_key(run.seed, passed), run_key
        state, means = train_epoch(run, phase, inputs, step, state, frozen, keys, best, at)
        inputs.refuse_lost_class()
        batch, sums = 0, {}
        changing = state.ema or state.changing
        now = join(changing, frozen, materialize)
        evaluation = evaluate(inputs.logits(model, now))
        entry = {
            "phase": phase.name,
            "epoch": passed,
            "learning_rate": float(np.asarray(schedule(int(state.step) - 1))),
            "train_loss": means["loss"],
            **{f"train_{name}": mean for name, mean in means.items() if name not in RESERVED},
            **_scores(evaluation, _robust(run, now)),
        }
        if bad := _not_finite(entry):
            raise diverged(run, phase, state, bad)
        history = [*history, entry]
        if best_epoch(history) == len(history) - 1:
            best = jax.device_get(changing)
        run.tell(history)
        after = {"epoch": epoch + 1, "pass": passed + 1, "history": history}
        save(run, phase, inputs, {**position, **after, "batch": 0, "sums": {}}, state, best)
    _, frozen = split(variables, phase.rates, moving)  # as they were, in full precision
    return join(state.changing, frozen), join(best, frozen), history


def _not_finite(entry: Mapping[str, Any]) -> str | None:
    """Name a loss that is not finite; of metrics that is up to the objective."""
    losses = (
        (name, entry.get(name, 0.0)) for name in ("train_loss", "val_loss", "val_robust_loss")
    )
    return next((f"{name} is {value}" for name, value in losses if not np.isfinite(value)), None)


def _robust(run: Run, variables: Variables) -> Evaluation | None:
    """On the attacked validation set, if training is attacked."""
    attacker = run.config.attacker
    if attacker is None:
        return None
    return evaluate(
        robust_logits(run.model, variables, run.splits.val, run.loading, attacker, run.seed)
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
