"""Tables between the keys of a foreign weight file and the paths of our variables, both ways.

A table lists every tensor of a network once: its key in the file, its path here, and the
permutation of axes between them. So a table is a bijection, and the same one imports and exports.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten, unflatten
from tljax.runtime.types import Preprocess, Variables

CONV = (2, 3, 1, 0)
"""From torch's ``[out, in, k, k]`` to our ``[k, k, in, out]``; depthwise kernels likewise."""

DENSE = (1, 0)
"""From torch's ``[out, in]`` to our ``[in, out]``."""

NUM_BATCHES = "num_batches_tracked"
"""Torch's batch norm counts its steps. We have no use for that: ignored here, zero on export."""


class Rule(NamedTuple):
    """One tensor: ``ours = theirs.reshape(view).transpose(axes)``, in the shape that ours has.

    Most tensors differ by the order of their axes alone. ``shape`` and ``view`` are for the others:
    a linear layer that reads a flattened map, or is kept as a 1x1 convolution.

    Attributes:
        key: in the foreign file.
        path: in our variables, joined by slashes: ``params/layer1/block0/conv1/kernel``.
        axes: the permutation; empty for none.
        shape: theirs, where it is not ours permuted; -1 for the number of classes.
        view: the shape in which the axes of theirs are permuted, with -1 likewise.
    """

    key: str
    path: str
    axes: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    view: tuple[int, ...] = ()

    def expected(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of theirs, given that of ours."""
        if self.shape:
            return _filled(self.shape, math.prod(ours))
        return tuple(ours[i] for i in np.argsort(self.axes)) if self.axes else ours

    def to_ours(self, theirs: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
        """Our tensor, contiguous."""
        seen = theirs.reshape(self.view) if self.view else theirs
        seen = seen.transpose(self.axes) if self.axes else seen
        return np.ascontiguousarray(seen).reshape(ours)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """Their tensor, contiguous: the inverse of `to_ours`."""
        theirs = self.expected(ours.shape)
        view = _filled(self.view, ours.size) if self.view else theirs
        axes = self.axes or tuple(range(len(view)))
        seen = ours.reshape([view[i] for i in axes]).transpose(np.argsort(axes))
        return np.ascontiguousarray(seen).reshape(theirs)


def _filled(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The shape with its -1 worked out, for so many elements."""
    rest = size // math.prod(side for side in shape if side != -1)
    return tuple(rest if side == -1 else side for side in shape)


Rules = tuple[Rule, ...]


def conv_norm(conv: str, norm: str, path: str) -> Rules:
    """The five tensors of a torch convolution and the batch norm behind it."""
    return (
        Rule(f"{conv}.weight", f"params/{path}/kernel", CONV),
        Rule(f"{norm}.weight", f"params/{path}/scale"),
        Rule(f"{norm}.bias", f"params/{path}/bias"),
        Rule(f"{norm}.running_mean", f"batch_stats/{path}/mean"),
        Rule(f"{norm}.running_var", f"batch_stats/{path}/var"),
    )


def conv(key: str, path: str) -> Rules:
    """The two tensors of a torch convolution without a norm."""
    return (
        Rule(f"{key}.weight", f"params/{path}/kernel", CONV),
        Rule(f"{key}.bias", f"params/{path}/bias"),
    )


def dense(key: str, path: str) -> Rules:
    """The two tensors of a torch linear layer."""
    return (
        Rule(f"{key}.weight", f"params/{path}/kernel", DENSE),
        Rule(f"{key}.bias", f"params/{path}/bias"),
    )


Config = dict[str, Any]
"""What the config.json beside the weights says of the architecture."""


def timm_config(name: str) -> Config:
    """Of a network that timm calls as we do."""
    return {"architecture": name}


class Layout(NamedTuple):
    """How one project writes a network.

    Attributes:
        table: from the name of a model to its table.
        preprocess: the usual one of weights in this layout, where it is not the model's own.
        ignore: beginnings of keys that may be there and are dropped: an auxiliary head.
        config: from the name of a model to what config.json has to say of it, if it says anything:
            tensors do not tell geometry. For ``huggingface`` it is also what export writes.
        twins: from the name of a model to the networks that have the same tensors in this layout
            and compute something else; we need not have them.
    """

    table: Callable[[str], Rules]
    preprocess: Preprocess | None = None
    ignore: tuple[str, ...] = ()
    config: Callable[[str], Config] = timm_config
    twins: Callable[[str], tuple[str, ...]] = lambda _: ()


class Difference(NamedTuple):
    """What keeps a file from filling a skeleton; empty when it fits.

    Attributes:
        missing: keys that the table has and the file lacks.
        leftover: keys that the file has and the table lacks.
        shapes: one line for each tensor of another shape.
    """

    missing: tuple[str, ...]
    leftover: tuple[str, ...]
    shapes: tuple[str, ...]

    def __str__(self) -> str:
        parts = (("missing", self.missing), ("left over", self.leftover), ("shape", self.shapes))
        return "; ".join(f"{len(items)} {what}: {few(items)}" for what, items in parts if items)


def few(items: Sequence[str], count: int = 3) -> str:
    """Return the first few of the names in a file, shortened, and how many more there are."""
    more = f", ... ({len(items) - count} more)" if len(items) > count else ""
    return ", ".join(f"{' '.join(item.split()):.60}" for item in items[:count]) + more


def counted(keys: Iterable[str], ignore: tuple[str, ...] = ()) -> Iterator[str]:
    """The keys that a table has to account for.

    Args:
        keys: of a file.
        ignore: beginnings of keys that a network does without.
    """
    return (key for key in keys if not key.endswith(NUM_BATCHES) and not key.startswith(ignore))


def compare(
    rules: Rules,
    arrays: Mapping[str, np.ndarray],
    skeleton: Variables,
    ignore: tuple[str, ...] = (),
) -> Difference:
    """What a file lacks, has too much or has in another shape, by its own keys.

    Args:
        rules: the table; it must cover the skeleton exactly.
        arrays: the file.
        skeleton: shapes of our variables.
        ignore: beginnings of keys that the network does without.
    """
    expected = flatten(skeleton)
    if expected.keys() != {rule.path for rule in rules}:
        wrong = sorted(expected.keys() ^ {rule.path for rule in rules})
        raise AssertionError(f"the table does not cover the network: {wrong}")
    keys = {rule.key for rule in rules}
    shapes = []
    for rule in rules:
        if rule.key in arrays:
            theirs, wanted = arrays[rule.key].shape, rule.expected(expected[rule.path].shape)
            if theirs != wanted:
                shapes.append(f"{rule.key} is {list(theirs)}, not {list(wanted)}")
    return Difference(
        tuple(rule.key for rule in rules if rule.key not in arrays),
        tuple(key for key in counted(arrays, ignore) if key not in keys),
        tuple(shapes),
    )


def own_rules(arrays: Mapping[str, Any], skeleton: Variables, misfit: str) -> Rules:
    """Return the table of tljax's own keys, which are paths.

    Args:
        arrays: by path.
        skeleton: shapes of the network's variables.
        misfit: what the error begins with.

    Raises:
        RequestError: the arrays do not fit the skeleton.
    """
    rules = tuple(Rule(path, path) for path in flatten(skeleton))
    difference = compare(rules, arrays, skeleton)
    if any(difference):
        raise RequestError(f"{misfit}: {difference}")
    return rules


def apply_rules(rules: Rules, arrays: Mapping[str, np.ndarray], skeleton: Variables) -> Variables:
    """Our variables, float32, from a file that fits (see `compare`).

    Args:
        rules: the table.
        arrays: the file.
        skeleton: shapes of our variables.

    Raises:
        RequestError: a tensor holds NaN or infinity, or a running variance is negative.
    """
    flat, expected = {}, flatten(skeleton)
    for rule in rules:
        key, path = rule.key, rule.path
        array = np.asarray(arrays[key], np.float32)
        if not np.isfinite(array).all():
            raise RequestError(f"{key} holds NaN or infinity; the file is damaged")
        if path.endswith("/var") and (array < 0).any():
            raise RequestError(
                f"{key} is a running variance and holds negative values; "
                "were running_mean and running_var swapped when the file was written?"
            )
        flat[path] = rule.to_ours(array, expected[path].shape)
    return {"params": {}, "batch_stats": {}, **unflatten(flat)}  # a network may have no batch norm


def invert_rules(rules: Rules, variables: Variables) -> dict[str, np.ndarray]:
    """The tensors of a foreign file from our variables: the inverse of `apply_rules`."""
    flat = flatten(variables)
    arrays: dict[str, np.ndarray] = {}
    for rule in rules:
        key = rule.key
        arrays[key] = rule.to_theirs(np.asarray(flat[rule.path]))
        if key.endswith("running_var"):
            arrays[key.removesuffix("running_var") + NUM_BATCHES] = np.zeros((), np.int64)
    return arrays
