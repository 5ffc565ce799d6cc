"""Key tables between weight files of other projects and the variables of tljax, in both directions.

A table lists every tensor of a network once: its key in the source file, its path in tljax, and the
permutation of axes between the two. It can be inverted, so one table serves import and export.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.trees import flatten, unflatten
from tljax.runtime.types import Variables

CONV = (2, 3, 1, 0)
"""Axes from torch's ``[out, in, k, k]`` to ``[k, k, in, out]``; the same for depthwise kernels."""

DENSE = (1, 0)
"""Axes from torch's ``[out, in]`` to ``[in, out]``."""

NUM_BATCHES = "num_batches_tracked"
"""Key of the step counter in torch's batch norm: ignored by import, zero in export."""


class Rule(NamedTuple):
    """One tensor: ``tensor = source.reshape(view).transpose(axes)``, reshaped to tljax's shape.

    Most tensors differ only in the order of their axes. ``shape`` and ``view`` serve the others: a
    linear layer that reads a flattened feature map, or is stored as a 1x1 convolution. ``part``
    serves a source that stores several tensors in one, such as query, key and value.

    Attributes:
        key: key in the source file.
        path: path in tljax's variables: ``params/layer1/block0/conv1/kernel``.
        axes: permutation of the source's axes; empty for none.
        shape: shape in the source, unless it is a permutation of tljax's; -1 stands for the number
            of classes.
        view: shape of the source before the permutation, if it is another one; -1 as above.
        part: index and number of the equal parts into which the source is split along its first
            axis. There is a rule for each part, in order; shape, view and axes are those of a part.
    """

    key: str
    path: str
    axes: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    view: tuple[int, ...] = ()
    part: tuple[int, int] = (0, 1)

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in the source file, given the shape in tljax."""
        shape, parts = self._part_shape(shape), self.part[1]
        return (shape[0] * parts, *shape[1:]) if parts > 1 else shape

    def _part_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.shape:
            return _fill_in(self.shape, math.prod(shape))
        return tuple(shape[i] for i in np.argsort(self.axes)) if self.axes else shape

    def from_source(self, source: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Convert a tensor of the source file to the given shape in tljax, contiguous."""
        index, parts = self.part
        tensor = np.split(source, parts)[index] if parts > 1 else source
        tensor = tensor.reshape(self.view) if self.view else tensor
        tensor = tensor.transpose(self.axes) if self.axes else tensor
        return np.ascontiguousarray(tensor).reshape(shape)

    def to_source(self, tensor: np.ndarray) -> np.ndarray:
        """Convert a tensor of tljax to a part of the source, contiguous: inverts `from_source`."""
        shape = self._part_shape(tensor.shape)
        view = _fill_in(self.view, tensor.size) if self.view else shape
        axes = self.axes or tuple(range(len(view)))
        source = tensor.reshape([view[i] for i in axes]).transpose(np.argsort(axes))
        return np.ascontiguousarray(source).reshape(shape)


