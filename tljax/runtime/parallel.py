"""One mesh over all devices, the batch split along its ``data`` axis. Also on several hosts.

Several processes, one a host or a GPU, run the same program: `join` once at the start, and from
there on every function here means all of them together.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any, NoReturn, Self, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tljax.runtime.errors import RequestError, StoppedError

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
    Thread(target=_follow, args=(_client(),), daemon=True).start()


def leave(message: str, code: int) -> NoReturn:
    """End this process, and the others with it, which would wait for it for ever.

    Args:
        message: what the others print; this process has said it.
        code: the exit code of all.
    """
    if jax.process_count() == 1:
        sys.exit(code)
    client = _client()
    with suppress(RuntimeError):  # another one was first
        client.key_value_set(_LEFT, json.dumps((jax.process_index(), message, code)))
    _end_together(client, code)


def _client() -> Any:
    """Reach what JAX's coordinator holds for all processes."""
    import orbax.checkpoint as ocp  # noqa: PLC0415 - takes half a second, which one process saves

    return ocp.multihost.get_jax_distributed_client()


def _follow(client: Any) -> None:
    """Look every second for a process that leaves, and leave as well."""
    while True:
        time.sleep(1)  # not in the client: a thread that waits there would break Python's exit
        with suppress(RuntimeError):  # none has
            number, message, code = json.loads(client.key_value_try_get(_LEFT))
            if number != jax.process_index():
                print(f"error: process {number}: {message}", file=sys.stderr)
                _end_together(client, code)


def _end_together(client: Any, code: int) -> NoReturn:
    with suppress(RuntimeError):  # not all of them can answer
        client.wait_at_barrier(_LEFT, 10_000)
    sys.stdout.flush()
    os._exit(code)


_LEFT = "tljax/left"


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


def agree(due: bool, stop: bool) -> tuple[bool, bool]:
    """Decide together: the writer's clock says what is due, and any process that all stop."""
    answers = gather(np.array([[due, stop]]))
    return bool(answers[0, 0]), bool(answers[:, 1].any())


class Preemption:
    """SIGTERM, which schedulers send before they end a process: nothing is lost by it.

    Within `deferred` it is noted in ``asked``, for a loop that looks there after every step;
    elsewhere it raises `StoppedError` at once, and so does a second one anywhere.
    """

    def __init__(self) -> None:
        self.asked = self._deferred = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Keep training from being interrupted within a step or a save."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.asked:
            raise StoppedError

    def _stop(self, *_: object) -> None:
        now = self.asked or not self._deferred
        self.asked = True
        if not now:
            return
        if jax.process_count() > 1:
            message = str(StoppedError())
            print(f"error: {message}", file=sys.stderr)
            leave(message, StoppedError.CODE)
        raise StoppedError


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
