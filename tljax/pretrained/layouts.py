"""Which key tables there are for each network, and which network a file holds."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

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
from tljax.pretrained.rules import Difference, Layout, Rules, compare, counted, few
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten

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
    layouts = LAYOUTS.get(model, {})
    if layout not in layouts:
        known = ", ".join(layouts) or "tljax"
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
        prefix: what stood before each of their keys.
        ignored: the keys beside them that the network does without.
    """

    model: Model
    layout: str
    difference: Difference
    arrays: Mapping[str, np.ndarray]
    prefix: str = ""
    ignored: tuple[str, ...] = ()

    def notes(self, where: str) -> tuple[str, ...]:
        """Return a remark on what was left out of the file ``where``, if anything was."""
        left_out = f"left out what {self.model.name} does without: {few(self.ignored)}"
        return (f"{where}: {left_out}{self.under}",) if self.ignored else ()

    @property
    def under(self) -> str:
        """The prefix, for a message."""
        return f" (its keys begin with '{self.prefix:.60}')" if self.prefix else ""


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


# What wraps a module, wherever in the network.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Of several copies of a network, those that are not meant.
_COPY = re.compile(r"(?:^|[._])(?:student|encoder_k|key|momentum|target|ema|avg)(?:[._]|$)")

# What has matrices and trains a network that runs without it; what thop leaves in every module.
_TRAINING = re.compile(r"queue|memory|proj|predict|proto|criterion|loss|metric|teacher|\w+_k\b")
_HEADS = re.compile(r"fc|head|classifier|mlp|last_linear")
_COUNTERS = (".total_ops", ".total_params")
_OF_LAYERS = (".weight", ".bias", ".running_mean", ".running_var")


def _find(arrays: Mapping[str, np.ndarray], where: str, model: str | None) -> Identity:
    """The network that fits, under whatever prefix, or else the nearest."""
    arrays = {_WRAPPERS.sub("", key): array for key, array in arrays.items()}
    whole = identify(arrays, model)
    if not any(whole.difference):
        return whole
    names = [model] if model else MODELS
    firsts = {
        layout_rules(name, layout)[0].key.removeprefix(part.unnamed)
        for name in names
        for layout in LAYOUTS[name]
        for part in _parts(name, layout)
    }
    prefixes = {
        key.removesuffix(first)
        for first in firsts
        for key in arrays
        if f".{key}".endswith(f".{first}")
    }
    tops = {key.partition(".")[0] + "." for key in arrays}
    prefixes |= tops if len(tops) == 1 else set()
    # Longer ones are of blocks within a network.
    likely = sorted(prefixes, key=lambda prefix: (prefix.count("."), prefix))[:8]
    found = [_under(prefix, arrays, model) for prefix in likely]
    fits = [identity for identity in found if not any(identity.difference)]
    fits = [x for x in fits if not any(x.prefix.startswith(y.prefix) for y in fits if y is not x)]
    fits = [identity for identity in fits if not _COPY.search(identity.prefix)] or fits
    if len(fits) > 1 and fits[0].prefix:
        both = " and ".join(f"'{identity.prefix:.60}'" for identity in fits[:2])
        raise RequestError(f"{where} holds several networks, under {both}; save the one you mean")
    return min(fits or [whole, *found], key=lambda x: sum(map(len, (*x.difference, x.ignored))))


def _under(prefix: str, arrays: Mapping[str, np.ndarray], model: str | None) -> Identity:
    """What the tensors under a prefix are; keys that the network does without are no difference."""
    inside = {
        key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)
    }
    found = identify(inside, model)
    whole = found.model.num_classes > 0
    own = {rule.key.partition(".")[0] for rule in table(found.model, found.layout)}

    def is_odd(key: str) -> bool:
        top, array = key.partition(".")[0], found.arrays[key]
        if top in own or "/" in key:
            return key.endswith(_COUNTERS)
        if _TRAINING.match(top) or (not whole and _HEADS.match(top)):
            return True
        return array.size <= max(array.shape, default=1) and not key.endswith(_OF_LAYERS)

    odd = [key for key in found.difference.leftover if is_odd(key)]
    leftover = tuple(key for key in found.difference.leftover if not is_odd(key))
    outside = counted(key for key in arrays if not key.startswith(prefix))
    return found._replace(
        difference=found.difference._replace(leftover=leftover),
        prefix=prefix,
        ignored=(*(prefix + key for key in odd), *outside),
    )


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
    found = _find(arrays, where, model)
    if not any(found.difference):
        return found
    named = f"{found.model.name} ({found.layout} keys)"
    message = f"{where} does not fit {named}"
    other = _find(arrays, where, None) if model else None
    if other and other.model.name != model and not any(other.difference):
        reasons = "; ".join(_block_counts(found, other))
        message += f": it looks like {other.model.name}" + (f" ({reasons})" if reasons else "")
    elif len(found.difference.missing) == len(table(found.model, found.layout)):
        message = f"{where} holds none of the networks that tljax knows; the nearest is {named}"
    missing, leftover, shapes = found.difference
    difference = Difference(missing, (*leftover, *found.ignored), shapes)
    raise RequestError(f"{message}. {difference}{found.under}")


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
