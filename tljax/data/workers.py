"""Decode batches in threads or processes that live as long as the program.

Images are decoded straight into the array of their batch. Between processes nothing is passed for
an image but its pixels, in shared memory: a worker gets the examples once, and then the numbers of
a few images at a time. Imports no JAX, which a worker does not need.
"""

import atexit
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int, Shaped

from tljax.data.boxes import Crops
from tljax.data.decode import decode
from tljax.runtime.errors import RequestError, UnreadableImageError, first_line
from tljax.runtime.preprocess import Preprocess

CHUNK = 8
"""Images that a worker decodes at a time."""


class Note(NamedTuple):
    """What is to be said of an image of a batch.

    Attributes:
        row: its row in the batch.
        fault: the reason why it cannot be read; None if it can.
        remarks: remarks about the image.
    """

    row: int
    fault: str | None
    remarks: list[str]


class CropRows(NamedTuple):
    """The random crops of the images of a batch.

    Attributes:
        crops: the crops of the epoch.
        indices: position of each image in the source, by which crops are drawn; a selection of
            examples has other positions than the examples themselves.
    """

    crops: Crops
    indices: Int[np.ndarray, " rows"]

    def part(self, rows: slice) -> "CropRows":
        """Return the crops of some rows."""
        return CropRows(self.crops, self.indices[rows])


class Decoder(Protocol):
    """Decode the images of a batch."""

    def __call__(
        self,
        examples: Any,
        preprocess: Preprocess,
        indices: Int[np.ndarray, " rows"],
        out: Shaped[np.ndarray, "rows size size channels"],
        crops: CropRows | None = None,
    ) -> list[Note]:
        """Decode ``examples[i]`` for each index into a row of ``out``; zeros for an index of -1.

        If the rows of ``out`` have another shape than ``preprocess``, they are canvases for the
        whole photographs of a `tljax.data.packed.Packed`.
        """
        ...


def decoder(workers: int) -> Decoder:
    """Return a decoder that uses a number of processes; 0 uses threads, one for each core."""
    return _decode_in_threads if workers == 0 else _processes(workers)


def concurrent_batches(workers: int, rows: int) -> int:
    """Return how many batches to decode at a time so that no worker waits."""
    return 2 + 2 * (workers or cores()) * CHUNK // rows


def cores() -> int:
    """Return the number of cores that this process may use."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _decode_rows(
    examples: Any,
    preprocess: Preprocess,
    indices: np.ndarray,
    out: np.ndarray,
    first: int,
    crops: CropRows | None,
) -> list[Note]:
    """Decode a part of a batch that begins at row ``first``."""
    notes = []
    packed: Any = examples if hasattr(examples, "copy_square") else None
    whole = out.shape[1:] != preprocess.shape
    for row, index in enumerate(indices.tolist()):
        fault, remarks = None, []
        if index < 0:
            out[row] = 0
            continue
        try:
            if whole:
                packed.copy_whole(index, out[row])
            elif crops or not (packed and packed.copy_square(index, preprocess, out[row])):
                crop = crops and crops.crops.of(crops.indices[row], preprocess)
                if crop and packed:
                    crop = packed.crop(crop, index)
                out[row] = decode(examples[index], preprocess, remarks, crop=crop)
        except UnreadableImageError as error:
            fault = str(error)
            out[row] = 0
        if fault or remarks:
            notes.append(Note(first + row, fault, remarks))
    return notes


def _chunks(rows: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK)]


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "decode")


def _decode_in_threads(
    examples: Any,
    preprocess: Preprocess,
    indices: np.ndarray,
    out: np.ndarray,
    crops: CropRows | None = None,
) -> list[Note]:
    submit = _threads(cores()).submit
    futures = [
        submit(_decode_rows, examples, preprocess, indices[part], out[part], part.start, crop)
        for part in _chunks(len(out))
        for crop in [crops and crops.part(part)]
    ]
    return [note for future in futures for note in future.result()]


class _Processes:
    """Worker processes, the examples that they know, and the memory that they decode into."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context, _begin)
        self._lock = threading.Lock()
        self._known: OrderedDict[int, tuple[Any, _Shared]] = OrderedDict()
        self._slots: dict[int, SimpleQueue[_Slot]] = {}
        self._memories: list[str] = []
        atexit.register(self._close)

    def __call__(
        self,
        examples: Any,
        preprocess: Preprocess,
        indices: np.ndarray,
        out: np.ndarray,
        crops: CropRows | None = None,
    ) -> list[Note]:
        with self._lock:
            shared, slots = self._share(examples), self._memory(out[:CHUNK].nbytes)
        pending = deque[tuple[Future[list[Note]], slice, _Slot]]()
        notes, parts = list[Note](), deque(_chunks(len(out)))
        try:
            while parts or pending:
                # Wait for memory only while none is in use here: it would never become free.
                while parts and (slot := _take(slots, wait=not pending)):
                    part = parts.popleft()
                    crop = crops and crops.part(part)
                    task = shared, preprocess, indices[part], slot, out.shape[1:], part.start, crop
                    pending.append((self._pool.submit(_decode_into_slot, *task), part, slot))
                future, part, slot = pending[0]
                notes += future.result()
                out[part] = slot.array(out[part].shape, out.dtype)
                slots.put(pending.popleft()[2])
        except BrokenProcessPool as error:
            _processes.cache_clear()  # a later call starts new ones
            raise RequestError(
                "a process that decodes images was killed, perhaps because memory was short: choose"
                " fewer --workers"
            ) from error
        finally:
            for future, _, slot in pending:
                future.add_done_callback(lambda _, slot=slot: slots.put(slot))
        return notes

    def _share(self, examples: Any) -> "_Shared":
        """Put examples into shared memory, and remove those that were used longest ago."""
        if id(examples) not in self._known:
            self._known[id(examples)] = examples, _write_shared(examples)
        self._known.move_to_end(id(examples))
        while len(self._known) > _KNOWN:
            _, (_, shared) = self._known.popitem(last=False)
            _remove(shared.memory)
        return self._known[id(examples)][1]

    def _memory(self, size: int) -> "SimpleQueue[_Slot]":
        """Return the free slots of a size in bytes: three for each worker."""
        if size not in self._slots:
            count = 3 * self._workers
            memory = _allocate(count * size)
            self._memories.append(memory)
            self._slots[size] = SimpleQueue()
            for k in range(count):
                self._slots[size].put(_Slot(memory, k * size))
        return self._slots[size]

    def _close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for name in [*self._memories, *(shared.memory for _, shared in self._known.values())]:
            _remove(name)


