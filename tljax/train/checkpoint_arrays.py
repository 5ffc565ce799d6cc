"""Arrays of a checkpoint, written and read by Orbax, with a checksum of each shard.

TensorStore, which Orbax writes with, does not notice a changed bit. So each process writes a file
``tljax.PROCESS.json`` beside Orbax's, with the shards that it saves: ``{leaf: {"dtype": ...,
"shape": [...], "shards": [{"start": [...], "stop": [...], "sha256": ...}]}}``. The thread that
writes computes the checksums. The main process adds what the caller says about the checkpoint.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals, Future

from tljax.runtime.files import in_bucket, sha256
from tljax.runtime.parallel import is_main_process
from tljax.runtime.trees import array_bytes, flatten, unflatten

Leaves = dict[str, dict[str, Any]]
"""``{leaf: {"dtype": ..., "shape": [...], "shards": [...]}}``"""


class ArraysHandler(ocp.PyTreeCheckpointHandler):
    """Orbax handler of named arrays and their checksums."""

    def __init__(self) -> None:
        """Let all processes save the shards that they have, and one of them replicated arrays."""
        super().__init__(
            multiprocessing_options=together(),
            type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                (np.ndarray, ocp.type_handlers.NumpyHandler()),
                (
                    jax.Array,
                    _ArrayHandler(use_replica_parallel=False, enable_write_sharding_file=False),
                ),
            ),
        )

    async def async_save(self, directory: epath.Path, args: "SaveArrays") -> list[Future]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Copy the shards to the host, and write them and their checksums in the background."""
        shards = {name: _saved_shards(leaf) for name, leaf in args.leaves.items()}
        _start_copies(chain.from_iterable(shards.values()))
        arrays = ocp.args.PyTreeSave(unflatten(args.leaves))  # pyright: ignore[reportCallIssue]
        futures = await super().async_save(directory, args=arrays) or []
        # Arrays keep the copies that Orbax writes, and a step may then donate the arrays.
        copies = {
            name: (args.leaves[name].shape, [(start, np.asarray(data)) for start, data in saved])
            for name, saved in shards.items()
            if saved
        }

        async def write_checksums() -> None:
            leaves = {name: _describe(*saved) for name, saved in copies.items()}
            content = {"leaves": leaves, "about": args.about if is_main_process() else {}}
            text = json.dumps({"sha256": _digest(content), "content": content})
            (directory / f"tljax.{jax.process_index()}.json").write_text(text)

        return [*futures, CommitFutureAwaitingContractedSignals(write_checksums(), name="tljax")]


@ocp.args.register_with_handler(ArraysHandler, for_save=True, for_restore=True)
@dataclass
class SaveArrays(ocp.args.CheckpointArgs):
    """What `ArraysHandler` saves.

    Attributes:
        about: facts about the checkpoint, as JSON.
        leaves: host arrays, and arrays on the devices of all processes, by their paths.
    """

    about: dict[str, Any]
    leaves: dict[str, Any]


class _ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Handler whose arrays a plain Orbax reads as host arrays, whatever devices they were on."""

    def typestr(self) -> str:
        return ocp.type_handlers.NumpyHandler().typestr()


def together() -> ocp.options.MultiprocessingOptions:
    """Return Orbax's options of processes, which wait for each other for minutes, not forever."""
    # Without this set Orbax synchronizes them by a program on the devices, which has no timeout.
    return ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))


def absolute(folder: Path) -> epath.Path:
    """Return the absolute path of a checkpoint, which Orbax needs."""
    return epath.Path(folder if in_bucket(folder) else folder.absolute())


def is_on_mesh(leaf: Any) -> bool:
    """Return whether an array is on the devices of all processes, which then save it together."""
    return isinstance(leaf, jax.Array) and (
        jax.process_count() == 1 or not leaf.is_fully_addressable
    )


def read_arrays(folder: Path, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Read some arrays of a checkpoint, on the devices of those given or else on the host.

    Args:
        folder: the checkpoint.
        leaves: ``{path: array or None}``. Of an array on the mesh each process reads its shards.

    Raises:
        OSError, ValueError, LookupError, TypeError: the files cannot be read, or are damaged.
    """
    if not leaves:
        return {}
    how = {
        name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape)
        if is_on_mesh(leaf)
        else ocp.RestoreArgs(restore_type=np.ndarray)
        for name, leaf in leaves.items()
    }
    what = ocp.args.PyTreeRestore(  # pyright: ignore[reportCallIssue]
        item=unflatten(dict.fromkeys(leaves, 0)),
        restore_args=unflatten(how),
        partial_restore=True,
    )
    return flatten(ArraysHandler().restore(absolute(folder), args=what))


def all_finite(tree: Any) -> bool:
    """Return whether no number of the shards that this process saves is NaN or infinite.

    The copies on the host are those that `ArraysHandler` writes. To compute it on the devices takes
    longer, above all to compile.
    """
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in _saved_shards(leaf)]
    _start_copies(shards)
    return all(bool(np.isfinite(np.asarray(data)).all()) for _, data in shards)


def read_checksums(folder: Path) -> tuple[dict[str, Any], Leaves]:
    """Read what all processes wrote about a checkpoint.

    Returns:
        What the main process said about it, and the description of its arrays.

    Raises:
        OSError, ValueError, LookupError, TypeError: a file cannot be read, or is damaged.
    """
    about: dict[str, Any] = {}
    leaves: Leaves = {}
    for path in sorted(folder.glob("tljax.*.json")):
        found = json.loads(path.read_text())
        content = found["content"]
        if found["sha256"] != _digest(content):
            raise ValueError(f"checksum mismatch in {path.name}")
        about |= content["about"]
        for name, leaf in content["leaves"].items():
            leaves.setdefault(name, {**leaf, "shards": []})["shards"] += leaf["shards"]
    if not about:
        raise FileNotFoundError(f"{folder}: tljax.0.json is missing")
    return about, leaves


def verify(leaves: Leaves, arrays: Mapping[str, np.ndarray]) -> None:
    """Compare whole arrays with their descriptions.

    Raises:
        ValueError, LookupError, TypeError: they differ, or one is missing.
    """
    for name, leaf in leaves.items():
        array, size = arrays[name], 0
        for shard in leaf["shards"]:
            part = array[tuple(map(slice, shard["start"], shard["stop"]))]
            size += part.size
            if _describe(array.shape, [(shard["start"], part)]) != {**leaf, "shards": [shard]}:
                raise ValueError(f"checksum mismatch in {name}")
        if size != array.size:
            raise ValueError(f"a shard of {name} is missing")


def _saved_shards(leaf: Any) -> list[tuple[list[int], Any]]:
    """Return (start, values) of the shards that this process saves: one replica of each."""
    if isinstance(leaf, np.ndarray):
        return [([0] * leaf.ndim, leaf)] if is_main_process() else []
    return [
        ([axis.start or 0 for axis in shard.index], shard.data)
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]


def _start_copies(shards: Iterable[tuple[list[int], Any]]) -> None:
    for _, data in shards:
        if isinstance(data, jax.Array):
            data.copy_to_host_async()


def _describe(shape: tuple[int, ...], shards: list[tuple[list[int], np.ndarray]]) -> dict[str, Any]:
    return {
        "dtype": shards[0][1].dtype.name,
        "shape": list(shape),
        "shards": [
            {
                "start": start,
                "stop": [a + b for a, b in zip(start, data.shape, strict=True)],
                "sha256": hashlib.sha256(array_bytes(data)).hexdigest(),
            }
            for start, data in shards
        ],
    }


def _digest(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode())
