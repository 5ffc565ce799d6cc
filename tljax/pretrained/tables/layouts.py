"""The key tables of each network, and the identification of the network in a file."""

import re
from collections import Counter
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
from tljax.pretrained.tables import (
    bit,
    convnext,
    efficientnet,
    inception,
    keras,
    mobilenet,
    mobilenetv4,
    regnet,
    resnet,
    vgg,
    vit,
    xception,
)
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten
from tljax.runtime.types import Variables

_FAMILIES = (
    resnet,
    bit,
    inception,
    xception,
    efficientnet,
    vgg,
    mobilenet,
    regnet,
    convnext,
    mobilenetv4,
    vit,
    keras,
)

LAYOUTS: dict[str, dict[str, Layout]] = {
    model: {
        name: layout
        for family in _FAMILIES
        for name, layout in family.LAYOUTS.get(model, {}).items()
    }
    for model in MODELS
}
"""The layouts of each model, by name."""


@cache
def layout_rules(model: str, layout: str) -> Rules:
    """Return the key table of a model in a layout.

    Raises:
        RequestError: the model has no such layout.
    """
    layouts = LAYOUTS.get(model, {})
    if layout not in layouts:
        known = ", ".join(layouts) or "tljax"
        raise RequestError(f"there is no layout '{layout}' for {model}; known: {known}")
    return LAYOUTS[model][layout].table(model)


def table(model: Model, layout: str) -> Rules:
    """Return the rules of a layout for the stages that a model has."""
    paths = flatten(abstract_variables(model))
    return tuple(rule for rule in layout_rules(model.name, layout) if rule.path in paths)


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
        resized: note on learned positions that were resized; empty if they were not.
    """

    model: Model
    layout: str
    difference: Difference
    arrays: Mapping[str, np.ndarray]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    resized: str = ""

    def notes(self, where: str) -> tuple[str, ...]:
        """Return notes about what the file ``where`` holds and the network does not."""
        names = shorten_list(self.ignored)
        left_out = f"ignored tensors that {self.model.name} does not use: {names}"
        notes = (f"{where}: {left_out}{self.under}",) if self.ignored else ()
        return (*notes, f"{where}: {self.resized}") if self.resized else notes

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
    details, keys = LAYOUTS[name][layout], _part(arrays, name, layout).keys
    if details.optional:
        keys = {key for key in keys if key in arrays or not key.endswith(details.optional)}
    return len({*required_keys(arrays, details.ignore + details.drop)} ^ keys)


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


class _Part(NamedTuple):
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
def _parts(model: str, layout: str) -> tuple[_Part, ...]:
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
            parts.append(_Part(keys, frozenset(stage_keys[last]), after if parts else None))
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


def _part(arrays: Mapping[str, np.ndarray], model: str, layout: str) -> _Part:
    """Return the largest part with a tensor of its last stage in the file, or the smallest part."""
    parts = _parts(model, layout)
    return next((part for part in parts if not part.last.isdisjoint(arrays)), parts[-1])


def head_bias_key(rules: Rules) -> str:
    """Return the key of the head's bias, whose size is the number of classes."""
    return next(rule.key for rule in rules if rule.path == "params/head/bias")


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
    if part.after:
        model = with_head(model, 0, after=part.after)
    preprocess = details.preprocess or model.preprocess
    channels = _channels(arrays, name, layout)
    if 0 < channels <= MAX_CHANNELS:
        preprocess = preprocess.with_channels(channels)
    model = replace(model, preprocess=preprocess)
    rules, skeleton = table(model, layout), abstract_variables(model)
    dropped = tuple(key for key in arrays if details.drop and key.startswith(details.drop))
    arrays = {**_zeros(rules, arrays, skeleton, details.optional), **arrays}
    arrays, note = _with_positions(rules, arrays, skeleton, name)
    difference = compare(rules, arrays, skeleton, details.ignore + details.drop)
    return Identity(model, layout, difference, arrays, ignored=dropped, resized=note)


_POSITION = "params/embed/position"


def _with_positions(
    rules: Rules, arrays: Mapping[str, np.ndarray], skeleton: Variables, name: str
) -> tuple[Mapping[str, np.ndarray], str]:
    """Resize learned positions to the grid of the network; this import cannot be inverted.

    Returns:
        The arrays, and a note; empty if nothing was resized.
    """
    rule = next((rule for rule in rules if rule.path == _POSITION), None)
    positions = None if rule is None else arrays.get(rule.key)
    if rule is None or positions is None:
        return arrays, ""
    shape = rule.source_shape(flatten(skeleton)[_POSITION].shape)
    same_kind = len(positions.shape) == len(shape) and positions.shape[-1] == shape[-1]
    if positions.shape == shape or not same_kind:
        return arrays, ""
    resized = vit.resize_positions(name, positions)
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


# Names of wrapper modules, which may occur anywhere in a key.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Prefixes of copies of a network that are not used if there is another one.
_COPY = re.compile(r"(?:^|[._])(?:student|encoder_k|key|momentum|target|ema|avg)(?:[._]|$)")

