"""Accumulate step metrics and report their means every ``log_every`` steps."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from tljax.metrics.sums import Sums, means, merge
from tljax.train.recipes import Phase
from tljax.train.setup import Run
from tljax.train.step import StepMetrics

IN_FLIGHT = 2
"""Number of dispatches that the devices may have been given and not finished."""


class StepLog:
    """Metrics of the steps of an epoch, read from the devices some steps later.

    Every `Run.log_every` steps, ``on_step`` gets the means since its last call or the start of the
    epoch.
    """

    def __init__(self, run: Run, phase: Phase, step: int, sums: Sums) -> None:
        """Start after ``step`` steps of the run, with the ``sums`` of this epoch so far."""
        self._run, self._step, self._sums, self._schedule = run, step, sums, run.schedule(phase)
        self._first = phase.epochs_before * run.steps_per_epoch
        self._pending: list[tuple[float, int, list[str], jax.Array]] = []
        self._read = self._last = self._began = time.monotonic()
        self._window: Sums = {}

    def append(self, metrics: StepMetrics, steps: int) -> None:
        """Add the metrics of a dispatch of some steps, and wait for the dispatch before the last.

        So two are in flight: the devices never run out of work, nor does it pile up on them.
        """
        packed = _pack(metrics)
        packed.copy_to_host_async()
        self._pending.append((time.monotonic(), steps, sorted(metrics), packed))
        if len(self._pending) > IN_FLIGHT:
            jax.block_until_ready(self._pending[-1 - IN_FLIGHT][-1])
        if len(self._pending) > 64 or time.monotonic() - self._read > 1:
            self.read(leave=IN_FLIGHT)

    def read(self, leave: int = 0) -> Sums:
        """Add up the metrics of all dispatches but the last ``leave``; return the sums."""
        ready = self._pending[: len(self._pending) - leave]
        del self._pending[: len(ready)]
        for when, steps, names, packed in ready:
            seconds = (when - self._last) / steps
            for i, values in enumerate(np.asarray(packed)[:steps].tolist()):
                sums = dict(zip(names, map(tuple, values), strict=True))
                self._add(sums, self._last + seconds * (i + 1))
            self._last = when
        self._read = time.monotonic()
        return self._sums

    def _add(self, sums: Sums, when: float) -> None:
        """Add the metrics of a step, and report the window that it ends."""
        self._step += 1
        self._sums = merge(self._sums, sums)
        if self._run.on_step is None:
            return
        self._window = merge(self._window, sums)
        if self._step % self._run.log_every == 0:
            examples = self._window["examples"][0]
            rate = float(np.asarray(self._schedule(self._step - 1 - self._first)))
            entry = means(self._window) | {"learning_rate": rate}
            entry["images_per_second"] = examples / max(when - self._began, 1e-9)
            del entry["examples"]
            self._run.on_step(self._step, entry)
            self._window, self._began = {}, when


@jax.jit
def _pack(metrics: StepMetrics) -> jax.Array:
    """Join the metrics into one array ``[steps, names, 2]``, which is one copy to the host."""
    pairs = [jnp.stack(metrics[name], axis=-1) for name in sorted(metrics)]
    packed = jnp.stack(pairs, axis=-2)
    return packed.reshape(-1, *packed.shape[-2:])
