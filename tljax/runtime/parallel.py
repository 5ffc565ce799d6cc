"""Data parallelism over all devices of one or several processes.

One mesh contains all devices, and batches are sharded along its ``data`` axis. With several
processes (one per host or GPU), all run the same program: each calls `join` once at the start, and
later all of them call the functions of this module together.
"""

import atexit
import ctypes
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from threading import Event, Thread
from typing import Any, NoReturn, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tljax.runtime.errors import RequestError, StoppedError, first_line

Tree = TypeVar("Tree")


def join() -> None:
    """Initialize `jax.distributed`; call it before anything uses a device.

    JAX detects the coordinator on TPU pods and under Slurm. Elsewhere set the environment variables
    ``JAX_COORDINATOR_ADDRESS`` (``host:port`` of process 0), ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``.

    Raises:
        RequestError: the coordinator is unknown, or the other processes do not connect.
    """
    try:
        # Of these variables JAX itself reads only the address.
        num_processes, process_id = (
            int(os.environ[name]) if name in os.environ else None
            for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        )
        jax.distributed.initialize(num_processes=num_processes, process_id=process_id)
    except (RuntimeError, ValueError) as error:
        raise RequestError(
            f"--distributed: {first_line(error)} Outside TPU pods and Slurm, set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error
    # JAX now handles SIGTERM, for its preemption service, and Python does not know of it: keep that
    # handler for `Preemption.deferred`, and put the handler of Python back.
    if handler := _set_signal(signal.SIGTERM, None):
        _OF_JAX.append(handler)
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    ending = Event()
    following = Thread(target=_follow, args=(_client(), ending), daemon=True)
    following.start()
    atexit.register(_end, following, ending)


def exit_all_processes(message: str, code: int) -> NoReturn:
    """Exit all processes; without this one the others would wait forever.

    Args:
        message: error message that the other processes print; this process has printed it.
        code: exit code of all processes.
    """
    if jax.process_count() == 1:
        sys.exit(code)
    client = _client()
    with suppress(RuntimeError):  # another process has set it already
        client.key_value_set(_EXIT_KEY, json.dumps((jax.process_index(), message, code)))
    _exit_together(client, code)


def _client() -> Any:
    """Return the client of JAX's coordination service."""
    import orbax.checkpoint as ocp  # noqa: PLC0415 - half a second, which a single process saves

    return ocp.multihost.get_jax_distributed_client()


def _end(following: Thread, ending: Event) -> None:
    """Wait for the other processes, following them, before Python's exit, which the thread breaks.

    Python ends a thread that returns from the client then by aborting the process.
    """
    with suppress(RuntimeError):  # another process is dead
        jax.distributed.shutdown()
    ending.set()
    following.join()


def _follow(client: Any, ending: Event) -> None:
    """Check every second whether another process called `exit_all_processes`, and exit if so."""
    while not ending.wait(_POLL_SECONDS):
        with suppress(RuntimeError):  # the key is not set
            process_id, message, code = json.loads(client.key_value_try_get(_EXIT_KEY))
            if process_id != jax.process_index():
                print(f"error: process {process_id}: {message}", file=sys.stderr)
                _exit_together(client, code)


def _exit_together(client: Any, code: int) -> NoReturn:
    try:
        client.wait_at_barrier(_EXIT_KEY, 20_000)
    except RuntimeError:  # a process has died
        if is_main_process():
            time.sleep(_LAST_WORDS)
    sys.stdout.flush()
    os._exit(code)


_POLL_SECONDS = 1.0
_LAST_WORDS = 5.0  # seconds in which the others end, before JAX aborts them for want of process 0
_EXIT_KEY = "tljax/left"


def is_main_process() -> bool:
    """Return True in process 0, the only one that writes files."""
    return jax.process_index() == 0


def data_mesh(devices: int | None = None) -> Mesh:
    """Create a one-dimensional mesh with the axis ``data``.

    Args:
        devices: number of devices to use; by default all devices of all processes.

    Raises:
        RequestError: there are fewer devices, or there are several processes, which must use all.
    """
    available = jax.devices()
    if devices is not None and not 1 <= devices <= len(available):
        raise RequestError(f"--devices {devices}: this machine has {len(available)}")
    if devices not in (None, len(available)) and jax.process_count() > 1:
        raise RequestError(f"--devices {devices}: several processes must use all {len(available)}")
    return mesh_of(available[:devices])


def mesh_of(devices: Sequence[Any]) -> Mesh:
    """Create the mesh of `data_mesh` of given devices, those of `tljax.runtime.machines` too.

    They are in the order of their processes, so that the rows of a process follow each other, as in
    `gather`. `jax.make_mesh` orders them otherwise, and takes none of several slices.
    """
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered), ("data",), axis_types=(AxisType.Auto,))


def round_up_to_devices(batch_size: int, mesh: Mesh) -> int:
    """Return the batch size rounded up to a multiple of the number of devices."""
    return -(-batch_size // mesh.size) * mesh.size


def shard(batch: Tree, mesh: Mesh, *, axis: int = 0) -> Tree:
    """Transfer host arrays to the devices, sharded along an axis over the mesh.

    Args:
        batch: tree of arrays ``[rows, ...]``, the rows of this process; their number must be
            divisible by the number of its devices.
        mesh: see `data_mesh`.
        axis: axis of the rows.

    Returns:
        The tree with global arrays, which contain the rows of all processes.
    """
    sharding = NamedSharding(mesh, PartitionSpec(*(None,) * axis, "data"))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def process_share(num_rows: int) -> slice:
    """Return the rows of this process, of rows that all processes know; the last has the fewest."""
    size = math.ceil(num_rows / jax.process_count())
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)


