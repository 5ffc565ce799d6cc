"""Multi-head attention, the MLP that follows it, and rotary positions (see `vit.py`)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float

from tljax.models.layers import Activation, Dense, LayerNorm

Tokens = Float[jax.Array, "batch tokens channels"]
Heads = Float[jax.Array, "batch tokens heads width"]

ROPE_PERIOD = 100.0
"""Base of the wavelengths of rotary positions in DINOv3."""


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762).

    Attributes:
        heads: number of heads.
        key_bias: whether the keys have a bias. It changes no output, so DINOv3 has none.
        qk_norm: epsilon of layer norms of the queries and keys of each head (Dehghani et al. 2023,
            arXiv 2302.05442); None for no norms.
    """

    heads: int
    key_bias: bool = True
    qk_norm: float | None = None

    @nn.compact
    def __call__(
        self, x: Tokens, context: Tokens | None = None, grid: tuple[int, int] | None = None
    ) -> Tokens:
        """Map ``[b, t, c]`` to ``[b, t, c]``.

        Args:
            x: tokens that ask.
            context: tokens that are attended to; by default ``x``.
            grid: rows and columns of the last tokens of ``x``, to rotate their queries and keys by
                position; by default they have no position.
        """
        context, width = x if context is None else context, x.shape[-1]
        query = self._split(Dense(width, name="query")(x))
        key = self._split(Dense(width, use_bias=self.key_bias, name="key")(context))
        value = self._split(Dense(width, name="value")(context))
        if self.qk_norm is not None:
            query = LayerNorm(self.qk_norm, name="query_norm")(query)
            key = LayerNorm(self.qk_norm, name="key_norm")(key)
        if grid is not None:
            query, key = rotate(query, grid), rotate(key, grid)
        # The default implementation is XLA's, with the softmax in float32. cuDNN's has a custom
        # gradient without forward mode, which `lax.platform_dependent` would take away on every
        # platform.
        y = jax.nn.dot_product_attention(query, key, value)
        return Dense(width, name="out")(y.reshape(x.shape))

    def _split(self, x: Tokens) -> Heads:
        return x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)


class Mlp(nn.Module):
    """Two dense layers; ``gated``, the first one is multiplied by a gate (Shazeer 2020).

    arXiv 2002.05202. The activation is then that of the gate.
    """

    features: int
    activation: Activation
    gated: bool = False

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        """Map ``[b, t, c]`` to ``[b, t, c]``."""
        y = Dense(self.features, name="fc1")(x)
        if self.gated:
            y = self.activation(Dense(self.features, name="gate")(x)) * y
        else:
            y = self.activation(y)
        return Dense(x.shape[-1], name="fc2")(y)


def rotate(x: Heads, grid: tuple[int, int]) -> Heads:
    """Rotate pairs of channels of the last tokens by angles that grow with row and column.

    Rotary positions (Su et al. 2021, arXiv 2104.09864) as DINOv3 has them (Siméoni et al. 2025,
    arXiv 2508.10104): positions are centers of patches, from -1 to 1 in both directions whatever
    the size of the image; the first half of the angles belongs to the row, the second to the
    column; channel i is paired with i + width / 2.

    Args:
        x: ``[b, tokens, heads, width]``; the width is a multiple of 4. The tokens before those of
            the grid remain as they are.
        grid: rows and columns of the last tokens.
    """
    rows, columns = ((2 * np.arange(side) + 1) / side - 1 for side in grid)
    frequencies = 2 * np.pi * ROPE_PERIOD ** -np.arange(0, 1, 4 / x.shape[-1])
    angles = np.concatenate(
        (
            np.repeat(rows, grid[1])[:, None] * frequencies,
            np.tile(columns, grid[0])[:, None] * frequencies,
        ),
        axis=1,
    )[:, None]
    prefix, patches = jnp.split(x, [x.shape[1] - len(angles)], axis=1)
    first, second = jnp.split(patches.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    cos, sin = (jnp.asarray(f(angles), first.dtype) for f in (np.cos, np.sin))
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return jnp.concatenate((prefix, turned.astype(x.dtype)), axis=1)
