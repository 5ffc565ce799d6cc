"""Features in the basis of their principal axes, on the devices that solve a probe.

There the Hessian of a linear probe is nearly diagonal, and known up to one number per class.
"""

import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, Int, Shaped

from tljax.features.lbfgs import HISTORY
from tljax.features.rows import Layout, Rows, StreamedRows, divide, layout, row_bytes
from tljax.features.share import Share, share_of
from tljax.runtime.errors import DivergenceError, RequestError
from tljax.runtime.free_memory import free_device_memory
from tljax.runtime.parallel import gather_json, replicate, sum_over_processes
from tljax.runtime.types import Array

ADVICE = "check the weights and the preprocessing of the network that computed them"

_CHUNK_BYTES = 2**27  # rows that the host looks at together


class Design(NamedTuple):
    """Standardized features, rotated to their principal axes.

    Attributes:
        rows: the rotated rows ``[n, r]`` where ``r = min(n, d)``: the optimum of an L2-penalized
            problem is in the span of the centered features.
        share: ``[m]`` which rows this process has.
        layout: how they are divided.
        spectrum: ``[r + 1]`` mean square of each column, and of the ones that the bias multiplies.
        rotation: ``[d, r]`` orthonormal columns.
        mean: ``[d]`` mean of the features.
        scale: ``[d]`` what features were divided by.
    """

    rows: Rows | StreamedRows
    share: Int[np.ndarray, " m"]
    layout: Layout
    spectrum: Float[np.ndarray, " r+1"]
    rotation: Float[np.ndarray, "d r"]
    mean: Float[np.ndarray, " d"]
    scale: Float[np.ndarray, " d"]

    def place(self, values: Shaped[np.ndarray, " n"], dtype: Any) -> jax.Array:
        """Divide values of all examples over the devices, as the rows are; 0 for padding."""
        return self.layout.place(values[self.share], dtype, 0)


def check_features(features: Shaped[Array, "n d"] | Share) -> Share:
    """Convert features to a matrix of float32, or of a narrower floating-point type as they are.

    Args:
        features: ``[n, d]``, the same in all processes, of which each keeps its share; or that.

    Raises:
        RequestError: they are not a matrix, or a value is not finite.
    """
    if not isinstance(features, Share):
        features = share_of(np.atleast_1d(features))
    shape, values = features.shape, features.values
    if len(shape) != 2 or not all(shape):
        raise RequestError(f"features must be [examples, dimensions], got {list(shape)}")
    if values.dtype.itemsize > 4 or not jnp.issubdtype(values.dtype, jnp.floating):
        values = np.asarray(values, np.float32)
    bad = sum(gather_json(sum(int((~np.isfinite(chunk)).sum()) for chunk in _chunks(values))))
    if bad:
        raise RequestError(f"{bad} of {math.prod(shape)} feature values are not finite: {ADVICE}")
    return features._replace(values=values)


def diverged(features: Share) -> DivergenceError:
    """Return the error for features that are too large to compute with."""
    chunks = _chunks(features.values)
    largest = max(gather_json(max((float(np.abs(chunk).max()) for chunk in chunks), default=0.0)))
    return DivergenceError(
        f"logistic regression diverged on features of up to {largest:.1e}: {ADVICE}"
    )


def make_design(features: Share, num_outputs: int, mesh: Mesh, *, standardize: bool) -> Design:
    """Put features on the devices, center and rotate them; the optional scale is that of a column.

    Where a device has too little memory for its rows, they are read again in every pass, in blocks.

    Args:
        features: ``[n, d]`` from `check_features`.
        num_outputs: number of outputs of the model, for the size of blocks.
        mesh: see `data_mesh`.
        standardize: divide each feature by its standard deviation, unless it is constant.

    Raises:
        DivergenceError: the values are too large to compute with.
    """
    source, share, count = features
    mean, scale = transform = moments(features, standardize=standardize)
    span = None
    if count < source.shape[1]:
        # Every process has all rows, because the rotation is as large.
        centered = (np.asarray(features.whole(), np.float32) - mean) / scale
        span = np.linalg.qr(centered.T)[0]
        source = centered[share] @ span
        transform = np.zeros(count, np.float32), np.ones(count, np.float32)
    blocks = layout(len(source), row_bytes(source.shape[1], num_outputs), mesh)
    rows = _hold(source, blocks, replicate(transform, mesh), num_outputs)
    second_moment = np.asarray(rows.sum(_second_moment, ())) / count
    if not np.isfinite(second_moment).all():
        raise diverged(features)
    # On the host: compiling an eigendecomposition for a TPU takes minutes. All processes use that
    # of the first one, since another CPU may round otherwise.
    rotation = np.linalg.eigh(second_moment)[1]
    if jax.process_count() > 1:
        rotation = np.asarray(multihost_utils.broadcast_one_to_all(rotation))
    rows = rows.rotated(rotation)
    spectrum = np.append(np.asarray(rows.sum(_squares, ())) / np.float32(count), np.float32(1))
    if span is not None:
        rotation = span @ rotation
    return Design(rows, share, blocks, spectrum, rotation, mean, scale)


