"""Checkpoints of a run in progress, written asynchronously by Orbax and verified when read.

A checkpoint holds the training state (trainable parameters, optimizer state, updated statistics)
as named arrays, which any Orbax reads, their checksums, and the position in the run. Frozen
variables are identified by their hash. Each process writes and reads its own shards. A damaged
checkpoint ``3`` is marked by a file ``3.damaged``: it is not read again, and never deleted. An
unfinished one has a temporary name, or in a bucket no ``commit_success.txt``, and is removed.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tljax.runtime.errors import RequestError, WriteError
from tljax.runtime.files import atomic_write, in_bucket
from tljax.runtime.parallel import gather_json, is_main_process
from tljax.train.checkpoint_arrays import (
    ArraysHandler,
    Leaves,
    SaveArrays,
    absolute,
    is_on_mesh,
    read_arrays,
    read_checksums,
    together,
    verify,
)

Tree = TypeVar("Tree")


class Checkpoint(NamedTuple):
    """Saved state of a run, whose arrays are intact.

    Attributes:
        position: position in the run that the caller saved, as JSON.
        notes: one line for each damaged checkpoint that was skipped.
        folder: folder of the checkpoint, which any Orbax reads.
        leaves: description of each array, see `tljax.train.checkpoint_arrays`.
    """

    position: dict[str, Any]
    notes: tuple[str, ...]
    folder: Path
    leaves: Leaves

    def fill(self, like: Tree) -> Tree:
        """Read the saved state as a tree like ``like``; all processes call it together.

        Args:
            like: tree of arrays. For an array on the devices of the mesh each process reads its
                shards only, whatever devices it was saved from; others become host arrays.

        Raises:
            RequestError: a name, shape or dtype differs, or an array cannot be read.
        """
        expected = name_leaves(like)
        saved = {name: (leaf["dtype"], leaf["shape"]) for name, leaf in self.leaves.items()}
        if saved != {name: (x.dtype.name, [*x.shape]) for name, x in expected.items()}:
            raise RequestError("the checkpoint was saved with another network or optimizer")
        try:
            arrays = read_arrays(self.folder, expected)
        except (OSError, ValueError) as error:
            raise RequestError(f"{self.folder} cannot be read ({_reason(error)})") from error
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in expected])


class Checkpoints:
    """The last two checkpoints in a folder, so that one is intact if the other is damaged."""

    def __init__(
        self, folder: Path, identity: str, before_save: Callable[[], None] = lambda: None
    ) -> None:
        """Open a folder of checkpoints, or create it.

        Args:
            folder: folder that holds nothing but checkpoints.
            identity: identifies what is constant during the run: base weights, data, configuration.
            before_save: called before a checkpoint is written.

        Raises:
            RequestError: the folder cannot be written.
        """
        # These log progress and unfinished steps, and background errors, which are raised anyway.
        for library in ("absl", "asyncio"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        # Of a write that Ctrl-C ends, after the line that says how to continue.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        self._identity, self._before_save = identity, before_save
        self._folder = folder
        # The packages for buckets have errors of their own.
        self._errors = (Exception,) if in_bucket(folder) else (OSError,)
        try:
            if not in_bucket(folder):
                folder.mkdir(parents=True, exist_ok=True)
            damaged = [int(path.stem) for path in self._folder.glob("[0-9]*.damaged")]
            numbers = ocp.utils.checkpoint_steps(self._folder)
            if is_main_process():
                for unfinished in ocp.utils.tmp_checkpoints(self._folder):
                    unfinished.get().rmtree(missing_ok=True)
        except self._errors as error:
            raise RequestError(f"{folder}: cannot be written ({_reason(error)})") from error
        # The main process decides, as the others may see its files later.
        self._numbers, damaged = gather_json((sorted(numbers), damaged))[0]
        self._damaged = set(damaged)
        self._writer = ocp.AsyncCheckpointer(ArraysHandler(), multiprocessing_options=together())

    def save(self, number: int, position: dict[str, Any], state: Any) -> None:
        """Write a checkpoint in the background; all processes call it together.

        It waits for the previous write, and for the copies of the arrays to the host.

        Args:
            number: number of the checkpoint, higher than before. If a damaged checkpoint has a
                higher one, the next free number is used instead.
            position: position in the run, as JSON.
            state: tree of arrays. Each process writes its shards of those on the devices of the
                mesh; the main process writes host arrays.

        Raises:
            RequestError: the previous write failed, or another process failed.
        """
        leaves = {
            name: leaf if is_on_mesh(leaf) else np.array(leaf)
            for name, leaf in name_leaves(state).items()
        }
        self._before_save()
        about = {"position": position, "identity": self._identity}
        with self._explained():
            self._writer.wait_until_finished()
            self._remove_old()
            self._numbers.append(max([number, *(before + 1 for before in self._numbers)]))
            path = self._folder / str(self._numbers[-1])
            self._writer.save(absolute(path), args=SaveArrays(about, leaves))

    def restore(self) -> Checkpoint | None:
        """Return the last intact checkpoint, or None if the folder has no checkpoints.

        Damaged checkpoints are marked and skipped. Each process verifies a part of the arrays.

        Raises:
            RequestError: all are damaged, they belong to another run, or one cannot be read.
        """
        notes: list[str] = []
        for number in reversed(self._numbers):
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
            folder = self._folder / str(number)
            return Checkpoint(about["position"], tuple(notes), folder, leaves)
        if notes:
            raise RequestError(f"{self._folder}: no checkpoint is intact: {'; '.join(notes)}")
        return None

    def _read(self, number: int) -> tuple[dict[str, Any], Leaves] | None:
        """Verify a checkpoint; mark it and return None if it is damaged.

        Returns:
            Position and identity, and the description of the arrays.

        Raises:
            RequestError: it cannot be read, but may be intact.
        """
        about, leaves, failed = {}, {}, None
        folder = self._folder / str(number)
        try:
            about, leaves = read_checksums(folder)
            names = sorted(leaves)[jax.process_index() :: jax.process_count()]
            mine = {name: leaves[name] for name in names}
            verify(mine, read_arrays(folder, dict.fromkeys(mine)))
        except Exception as error:  # noqa: BLE001 - Orbax documents no type for a damaged file
            failed = error
        damaged = _proves_damage(failed) and folder.is_dir()
        outcomes = gather_json((damaged, failed and _reason(failed)))
        if reason := next((reason for damaged, reason in outcomes if damaged), None):
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
        with self._explained():
            self._writer.wait_until_finished()
            self._remove_old()
            self._writer.close()

    def _remove_old(self) -> None:
        """Delete all but the last two intact checkpoints and the damaged ones."""
        for number in [n for n in self._numbers if n not in self._damaged][:-2]:
            if is_main_process():
                path = epath.Path(self._folder / str(number))
                # First what makes it complete in a bucket, as a process may be killed.
                if in_bucket(self._folder):
                    (path / _COMPLETE).unlink(missing_ok=True)
                path.rmtree(missing_ok=True)
            self._numbers.remove(number)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Convert an error of a write to a one-line RequestError."""
        try:
            yield
        except (*self._errors, ValueError, jax.errors.JaxRuntimeError) as error:
            reason = _reason(error)
            advice = "check the bucket" if in_bucket(self._folder) else "free disk space"
            if reason == _ALONE:
                advice = "start all processes again"
            raise RequestError(
                f"{self._folder}: a checkpoint cannot be written ({reason}); earlier ones "
                f"are kept: {advice} and continue with --resume"
            ) from error


_ALONE = "another process has ended or hangs"

_COMPLETE = "commit_success.txt"
"""File that Orbax writes last in a bucket, whose folders cannot be renamed."""


def name_leaves(tree: Any) -> dict[str, Any]:
    """Return ``{path: leaf}``, such as ``params/head/kernel``, for the leaves of any tree."""
    path = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {path(keys): leaf for keys, leaf in jax.tree.leaves_with_path(tree)}


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
    # Of JAX's coordination service, or of Orbax, which waits by it.
    if isinstance(error, jax.errors.JaxRuntimeError) or "barrier" in str(error):
        return _ALONE
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(re.split(r" \[\w+='", text)[0].rpartition(": ")[2].split())
