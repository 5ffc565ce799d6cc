"""Tables between the keys of a foreign weight file and the paths of our variables, both ways.

A table lists every tensor of a network once: its key in the file, its path here, and the
permutation of axes between them. So a table is a bijection, and the same one imports and exports.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tljax.errors import RequestError
from tljax.trees import flatten, unflatten
from tljax.types import Variables

CONV = (2, 3, 1, 0)
"""From torch's ``[out, in, k, k]`` to our ``[k, k, in, out]``; depthwise kernels likewise."""

DENSE = (1, 0)
"""From torch's ``[out, in]`` to our ``[in, out]``."""

NUM_BATCHES = "num_batches_tracked"
"""Torch's batch norm counts its steps. We have no use for that: ignored here, zero on export."""


class Rule(NamedTuple):
    """One tensor: ``ours = theirs.transpose(axes)``.

    Attributes:
        key: in the foreign file.
        path: in our variables, joined by slashes: ``params/layer1/block0/conv1/kernel``.
        axes: the permutation; empty for none.
    """

    key: str
    path: str
    axes: tuple[int, ...] = ()


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


def dense(key: str, path: str) -> Rules:
    """The two tensors of a torch linear layer."""
    return (
        Rule(f"{key}.weight", f"params/{path}/kernel", DENSE),
        Rule(f"{key}.bias", f"params/{path}/bias"),
    )


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
        return "; ".join(f"{len(items)} {what}: {_few(items)}" for what, items in parts if items)


def _few(items: tuple[str, ...], count: int = 4) -> str:
    more = f", ... ({len(items) - count} more)" if len(items) > count else ""
    return ", ".join(items[:count]) + more


def compare(rules: Rules, arrays: Mapping[str, np.ndarray], skeleton: Variables) -> Difference:
    """What a file lacks, has too much or has in another shape, by its own keys.

    Args:
        rules: the table; it must cover the skeleton exactly.
        arrays: the file.
        skeleton: shapes of our variables.
    """
    expected = flatten(skeleton)
    if expected.keys() != {rule.path for rule in rules}:
        wrong = sorted(expected.keys() ^ {rule.path for rule in rules})
        raise AssertionError(f"the table does not cover the network: {wrong}")
    keys = {rule.key for rule in rules}
    shapes = []
    for key, path, axes in rules:
        if key in arrays:
            theirs = arrays[key].shape
            ours = expected[path].shape
            wanted = tuple(np.array(ours)[np.argsort(axes)].tolist()) if axes else ours
            if theirs != wanted:
                shapes.append(f"{key} is {list(theirs)}, not {list(wanted)}")
    return Difference(
        tuple(rule.key for rule in rules if rule.key not in arrays),
        tuple(key for key in arrays if key not in keys and not key.endswith(NUM_BATCHES)),
        tuple(shapes),
    )


def apply_rules(rules: Rules, arrays: Mapping[str, np.ndarray]) -> Variables:
    """Our variables, float32, from a file that fits (see `compare`).

    Raises:
        RequestError: a tensor holds NaN or infinity, or a running variance is negative.
    """
    flat = {}
    for key, path, axes in rules:
        array = np.asarray(arrays[key], np.float32)
        if not np.isfinite(array).all():
            raise RequestError(f"{key} holds NaN or infinity; the file is damaged")
        if path.endswith("/var") and (array < 0).any():
            raise RequestError(
                f"{key} is a running variance and holds negative values; "
                "were running_mean and running_var swapped when the file was written?"
            )
        flat[path] = np.ascontiguousarray(array.transpose(axes)) if axes else array
    return unflatten(flat)


def invert_rules(rules: Rules, variables: Variables) -> dict[str, np.ndarray]:
    """The tensors of a foreign file from our variables: the inverse of `apply_rules`."""
    flat = flatten(variables)
    arrays: dict[str, np.ndarray] = {}
    for key, path, axes in rules:
        array = np.asarray(flat[path])
        arrays[key] = np.ascontiguousarray(array.transpose(np.argsort(axes))) if axes else array
        if key.endswith("running_var"):
            arrays[key.removesuffix("running_var") + NUM_BATCHES] = np.zeros((), np.int64)
    return arrays
