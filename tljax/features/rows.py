"""Rows of features in blocks, sharded over the devices, and sums over all of them.

Every product with the features is a sum over blocks of rows: `Rows` holds them on the devices, and
`StreamedRows` reads them again for every sum, where the devices have not enough memory. Each
process holds or reads only its own rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped

from tljax.runtime.parallel import gather_json

Transform = tuple[Float[jax.Array, "..."], ...]
"""Mean and scale ``[d]`` to standardize rows with, then a rotation ``[d, r]``; or a part of it."""

BLOCK_BYTES = 2**28  # temporary memory of one block
_TILE = 8  # rows of a block are a multiple of it, because devices pad arrays to tiles


class Layout(NamedTuple):
    """How rows are divided: each device has ``blocks`` blocks of ``rows`` rows, padded.

    Attributes:
        mesh: see `data_mesh`.
        blocks: number of blocks on one device.
        rows: number of rows in a block.
    """

    mesh: Mesh
    blocks: int
    rows: int

    def place(
        self, values: Shaped[np.ndarray, "n ..."], dtype: Any, padding: ArrayLike
    ) -> Shaped[jax.Array, "devices blocks rows ..."]:
        """Divide rows of this process over its devices; only those that need padding are copied.

        Args:
            values: ``[n, ...]`` the rows of this process.
            dtype: dtype on the devices.
            padding: value of a row that pads the others.
        """
        return self._put(values, 0, self.blocks, dtype, padding)

    def place_block(
        self, values: Shaped[np.ndarray, "n ..."], block: int, padding: ArrayLike
    ) -> Shaped[jax.Array, "devices 1 rows ..."]:
        """Place one block of every device, as `place` does all of them."""
        return self._put(values, block, 1, values.dtype, padding)

    def _put(self, values, first, blocks, dtype, padding):
        size = blocks * self.rows

        def part(device: int) -> np.ndarray:
            start = (device * self.blocks + first) * self.rows
            rows = np.asarray(values[start : start + size], dtype)
            if len(rows) < size:
                pad = np.broadcast_to(padding, (size - len(rows), *rows.shape[1:]))
                rows = np.concatenate([rows, pad.astype(dtype)])
            return rows.reshape(1, blocks, self.rows, *rows.shape[1:])

        return jax.make_array_from_single_device_arrays(
            (self.mesh.size, blocks, self.rows, *values.shape[1:]),
            NamedSharding(self.mesh, PartitionSpec("data")),
            [jax.device_put(part(i), device) for i, device in enumerate(self.mesh.local_devices)],
        )


def row_bytes(dimensions: int, outputs: int) -> int:
    """Return the temporary memory of one row: its features, and two arrays and a mask of outputs.

    XLA fuses the rest of `logistic._terms`.
    """
    return 4 * dimensions + 9 * outputs


def layout(num_rows: int, row_bytes: int, mesh: Mesh) -> Layout:
    """Choose equal blocks for the rows of all processes.

    Args:
        num_rows: number of rows of this process.
        row_bytes: temporary memory of a row in a block.
        mesh: see `data_mesh`.
    """
    return divide(rows_per_device(num_rows, mesh), row_bytes, mesh)


def rows_per_device(num_rows: int, mesh: Mesh) -> int:
    """Return how many rows a device holds at most, from the number of rows of each process."""
    return math.ceil(max(gather_json(num_rows)) / len(mesh.local_devices))


def divide(per_device: int, row_bytes: int, mesh: Mesh) -> Layout:
    """Choose equal blocks for a number of rows on each device; see `layout`."""
    blocks = math.ceil(per_device * row_bytes / BLOCK_BYTES)
    rows = math.ceil(per_device / blocks)
    return Layout(mesh, blocks, math.ceil(rows / _TILE) * _TILE)


@partial(
    jax.tree_util.register_dataclass, data_fields=["features", "transform"], meta_fields=["mesh"]
)
@dataclass(frozen=True)
class Rows:
    """Rows of features on the devices.

    Attributes:
        features: ``[devices, blocks, rows, d]`` sharded along the first axis.
        transform: applied to a block when it is used; empty if it was applied in place.
        mesh: see `data_mesh`.
    """

    features: Float[jax.Array, "devices blocks rows d"] | jax.ShapeDtypeStruct
    transform: Transform
    mesh: Mesh

    def sum(self, terms: Callable[..., Any], examples: tuple[Any, ...], *shared: Any) -> Any:
        """Sum a function over all blocks of all devices.

        Args:
            terms: maps the features ``[rows, r]`` of a block, the same rows of each of
                ``examples``, and ``shared`` to a tree of arrays. It is a function at the top level
                of a module, so that it is compiled once.
            examples: arrays ``[devices, blocks, rows, ...]`` from `Layout.place`.
            shared: further arguments, replicated.
        """
        return _sum(terms, self, examples, shared)

    def rotated(self, rotation: Float[np.ndarray, "d d"]) -> "Rows":
        """Apply the transform and a rotation in the place of the features, which are used up."""
        transform = *self.transform, rotation
        return Rows(_transform_in_place(self.features, transform, self.mesh), (), self.mesh)


@partial(jax.jit, static_argnums=0)
def _sum(terms, rows, examples, shared):
    def on_device(features, transform, examples, shared):
        def of_block(features, *examples):
            return terms(_transformed(features, transform), *examples, *shared)

        def add(sums, block):
            return jax.tree.map(jnp.add, sums, of_block(*block)), None

        blocks = features[0], *(values[0] for values in examples)
        if len(features[0]) == 1:
            sums = of_block(*(values[0] for values in blocks))
        else:
            first = jax.eval_shape(of_block, *(values[0] for values in blocks))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
            sums = jax.lax.scan(add, zeros, blocks)[0]
        return jax.lax.psum(sums, "data")

    data, everywhere = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(
        on_device, mesh=rows.mesh, in_specs=(data, everywhere, data, everywhere),
        out_specs=everywhere, check_vma=False,
    )(rows.features, rows.transform, examples, shared)  # fmt: skip


@partial(jax.jit, static_argnums=2, donate_argnums=0)
def _transform_in_place(features, transform, mesh):
    def on_device(features, transform):
        def write(block, features):
            return features.at[0, block].set(_transformed(features[0, block], transform))

        return jax.lax.fori_loop(0, features.shape[1], write, features)

    data, everywhere = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(data, everywhere), out_specs=data, check_vma=False
    )(features, transform)


def _transformed(block: Shaped[jax.Array, "rows d"], transform: Transform) -> jax.Array:
    if not transform:
        return block
    mean, scale, *rotation = transform
    block = (block.astype(jnp.float32) - mean) / scale
    return block @ rotation[0] if rotation else block


@dataclass(frozen=True)
class StreamedRows:
    """Rows of features that stay on the host, or in a memory-mapped file.

    Attributes:
        features: ``[n, d]`` the rows of this process.
        layout: how they are divided.
        transform: applied to every block on the devices.
    """

    features: Shaped[np.ndarray, "n d"]
    layout: Layout
    transform: Transform

    def sum(self, terms: Callable[..., Any], examples: tuple[Any, ...], *shared: Any) -> Any:
        """Sum a function over all blocks, as `Rows.sum` does, reading the features once."""
        sums = None
        for block in range(self.layout.blocks):
            features = self.layout.place_block(self.features, block, self.transform[0])
            rows = Rows(features, self.transform, self.layout.mesh)
            before, sums = sums, _add_block(terms, sums, rows, block, examples, shared)
            jax.block_until_ready(before)  # at most one block is computed and one waits
        return sums

    @property
    def mesh(self) -> Mesh:
        """Return the mesh of the devices."""
        return self.layout.mesh

    def rotated(self, rotation: Float[np.ndarray, "d d"]) -> "StreamedRows":
        """Rotate every block when it is read."""
        return replace(self, transform=(*self.transform, rotation))


@partial(jax.jit, static_argnums=0)
def _add_block(terms, sums, rows, block, examples, shared):
    examples = tuple(jax.lax.dynamic_slice_in_dim(values, block, 1, axis=1) for values in examples)
    more = rows.sum(terms, examples, *shared)
    return more if sums is None else jax.tree.map(jnp.add, sums, more)