def _fill_in(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Replace the -1 of a shape so that it has ``size`` elements."""
    rest = size // math.prod(side for side in shape if side != -1)
    return tuple(rest if side == -1 else side for side in shape)


Rules = tuple[Rule, ...]
"""A key table."""


def conv_norm(conv: str, norm: str, path: str) -> Rules:
    """Return the rules of a torch convolution without bias and the batch norm that follows it.

    Args:
        conv: prefix of the convolution's keys in the source file.
        norm: prefix of the batch norm's keys.
        path: path of the layer in tljax, e.g. ``layer1/block0/conv1``.
    """
    return (
        Rule(f"{conv}.weight", f"params/{path}/kernel", CONV),
        Rule(f"{norm}.weight", f"params/{path}/scale"),
        Rule(f"{norm}.bias", f"params/{path}/bias"),
        Rule(f"{norm}.running_mean", f"batch_stats/{path}/mean"),
        Rule(f"{norm}.running_var", f"batch_stats/{path}/var"),
    )


def conv(key: str, path: str) -> Rules:
    """Return the rules of a torch convolution with a bias and without a norm."""
    return _with_bias(key, path, CONV)


def dense(key: str, path: str) -> Rules:
    """Return the rules of a torch linear layer."""
    return _with_bias(key, path, DENSE)


def _with_bias(key: str, path: str, axes: tuple[int, ...]) -> Rules:
    return (
        Rule(f"{key}.weight", f"params/{path}/kernel", axes),
        Rule(f"{key}.bias", f"params/{path}/bias"),
    )


Config = dict[str, Any]
"""Settings of an architecture in the config.json beside the weights."""


def timm_config(name: str) -> Config:
    """Return the settings that timm writes for a network with the same name in tljax."""
    return {"architecture": name}


Arguments = Mapping[str, tuple[object, ...]]
"""Arguments of a constructor, and the values that tljax supports."""

RELU: Arguments = {"act_layer": ("relu",)}


class Layout(NamedTuple):
    """The way one project stores a network.

    Attributes:
        table: function from the name of a model to its key table.
        preprocess: default preprocessing of weights in this layout, if it is not the model's.
        ignore: prefixes of optional keys that import drops, such as an auxiliary head's.
        config: function from the name of a model to the settings that its config.json must agree
            with: tensors do not determine the geometry. A tuple holds alternatives. Export writes
            those of ``huggingface``, the first of alternatives.
        twins: function from the name of a model to the networks that have the same tensors in this
            layout but compute something else; tljax may not have them.
        drop: prefixes of the keys of other networks in the same file, such as a text tower, which
            import drops with a note.
        optional: endings of the keys that a file may lack, which then stand for zeros.
        arguments: function from the name of a model to the arguments of timm's constructor that
            give this network, with their values, beside those that all networks have.
        rename: function from the tensors of a file of any version of this layout to those that the
            key table names; it leaves other files as they are.
        resize_positions: function from the name of a model and the learned positions of a file to
            positions for the grid of the model; None if they fit no square grid.
    """

    table: Callable[[str], Rules]
    preprocess: Preprocess | None = None
    ignore: tuple[str, ...] = ()
    config: Callable[[str], Config] = timm_config
    twins: Callable[[str], tuple[str, ...]] = lambda _: ()
    drop: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    arguments: Callable[[str], Arguments] = lambda _: RELU
    rename: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] | None = None
    resize_positions: Callable[[str, np.ndarray], np.ndarray | None] | None = None


class Difference(NamedTuple):
    """Differences between a file and a network; all empty if the file fits.

    Attributes:
        missing: keys of the table that the file lacks.
        leftover: keys of the file that the table lacks.
        shapes: one line for each tensor of another shape.
    """

    missing: tuple[str, ...]
    leftover: tuple[str, ...]
    shapes: tuple[str, ...]

    def __str__(self) -> str:
        parts = (("missing", self.missing), ("left over", self.leftover), ("shape", self.shapes))
        return "; ".join(
            f"{len(items)} {name}: {shorten_list(items)}" for name, items in parts if items
        )


def shorten_list(items: Sequence[str], count: int = 3) -> str:
    """Return the first few of the names in a file, shortened, and the number of the others."""
    more = f", ... ({len(items) - count} more)" if len(items) > count else ""
    return ", ".join(f"{' '.join(item.split()):.60}" for item in items[:count]) + more


def required_keys(keys: Iterable[str], ignore: tuple[str, ...] = ()) -> Iterator[str]:
    """Return the keys of a file that a table must contain.

    Args:
        keys: keys of the file.
        ignore: prefixes of keys that the network does not need.
    """
    return (key for key in keys if not key.endswith(NUM_BATCHES) and not key.startswith(ignore))


def compare(
    rules: Rules,
    arrays: Mapping[str, np.ndarray],
    skeleton: Variables,
    ignore: tuple[str, ...] = (),
) -> Difference:
    """Compare the keys and shapes of a file with those of a network.

    Args:
        rules: key table, with exactly one rule for each variable of the skeleton.
        arrays: tensors of the file by key.
        skeleton: shapes of the network's variables.
        ignore: prefixes of keys that the network does not need.
    """
    expected = flatten(skeleton)
    if wrong := sorted(expected.keys() ^ {rule.path for rule in rules}):
        raise AssertionError(f"the table does not cover the network: {wrong}")
    keys = {rule.key for rule in rules}
    shapes = []
    for rule in rules:
        if rule.key in arrays:
            shape, needed = arrays[rule.key].shape, rule.source_shape(expected[rule.path].shape)
            if shape != needed:
                shapes.append(f"{rule.key} is {list(shape)}, not {list(needed)}")
    return Difference(
        tuple(dict.fromkeys(rule.key for rule in rules if rule.key not in arrays)),
        tuple(key for key in required_keys(arrays, ignore) if key not in keys),
        tuple(dict.fromkeys(shapes)),
    )


def native_rules(arrays: Mapping[str, Any], skeleton: Variables, misfit: str) -> Rules:
    """Return the table of tljax's own format, whose keys are paths, after comparing the shapes.

    Args:
        arrays: tensors by path.
        skeleton: shapes of the network's variables.
        misfit: beginning of the error message.

    Raises:
        RequestError: the arrays do not fit the skeleton.
    """
    rules = tuple(Rule(path, path) for path in flatten(skeleton))
    difference = compare(rules, arrays, skeleton)
    if any(difference):
        raise RequestError(f"{misfit}: {difference}")
    return rules


def apply_rules(
    rules: Rules, arrays: Mapping[str, np.ndarray], skeleton: Variables, where: str = "the file"
) -> Variables:
    """Convert the tensors of a file to tljax's variables, float32.

    Args:
        rules: key table.
        arrays: tensors of a file that fits (see `compare`), by key.
        skeleton: shapes of the network's variables.
        where: name of the file, for error messages.

    Raises:
        RequestError: a tensor holds NaN or infinity, or a running variance is negative.
    """
    flat, expected = {}, flatten(skeleton)
    for rule in rules:
        key, path = rule.key, rule.path
        array = np.asarray(arrays[key], np.float32)
        if not np.isfinite(array).all():
            raise RequestError(f"{where}: {key} holds NaN or infinity; the file is damaged")
        if path.endswith("/var") and (array < 0).any():
            raise RequestError(
                f"{where}: {key} is a running variance and holds negative values; "
                "were running_mean and running_var swapped when the file was written?"
            )
        flat[path] = rule.from_source(array, expected[path].shape)
    return {"params": {}, "batch_stats": {}, **unflatten(flat)}  # a network may have no batch norm


def invert_rules(rules: Rules, variables: Variables) -> dict[str, np.ndarray]:
    """Convert tljax's variables to the tensors of a file by key: inverts `apply_rules`."""
    flat = flatten(variables)
    arrays: dict[str, np.ndarray] = {}
    for rule in rules:
        key, array = rule.key, rule.to_source(np.asarray(flat[rule.path]))
        arrays[key] = np.concatenate((arrays[key], array)) if key in arrays else array
        if key.endswith("running_var"):
            arrays[key.removesuffix("running_var") + NUM_BATCHES] = np.zeros((), np.int64)
    return arrays
