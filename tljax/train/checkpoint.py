"""Checkpoints of a run in progress, written asynchronously by Orbax and verified when read.

A checkpoint holds the training state (trainable parameters, optimizer state, updated statistics)
and the position in the run; frozen variables are identified by their hash. A damaged checkpoint
``3`` is marked by a file ``3.damaged``: it is not read again, and never deleted.
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
from tljax.runtime.files import atomic_write
from tljax.runtime.parallel import gather_json, is_main_process
from tljax.runtime.trees import array_bytes

Tree = TypeVar("Tree")
Content = tuple[dict[str, Any], list[np.ndarray]]


class Checkpoint(NamedTuple):
    """Saved state of a run.

    Attributes:
        position: position in the run that the caller saved, as JSON.
        leaves: arrays of the saved state, in the order of its tree.
        notes: one line for each damaged checkpoint that was skipped.
    """

    position: dict[str, Any]
    leaves: list[np.ndarray]
    notes: tuple[str, ...]

    def fill(self, like: Tree) -> Tree:
        """Return the saved state as a tree like ``like``.

        Raises:
            RequestError: a shape or dtype differs.
        """
        expected, structure = jax.tree.flatten(like)
        if [(x.shape, x.dtype) for x in expected] != [(x.shape, x.dtype) for x in self.leaves]:
            raise RequestError("the checkpoint was saved with another network or optimizer")
        return jax.tree.unflatten(structure, self.leaves)


class Checkpoints:
    """The last two checkpoints in a folder, so that one is intact if the other is damaged."""

    def __init__(self, folder: Path, identity: str) -> None:
        """Open a folder of checkpoints, or create it.

        Args:
            folder: folder that holds nothing but checkpoints.
            identity: identifies what is constant during the run: base weights, data, configuration.

        Raises:
            RequestError: the folder cannot be written.
        """
        # These log progress and unfinished steps, and background errors, which are raised anyway.
        for library in ("absl", "asyncio"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        self._identity = identity
        self._folder = folder
        # Each process saves and reads alone: with a barrier, all would wait for one that fails.
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process {me}"
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            damaged = [int(path.stem) for path in folder.glob("[0-9]*.damaged")]
            self._damaged = set(gather_json(damaged)[0])
            self._manager = ocp.CheckpointManager(
                folder.absolute(),
                item_names=("state", "position"),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_LastTwoIntact(self._damaged),
                    create=False,
                    cleanup_tmp_directories=is_main_process(),
                    multiprocessing_options=alone,
                ),
            )
        except OSError as error:
            raise RequestError(f"{folder}: cannot be written ({error.strerror})") from error

    def save(self, number: int, position: dict[str, Any], state: Any) -> None:
        """Write a checkpoint in the background, on the process that writes.

        It waits for the previous write.

        Args:
            number: number of the checkpoint, higher than before. If a damaged checkpoint has a
                higher one, the next free number is used instead.
            position: position in the run, as JSON.
            state: tree of arrays; they are copied before this returns.

        Raises:
            RequestError: the previous write failed.
        """
        if not is_main_process():
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
        """Return the last intact checkpoint, or None if the folder has no checkpoints.

        Damaged checkpoints are marked and skipped. The writing process decides for all processes.

        Raises:
            RequestError: all are damaged, they belong to another run, or one cannot be read.
        """
        notes: list[str] = []
        for number in sorted(gather_json(list(self._manager.all_steps()))[0], reverse=True):
            content = None if number in self._damaged else self._read(number)
            if content is None:
                notes.append(f"checkpoint {number} is damaged")
                continue
            about, leaves = content
            if about["identity"] != self._identity:
                raise RequestError(
                    f"{self._folder} belongs to a run with other base weights, images or "
                    "settings: choose another --workdir"
                )
            return Checkpoint(about["position"], leaves, tuple(notes))
        if notes:
            raise RequestError(f"{self._folder}: no checkpoint is intact: {'; '.join(notes)}")
        return None

    def _read(self, number: int) -> Content | None:
        """Read a checkpoint; mark it and return None if it is damaged.

        Raises:
            RequestError: it cannot be read, but may be intact.
        """
        about, leaves, failed = {}, [], None
        try:
            # The shapes come from the checkpoint itself: `fill` compares them.
            restored = self._manager.restore(
                number,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(),  # pyright: ignore[reportCallIssue]
                    position=ocp.args.JsonRestore(),  # pyright: ignore[reportCallIssue]
                ),
            )
            about, state = restored["position"], restored["state"]
            leaves = [np.asarray(state[name]) for name in sorted(state)]
            if about.pop("sha256") != _digest(leaves, about):
                raise ValueError("checksum mismatch")  # noqa: TRY301
        except Exception as error:  # noqa: BLE001 - Orbax documents no type for a damaged file
            failed = error
        damaged = _proves_damage(failed) and (self._folder / str(number)).is_dir()
        outcomes = gather_json((damaged, failed and _reason(failed)))
        damaged, reason = outcomes[0]
        if damaged:
            self._damaged.add(number)
            marker = self._folder / f"{number}.damaged"
            text = f"{reason}\nDelete this file to read checkpoint {number} again.\n"
            if is_main_process():
                with suppress(WriteError), atomic_write(marker) as temporary:
                    temporary.write_text(text, "utf-8")
            return None
        if reasons := [reason for _, reason in outcomes if reason]:
            raise RequestError(
                f"{self._folder}: checkpoint {number} cannot be read ({reasons[0]}), but may be "
                "intact: try again"
            ) from failed
        return about, leaves

    def close(self) -> None:
        """Wait until all checkpoints are written.

        Raises:
            RequestError: the last write failed.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> RequestError:
        return RequestError(
            f"{self._folder}: a checkpoint cannot be written ({_reason(error)}); earlier ones are "
            "kept: free disk space and continue with --resume"
        )


@dataclass
class _LastTwoIntact:
    """Orbax policy: preserve the last two intact checkpoints and all damaged ones."""

    damaged: set[int]

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], **_: Any
    ) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        preserved = self.damaged.union([step for step in steps if step not in self.damaged][-2:])
        return [step in preserved for step in steps]


_ENVIRONMENT_ERROR = re.compile(
    r"os_error_code='(?!2')"  # 2: no such file
    "|^(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|PERMISSION_DENIED|RESOURCE_EXHAUSTED"
    "|UNAUTHENTICATED|UNAVAILABLE|UNKNOWN):"
)
"""Matches messages of TensorStore, which raises ValueError for every kind of failure."""


def _proves_damage(error: Exception | None) -> bool:
    """Return whether an error comes from the content, not from the disk, memory or network."""
    if isinstance(error, ValueError):
        return not _ENVIRONMENT_ERROR.search(str(error))
    return isinstance(error, FileNotFoundError | LookupError | TypeError | AttributeError)


def _reason(error: Exception) -> str:
    """Return the last part of an error message, without TensorStore's " [os_error_code='28']"."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return re.split(r" \[\w+='", text)[0].rpartition(": ")[2]


def _digest(leaves: list[np.ndarray], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for leaf in leaves:
        digest.update(f"{leaf.dtype} {leaf.shape}".encode())
        digest.update(array_bytes(leaf))
    return digest.hexdigest()
