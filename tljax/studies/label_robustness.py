"""Adversarial robustness of a network with several labels: figures, tables and JSON."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tljax import attack as library
from tljax.attack.contract import Attack
from tljax.attack.evaluate import Robustness, Share
from tljax.attack.evaluate_labels import LabelFigures, LabelRobustness
from tljax.data.options import Loading
from tljax.metrics.classification import standard_error
from tljax.pretrained import Card, Pretrained
from tljax.runtime.parallel import data_mesh
from tljax.runtime.tables import format_table
from tljax.studies.attack_captions import LabelTarget, Target
from tljax.studies.robustness import AttackedImages, format_share, logits_fn


def attack_labels(
    network: Pretrained,
    victims: AttackedImages,
    attacks: Mapping[str, Attack],
    epsilons: Sequence[float],
    loading: Loading,
    *,
    seed: int = 0,
) -> LabelRobustness:
    """Predict the labels of images before and after attacks, see `tljax.attack.evaluate_labels`.

    Args:
        network: a network with several labels, whose thresholds apply.
        victims: images to attack.
        attacks: attacks of `tljax.studies.robustness.choose_attacks`.
        epsilons: radii of the perturbations, for images in [0, 1].
        loading: batch size and devices.
        seed: seed of the random starts.

    Raises:
        RequestError: there are no attacks, no epsilons or negative ones.
    """
    return library.evaluate_labels(
        logits_fn(network),
        (victims.images, victims.labels),
        jax.random.key(seed),
        epsilons=epsilons,
        attacks=attacks,
        thresholds=network.card.task.thresholds or 0.5,
        batch_size=loading.batch_size,
        mesh=data_mesh(loading.devices),
    )


def by_image(robustness: LabelRobustness, target: Target | None = None) -> Robustness:
    """Return which images resisted, see `LabelRobustness.by_image`."""
    return robustness.by_image(target.label if isinstance(target, LabelTarget) else None)


def table(robustness: LabelRobustness, card: Card, target: Target | None = None) -> str:
    """Return a text table in percent: `LabelFigures`, or the rates of success with a target.

    The lines "saved as PNG" are those of adversarial images rounded to 8 bits.
    """
    if isinstance(target, LabelTarget):
        return _target_table(robustness, card, target)
    count, known = len(robustness.labels), int(np.count_nonzero(~np.isnan(robustness.labels)))
    clean = robustness.figures(robustness.clean)
    cells: dict[str, Callable[[LabelFigures], str]] = {
        "labels right": lambda figures: _percent(figures.decisions),
        "images all right": lambda figures: format_share(
            Share(figures.images, standard_error(figures.images, count))
        ),
        "mAP": lambda figures: _percent(figures.map),
    }
    rows: list[list[str]] = []
    for title, cell in cells.items():
        for name, attacked in robustness.attacked.items():
            for label, probabilities in (
                (f"{title}, {name}", attacked),
                ("  saved as PNG", robustness.rounded[name]),
            ):
                figures = map(robustness.figures, probabilities)
                rows.append([label, *map(cell, [clean, *figures])])
    header = ["epsilon * 255", "0", *_radii(robustness)]
    title = f"in % of {count} images with {known} known labels, +- standard error"
    return f"{title}\n{format_table(header, rows)}"


def _target_table(robustness: LabelRobustness, card: Card, target: LabelTarget) -> str:
    images = by_image(robustness, target)
    rows: list[list[str]] = []
    for name in images.outcomes:
        for label, shares in (
            (name, images.accuracy(name)),
            ("  saved as PNG", images.rounded_accuracy(name)),
        ):
            rows.append([label, *map(format_share, _failures(shares))])
    goal = "predicted" if target.applies else "no longer predicted"
    title = f"'{card.classes[target.label]}' {goal}, in % of {len(robustness.labels)} images"
    header = ["epsilon * 255", *_radii(robustness)]
    return f"{title}, +- standard error\n{format_table(header, rows)}"


def summary(
    robustness: LabelRobustness, card: Card, target: Target | None = None
) -> dict[str, Any]:
    """Return `LabelFigures`, or with a target the rates of success, as JSON.

    They are by attack and by epsilon in units of 1/255.
    """
    if isinstance(target, LabelTarget):
        return _target_summary(robustness, card, target)

    def by_epsilon(probabilities: np.ndarray) -> dict[str, Any]:
        figures = (robustness.figures(values)._asdict() for values in probabilities)
        return dict(zip(_radii(robustness), figures, strict=True))

    return {
        "task": "multilabel",
        "clean": robustness.figures(robustness.clean)._asdict(),
        "robust": {name: by_epsilon(values) for name, values in robustness.attacked.items()},
        "robust_rounded": {name: by_epsilon(values) for name, values in robustness.rounded.items()},
        "examples": len(robustness.labels),
        "flags": robustness.flags,
    }


def _target_summary(robustness: LabelRobustness, card: Card, target: LabelTarget) -> dict[str, Any]:
    images = by_image(robustness, target)

    def by_epsilon(shares: Sequence[Share] | None) -> dict[str, float]:
        rates = (share.value for share in _failures(shares))
        return dict(zip(_radii(robustness), rates, strict=True))

    return {
        "task": "multilabel",
        "target": {"name": card.classes[target.label], "applies": target.applies},
        "success": {name: by_epsilon(images.accuracy(name)) for name in images.outcomes},
        "success_rounded": {
            name: by_epsilon(images.rounded_accuracy(name)) for name in images.outcomes
        },
        "examples": len(robustness.labels),
        "flags": robustness.flags,
    }


def _radii(robustness: LabelRobustness) -> list[str]:
    return [f"{epsilon * 255:.6g}" for epsilon in robustness.epsilons]


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def _failures(shares: Sequence[Share] | None) -> list[Share]:
    """Return the shares of the images that did not resist."""
    return [Share(1 - share.value, share.error) for share in shares or ()]
