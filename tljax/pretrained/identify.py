"""Identification of the network in a file by the keys and shapes of its tensors."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from tljax.models import (
    MODELS,
    Model,
    abstract_variables,
    build_model,
    input_kernel,
    with_head,
)
from tljax.models.spec import MAX_CHANNELS
from tljax.pretrained.rules import (
    Difference,
    Layout,
    Rule,
    Rules,
    compare,
    required_keys,
    shorten_list,
)
from tljax.pretrained.tables.layouts import LAYOUTS, layout_rules, table
from tljax.runtime.trees import flatten
from tljax.runtime.types import Variables


class Identity(NamedTuple):
    """The network in a file, identified by keys and shapes.

    Attributes:
        model: the network, with the number of classes of the file's head and the default
            preprocessing of the layout.
        layout: name of the layout in `LAYOUTS`.
        difference: empty if the file fits.
        arrays: the tensors of the network, by the keys of the layout.
        prefix: prefix of the keys in the file.
        ignored: other keys in the file, which the network does not need.
        remarks: notes on learned positions that were resized, or a last norm that is missing.
    """

    model: Model
    layout: str
    difference: Difference
    arrays: Mapping[str, np.ndarray]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def notes(self, where: str) -> tuple[str, ...]:
        """Return notes about what the file ``where`` holds and the network does not."""
        names = shorten_list(self.ignored)
        left_out = f"ignored tensors that {self.model.name} does not use: {names}"
        notes = (f"{where}: {left_out}{self.under}",) if self.ignored else ()
        return (*notes, *(f"{where}: {remark}" for remark in self.remarks))

    @property
    def under(self) -> str:
        """Return the prefix, for messages."""
        return f" (its keys begin with '{self.prefix:.60}')" if self.prefix else ""


def identify(arrays: Mapping[str, np.ndarray], model: str | None = None) -> Identity:
    """Return the nearest network and layout: by keys, then shapes, then the order of `MODELS`.

    Args:
        arrays: the tensors of the file.
        model: name of the only model to consider; by default all.
    """
    candidates = [
        (_distance(arrays, name, layout), name, layout)
        for name in ([model] if model else MODELS)
        for layout in LAYOUTS[name]
    ]
    smallest = min(distance for distance, _, _ in candidates)
    nearest = [(name, layout) for distance, name, layout in candidates if distance == smallest]
    if len(nearest) > 1:  # computing all shapes of a network takes a second, those of a stage 10 ms
        exact = [pair for pair in nearest if _fits_first(arrays, *pair)]
        nearest = (
            exact or [pair for pair in nearest if _fits_first(arrays, *pair, _POSITION)] or nearest
        )
    best: Identity | None = None
    for name, layout in nearest:
        identity = _compare(arrays, name, layout)
        if best is None or len(identity.difference.shapes) < len(best.difference.shapes):
            best = identity
        if not any(best.difference):
            break
    assert best is not None
    return best


def _distance(arrays: Mapping[str, np.ndarray], name: str, layout: str) -> int:
    """Return the number of keys that only the file has, or only the network."""
    details, part = LAYOUTS[name][layout], _part(arrays, name, layout)
    keys, whole = part.keys, map(part.omitted.__add__, arrays)
    if details.optional:
        keys = {key for key in keys if key in arrays or not key.endswith(details.optional)}
    found = required_keys(whole, details.ignore + details.drop)
    return len({key.removeprefix(part.omitted) for key in found} ^ keys)


def _fits_first(arrays: Mapping[str, np.ndarray], name: str, layout: str, but: str = "") -> bool:
    """Return True if the tensors of the first stage, but one, have the shapes of a network's."""
    part = _part(arrays, name, layout)
    tensors = {part.omitted + key: array for key, array in arrays.items()}
    expected = flatten(_first_shapes(name, _channels(tensors, name, layout)))
    return all(
        rule.source_shape(expected[rule.path].shape) == tensors[rule.key].shape
        for rule in layout_rules(name, layout)
        if rule.path in expected and rule.path != but and rule.key in tensors
    )


@cache
def _first_shapes(name: str, channels: int) -> Variables:
    """Return the shapes of the variables of a network's first stage."""
    model = build_model(name)
    preprocess = model.preprocess.with_channels(channels)
    return abstract_variables(replace(model, stages=model.stages[:1], preprocess=preprocess))


def _channels(tensors: Mapping[str, np.ndarray], name: str, layout: str) -> int:
    """Return the number of channels of the images that a file's first kernel reads."""
    rule = _input_rule(name, layout)
    kernel = tensors.get(rule.key)
    if kernel is None or kernel.ndim != 4 or rule.shape or rule.view:
        return build_model(name).preprocess.channels
    return kernel.shape[rule.axes[2] if rule.axes else 2]


@cache
def _input_rule(name: str, layout: str) -> Rule:
    path = f"params/{input_kernel(build_model(name))}"
    return next(rule for rule in layout_rules(name, layout) if rule.path == path)


class Part(NamedTuple):
    """The stages of a network that a file may contain: all, or a prefix without the head.

    Attributes:
        keys: keys of these stages.
        last: keys of the last of these stages.
        after: name of the last stage; None for the whole network.
        omitted: prefix of all keys in the layout that is omitted in ``keys``.
    """

    keys: frozenset[str]
    last: frozenset[str]
    after: str | None
    omitted: str = ""


