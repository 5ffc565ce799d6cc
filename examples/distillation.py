"""Distillation: train a student on the logits of a teacher, which are computed once per image.

Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network",
https://arxiv.org/abs/1503.02531. Here the teacher is fine-tuned on images of twice the side. The
student has the same architecture and takes a quarter of the teacher's time per image.

    python examples/distillation.py FOLDER
"""

import sys
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax

import tljax


def distillation(temperature: float = 2.0, weight: float = 0.9) -> tljax.Objective:
    """Make an objective: a weighted sum of the divergence from the teacher and the cross-entropy.

    Args:
        temperature: divisor of the logits of teacher and student, above 0.
        weight: weight of the divergence, in [0, 1]; the cross-entropy has weight ``1 - weight``.
    """

    def objective(forward: tljax.Forward, batch: tljax.Batch, _: jax.Array) -> Any:
        logits = forward(batch.inputs).logits
        student, teacher = (
            jax.nn.log_softmax(each / temperature) for each in (logits, batch.extra["teacher"])
        )
        # The factor temperature**2 keeps the size of the gradients (section 2 of the paper).
        divergence = temperature**2 * optax.losses.kl_divergence_with_log_targets(student, teacher)
        shares = tljax.class_shares(batch.targets, logits.shape[1])
        cross_entropy = optax.softmax_cross_entropy(logits, shares)
        losses = weight * divergence + (1 - weight) * cross_entropy
        return losses, {"divergence": divergence, "cross_entropy": cross_entropy}

    return objective


def with_teacher(
    source: tljax.Source, model: tljax.Model, variables: tljax.Variables
) -> tljax.Source:
    """Return the source with the teacher's logits of every example; zeros if unreadable."""
    computed = tljax.compute_features(model, variables, source, tljax.Loading(), stop=None)
    logits = np.zeros((len(source), model.num_classes), np.float32)
    logits[computed.indices] = computed.values
    return replace(source, extra={**source.extra, "teacher": logits})


def main(data: str, image_size: int = 96, epochs: int = 4) -> dict[str, tljax.FitResult]:
    """Fine-tune the teacher, then the student."""
    pretrained, splits = tljax.load_pretrained("efficientnet_lite0.in1k"), tljax.open_splits(data)
    config = tljax.FitConfig(epochs=epochs)
    model, variables, _ = pretrained.with_size(2 * image_size)
    teacher = tljax.fit(model, variables, splits, config)
    train = with_teacher(splits.train, teacher.model, teacher.variables)
    model, variables, _ = pretrained.with_size(image_size)
    student = tljax.fit(
        model, variables, splits._replace(train=train), config, objective=distillation()
    )
    for name, result in (results := {"teacher": teacher, "student": student}).items():
        print(f"{name}: {result.evaluation.top1:.3f}")
    return results


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits")
