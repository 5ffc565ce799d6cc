"""Decisions that are made from the history of a run."""

import pytest

from tljax.train.history import best_epoch, first_epoch_drop


def history(*top1, phase="probe", **metrics):
    return [
        {"phase": "train" if i else phase, "epoch": i, "val_top1": x, "val_loss": 1.0, **metrics}
        for i, x in enumerate(top1)
    ]


ROBUST_DROP = [
    entry | {"val_robust_top1": top1, "val_robust_loss": 1.0}
    for entry, top1 in zip(history(0.9, 0.9), (0.6, 0.4), strict=True)
]


@pytest.mark.parametrize(
    ("entries", "examples", "expected"),
    [
        (history(0.9, 0.8, 0.95), 1000, (0.9, 0.8)),
        # One standard error of 96% on 400 images is 0.98%.
        (history(0.96, 0.9503), 400, None),
        (history(0.96, 0.95), 400, (0.96, 0.95)),
        (history(0.96, 0.97, 0.5), 1000, None),
        (history(0.9), 1000, None),
        (history(0.9, 0.8, phase="zeros"), 1000, None),
        (history(0.9, 0.8, val_robust_top1=0.5, val_robust_loss=1.0), 1000, None),
        (ROBUST_DROP, 1000, (0.6, 0.4)),
    ],
)
def test_a_first_epoch_clearly_below_the_probe_is_recognized(entries, examples, expected):
    assert first_epoch_drop(entries, examples) == expected


def test_the_best_epoch_has_the_highest_accuracy_and_then_a_clearly_lower_loss():
    entries = history(0.8, 0.9, 0.9, 0.9)
    entries[2]["val_loss"] = 0.9995
    assert best_epoch(entries) == 1
    entries[3]["val_loss"] = 0.99
    assert best_epoch(entries) == 3
