"""Array and function types of attacks."""

from collections.abc import Callable

import jax
from jaxtyping import Float, Integer

from tljax.runtime.types import Array

Images = Float[Array, "batch ..."]
"""Floating point images within the bounds, usually ``[batch, height, width, 3]`` in [0, 1]."""

DeviceImages = Float[jax.Array, "batch ..."]
"""`Images` as a JAX array."""

Labels = Integer[Array, " batch"]

LabelMatrix = Float[Array, "batch labels"]
"""For networks with several labels per image: 1 where a label applies, 0 where it does not, NaN
where that is unknown."""

PerExample = float | Float[Array, ""] | Float[Array, " batch"]
"""One number for all examples, or one per example."""

Values = Float[jax.Array, " batch"]

Bounds = tuple[float, float]
"""Smallest and largest value of a pixel."""

LogitsFn = Callable[[jax.Array], jax.Array]
"""Maps images ``[batch, ...]`` to logits ``[batch, classes]``.

A randomized network returns ``[samples, batch, classes]`` (see `tljax.attack.eot.eot`); losses and
logits are averaged over the samples.

The variables of ``jax.tree_util.Partial(function, variables)`` are arguments of the compiled
program: they are not copied into it, and new values do not trigger compilation.
"""
