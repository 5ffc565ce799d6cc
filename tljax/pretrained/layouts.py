"""Which key tables there are for each network, and which network a file holds."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from tljax.errors import RequestError
from tljax.models import MODELS, Model, abstract_variables, build_model, with_head
from tljax.pretrained import (
    bit,
    efficientnet,
    inception,
    keras,
    mobilenet,
    resnet,
    vgg,
    xception,
)
from tljax.pretrained.rules import Difference, Layout, Rules, compare, counted
from tljax.trees import flatten

_FAMILIES = (resnet, bit, inception, xception, efficientnet, vgg, mobilenet, keras)

LAYOUTS: dict[str, dict[str, Layout]] = {
    model: {
        name: layout
        for family in _FAMILIES
        for name, layout in family.LAYOUTS.get(model, {}).items()
    }
    for model in MODELS
}
"""The layouts of each model by name."""


@cache
def layout_rules(model: str, layout: str) -> Rules:
    """One table.

    Raises:
        RequestError: the model has no such layout.
    """
    if layout not in LAYOUTS[model]:
        known = ", ".join(LAYOUTS[model])
        raise RequestError(f"there is no layout '{layout}' for {model}; known: {known}")
    return LAYOUTS[model][layout].table(model)


def table(model: Model, layout: str) -> Rules:
    """Return the part of a layout's table that is of the stages that a model has."""
    paths = flatten(abstract_variables(model))
    return tuple(rule for rule in layout_rules(model.name, layout) if rule.path in paths)


class Identity(NamedTuple):
    """What a file holds, as far as its keys and shapes tell.

    Attributes:
        model: with as many classes as the file's head, and the layout's usual preprocessing.
        layout: key of `LAYOUTS`.
        difference: empty if it fits.
        arrays: the tensors of the network, by the keys of the layout.
    """

    model: Model
    layout: str
    difference: Difference
    arrays: Mapping[str, np.ndarray]


def identify(arrays: Mapping[str, np.ndarray], model: str | None = None) -> Identity:
    """The nearest network and layout: first by keys, then by shapes, then in the order of `MODELS`.

    Args:
        arrays: the file.
        model: only consider this one.
    """
    candidates = [
        (len({*counted(arrays, found.ignore)} ^ _part(arrays, name, layout).keys), name, layout)
        for name in ([model] if model else MODELS)
        for layout, found in LAYOUTS[name].items()
    ]
    nearest = min(distance for distance, _, _ in candidates)
    best: Identity | None = None
    for distance, name, layout in candidates:
        if distance > nearest:
            continue
        identity = _compare(arrays, name, layout)
        if best is None or len(identity.difference.shapes) < len(best.difference.shapes):
            best = identity
        if not any(best.difference):
            break  # finding the shapes of a network takes a second
    assert best is not None
    return best


class _Part(NamedTuple):
    """What a file may hold of a network: all of it, or no head.

    Attributes:
        keys: of all stages that it has.
        last: those of the last of them alone.
        after: that stage; None for the whole network.
        unnamed: what all keys begin with, and is left out of them here.
    """

    keys: frozenset[str]
    last: frozenset[str]
    after: str | None
    unnamed: str = ""


@cache
def _parts(model: str, layout: str) -> tuple[_Part, ...]:
    """The whole network; without its head; without the hidden layers before that, one by one.

    What remains at least ends with the last map, whose average the features are then. Its keys may
    lack the name of the module that holds it, as ``resnet.`` in transformers' `ResNetModel`.
    """
    stages = build_model(model).stage_names
    of_stage: dict[str, set[str]] = {stage: set() for stage in stages}
    for rule in layout_rules(model, layout):
        of_stage[rule.path.split("/")[1]].add(rule.key)
    parts = []
    for count in range(len(stages), stages.index("pool") - 1, -1):
        keys = frozenset[str]().union(*(of_stage[stage] for stage in stages[:count]))
        last = stages[count - 1]
        if of_stage[last]:
            parts.append(_Part(keys, frozenset(of_stage[last]), last if parts else None))
    named = {key.partition(".")[0] for key in parts[-1].keys}
    if len(named) == 1:
        unnamed = f"{named.pop()}."
        keys = frozenset(key.removeprefix(unnamed) for key in parts[-1].keys)
        parts.append(parts[-1]._replace(keys=keys, unnamed=unnamed))
    return tuple(parts)


def _part(arrays: Mapping[str, np.ndarray], model: str, layout: str) -> _Part:
    """The largest part of whose last stage a file has a tensor; else the least."""
    parts = _parts(model, layout)
    return next((part for part in parts if not part.last.isdisjoint(arrays)), parts[-1])


def bias_of_head(rules: Rules) -> str:
    """Return the key of the tensor that has as many entries as a network has outputs."""
    return next(rule.key for rule in rules if rule.path == "params/head/bias")


def _compare(arrays: Mapping[str, np.ndarray], name: str, layout: str) -> Identity:
    rules = layout_rules(name, layout)
    part, found = _part(arrays, name, layout), LAYOUTS[name][layout]
    arrays = {part.unnamed + key: array for key, array in arrays.items()}
    head = bias_of_head(rules)
    model = build_model(name, arrays[head].size if head in arrays else 1000)
    if part.after:
        model = with_head(model, 0, after=part.after)
    if found.preprocess:
        model = replace(model, preprocess=found.preprocess)
    rules, skeleton = table(model, layout), abstract_variables(model)
    return Identity(model, layout, compare(rules, arrays, skeleton, found.ignore), arrays)


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
    elif len(found.difference.missing) == len(table(found.model, found.layout)):
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
