"""Predictions before and after an attack, in words and as JSON."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tljax.data.examples import join_names
from tljax.pretrained import Card

Probabilities = Mapping[str, Float[np.ndarray, " names"]]
"""Probabilities of the classes or labels of one image: ``before`` the attack, for the ``exact``
adversarial image, and ``after`` rounding it to 8 bits."""


class LabelTarget(NamedTuple):
    """The prediction of one of several labels that an attack is to reach.

    Attributes:
        label: index of the label.
        applies: True to have it predicted, False to have it not predicted.
    """

    label: int
    applies: bool


Target = int | LabelTarget
"""What a targeted attack is to reach: an index of a class, or the prediction of one label."""


def class_facts(
    card: Card, probabilities: Probabilities, target: Target | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the predicted classes of one image as JSON, and a caption for each.

    Args:
        card: names of the classes.
        probabilities: see `Probabilities`.
        target: index of the target class, whose probability is then told too.
    """
    facts: dict[str, Any] = {
        when: card.guess(p, int(p.argmax())) for when, p in probabilities.items()
    }
    if isinstance(target, int):
        facts["target"] = _target(card, probabilities, target)
    captions: dict[str, str] = {}
    for when in probabilities:
        captions[when] = f"{facts[when]['name']}, p {facts[when]['probability']:.3f}"
        if "target" in facts and facts["target"]["name"] != facts[when]["name"]:
            captions[when] += f"\n{_format_target(facts['target'], when)}"
    return facts, captions


def label_facts(
    card: Card, probabilities: Probabilities, target: Target | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the predicted labels of one image as JSON, and a caption for each.

    The caption before the attack names the predicted labels, the others those that the attack added
    or removed.

    Args:
        card: names and thresholds of the labels.
        probabilities: see `Probabilities`.
        target: the target, whose probability is then told too.
    """
    predicted = {when: card.task.applies(p[None])[0] for when, p in probabilities.items()}
    names = np.array(card.classes)
    facts: dict[str, Any] = {}
    captions: dict[str, str] = {}
    for when, p in probabilities.items():
        order = np.argsort(-p, kind="stable")
        labels = [card.guess(p, int(i)) for i in order if predicted[when][i]]
        added = names[predicted[when] & ~predicted["before"]].tolist()
        removed = names[predicted["before"] & ~predicted[when]].tolist()
        facts[when] = {"labels": labels}
        captions[when] = join_names([label["name"] for label in labels]) if labels else "no label"
        if when != "before":
            facts[when] |= {"added": added, "removed": removed}
            changes = {"added": added, "removed": removed}.items()
            changes = [f"{verb} {join_names(some)}" for verb, some in changes if some]
            captions[when] = "\n".join(changes) or "no label changed"
    if isinstance(target, LabelTarget):
        facts["target"] = _target(card, probabilities, target.label) | {"applies": target.applies}
        for when in probabilities:
            captions[when] += f"\n{_format_target(facts['target'], when)}"
    return facts, captions


def _target(card: Card, probabilities: Probabilities, index: int) -> dict[str, Any]:
    return {
        "name": card.classes[index],
        **{when: float(p[index]) for when, p in probabilities.items()},
    }


def _format_target(target: Mapping[str, Any], when: str) -> str:
    probability = target[when]
    digits = ".3f" if probability >= 1e-3 else ".0e"
    return f"{target['name']}, p {probability:{digits}}"
