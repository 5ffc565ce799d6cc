"""Evaluation of attacks on networks with several labels per image."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float
from scipy.special import expit

from tljax.attack.contract import Attack, as_float, as_partial, check_images, check_labels
from tljax.attack.evaluate import Outcome, Robustness, check_request, round_inward, run_batches
from tljax.attack.flags import check_network
from tljax.attack.losses import mean_logits
from tljax.attack.types import LogitsFn
from tljax.metrics.multilabel import average_precision
from tljax.metrics.weighted import mean_of_defined
from tljax.runtime.errors import RequestError
from tljax.runtime.parallel import data_mesh, replicate, round_up_to_devices
from tljax.runtime.types import Array

Probabilities = Float[np.ndarray, "n labels"]
PerEpsilon = Float[np.ndarray, "epsilons n labels"]


class LabelFigures(NamedTuple):
    """Metrics of predicted labels.

    Attributes:
        decisions: share of the known labels that are predicted if and only if they apply.
        images: share of the images whose known labels are all predicted right.
        map: mean average precision; NaN if no label is known to apply to an image.
    """

    decisions: float
    images: float
    map: float


class LabelRobustness(NamedTuple):
    """Predictions of a network with several labels, before and after attacks.

    Attributes:
        epsilons: ``[epsilons]`` ascending.
        labels: ``[n, labels]`` of 0, 1 and NaN, which is unknown.
        thresholds: ``[labels]``, the probability from which a label is predicted.
        clean: ``[n, labels]`` probabilities for the clean images.
        attacked: ``[epsilons, n, labels]`` probabilities for the adversarial images, by the name of
            the attack.
        rounded: the same after rounding the images to 8 bits with `tljax.attack.round_inward`.
        flags: warnings about the evaluation by name; see `tljax.attack.flags`.
    """

    epsilons: Float[np.ndarray, " epsilons"]
    labels: Float[np.ndarray, "n labels"]
    thresholds: Float[np.ndarray, " labels"]
    clean: Probabilities
    attacked: dict[str, PerEpsilon]
    rounded: dict[str, PerEpsilon]
    flags: dict[str, str]

    def figures(self, probabilities: Probabilities) -> LabelFigures:
        """Compute the metrics of ``clean``, or of an attack at one epsilon."""
        known = ~np.isnan(self.labels)
        right = self._predicted(probabilities) == (self.labels == 1)
        precision = average_precision(probabilities, self.labels)
        return LabelFigures(
            float(right[known].mean()),
            float((right | ~known).all(1).mean()),
            float(mean_of_defined(precision)),
        )

    def by_image(self, target: int | None = None) -> Robustness:
        """Return for each image whether it resisted the attacks.

        Args:
            target: index of a label whose prediction the attacks were to change. An image resists
                as long as it is predicted as before. By default an image resists as long as all
                its known labels are predicted right.
        """

        def right(probabilities: np.ndarray) -> np.ndarray:
            predicted = self._predicted(probabilities)
            if target is not None:
                return predicted[..., target] == self._predicted(self.clean)[:, target]
            return ((predicted == (self.labels == 1)) | np.isnan(self.labels)).all(-1)

        clean = right(self.clean)
        outcomes = {
            name: Outcome(clean & right(attacked), clean & right(self.rounded[name]), None)
            for name, attacked in self.attacked.items()
        }
        return Robustness(self.epsilons, clean, None, outcomes, self.flags)

    def _predicted(self, probabilities: np.ndarray) -> Bool[np.ndarray, "*epsilons n labels"]:
        return probabilities >= self.thresholds


def evaluate_labels(
    logits_fn: LogitsFn,
    data: tuple[Array, Array],
    key: jax.Array,
    *,
    epsilons: Sequence[float],
    attacks: Mapping[str, Attack],
    thresholds: float | Sequence[float] | Float[np.ndarray, " labels"] = 0.5,
    batch_size: int = 64,
    mesh: Mesh | None = None,
    quiet: bool = False,
) -> LabelRobustness:
    """Attack every image of a data set with several labels per image.

        attacks = {"pgd": partial(pgd, loss="bce", num_steps=20)}
        result = evaluate_labels(logits_fn, (images, labels), key, epsilons=[0.01], attacks=attacks)
        print(result.figures(result.clean), result.figures(result.attacked["pgd"][0]))

    Args:
        logits_fn: maps images ``[batch, ...]`` to logits ``[batch, labels]`` of a sigmoid each.
        data: images ``[n, height, width, channels]``, uint8 or floating point in [0, 1], and labels
            ``[n, labels]`` of 0, 1 and NaN, which is unknown and counts nowhere.
        key: random key.
        epsilons: radii of the balls, for images in [0, 1], in any order. All share one compilation.
        attacks: attacks by name; see the loss "bce" of `tljax.attack.pgd`.
        thresholds: probability from which a label is predicted, one for all or ``[labels]``.
        batch_size: number of images per batch; see `tljax.attack.evaluate`.
        mesh: the devices to use; see `tljax.attack.evaluate`.
        quiet: show no progress bar on stderr.

    Raises:
        RequestError: there are no images, no known labels, no attacks or no epsilons, or the labels
            have another shape than the logits.
    """
    images, labels = np.asarray(data[0]), np.asarray(data[1], np.float32)
    radii = check_request(epsilons, attacks)
    if np.isnan(labels).all():
        raise RequestError("evaluate_labels needs at least one image with a known label")
    network = as_partial(logits_fn)
    check_labels(network, jax.eval_shape(as_float, images), labels, "labels")
    if images.dtype != np.uint8:
        check_images(images, (0.0, 1.0))
    mesh = mesh or data_mesh()
    size = round_up_to_devices(min(batch_size, len(images)), mesh)
    run = partial(
        run_batches, replicate([network], mesh), (images, labels), np.nan,
        size=size, mesh=mesh, quiet=quiet,
    )  # fmt: skip
    rows = np.arange(len(images))
    clean = run(_clean, rows, name="clean")[0]
    flags = check_network(logits_fn, as_float(images[:size]), labels[:size])
    outputs = {
        name: [
            run(
                partial(_attacked, attack),
                rows,
                key,
                epsilon,
                name=f"{name} {255 * epsilon:.6g}/255",
            )
            for epsilon in radii
        ]
        for name, attack in attacks.items()
    }
    attacked, rounded = (
        {name: expit(np.stack([pair[i] for pair in pairs])) for name, pairs in outputs.items()}
        for i in range(2)
    )
    limits = np.broadcast_to(np.asarray(thresholds, np.float64), clean.shape[1:])
    return LabelRobustness(radii, labels, limits, expit(clean), attacked, rounded, flags)


@jax.jit
def _clean(networks: list[LogitsFn], images: jax.Array, _: jax.Array) -> list[jax.Array]:
    return [mean_logits(networks[0], as_float(images))]


@partial(jax.jit, static_argnums=0)
def _attacked(
    attack: Attack, networks: list[LogitsFn], images: Any, labels: Any, key: Any, epsilon: Any
) -> list[jax.Array]:
    x = as_float(images)
    adversarial = attack(networks[0], x, labels, key, epsilon=epsilon)
    saved = round_inward(adversarial, x).astype(x.dtype)
    return [mean_logits(networks[0], inputs) for inputs in (adversarial, saved)]
