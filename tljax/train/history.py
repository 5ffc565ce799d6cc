"""The history of a run, one entry per epoch, and the decisions that are made from it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tljax.features.evaluate import METRICS, Evaluation
from tljax.metrics.classification import standard_error
from tljax.runtime.settings import Kind
from tljax.train.options import ChooseBy

History = list[dict[str, Any]]
"""One JSON object per epoch: ``phase``, ``epoch`` (0 before training), ``learning_rate``,
``train_loss``, metrics of the objective as ``train_NAME``, ``val_loss``, the main metric of
the task, such as ``val_top1``, and the metric by which the best epoch is chosen; with adversarial
training ``val_robust_loss`` and ``val_robust_top1``, too."""

MIN_DELTA = 1e-3
"""Decrease of the validation loss, in nats, that counts as better at the same accuracy."""


def default_choice(kind: Kind) -> ChooseBy:
    """Return the metric by which the best epoch is chosen, if none is requested."""
    choices: dict[Kind, ChooseBy] = {
        "classification": "top1",
        "multilabel": "map",
        "regression": "loss",
        "ordinal": "kappa",
    }
    return choices[kind]


def validation_metrics(
    clean: Evaluation, robust: Evaluation | None, choose_by: str
) -> dict[str, float]:
    """Return the validation metrics of a history entry."""
    names = dict.fromkeys(("loss", clean.main_metric, choose_by))
    metrics = {f"val_{name}": clean.metric(name) for name in names}
    if robust is not None:
        metrics |= {"val_robust_loss": robust.loss, "val_robust_top1": robust.top1}
    return metrics


def non_finite_loss(entry: Mapping[str, Any]) -> str | None:
    """Describe the first loss of an entry that is not finite; other metrics are not checked."""
    losses = (
        (name, entry.get(name, 0.0)) for name in ("train_loss", "val_loss", "val_robust_loss")
    )
    return next((f"{name} is {value}" for name, value in losses if not np.isfinite(value)), None)


def best_epoch(history: History, choose_by: str = "top1") -> int:
    """Return the index of the best entry: the best value of a metric, then the lowest loss.

    At equal values, the loss must be lower by at least `MIN_DELTA`: otherwise a network that has
    stopped improving would be replaced by ever more confident ones. A metric that is undefined on
    the validation images, NaN, is ignored. With adversarial training, robust accuracy and robust
    loss are compared.

    Args:
        history: the entries of a run.
        choose_by: name of the metric.
    """
    values, loss = _compared(history, choose_by), _compared(history, "loss")
    sign = -1 if choose_by in _ERRORS else 1
    best = 0
    for i in range(len(history)):
        gain = sign * (values[i] - values[best])
        if gain > 0 or (not abs(gain) > 0 and loss[i] < loss[best] - MIN_DELTA):
            best = i
    return best


_ERRORS = {"loss"} | {
    name for metrics in METRICS.values() for name, metric in metrics.items() if metric.is_error
}


def first_epoch_drop(history: History, examples: int) -> tuple[float, float] | None:
    """Return the accuracies of the probe and of the first epoch if the epoch is clearly worse.

    Args:
        history: the entries of a run. With adversarial training, robust accuracies are compared.
        examples: number of validation images.

    Returns:
        Two accuracies in [0, 1]; None without a probe or an epoch, or if the second is not lower
        than the first by more than one standard error.
    """
    if len(history) < 2 or history[0]["phase"] != "probe" or "val_top1" not in history[0]:
        return None
    probe, first = _compared(history[:2], "top1")
    return (probe, first) if probe - first > standard_error(probe, examples) else None


def _compared(history: History, name: str) -> list[float]:
    """Return the values of the metric that epochs are compared by."""
    part = "val_robust" if "val_robust_top1" in history[0] else "val"
    return [entry[f"{part}_{name}"] for entry in history]
