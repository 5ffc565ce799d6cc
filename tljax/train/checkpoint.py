"""Checkpoints of a run in progress: Orbax writes them, asynchronously; nothing damaged is believed.

A checkpoint holds what training has changed: the trainable parameters, their optimizer state, the
statistics that move, and where in which epoch the run stands. What is frozen is named by its hash.
Beside a damaged one, ``3``, lies a file ``3.damaged``: it is not read again, and never deleted.
"""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo

from tljax.runtime.errors import RequestError, WriteError
from tljax.runtime.files import written_whole
from tljax.runtime.parallel import gather_json, is_writer
from tljax.runtime.trees import array_bytes

Tree = TypeVar("Tree")
Content = tuple[dict[str, Any], list[np.ndarray]]


class Checkpoint(NamedTuple):
    """Where a run stood.

    Attributes:
        position: JSON: whatever the caller saved.
        leaves: of the state that the caller saved, in its order.
        notes: what was damaged and passed over, a line each.
    """

    position: dict[str, Any]
    leaves: list[np.ndarray]
    notes: tuple[str, ...]

    def fill(self, like: Tree) -> Tree:
        """Return the leaves in the shape of ``like``.

        Raises:
            RequestError: the checkpoint is of something else.
        """
        expected, structure = jax.tree.flatten(like)
        if [(x.shape, x.dtype) for x in expected] != [(x.shape, x.dtype) for x in self.leaves]:
            raise RequestError("the checkpoint is of another network or another optimizer")
        return jax.tree.unflatten(structure, self.leaves)


