"""The history of a run, one entry per epoch, and the decisions that are made from it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tljax.features.evaluate import Evaluation
from tljax.metrics.classification import standard_error

History = list[dict[str, Any]]
"""One JSON object per epoch: ``phase``, ``epoch`` (0 before training), ``learning_rate``,
``train_loss``, the objective's metrics as ``train_NAME``, ``val_loss`` and ``val_top1``; with
adversarial training ``val_robust_loss`` and ``val_robust_top1``, too."""

MIN_DELTA = 1e-3
"""Decrease of the validation loss, in nats, that counts as better at the same accuracy."""


def validation_metrics(clean: Evaluation, robust: Evaluation | None) -> dict[str, float]:
    """Return the validation metrics of a history entry."""
    metrics = {"val_loss": clean.loss, "val_top1": clean.top1}
    if robust is not None:
        metrics |= {"val_robust_loss": robust.loss, "val_robust_top1": robust.top1}
    return metrics


def non_finite_loss(entry: Mapping[str, Any]) -> str | None:
    """Describe the first loss of an entry that is not finite; other metrics are not checked."""
    losses = (
        (name, entry.get(name, 0.0)) for name in ("train_loss", "val_loss", "val_robust_loss")
    )
    return next((f"{name} is {value}" for name, value in losses if not np.isfinite(value)), None)


def best_epoch(history: History) -> int:
    """Return the index of the best entry: the highest accuracy, then the lowest loss.

    At equal accuracy, the loss must be lower by at least `MIN_DELTA`: otherwise a network that has
    stopped improving would be replaced by ever more confident ones. With adversarial training,
    robust accuracy and robust loss are compared.
    """
    top1, loss = _compared(history, "top1"), _compared(history, "loss")
    best = 0
    for i in range(len(history)):
        gain = top1[i] - top1[best]
        if gain > 0 or (gain == 0 and loss[i] < loss[best] - MIN_DELTA):
            best = i
    return best


def first_epoch_drop(history: History, examples: int) -> tuple[float, float] | None:
    """Return the accuracies of the probe and of the first epoch if the epoch is clearly worse.

    Args:
        history: the entries of a run. With adversarial training, robust accuracies are compared.
        examples: number of validation images.

    Returns:
        Two accuracies in [0, 1]; None without a probe or an epoch, or if the second is not lower
        than the first by more than one standard error.
    """
    if len(history) < 2 or history[0]["phase"] != "probe":
        return None
    probe, first = _compared(history[:2], "top1")
    return (probe, first) if probe - first > standard_error(probe, examples) else None


def _compared(history: History, name: str) -> list[float]:
    """Return the values of the metric that epochs are compared by."""
    kind = "val_robust" if "val_robust_top1" in history[0] else "val"
    return [entry[f"{kind}_{name}"] for entry in history]
