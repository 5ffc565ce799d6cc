"""Checkpoints of a run in progress: Orbax writes them, asynchronously; nothing damaged is believed.

A checkpoint holds what training has changed: the trainable parameters, their optimizer state, the
statistics that move, and where in which epoch the run stands. What is frozen is named by its hash.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from tljax.errors import RequestError
from tljax.parallel import is_writer
from tljax.trees import array_bytes

Tree = TypeVar("Tree")


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
        """The leaves in the shape of ``like``.

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
        """Opens the folder, or makes it.

        Args:
            folder: of checkpoints alone.
            identity: of what does not change during the run: base weights, data, configuration.
        """
        # Its progress is not for the user, half-written steps are none of his business, and of an
        # error in the background he is told when it is raised.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._identity = identity
        self._folder = folder
        # Each process for itself: at a barrier, all would wait for a writer that cannot write.
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process {me}"
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                folder.absolute(),
                item_names=("state", "position"),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=2,
                    create=False,
                    cleanup_tmp_directories=is_writer(),
                    multiprocessing_options=alone,
                ),
            )
        except OSError as error:
            raise RequestError(f"{folder}: cannot be written ({error.strerror})") from error

    def save(self, number: int, position: dict[str, Any], state: Any) -> None:
        """Writes in the background, on the writer; waits for the write before this one.

        Args:
            number: rises from save to save.
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
        try:
            self._manager.save(
                number,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave({f"{i:05d}": x for i, x in enumerate(leaves)}),  # pyright: ignore[reportCallIssue]
                    position=ocp.args.JsonSave(about),  # pyright: ignore[reportCallIssue]
                ),
            )
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def restore(self) -> Checkpoint | None:
        """The last checkpoint that is whole; None if there is none at all.

        Damaged ones after it are deleted, as their numbers will be needed again.

        Raises:
            RequestError: all are damaged, or they belong to another run.
        """
        notes: list[str] = []
        damaged: list[int] = []
        for number in sorted(self._manager.all_steps(), reverse=True):
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
                    raise ValueError("checksum")  # noqa: TRY301
            except Exception as error:  # noqa: BLE001 - Orbax promises no type for a damaged file
                notes.append(f"checkpoint {number} is damaged ({type(error).__name__})")
                damaged.append(number)
                continue
            if about["identity"] != self._identity:
                raise RequestError(
                    f"{self._folder} belongs to another run: its base weights, images or "
                    "configuration differ; choose another --workdir"
                )
            for later in damaged:
                self._manager.delete(later)
            return Checkpoint(about["position"], leaves, tuple(notes))
        if notes:
            raise RequestError(f"{self._folder}: no checkpoint is whole: {'; '.join(notes)}")
        return None

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
            RequestError: it could not be.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError | ValueError) -> Exception:
        reason = error.strerror or str(error) if isinstance(error, OSError) else ""
        if not reason:
            # TensorStore's: "RESOURCE_EXHAUSTED: ...: No space left on device [os_error_code='28']"
            text, found, _ = str(error).partition(" [os_error_code")
            if not found:
                return error
            reason = text.rpartition(": ")[2]
        return RequestError(
            f"{self._folder}: a checkpoint cannot be written ({reason}); "
            "the one before it is kept: make room and go on with --resume"
        )


def _digest(leaves: list[np.ndarray], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for leaf in leaves:
        digest.update(f"{leaf.dtype} {leaf.shape}".encode())
        digest.update(array_bytes(leaf))
    return digest.hexdigest()
