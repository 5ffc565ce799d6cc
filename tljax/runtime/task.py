"""Tasks: the meaning of a network's outputs."""

import math
from dataclasses import dataclass
from typing import get_args

import numpy as np
from jaxtyping import Float, Shaped
from scipy.special import expit, softmax

from tljax.runtime.errors import RequestError
from tljax.runtime.settings import Kind


@dataclass(frozen=True)
class Task:
    """What a network predicts, and how its outputs are read.

    Attributes:
        kind: ``classification``: exclusive classes, whose outputs are logits of a softmax;
            ``multilabel``: any number of labels, whose outputs are logits of a sigmoid each;
            ``regression``: numbers, whose outputs are standardized by ``mean`` and ``scale``;
            ``ordinal``: ordered classes, where output ``k`` is the logit of the probability that
            the class is above class ``k``.
        thresholds: for ``multilabel``, the probability from which each label applies; empty for 0.5
            each.
        mean: for ``regression``, the mean of each number in the training data; empty for 0.
        scale: for ``regression``, the standard deviation of each number; empty for 1.
        units: for ``regression``, the unit of each number; empty if they are unknown.

    Raises:
        RequestError: there is no such kind.
    """

    kind: Kind = "classification"
    thresholds: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    units: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise RequestError(f"there is no task {self.kind!r:.80}; choose from {kinds}")

    @property
    def has_classes(self) -> bool:
        """Return True if every example has one of several classes."""
        return self.kind in ("classification", "ordinal")

    def num_outputs(self, names: int) -> int:
        """Return the number of outputs for a number of classes, labels or numbers."""
        return max(names - 1, 0) if self.kind == "ordinal" else names

    def decode(self, outputs: Float[np.ndarray, "n outputs"]) -> Float[np.ndarray, "n names"]:
        """Convert outputs to probabilities of classes or labels, or to numbers in their units.

        Cumulative probabilities that increase from one ordered class to the next are replaced by
        the lowest one so far, so that no class has a negative probability.

        Args:
            outputs: ``[n, outputs]`` outputs of the network.

        Returns:
            ``[n, names]``, one column per class or label, in the dtype of ``outputs``, or per
            number, in float64.
        """
        if self.kind == "classification":
            with np.errstate(invalid="ignore"):  # a network that diverged has infinite logits
                return softmax(outputs, axis=1)
        if self.kind == "regression":
            mean, scale = np.asarray(self.mean or 0.0), np.asarray(self.scale or 1.0)
            return outputs.astype(np.float64) * scale + mean
        probabilities = expit(outputs)
        if self.kind == "multilabel":
            return probabilities
        above = np.minimum.accumulate(probabilities, axis=1)
        above = np.pad(above, ((0, 0), (1, 1)), constant_values=((0, 0), (1, 0)))
        return above[:, :-1] - above[:, 1:]

    def predict(self, outputs: Float[np.ndarray, "n outputs"]) -> Shaped[np.ndarray, "n ..."]:
        """Convert outputs to predictions.

        Args:
            outputs: ``[n, outputs]`` outputs of the network.

        Returns:
            ``[n]`` indices of the most probable class or of the median of ordered classes; ``[n,
            labels]`` bool; or ``[n, numbers]``.
        """
        if self.kind == "classification":
            return outputs.argmax(1)
        if self.kind == "ordinal":
            return (np.minimum.accumulate(outputs, axis=1) >= 0).sum(1)
        decoded = self.decode(outputs)
        return self.applies(decoded) if self.kind == "multilabel" else decoded

    def standardize(self, values: Float[np.ndarray, "n names"]) -> Float[np.ndarray, "n names"]:
        """Divide numbers by ``scale`` after subtracting ``mean``; return others unchanged.

        Args:
            values: ``[n, names]`` labels, or what `decode` returned.

        Returns:
            ``[n, names]`` float64.
        """
        return (values - np.asarray(self.mean or 0.0)) / np.asarray(self.scale or 1.0)

    def format_number(self, value: float, index: int) -> str:
        """Return a number as text: to a hundredth of its standard deviation, and with its unit.

        Args:
            value: the number, in its unit.
            index: position of the number among those of the task.
        """
        if self.scale:
            decimals = max(0, 2 - math.floor(math.log10(self.scale[index])))
            text = f"{value:.{decimals}f}"
        else:
            text = f"{value:.6g}"
        return f"{text} {self.units[index]}".rstrip() if self.units else text

    def applies(self, probabilities: Float[np.ndarray, "n labels"]) -> np.ndarray:
        """Return ``[n, labels]`` bool: which labels reach their thresholds."""
        return probabilities >= np.asarray(self.thresholds or 0.5)


CLASSIFICATION = Task()
"""The default: one of several classes."""