class Checkpoints:
    """The checkpoints in a folder: the last two, so that one is whole if the other is not."""

    def __init__(self, folder: Path, identity: str) -> None:
        """Open the folder, or make it.

        Args:
            folder: of checkpoints alone.
            identity: of what does not change during the run: base weights, data, configuration.

        Raises:
            RequestError: it cannot be written.
        """
        # Its progress is not for the user, half-written steps are none of his business, and of an
        # error in the background he is told when it is raised.
        for library in ("absl", "asyncio"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        self._identity = identity
        self._folder = folder
        # Each process for itself: at a barrier, all would wait for one that cannot read or write.
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process {me}"
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            marked = [int(path.stem) for path in folder.glob("[0-9]*.damaged")]
            self._damaged = set(gather_json(marked)[0])
            self._manager = ocp.CheckpointManager(
                folder.absolute(),
                item_names=("state", "position"),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_LastTwoWhole(self._damaged),
                    create=False,
                    cleanup_tmp_directories=is_writer(),
                    multiprocessing_options=alone,
                ),
            )
        except OSError as error:
            raise RequestError(f"{folder}: cannot be written ({error.strerror})") from error

    def save(self, number: int, position: dict[str, Any], state: Any) -> None:
        """Write in the background, on the writer; wait for the write before this one.

        Args:
            number: rises from save to save. Behind a damaged checkpoint of a higher number, it
                becomes the next one that is free.
            position: JSON.
            state: a tree of arrays; they are copied before this returns.

        Raises:
            RequestError: the write before this one failed.
        """
        if not is_writer():
            return
        leaves = [np.array(leaf) for leaf in jax.tree.leaves(state)]
        about = {"position": position, "identity": self._identity}
        about["sha256"] = _digest(leaves, about)
        latest = self._manager.latest_step()
        try:
            self._manager.save(
                number if latest is None else max(number, latest + 1),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave({f"{i:05d}": x for i, x in enumerate(leaves)}),  # pyright: ignore[reportCallIssue]
                    position=ocp.args.JsonSave(about),  # pyright: ignore[reportCallIssue]
                ),
            )
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def restore(self) -> Checkpoint | None:
        """Read the last checkpoint that is whole; None if there is none at all.

        Damaged ones after it are marked. Of several processes, the writer says which are.

        Raises:
            RequestError: all are damaged, or they belong to another run, or the disk fails.
        """
        notes: list[str] = []
        for number in sorted(gather_json(list(self._manager.all_steps()))[0], reverse=True):
            found = None if number in self._damaged else self._read(number)
            if found is None:
                notes.append(f"checkpoint {number} is damaged")
                continue
            about, leaves = found
            if about["identity"] != self._identity:
                raise RequestError(
                    f"{self._folder} belongs to another run: its base weights, images or "
                    "configuration differ; choose another --workdir"
                )
            return Checkpoint(about["position"], leaves, tuple(notes))
        if notes:
            raise RequestError(f"{self._folder}: no checkpoint is whole: {'; '.join(notes)}")
        return None

    def _read(self, number: int) -> Content | None:
        """Read one checkpoint; None if it is damaged, which is marked.

        Raises:
            RequestError: it cannot be read, which does not prove that it is damaged.
        """
        about, leaves, failed = {}, [], None
        try:
            # The shapes come from the checkpoint itself: `fill` compares them.
            found = self._manager.restore(
                number,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(),  # pyright: ignore[reportCallIssue]
                    position=ocp.args.JsonRestore(),  # pyright: ignore[reportCallIssue]
                ),
            )
            about, state = found["position"], found["state"]
            leaves = [np.asarray(state[name]) for name in sorted(state)]
            if about.pop("sha256") != _digest(leaves, about):
                raise ValueError("its checksum differs")  # noqa: TRY301
        except Exception as error:  # noqa: BLE001 - Orbax promises no type for a damaged file
            failed = error
        damaged = _proves_damage(failed) and (self._folder / str(number)).is_dir()
        told = gather_json((damaged, failed and _reason(failed)))
        if told[0][0]:
            self._damaged.add(number)
            mark = self._folder / f"{number}.damaged"
            text = f"{told[0][1]}\nWithout this file, checkpoint {number} is read again.\n"
            if is_writer():
                with suppress(WriteError), written_whole(mark) as temporary:
                    temporary.write_text(text, "utf-8")
            return None
        if reasons := [reason for _, reason in told if reason]:
            raise RequestError(
                f"{self._folder}: checkpoint {number} cannot be read ({reasons[0]}), "
                "but may be whole: nothing was changed, try again"
            ) from failed
        return about, leaves

    def close(self) -> None:
        """Wait until everything is written.

        Raises:
            RequestError: it could not be.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> RequestError:
        return RequestError(
            f"{self._folder}: a checkpoint cannot be written ({_reason(error)}); "
            "those before it are kept: make room and go on with --resume"
        )


@dataclass
class _LastTwoWhole:
    """For Orbax: which checkpoints stay."""

    damaged: set[int]

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], **_: Any
    ) -> Sequence[bool]:
        last = [found.step for found in checkpoints if found.step not in self.damaged][-2:]
        return [found.step in self.damaged.union(last) for found in checkpoints]


_OF_THE_DISK = re.compile(
    r"os_error_code='(?!2')"  # 2: no such file
    "|^(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|PERMISSION_DENIED|RESOURCE_EXHAUSTED"
    "|UNAUTHENTICATED|UNAVAILABLE|UNKNOWN):"
)
"""In messages of TensorStore, which are ValueErrors whatever has happened."""


def _proves_damage(error: Exception | None) -> bool:
    """Whether it comes from the content, and not from the disk, the memory or the network."""
    if isinstance(error, ValueError):
        return not _OF_THE_DISK.search(str(error))
    return isinstance(error, FileNotFoundError | LookupError | TypeError | AttributeError)


def _reason(error: Exception) -> str:
    """The last words of an error, without what TensorStore adds: " [os_error_code='28']"."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return re.split(r" \[\w+='", text)[0].rpartition(": ")[2]


def _digest(leaves: list[np.ndarray], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for leaf in leaves:
        digest.update(f"{leaf.dtype} {leaf.shape}".encode())
        digest.update(array_bytes(leaf))
    return digest.hexdigest()