@cache
def parts_of(model: str, layout: str) -> tuple[Part, ...]:
    """Return the whole network, then without its head, then without each hidden layer before it.

    The smallest part ends with the last feature map, which is then averaged, or with pooled tokens.
    Keys of a part without the head may lack the name of the enclosing module, such as ``resnet.``
    in the `ResNetModel` of transformers.
    """
    outputs = {stage.name: stage.output for stage in build_model(model).stages}
    stages = tuple(outputs)
    stage_keys: dict[str, set[str]] = {stage: set() for stage in stages}
    for rule in layout_rules(model, layout):
        stage_keys[rule.path.split("/")[1]].add(rule.key)
    parts, pool = [], stages.index("pool")
    for count in range(len(stages), pool - 1, -1):
        keys = frozenset[str]().union(*(stage_keys[stage] for stage in stages[:count]))
        last = stages[count - 1]
        if stage_keys[last]:
            # Without a pooling of its own, a backbone would average its tokens.
            keep_pool = count == pool and outputs[last] == "tokens" and not stage_keys["pool"]
            after = "pool" if keep_pool else last
            parts.append(Part(keys, frozenset(stage_keys[last]), after if parts else None))
    for part in parts[1:]:
        modules = {key.partition(".")[0] for key in part.keys}
        if len(modules) == 1:
            omitted = f"{modules.pop()}."
            keys, last = (
                frozenset(key.removeprefix(omitted) for key in group)
                for group in (part.keys, part.last)
            )
            parts.append(part._replace(keys=keys, last=last, omitted=omitted))
    return tuple(parts)


def _part(arrays: Mapping[str, np.ndarray], model: str, layout: str) -> Part:
    """Return the largest part with a tensor of its last stage in the file, or the smallest part."""
    parts = parts_of(model, layout)
    return next((part for part in parts if not part.last.isdisjoint(arrays)), parts[-1])


def _outputs(rules: Rules, arrays: Mapping[str, np.ndarray]) -> int:
    """Return the number of outputs of the head in a file; 1000 if there is none."""
    for rule in rules:
        if rule.path == "params/head/bias" and rule.key in arrays:
            return arrays[rule.key].size
    for rule in rules:  # the bias may be optional
        if rule.path == "params/head/kernel" and rule.key in arrays:
            return arrays[rule.key].shape[(rule.axes or (-1,))[-1]]
    return 1000


def _compare(arrays: Mapping[str, np.ndarray], name: str, layout: str) -> Identity:
    rules = layout_rules(name, layout)
    part, details = _part(arrays, name, layout), LAYOUTS[name][layout]
    arrays = {part.omitted + key: array for key, array in arrays.items()}
    model = build_model(name, _outputs(rules, arrays))
    remarks: tuple[str, ...] = ()
    if part.after:
        later = model.stage_names[model.stage_names.index(part.after) + 1 :]
        if "norm" in later:
            remarks = ("it lacks the last norm, so its features are those before it",)
        model = with_head(model, 0, after=part.after)
    preprocess = details.preprocess or model.preprocess
    channels = _channels(arrays, name, layout)
    if 0 < channels <= MAX_CHANNELS:
        preprocess = preprocess.with_channels(channels)
    model = replace(model, preprocess=preprocess)
    rules, skeleton = table(model, layout), abstract_variables(model)
    dropped = tuple(key for key in arrays if details.drop and key.startswith(details.drop))
    arrays = {**_zeros(rules, arrays, skeleton, details.optional), **arrays}
    arrays, note = _with_positions(rules, arrays, skeleton, name, details)
    difference = compare(rules, arrays, skeleton, details.ignore + details.drop)
    remarks += (note,) if note else ()
    return Identity(model, layout, difference, arrays, ignored=dropped, remarks=remarks)


_POSITION = "params/embed/position"


def _with_positions(
    rules: Rules,
    arrays: Mapping[str, np.ndarray],
    skeleton: Variables,
    name: str,
    layout: Layout,
) -> tuple[Mapping[str, np.ndarray], str]:
    """Resize learned positions to the grid of the network; this import cannot be inverted.

    Returns:
        The arrays, and a note; empty if nothing was resized.
    """
    rule = next((rule for rule in rules if rule.path == _POSITION), None)
    positions = None if rule is None else arrays.get(rule.key)
    if rule is None or positions is None or layout.resize_positions is None:
        return arrays, ""
    shape = rule.source_shape(flatten(skeleton)[_POSITION].shape)
    same_kind = len(positions.shape) == len(shape) and positions.shape[-1] == shape[-1]
    if positions.shape == shape or not same_kind:
        return arrays, ""
    resized = layout.resize_positions(name, positions)
    if resized is None:
        return arrays, ""
    old, new = positions.shape[-2], shape[-2]
    note = f"its {old} positions are resized to the {new} of {name}; export writes the resized ones"
    return {**arrays, rule.key: resized}, note


def _zeros(
    rules: Rules, arrays: Mapping[str, np.ndarray], skeleton: Variables, optional: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Return zeros for the optional tensors that a file lacks."""
    expected = flatten(skeleton)
    return {
        rule.key: np.zeros(rule.source_shape(expected[rule.path].shape), np.float32)
        for rule in rules
        if optional and rule.key.endswith(optional) and rule.key not in arrays
    }
