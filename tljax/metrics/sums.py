"""Means that merge exactly: a sum and a count of each, so that a ragged tail is what it is."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tljax.runtime.types import Array

Sums = dict[str, tuple[float, float]]
"""By name: the sum of a metric, and what to divide it by."""


class Weighted(NamedTuple):
    """A value an example, whose mean is ``sum(values) / sum(weights)``.

    Attributes:
        values: ``[batch]``, multiplied by their weights.
        weights: ``[batch]``; 0 where an example does not count.
    """

    values: Array
    weights: Array


def add_up(values: Array | Weighted, mask: Array) -> tuple[jax.Array, jax.Array]:
    """Sum what an objective returns over the examples that count.

    Args:
        values: ``[batch]``.
        mask: ``[batch]`` bool; the others count for nothing, whatever their value.
    """
    values, weights = values if isinstance(values, Weighted) else (values, jnp.ones(mask.shape))
    return jnp.where(mask, values, 0).sum(), jnp.where(mask, weights, 0).sum()


def merge(one: Sums, other: Sums) -> Sums:
    """Add the sums of two sets of examples; a name that only one has is kept."""
    found = dict(one)
    for name, (total, count) in other.items():
        before = found.get(name, (0.0, 0.0))
        found[name] = before[0] + total, before[1] + count
    return found


def means(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Divide each sum by its count; nan where nothing counted."""
    return {
        name: float(total) / float(count) if count else float("nan")
        for name, (total, count) in sums.items()
    }
