"""Networks with their weights and their metadata."""

import unicodedata
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tljax.models import Model
from tljax.runtime.errors import RequestError
from tljax.runtime.settings import Kind
from tljax.runtime.task import CLASSIFICATION, Task
from tljax.runtime.types import Variables


@dataclass(frozen=True)
class Card:
    """Metadata of weights; their preprocessing belongs to the model.

    Attributes:
        classes: names of what the network predicts: classes, labels or numbers, one per output;
            for ordered classes one more; empty for a backbone without a head.
        source: origin of the weights: a catalog name, hub id, URL or path.
        licence: SPDX identifier of the license, or "unknown".
        sha256: SHA-256 of the file that was read; of the pretrained file for a fine-tuned network.
        layout: layout of the keys in the file: one of `LAYOUTS`, or ``tljax``.
        notes: assumptions made while loading, one line each, to be shown to the user; not saved.
        task: what the network predicts and how its outputs are read.
    """

    classes: tuple[str, ...]
    source: str
    licence: str
    sha256: str
    layout: str
    notes: tuple[str, ...] = ()
    task: Task = CLASSIFICATION

    def guess(self, probabilities: Float[np.ndarray, " names"], index: int) -> dict[str, Any]:
        """Return the name, the index and the probability of a class or label, as JSON."""
        return {
            "name": self.classes[index],
            "index": int(index),
            "probability": float(probabilities[index]),
        }

    def index_of(self, name: str) -> int:
        """Return the index of a class, label or number in `classes`.

        It is the index of its output as well, except for ordered classes.

        Args:
            name: name of the class. An exact match is preferred to one in another case. If no class
                has this name, the index itself is accepted, unless all class names are numbers.

        Raises:
            RequestError: no class has this name, or several do; the message gives the nearest name,
                or their indices.
        """
        one, many = NOUNS[self.task.kind]
        name, *classes = (unicodedata.normalize("NFC", each) for each in (name, *self.classes))
        matches = [i for i, each in enumerate(classes) if each == name]
        matches = matches or [i for i, each in enumerate(classes) if each.lower() == name.lower()]
        is_index = name.isdecimal() and not all(each.isdecimal() for each in classes)
        if not matches and is_index and int(name) < len(classes):
            return int(name)
        if len(matches) == 1:
            return matches[0]
        if matches:  # ImageNet has two cranes and two maillots
            indices = " or ".join(map(str, matches))
            raise RequestError(f"{len(matches)} {many} are called '{name}'; use {indices}")
        near = get_close_matches(name, classes, n=1)
        hint = f"did you mean {near[0]}?" if near else "`tljax.load_pretrained` lists card.classes"
        raise RequestError(f"no {one} is called '{name}' among {len(classes)}; {hint}")


NOUNS: dict[Kind, tuple[str, str]] = {
    "classification": ("class", "classes"),
    "multilabel": ("label", "labels"),
    "regression": ("number", "numbers"),
    "ordinal": ("class", "ordered classes"),
}


class Pretrained(NamedTuple):
    """A model, its variables (float32, on the host) and their metadata.

    Attributes:
        model: the network.
        variables: its parameters and batch statistics.
        card: class names, origin and license of the weights.
    """

    model: Model
    variables: Variables
    card: Card

    def with_size(self, size: int | None) -> "Pretrained":
        """Return the network with another image size in pixels; None changes nothing."""
        if size is None:
            return self
        preprocess = self.model.preprocess.with_size(size)
        return self._replace(model=replace(self.model, preprocess=preprocess))

    def require_classes(self) -> "Pretrained":
        """Return the network unchanged if it predicts named classes, labels or numbers.

        Raises:
            RequestError: the network is a backbone without a head, or has more or fewer outputs
                than names.
        """
        outputs, names, task = self.model.num_classes, len(self.card.classes), self.card.task
        one, many = NOUNS[task.kind]
        if not outputs:
            raise RequestError(
                f"{self.card.source} is a backbone without a head, so it has no {many}; add a head "
                "for yours with tljax train"
            )
        if outputs != task.num_outputs(names):
            outcome = "it is not a classifier" if task == CLASSIFICATION else "they do not fit"
            raise RequestError(
                f"{self.card.source} has {outputs} outputs but {names} {one} names: {outcome}"
            )
        return self

    def require_task(self, *kinds: Kind) -> "Pretrained":
        """Return the network unchanged if its task is of one of some kinds.

        Raises:
            RequestError: its task is another one.
        """
        if self.card.task.kind not in kinds:
            required = " or ".join(NOUNS[kind][1] for kind in kinds)
            raise RequestError(
                f"{self.card.source} predicts {NOUNS[self.card.task.kind][1]}, but this needs a "
                f"network that predicts {required}"
            )
        return self
