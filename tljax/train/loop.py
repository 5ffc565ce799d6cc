"""One epoch of training: feeding batches, taking steps, logging and saving checkpoints."""

import math
import sys
import time
from typing import Any

import jax
import numpy as np

from tljax.metrics.sums import means
from tljax.runtime.errors import DivergenceError, StoppedError
from tljax.runtime.parallel import gather_json, is_main_process, main_process_says, replicate
from tljax.runtime.prefetch import prefetch
from tljax.runtime.progress import track
from tljax.runtime.types import Variables
from tljax.train.checkpoint_arrays import all_finite
from tljax.train.feed import Feed
from tljax.train.inputs import Inputs
from tljax.train.memory import within_memory
from tljax.train.recipes import Phase
from tljax.train.setup import Run
from tljax.train.step import Keys, TrainState
from tljax.train.step_log import StepLog
from tljax.train.trace import traced

Position = dict[str, Any]
"""Progress of a run, as JSON: ``phase`` (index), ``epoch`` (within the phase), ``pass`` (epoch over
all phases), ``batch`` (steps taken in the epoch), ``sums`` (their metrics) and ``history``."""


def train_epoch(
    run: Run,
    phase: Phase,
    inputs: Inputs,
    feed: Feed,
    state: TrainState,
    frozen: Variables,
    keys: Keys,
    best: Variables,
    position: Position,
) -> tuple[TrainState, dict[str, float]]:
    """Take the remaining steps of an epoch.

    A thread loads and transfers the next two batches, and two steps are in flight: this waits for
    the step before the last one only. Processes agree on nothing between two logged steps.

    Args:
        run: everything that is constant during the run.
        phase: phase of the epoch.
        inputs: inputs of the trained stages.
        feed: batches on the devices, and the step that takes them.
        state: state before the first of these steps; it is donated.
        frozen: frozen variables.
        keys: keys of the epoch and of the phase, see `tljax.train.step.Keys`.
        best: trainable variables of the best epoch so far, which checkpoints include.
        position: progress before the first of these steps.

    Returns:
        The state after the last step, and the mean metrics of the whole epoch.

    Raises:
        DivergenceError: the state to save is not finite.
        RequestError: the device ran out of memory.
        StoppedError: the run was asked to stop; it is saved.
    """
    epoch, done, parts = position["pass"], position["batch"], run.config.accumulate
    batches = prefetch(feed.batches(epoch, done))
    if run.profile and epoch == 1:
        batches = traced(batches, run.profile)
    batches = track(
        batches,
        description=f"epoch {epoch}",
        total=len(run.splits.train) - done * run.loading.batch_size,
        size=lambda fed: fed.examples * jax.process_count(),
        quiet=not is_main_process(),
    )
    log = StepLog(run, phase, (epoch - 1) * run.steps_per_epoch + done, position["sums"])
    keys = replicate(keys, run.mesh)
    waited, images, began = 0.0, 0, time.monotonic()
    requested = saved = began
    for fed in batches:
        if state.step.is_ready():  # pyright: ignore[reportAttributeAccessIssue]
            waited += time.monotonic() - requested
        arguments = state, frozen, fed.batch, keys
        with within_memory(feed.step, arguments, run.mesh.size * parts, parts):
            state, metrics = feed.step(*arguments)
            log.append(metrics, fed.steps)
        images += fed.examples * jax.process_count()
        stop = run.preemption is not None and run.preemption.reached()
        late = time.monotonic() - saved >= run.checkpoint_seconds
        logged = (done + fed.steps) // run.agree_every > done // run.agree_every
        done += fed.steps
        if stop or (run.checkpoints and logged and main_process_says(late)):
            sums = log.read()
            save(run, phase, inputs, {**position, "batch": done, "sums": sums}, state, best)
            saved = time.monotonic()
        if stop:
            raise StoppedError
        requested = time.monotonic()
    if inputs.start is None and is_main_process():
        elapsed = time.monotonic() - began
        rate, share = images / elapsed, waited / elapsed
        slowest = "loading images" if share > 0.1 else "the step"
        print(
            f"  {rate:,.0f} images/s, {share:.1%} of the time waiting for images: {slowest} bounds",
            file=sys.stderr,
        )
    return state, means(log.read())


def save(
    run: Run,
    phase: Phase,
    inputs: Inputs,
    position: Position,
    state: TrainState,
    best: Variables,
) -> None:
    """Save a checkpoint, if the run has a place for them.

    Raises:
        DivergenceError: the state is not finite, so it is not saved.
    """
    if run.checkpoints is None:
        return
    loss = position["sums"].get("loss", (0.0, 0.0))[0]
    finite = math.isfinite(loss) and all_finite((state.changing, state.ema))
    if not all(gather_json(finite)):
        raise divergence_error(run, phase, state, "a parameter or the loss is not finite")
    skipped = [sorted(part.items()) for part in inputs.all_skipped()]
    # The end of an epoch has a number of its own, hence one more than the number of steps.
    number = position["pass"] * (run.steps_per_epoch + 1) + position["batch"]
    saved = {**position, "skipped": skipped}
    run.checkpoints.save(number, saved, {**state._asdict(), "best": best})


def divergence_error(run: Run, phase: Phase, state: TrainState, problem: str) -> DivergenceError:
    """Return an error that describes the problem and the settings that help."""
    step = int(state.step)
    rate = float(np.asarray(run.schedule(phase)(step - 1)))
    clip = "lower" if run.config.optimizer.clip_norm else "set"
    saved = "; earlier checkpoints are kept" if run.checkpoints else ""
    return DivergenceError(
        f"training diverged: {problem} after step {step}, at a learning rate of {rate:.1e}: lower "
        f"--learning-rate, {clip} --clip-norm, or lengthen --warmup{saved}"
    )
