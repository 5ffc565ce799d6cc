"""One mesh over all devices, the batch split along its ``data`` axis. Also on several hosts.

Several processes, one a host or a GPU, run the same program: `join` once at the start, and from
there on every function here means all of them together.
"""

import json
import os
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tljax.errors import RequestError

Tree = TypeVar("Tree")


def join() -> None:
    """Makes this process one of several; TPU pods and Slurm tell JAX by themselves who it is.

    Elsewhere the environment does: ``JAX_COORDINATOR_ADDRESS`` (``host:port`` of process 0),
    ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``. Before anything else touches a device.

    Raises:
        RequestError: nobody tells, or the others do not answer.
    """
    try:
        # JAX itself reads the address from the environment, and only that.
        count, number = (
            int(os.environ[name]) if name in os.environ else None
            for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        )
        jax.distributed.initialize(num_processes=count, process_id=number)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(
            f"--distributed: {reason} Outside TPU pods and Slurm, set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def is_writer() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def data_mesh(devices: int | None = None) -> Mesh:
    """A one-dimensional mesh named ``data``.

    Args:
        devices: how many to use; by default all, of every process.

    Raises:
        RequestError: there are not so many.
    """
    found = jax.devices()
    if devices is not None and not 1 <= devices <= len(found):
        raise RequestError(f"--devices {devices}: this machine has {len(found)}")
    if devices not in (None, len(found)) and jax.process_count() > 1:
        raise RequestError("--devices: several processes use all devices of all of them")
    return jax.make_mesh(
        (devices or len(found),), ("data",), axis_types=(AxisType.Auto,), devices=found[:devices]
    )


def divisible(batch_size: int, mesh: Mesh) -> int:
    """The batch size, rounded up to a multiple of the number of devices."""
    return -(-batch_size // mesh.size) * mesh.size


def shard(batch: Tree, mesh: Mesh) -> Tree:
    """Host arrays as global arrays, split along their first axis over the mesh.

    Each process gives its own rows; their number must divide by the number of its devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """The same values on every device of the mesh; every process must give the same.

    Fresh buffers, so that a step may be given them to keep.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.array(x)), tree
    )


def local_rows(x: jax.Array) -> np.ndarray:
    """What `shard` put onto this process's devices, on the host again."""
    shards = sorted(x.addressable_shards, key=lambda part: part.index[0].start or 0)
    return np.concatenate([np.asarray(part.data) for part in shards])


def gather(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes, one process after another; equally many of each."""
    if jax.process_count() == 1:
        return rows
    return np.asarray(multihost_utils.process_allgather(rows)).reshape(-1, *rows.shape[1:])


def agree(value: bool) -> bool:
    """What the writer says: for decisions that clocks make."""
    return bool(gather(np.array([value]))[0])


def gather_json(value: Any) -> list[Any]:
    """One JSON value of every process."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = gather(np.array([data.size], np.int32))
    everything = gather(np.pad(data, (0, int(lengths.max()) - data.size))[None])
    return [
        json.loads(row[:length].tobytes()) for row, length in zip(everything, lengths, strict=True)
    ]
