"""One mesh over all devices, the batch split along its ``data`` axis. Also on several hosts."""

from typing import TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tljax.errors import RequestError

Tree = TypeVar("Tree")


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
    """The same values on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