@cache
def _processes(workers: int) -> _Processes:
    return _Processes(workers)


_KNOWN = 4
"""Examples that workers keep: those to train on, those to validate on, and two more."""


@dataclass(frozen=True)
class _Slot:
    """A place in shared memory for the images that a worker decodes at a time."""

    memory: str
    start: int

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return np.ndarray(shape, dtype, _bytes(self.memory), self.start)


def _take(slots: SimpleQueue[_Slot], *, wait: bool) -> _Slot | None:
    with suppress(Empty):
        return slots.get(block=wait)
    return None


@dataclass(frozen=True)
class _Shared:
    """Examples in shared memory: their pickle, and the arrays that belong to it."""

    memory: str
    bounds: tuple[tuple[int, int], ...]

    def load(self) -> Any:
        """Build the examples on the arrays where they lie."""
        memory = _bytes(self.memory)
        data, *arrays = (memory[start:end].toreadonly() for start, end in self.bounds)
        return pickle.loads(data, buffers=arrays)  # noqa: S301 - written by the parent process


def _write_shared(examples: Any) -> _Shared:
    arrays = list[pickle.PickleBuffer]()
    try:
        data = pickle.dumps(examples, protocol=5, buffer_callback=arrays.append)
    except Exception as error:  # objects raise many types
        raise RequestError(
            f"{type(examples).__name__} cannot be handed to other processes, choose --workers 0:"
            f" {first_line(error)}"
        ) from error
    parts = [memoryview(data), *(array.raw() for array in arrays)]
    ends = np.cumsum([-(-part.nbytes // 64) * 64 for part in parts]).tolist()
    starts = [0, *ends[:-1]]
    memory = _allocate(ends[-1])
    for start, part in zip(starts, parts, strict=True):
        _bytes(memory)[start : start + part.nbytes] = part
    bounds = tuple((start, start + x.nbytes) for start, x in zip(starts, parts, strict=True))
    return _Shared(memory, bounds)


class _Memory(SharedMemory):
    """Shared memory that stays mapped while arrays lie in it."""

    def __del__(self) -> None:
        """Leave it open: to close it under an array is an error."""


_MEMORIES: dict[str, _Memory] = {}


def _bytes(name: str) -> memoryview:
    """Return the shared memory of a name, in the process that allocated it or in a worker."""
    memory = _MEMORIES.get(name) or _MEMORIES.setdefault(name, _Memory(name))
    return memoryview(memory.buf or b"")


def _allocate(size: int) -> str:
    """Allocate shared memory of a size in bytes, and return its name.

    Raises:
        RequestError: there is not enough. Writing to it would end the process.
    """
    folder = Path("/dev/shm")  # noqa: S108 - where Linux has it
    if folder.is_dir() and (free := shutil.disk_usage(folder).free) < size:
        raise RequestError(
            f"--workers needs {size >> 20} MiB of shared memory, {folder} has {free >> 20}: choose"
            " fewer, or 0, or give a container more (docker run --shm-size)"
        )
    memory = _Memory(create=True, size=size)
    _MEMORIES[memory.name] = memory
    return memory.name


def _remove(name: str) -> None:
    """Free shared memory as soon as no process has arrays in it."""
    _MEMORIES.pop(name).unlink()


# In a worker.


def _begin() -> None:
    """Prepare a worker: Ctrl-C is for its parent, and it ends when that does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


@lru_cache(_KNOWN)
def _load_shared(shared: _Shared) -> Any:
    return shared.load()


def _decode_into_slot(
    shared: _Shared,
    preprocess: Preprocess,
    indices: np.ndarray,
    slot: _Slot,
    shape: tuple[int, ...],
    first: int,
    crops: CropRows | None,
) -> list[Note]:
    out = slot.array((len(indices), *shape), np.dtype(preprocess.dtype))
    return _decode_rows(_load_shared(shared), preprocess, indices, out, first, crops)
