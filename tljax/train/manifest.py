"""Manifest of a checkpoint: the run's position and a checksum of each shard of its arrays.

Each process writes ``PROCESS.json`` with the shards that it saves: ``{leaf: {"dtype": ..., "shape":
[...], "shards": [{"start": [...], "stop": [...], "sha256": ...}]}}``. The thread that writes
computes the checksums. The main process adds the position.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals, Future

from tljax.runtime.files import sha256
from tljax.runtime.parallel import is_main_process
from tljax.runtime.trees import array_bytes

Leaves = dict[str, dict[str, Any]]
"""``{leaf: {"dtype": ..., "shape": [...], "shards": [...]}}``"""


class ManifestHandler(ocp.handlers.AsyncCheckpointHandler):
    """Orbax handler of the manifest, beside the one of the arrays."""

    async def async_save(self, directory: epath.Path, args: "SaveManifest") -> list[Future]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Copy the shards to the host; compute and write their checksums in the background."""
        saved = {name: _saved_shards(leaf) for name, leaf in args.leaves.items()}
        for _, data in chain.from_iterable(saved.values()):
            if isinstance(data, jax.Array):
                data.copy_to_host_async()
        # Orbax writes the same copies, which arrays keep; a step may then donate the arrays.
        copies = {
            name: (args.leaves[name].shape, [(start, np.asarray(data)) for start, data in shards])
            for name, shards in saved.items()
            if shards
        }

        async def write() -> None:
            leaves = {name: _describe(*shards) for name, shards in copies.items()}
            content = {"leaves": leaves, "about": args.about if is_main_process() else {}}
            text = json.dumps({"sha256": _digest(content), "content": content})
            (directory / f"{jax.process_index()}.json").write_text(text)

        return [CommitFutureAwaitingContractedSignals(write(), name="manifest")]

    def save(self, *_: Any, **__: Any) -> None:
        """Refuse to save without a background thread."""
        raise NotImplementedError

    def restore(self, *_: Any, **__: Any) -> None:
        """Refuse to restore: `read_manifest` does."""
        raise NotImplementedError


@ocp.args.register_with_handler(ManifestHandler, for_save=True)
@dataclass
class SaveManifest(ocp.args.CheckpointArgs):
    """What `ManifestHandler` writes.

    Attributes:
        about: the position and other facts, as JSON.
        leaves: all arrays of the checkpoint by their names.
    """

    about: dict[str, Any]
    leaves: dict[str, Any]


def read_manifest(folder: epath.Path) -> tuple[dict[str, Any], Leaves]:
    """Read the manifest that all processes wrote.

    Returns:
        What the main process said about the checkpoint, and the description of its arrays.

    Raises:
        OSError, ValueError, LookupError, TypeError: a file cannot be read, or is damaged.
    """
    about: dict[str, Any] = {}
    leaves: Leaves = {}
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        content = found["content"]
        if found["sha256"] != _digest(content):
            raise ValueError(f"checksum mismatch in {path.name}")
        about |= content["about"]
        for name, leaf in content["leaves"].items():
            leaves.setdefault(name, {**leaf, "shards": []})["shards"] += leaf["shards"]
    if not about:
        raise FileNotFoundError(f"{folder}: the manifest of the main process is missing")
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
