"""Metrics as (sum, count) pairs, whose means over batches, devices and hosts are exact."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from tljax.runtime.types import Array

Sums = dict[str, tuple[float, float]]
"""The sum of each metric and the count to divide it by, by name."""


class Weighted(NamedTuple):
    """Per-example values with weights; their mean is ``sum(values) / sum(weights)``.

    Attributes:
        values: ``[batch]``, already multiplied by the weights.
        weights: ``[batch]``; 0 excludes an example.
    """

    values: Float[Array, " batch"]
    weights: Float[Array, " batch"]


def masked_sum(
    values: Float[Array, " batch"] | Weighted, mask: Bool[Array, " batch"]
) -> tuple[jax.Array, jax.Array]:
    """Sum per-example values and their weights over the examples of the mask.

    Args:
        values: ``[batch]``; unweighted values have weight 1.
        mask: ``[batch]`` bool; False excludes an example, even if its value is not finite.

    Returns:
        The sum of the values and the sum of the weights.
    """
    values, weights = values if isinstance(values, Weighted) else (values, jnp.ones(mask.shape))
    return jnp.where(mask, values, 0).sum(), jnp.where(mask, weights, 0).sum()


def merge(first: Sums, second: Sums) -> Sums:
    """Add the sums and counts of two sets of examples; keep names that only one of them has."""
    zero = (0.0, 0.0)
    pairs = {name: (first.get(name, zero), second.get(name, zero)) for name in first | second}
    return {name: (a[0] + b[0], a[1] + b[1]) for name, (a, b) in pairs.items()}


def means(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Divide each sum by its count; return NaN where the count is 0."""
    return {
        name: float(total) / float(count) if count else float("nan")
        for name, (total, count) in sums.items()
    }