# Modules with matrices that only training needs; heads; the counters that thop adds to each module.
_TRAINING = re.compile(r"queue|memory|proj|predict|proto|criterion|loss|metric|teacher|\w+_k\b")
_HEADS = re.compile(r"fc|head|classifier|mlp|last_linear")
_COUNTERS = (".total_ops", ".total_params")
_LAYER_TENSORS = (".weight", ".bias", ".running_mean", ".running_var")


def _find(arrays: Mapping[str, np.ndarray], where: str, model: str | None) -> Identity:
    """Return the network that fits under any prefix of the keys, or the nearest one."""
    arrays = {_WRAPPERS.sub("", key): array for key, array in arrays.items()}
    whole = identify(arrays, model)
    if not any(whole.difference):
        return whole
    names = [model] if model else MODELS
    first_keys = {
        layout_rules(name, layout)[0].key.removeprefix(part.omitted)
        for name in names
        for layout in LAYOUTS[name]
        for part in _parts(name, layout)
    }
    prefixes = {
        key.removesuffix(first)
        for first in first_keys
        for key in arrays
        if f".{key}".endswith(f".{first}")
    }
    roots = {key.partition(".")[0] + "." for key in arrays}
    prefixes |= roots if len(roots) == 1 else set()
    # Long prefixes belong to blocks within a network.
    likely = sorted(prefixes, key=lambda prefix: (prefix.count("."), prefix))[:8]
    candidates = [_identify_under(prefix, arrays, model) for prefix in likely]
    fits = [identity for identity in candidates if not any(identity.difference)]
    fits = [x for x in fits if not any(x.prefix.startswith(y.prefix) for y in fits if y is not x)]
    fits = [identity for identity in fits if not _COPY.search(identity.prefix)] or fits
    if len(fits) > 1 and fits[0].prefix:
        both = " and ".join(f"'{identity.prefix:.60}'" for identity in fits[:2])
        raise RequestError(f"{where} holds several networks, under {both}; save the one you mean")
    return min(
        fits or [whole, *candidates], key=lambda x: sum(map(len, (*x.difference, x.ignored)))
    )


def _identify_under(prefix: str, arrays: Mapping[str, np.ndarray], model: str | None) -> Identity:
    """Identify the tensors under a prefix, moving keys that only training needs to ``ignored``."""
    inside = {
        key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)
    }
    identity = identify(inside, model)
    has_head = identity.model.num_classes > 0
    modules = {rule.key.partition(".")[0] for rule in table(identity.model, identity.layout)}

    def is_ignored(key: str) -> bool:
        module, array = key.partition(".")[0], identity.arrays[key]
        if module in modules or "/" in key:
            return key.endswith(_COUNTERS)
        if _TRAINING.match(module) or (not has_head and _HEADS.match(module)):
            return True
        return array.size <= max(array.shape, default=1) and not key.endswith(_LAYER_TENSORS)

    ignored = [key for key in identity.difference.leftover if is_ignored(key)]
    leftover = tuple(key for key in identity.difference.leftover if not is_ignored(key))
    outside = required_keys(key for key in arrays if not key.startswith(prefix))
    return identity._replace(
        difference=identity.difference._replace(leftover=leftover),
        prefix=prefix,
        ignored=(*(prefix + key for key in (*identity.ignored, *ignored)), *outside),
    )


def check(arrays: Mapping[str, np.ndarray], where: str, model: str | None = None) -> Identity:
    """Return the network that a file contains, checking that its tensors fit exactly.

    Args:
        arrays: the tensors of the file.
        where: name of the file, for messages.
        model: name of the expected model; by default any.

    Raises:
        RequestError: the file does not fit. The message lists the tensors that are missing, left
            over or of another shape, and names a network that fits, if there is one.
    """
    identity = _find(arrays, where, model)
    if not any(identity.difference):
        return identity
    name = f"{identity.model.name} ({identity.layout} keys)"
    message = f"{where} does not fit {name}"
    other = _find(arrays, where, None) if model else None
    if other and other.model.name != model and not any(other.difference):
        reasons = "; ".join(_depth_differences(identity, other))
        message += f": it looks like {other.model.name}" + (f" ({reasons})" if reasons else "")
    elif len(identity.difference.missing) == len(table(identity.model, identity.layout)):
        message = f"{where} holds no network that tljax supports; the nearest is {name}"
    missing, leftover, shapes = identity.difference
    difference = Difference(missing, (*leftover, *identity.ignored), shapes)
    raise RequestError(f"{message}. {difference}{identity.under}")


def _depth_differences(expected: Identity, actual: Identity) -> list[str]:
    """Return lines such as "layer3 has 23 blocks, expected 6"."""
    expected_counts, actual_counts = (
        Counter(
            stage
            for stage, _ in {
                tuple(rule.path.split("/")[1:3])
                for rule in layout_rules(identity.model.name, identity.layout)
                if "/block" in rule.path
            }
        )
        for identity in (expected, actual)
    )
    return [
        f"{stage} has {actual_counts[stage]} blocks, expected {count}"
        for stage, count in sorted(expected_counts.items())
        if actual_counts[stage] not in (0, count)
    ]
