"""Accumulate step metrics and report their means every ``log_every`` steps."""

import time

import jax
import numpy as np

from tljax.metrics.sums import Sums, means, merge
from tljax.train.recipes import Phase
from tljax.train.setup import Run
from tljax.train.step import StepMetrics


class StepLog:
    """Metrics of the steps of an epoch, read from the device without delaying any step.

    Every `Run.log_every` steps, ``on_step`` gets the means since its last call or the start of the
    epoch.
    """

    def __init__(self, run: Run, phase: Phase, step: int, sums: Sums) -> None:
        """Start after ``step`` steps of the run, with the ``sums`` of this epoch so far."""
        self._run, self._step, self._sums, self._schedule = run, step, sums, run.schedule(phase)
        self._first = phase.epochs_before * run.steps_per_epoch
        self._pending: list[tuple[float, StepMetrics]] = []
        self._read = self._began = time.monotonic()
        self._window: Sums = {}

    def append(self, metrics: StepMetrics) -> None:
        """Add the metrics of a step that was just dispatched."""
        self._pending.append((time.monotonic(), metrics))
        if len(self._pending) > 64 or time.monotonic() - self._read > 1:
            self.read(leave=1)

    def read(self, leave: int = 0) -> Sums:
        """Add up all pending metrics but those of the last ``leave`` steps; return the sums."""
        ready = self._pending[: len(self._pending) - leave]
        del self._pending[: len(ready)]
        for (when, _), metrics in zip(ready, jax.device_get([m for _, m in ready]), strict=True):
            self._step += 1
            sums = {name: (float(total), float(count)) for name, (total, count) in metrics.items()}
            self._sums = merge(self._sums, sums)
            if self._run.on_step is None:
                continue
            self._window = merge(self._window, sums)
            if self._step % self._run.log_every == 0:
                seconds, examples = when - self._began, self._window["examples"][0]
                rate = float(np.asarray(self._schedule(self._step - 1 - self._first)))
                entry = means(self._window) | {"learning_rate": rate}
                entry["images_per_second"] = examples / max(seconds, 1e-9)
                del entry["examples"]
                self._run.on_step(self._step, entry)
                self._window, self._began = {}, when
        self._read = time.monotonic()
        return self._sums
