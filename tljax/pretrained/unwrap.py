"""Identification of a network whose keys have a prefix, or lie between those of other networks."""

import re
from collections import Counter
from collections.abc import Mapping

import numpy as np

from tljax.models import MODELS
from tljax.pretrained.identify import Identity, identify, parts_of
from tljax.pretrained.rules import Difference, required_keys
from tljax.pretrained.tables.layouts import LAYOUTS, layout_rules, table
from tljax.runtime.errors import RequestError

# Names of wrapper modules, which may occur anywhere in a key.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_SEPARATORS = re.compile(r"[./]")

# Prefixes of copies of a network that are not used if there is another one.
_COPY = re.compile(r"(?:^|[._])(?:student|encoder_k|key|momentum|target|ema|avg)(?:[._]|$)")

# Modules with matrices that only training needs; heads; the counters that thop adds to each module.
_TRAINING = re.compile(r"queue|memory|proj|predict|proto|criterion|loss|metric|teacher|\w+_k\b")
_HEADS = re.compile(r"fc|head|classifier|mlp|last_linear")
_COUNTERS = (".total_ops", ".total_params")
_LAYER_TENSORS = (".weight", ".bias", ".running_mean", ".running_var")


_LAYOUTS = [layout for layouts in LAYOUTS.values() for layout in layouts.values()]
_RENAME = [rename for rename in dict.fromkeys(layout.rename for layout in _LAYOUTS) if rename]


def _with_usual_names(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Return tensors without wrapper modules in their keys, named as their layout names them."""
    arrays = {_WRAPPERS.sub("", key): array for key, array in arrays.items()}
    for rename in _RENAME:
        arrays = dict(rename(arrays))
    return arrays


def _find(arrays: Mapping[str, np.ndarray], where: str, model: str | None) -> Identity:
    """Return the network that fits under any prefix of the keys, or the nearest one."""
    arrays = _with_usual_names(arrays)
    whole = identify(arrays, model)
    if not any(whole.difference):
        return whole
    names = [model] if model else MODELS
    first_keys = {
        layout_rules(name, layout)[0].key.removeprefix(part.omitted)
        for name in names
        for layout in LAYOUTS[name]
        for part in parts_of(name, layout)
    }
    prefixes = {
        key.removesuffix(first)
        for first in first_keys
        for key in arrays
        if f".{key}".endswith((f".{first}", f"/{first}"))
    }
    roots = {key.partition(".")[0] + "." for key in arrays}
    prefixes |= roots if len(roots) == 1 else set()
    # Long prefixes belong to blocks within a network.
    likely = sorted(prefixes, key=lambda prefix: (len(_SEPARATORS.findall(prefix)), prefix))[:8]
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