def replicate(tree: Tree, mesh: Mesh, *, copy: bool = False) -> Tree:
    """Place a tree of arrays on every device of the mesh.

    Args:
        tree: host or device arrays, equal in all processes.
        mesh: see `data_mesh`.
        copy: return new buffers, which a step may donate; otherwise arrays that are already on
            every device are returned as they are.
    """
    sharding = NamedSharding(mesh, PartitionSpec())

    def place(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return jnp.copy(x) if copy else x
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(x)))
        return jax.make_array_from_process_local_data(sharding, np.array(to_host(x)))

    return jax.tree.map(place, tree)


def fsdp_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Return how fully sharded data parallelism divides an array over the devices.

    It is divided along its largest axis whose length is a multiple of the number of devices. Small
    arrays and those without such an axis are replicated.

    Args:
        shape: shape of a parameter, or of an array of the optimizer for it.
        mesh: see `data_mesh`.
    """
    axes = [axis for axis, length in enumerate(shape) if length % mesh.size == 0]
    if not axes or math.prod(shape) < _SMALL:
        return NamedSharding(mesh, PartitionSpec())
    largest = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*(None,) * largest, "data"))


_SMALL = 2**12  # elements; norms and biases are not worth a transfer of their own


def shard_parameters(tree: Tree, mesh: Mesh) -> Tree:
    """Divide a tree of parameters, or of the optimizer's state, over the devices of the mesh.

    Args:
        tree: host or device arrays, equal in all processes.
        mesh: see `data_mesh`.

    Returns:
        The tree with arrays sharded by `fsdp_sharding` in new buffers, which a step may donate.
    """

    def place(x: Any) -> jax.Array:
        whole = to_host(x)
        sharding = fsdp_sharding(whole.shape, mesh)
        return jax.make_array_from_callback(
            whole.shape, sharding, lambda part: np.array(whole[part])
        )

    return jax.tree.map(place, tree)


def to_host(tree: Tree) -> Tree:
    """Copy a tree of arrays to the host, each array as a whole; all processes call it together."""

    def copy(x: Any) -> np.ndarray:
        elsewhere = isinstance(x, jax.Array) and not x.is_fully_addressable
        if elsewhere and not x.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(copy, tree)


def local_shards(x: jax.Array) -> np.ndarray:
    """Copy this process's rows of an array sharded by `shard` to the host."""
    shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def gather(rows: np.ndarray) -> np.ndarray:
    """Concatenate the rows of all processes in process order; all must have the same number.

    Every device holds the result for a moment, so it should be small: see `GATHER_BYTES`.
    """
    if jax.process_count() == 1:
        return rows
    # As bytes, because JAX would round float64.
    data = np.frombuffer(rows.tobytes(), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(data))
    shape = len(gathered) * len(rows), *rows.shape[1:]
    return gathered.reshape(-1).view(rows.dtype).reshape(shape)


GATHER_BYTES = 2**26
"""Memory of a device that rows of all processes take, where they are gathered block by block."""


def pad_rows(rows: np.ndarray, length: int) -> np.ndarray:
    """Pad rows ``[rows, ...]`` to a number of them with zeros."""
    missing = length - len(rows)
    return np.pad(rows, ((0, missing), *[(0, 0)] * (rows.ndim - 1))) if missing else rows


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """Sum an array over the processes, in blocks; all get the same bits, in float64 too."""
    if jax.process_count() == 1:
        return values
    size = max(1, GATHER_BYTES // (jax.process_count() * values.itemsize))
    starts = range(0, values.size, size)
    sums = [gather(values.ravel()[None, start : start + size]).sum(0) for start in starts]
    return np.concatenate(sums).reshape(values.shape)


def main_process_says(flag: bool) -> bool:
    """Return the flag of the main process, on all processes, which call this together."""
    return bool(gather(np.array([flag]))[0])


class Preemption:
    """Context manager that handles SIGTERM, which schedulers send before they kill a process.

    Inside `deferred` the signal only requests a stop, see `reached`. Elsewhere, and in a single
    process on the second signal, it raises `StoppedError` immediately.
    """

    def __init__(self) -> None:
        self.requested = self._deferred = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def reached(self) -> bool:
        """Return whether to save and stop now, in the same call of all processes.

        They agree by JAX's preemption service, which costs less than a microsecond and waits for
        nothing.
        """
        if jax.process_count() == 1:
            return self.requested
        return multihost_utils.reached_preemption_sync_point(next(_calls))

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Delay SIGTERM until the end of the block, so that no step or save is interrupted."""
        self._deferred = True
        if _OF_JAX:
            _set_signal(signal.SIGTERM, _OF_JAX[-1])
        try:
            yield
        finally:
            self._deferred = False
            if _OF_JAX:
                signal.signal(signal.SIGTERM, self._stop)
        if self.requested:
            raise StoppedError

    def _stop(self, *_: object) -> None:
        immediately = self.requested or not self._deferred
        self.requested = True
        if not immediately:
            return
        if jax.process_count() > 1:
            message = str(StoppedError())
            print(f"error: {message}", file=sys.stderr)
            exit_all_processes(message, StoppedError.CODE)
        raise StoppedError


_OF_JAX: list[int] = []
"""JAX's handler of SIGTERM, once `join` has initialized it."""

_calls = count(1)  # of `Preemption.reached`: the service compares them between the processes
_set_signal = ctypes.CDLL(None).signal
_set_signal.argtypes, _set_signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p


def gather_json(value: Any) -> list[Any]:
    """Gather a JSON-serializable value from every process, in process order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = gather(np.array([data.size], np.int32))
    rows = gather(pad_rows(data, int(lengths.max()))[None])
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def broadcast_json(compute: Callable[[], Any]) -> Any:
    """Compute a JSON-serializable value on the main process, and return it on every process."""
    return gather_json(compute() if is_main_process() else None)[0]
