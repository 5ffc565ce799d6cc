"""Which key tables there are for each network, and which network a file holds."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tljax.errors import RequestError
from tljax.models import MODELS, Model, abstract_variables, build_model
from tljax.models.efficientnet import VARIANTS
from tljax.models.resnet import DEPTHS
from tljax.pretrained import efficientnet, resnet
from tljax.pretrained.rules import NUM_BATCHES, Difference, Rules, compare

_RESNET = {
    "torchvision": resnet.torchvision,
    "timm": resnet.torchvision,
    "huggingface": resnet.huggingface,
}
_EFFICIENTNET = {
    "timm": efficientnet.timm,
    "efficientnet_pytorch": efficientnet.efficientnet_pytorch,
}
LAYOUTS: dict[str, dict[str, Callable[[str], Rules]]] = {
    **dict.fromkeys(DEPTHS, _RESNET),
    **dict.fromkeys(VARIANTS, _EFFICIENTNET),
}
"""The tables of each model by the name of the layout."""


@lru_cache
def layout_rules(model: str, layout: str) -> Rules:
    """One table.

    Raises:
        RequestError: the model has no such layout.
    """
    if layout not in LAYOUTS[model]:
        known = ", ".join(LAYOUTS[model])
        raise RequestError(f"there is no layout '{layout}' for {model}; known: {known}")
    return LAYOUTS[model][layout](model)


class Identity(NamedTuple):
    """What a file holds, as far as its keys and shapes tell.

    Attributes:
        model: with as many classes as the file's head.
        layout: key of `LAYOUTS`.
        difference: empty if it fits.
    """

    model: Model
    layout: str
    difference: Difference


def identify(arrays: Mapping[str, np.ndarray], model: str | None = None) -> Identity:
    """The nearest network and layout: first by keys, then by shapes.

    Args:
        arrays: the file.
        model: only consider this one.
    """
    keys = {key for key in arrays if not key.endswith(NUM_BATCHES)}
    candidates = [
        (len(keys ^ {rule.key for rule in layout_rules(name, layout)}), name, layout)
        for name in ([model] if model else MODELS)
        for layout in LAYOUTS[name]
    ]
    nearest = min(distance for distance, _, _ in candidates)
    identities = [
        _compare(arrays, name, layout)
        for distance, name, layout in candidates
        if distance == nearest
    ]
    return min(identities, key=lambda identity: len(identity.difference.shapes))


def _compare(arrays: Mapping[str, np.ndarray], name: str, layout: str) -> Identity:
    rules = layout_rules(name, layout)
    head = next(rule.key for rule in rules if rule.path == "params/head/bias")
    num_classes = arrays[head].size if head in arrays else 1000
    model = build_model(name, num_classes)
    return Identity(model, layout, compare(rules, arrays, abstract_variables(model)))


def check(arrays: Mapping[str, np.ndarray], where: str, model: str | None = None) -> Identity:
    """The network that a file fills exactly.

    Args:
        arrays: the file.
        where: its name, for the message.
        model: the network that the file ought to hold; by default any.

    Raises:
        RequestError: it does not fit; the message says what is missing, left over and of another
            shape, and what the file looks like instead.
    """
    found = identify(arrays, model)
    if not any(found.difference):
        return found
    message = f"{where} does not fit {found.model.name} ({found.layout} keys)"
    other = identify(arrays) if model else None
    if other and other.model.name != model and not any(other.difference):
        reasons = "; ".join(_block_counts(found, other))
        message += f": it looks like {other.model.name}" + (f" ({reasons})" if reasons else "")
    elif len(found.difference.missing) == len(layout_rules(found.model.name, found.layout)):
        message = f"{where} holds none of the networks that tljax knows ({', '.join(MODELS)})"
    raise RequestError(f"{message}. {found.difference}")


def _block_counts(expected: Identity, found: Identity) -> list[str]:
    """Where the depths differ: "layer3 has 23 blocks, expected 6"."""
    ours, theirs = (
        Counter(
            stage
            for stage, _ in {
                tuple(rule.path.split("/")[1:3])
                for rule in layout_rules(identity.model.name, identity.layout)
                if "/block" in rule.path
            }
        )
        for identity in (expected, found)
    )
    return [
        f"{stage} has {theirs[stage]} blocks, expected {count}"
        for stage, count in sorted(ours.items())
        if theirs[stage] not in (0, count)
    ]
