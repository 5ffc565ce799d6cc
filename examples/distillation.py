"""Distillation: a student learns from what a teacher says of every image, computed once.

Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network",
https://arxiv.org/abs/1503.02531. Here the teacher is fine-tuned on images of twice the size, and
the student, of the same architecture, needs a quarter of its time.

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
    """Make the objective.

    Args:
        temperature: by which the logits of both are divided.
        weight: of the teacher; the rest is the cross-entropy with the labels.
    """

    def objective(forward: tljax.Forward, batch: tljax.Batch, _: jax.Array) -> Any:
        logits = forward(batch.inputs).logits
        student, teacher = (
            jax.nn.log_softmax(each / temperature) for each in (logits, batch.extra["teacher"])
        )
        # Times the temperature squared, so that its gradients keep their size.
        divergence = temperature**2 * optax.losses.kl_divergence_with_log_targets(student, teacher)
        shares = tljax.class_shares(batch.targets, logits.shape[1])
        cross_entropy = optax.softmax_cross_entropy(logits, shares)
        losses = weight * divergence + (1 - weight) * cross_entropy
        return losses, {"divergence": divergence, "cross_entropy": cross_entropy}

    return objective


def with_teacher(
    source: tljax.Source, model: tljax.Model, variables: tljax.Variables
) -> tljax.Source:
    """Put the teacher's logits beside the examples; those that cannot be read keep zeros."""
    found = tljax.compute_features(model, variables, source, tljax.Loading(), stop=None)
    logits = np.zeros((len(source), model.num_classes), np.float32)
    logits[found.indices] = found.values
    return replace(source, extra={**source.extra, "teacher": logits})


def main(data: str, image_size: int = 96, epochs: int = 4) -> dict[str, tljax.FitResult]:
    """Train the teacher, then the student."""
    pretrained, splits = tljax.load_pretrained("efficientnet_lite0.in1k"), tljax.open_splits(data)
    config = tljax.FitConfig(epochs=epochs)
    model, variables, _ = pretrained.with_size(2 * image_size)
    teacher = tljax.fit(model, variables, splits, config)
    taught = with_teacher(splits.train, teacher.model, teacher.variables)
    model, variables, _ = pretrained.with_size(image_size)
    student = tljax.fit(
        model, variables, splits._replace(train=taught), config, objective=distillation()
    )
    for name, result in (results := {"teacher": teacher, "student": student}).items():
        print(f"{name}: {result.evaluation.top1:.3f}")
    return results


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "digits")