def _hold(features, blocks, transform, num_outputs):
    """Put features on the devices, if there is memory for them and for a solver."""
    needed = solver_bytes(blocks, features.shape[1], num_outputs)
    free = min(gather_json(free_device_memory()))
    if needed <= free:
        padding = np.asarray(transform[0])
        return Rows(blocks.place(features, np.float32, padding), transform, blocks.mesh)
    print(
        f"probe  features are read in every pass: they would take {needed / 2**30:.1f} GiB of each "
        f"device, which has {free / 2**30:.1f} free",
        file=sys.stderr,
    )
    return StreamedRows(features, blocks, transform)


def probe_bytes(num_rows: int, dimensions: int, num_outputs: int, mesh: Mesh) -> int:
    """Compute the memory of each device that solves a probe with all of its rows on the devices.

    Args:
        num_rows: number of rows of all processes.
        dimensions: number of features.
        num_outputs: number of classes.
        mesh: see `data_mesh`.
    """
    return solver_bytes(*probe_layout(num_rows, dimensions, num_outputs, mesh), num_outputs)


def probe_layout(
    num_rows: int, dimensions: int, num_outputs: int, mesh: Mesh
) -> tuple[Layout, int]:
    """Return how rows are divided, and the number of columns that are left; see `probe_bytes`."""
    rank = min(num_rows, dimensions)
    per_device = -(-num_rows // mesh.size)
    return divide(per_device, row_bytes(rank, num_outputs), mesh), rank


def solver_bytes(blocks: Layout, rank: int, num_outputs: int) -> int:
    """Compute the memory of a device for rows, their labels and weights, a block, and L-BFGS."""
    rows = blocks.blocks * blocks.rows * 4 * (rank + 2)
    # A single block is used where it lies.
    block = blocks.rows * row_bytes(rank if blocks.blocks > 1 else 0, num_outputs)
    return rows + block + (2 * HISTORY + _VECTORS) * 4 * num_outputs * (rank + 1)


_VECTORS = 12  # besides the memory of L-BFGS, of the size of the parameters


def _chunks(features) -> Iterator[Float[np.ndarray, "rows d"]]:
    rows = max(1, _CHUNK_BYTES // (4 * features.shape[1]))
    for start in range(0, len(features), rows):
        yield np.asarray(features[start : start + rows], np.float32)


def moments(
    features: Share, *, standardize: bool
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """Return the mean and the standard deviation of each column, over all processes.

    The standard deviation of a constant, or of all columns without ``standardize``, is given as 1.
    """
    values, _, count = features
    totals = np.zeros(values.shape[1])
    for chunk in _chunks(values):
        totals += chunk.sum(0, dtype=np.float64)
    mean = (sum_over_processes(totals) / count).astype(np.float32)
    scale = np.ones_like(mean)
    if standardize:
        # In float64, so that no square overflows.
        squares = np.zeros(values.shape[1])
        for chunk in _chunks(values):
            centered = chunk - mean
            squares += np.einsum("nd,nd->d", centered, centered, dtype=np.float64)
        scale = np.sqrt(sum_over_processes(squares) / count).astype(np.float32)
        # A spread within float32's rounding of the values is noise, which dividing would amplify.
        scale[scale <= 4 * np.finfo(np.float32).eps * np.abs(mean)] = 1
    return mean, scale


def _second_moment(features):
    return features.T @ features


def _squares(features):
    return jnp.sum(features**2, 0)
