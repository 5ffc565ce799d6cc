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
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import count
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


class Flag(Protocol):
    """What is set once."""

    def set(self) -> None: ...  # noqa: D102
    def is_set(self) -> bool: ...  # noqa: D102


def decoder(workers: int) -> tuple[Decoder, Flag]:
    """Return a decoder that uses a number of processes; 0 uses threads, one for each core.

    Also returns a flag to set when no one needs its batches any more: those that are being decoded
    end after the next image, unfinished.
    """
    if workers == 0:
        stopped = threading.Event()
        return partial(_decode_in_threads, stopped), stopped
    processes = _processes(workers)
    stopped = processes.new_flag()
    return partial(processes, stopped), stopped


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
    stopped: Flag,
) -> list[Note]:
    """Decode a part of a batch that begins at row ``first``."""
    notes = []
    packed: Any = examples if hasattr(examples, "copy_square") else None
    whole = out.shape[1:] != preprocess.shape
    for row, index in enumerate(indices.tolist()):
        fault, remarks = None, []
        if stopped.is_set():
            break
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


def _chunks(
    indices: np.ndarray, crops: CropRows | None
) -> list[tuple[slice, np.ndarray, CropRows | None]]:
    """Divide a batch: the rows of each chunk, their indices and their crops."""
    rows = len(indices)
    parts = [slice(start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK)]
    return [(part, indices[part], crops and crops.part(part)) for part in parts]


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "decode")


def _decode_in_threads(
    stopped: Flag,
    examples: Any,
    preprocess: Preprocess,
    indices: np.ndarray,
    out: np.ndarray,
    crops: CropRows | None = None,
) -> list[Note]:
    submit = _threads(cores()).submit
    futures = [
        submit(_decode_rows, examples, preprocess, chosen, out[part], part.start, crop, stopped)
        for part, chosen, crop in _chunks(indices, crops)
    ]
    return [note for future in futures for note in future.result()]


def start_processes(
    workers: int, begin: Callable[..., None] | None = None, *args: Any
) -> ProcessPoolExecutor:
    """Start worker processes, which leave signals to this process and end when it does.

    Args:
        workers: how many.
        begin: a function that each worker calls first.
        *args: its arguments.
    """
    # Threads of this process may hold locks, which a fork would copy.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (begin, args))
    with _without_signals():
        for _ in range(workers):
            pool.submit(os.getpid)  # starts one
    return pool


@contextmanager
def _without_signals() -> Iterator[None]:
    """Block signals in this thread, and so in processes that it starts.

    Ctrl-C and the SIGTERM of a scheduler go to workers, too, but are for this process, which may
    need workers to go on with until it has saved its state.
    """
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    signals = {signal.SIGINT, signal.SIGTERM} if _TELLS_SENDER else {signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_TELLS_SENDER = hasattr(signal, "sigwaitinfo")  # not on macOS


class _Processes:
    """Worker processes, the examples that they know, and the memory that they decode into."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool = start_processes(workers)
        self._ready = self._pool.submit(os.getpid)
        self._lock = threading.Lock()
        self._known: OrderedDict[int, tuple[Any, _Shared]] = OrderedDict()
        self._users = Counter[_Shared]()  # calls that use them now
        self._slots: dict[int, SimpleQueue[_Slot]] = {}
        self._flags, self._numbers = _allocate(_FLAGS), count()
        self._memories = [self._flags]
        atexit.register(self._close)

    def new_flag(self) -> "_SharedFlag":
        """Return a flag that workers see."""
        flag = _SharedFlag(self._flags, next(self._numbers) % _FLAGS)
        flag.write(0)
        return flag

    def __call__(
        self,
        stopped: Flag,
        examples: Any,
        preprocess: Preprocess,
        indices: np.ndarray,
        out: np.ndarray,
        crops: CropRows | None = None,
    ) -> list[Note]:
        with self._lock:
            shared, slots = self._share(examples), self._memory(out[:CHUNK].nbytes)
            self._users[shared] += 1
        pending = deque[tuple[Future[list[Note]], slice, _Slot]]()
        notes, chunks = list[Note](), deque(_chunks(indices, crops))
        try:
            while chunks or pending:
                # Wait for memory only while none is in use here: it would never become free.
                while chunks and (slot := _take(slots, wait=not pending)):
                    part, chosen, crop = chunks.popleft()
                    task = shared, preprocess, chosen, slot, out.shape[1:], part.start, crop
                    future = self._pool.submit(_decode_into_slot, *task, stopped)
                    pending.append((future, part, slot))
                future, part, slot = pending[0]
                notes += future.result()
                out[part] = slot.array(out[part].shape, out.dtype)
                slots.put(pending.popleft()[2])
        except BrokenProcessPool as error:
            _processes.cache_clear()  # a later call starts new ones
            raise RequestError(_KILLED if self._have_started() else _NOT_STARTED) from error
        finally:
            for future, _, slot in pending:
                future.cancel()
                future.add_done_callback(lambda _, slot=slot: slots.put(slot))
            with self._lock:
                self._users[shared] -= 1
        return notes

    def _have_started(self) -> bool:
        return self._ready.done() and self._ready.exception() is None

    def _share(self, examples: Any) -> "_Shared":
        """Put examples into shared memory; remove unused ones that were used longest ago."""
        if id(examples) not in self._known:
            unused = [key for key, (_, one) in self._known.items() if not self._users[one]]
            for key in unused[: max(0, len(self._known) + 1 - _KNOWN)]:
                _remove(self._known.pop(key)[1].memory)
            self._known[id(examples)] = examples, _write_shared(examples)
        self._known.move_to_end(id(examples))
        return self._known[id(examples)][1]

    def _memory(self, size: int) -> "SimpleQueue[_Slot]":
        """Return the free slots of a size in bytes: three for each worker."""
        if size not in self._slots:
            slots = 3 * self._workers
            memory = _allocate(slots * size)
            self._memories.append(memory)
            self._slots[size] = SimpleQueue()
            for k in range(slots):
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

_FLAGS = 4096
"""Flags of passes that may be under way at the same time."""

_KILLED = (
    "a process that decodes images was killed, perhaps because memory was short: choose fewer"
    " --workers"
)
_NOT_STARTED = (
    "processes that decode images end before they begin: a program that uses workers must be a file"
    ' with the guard if __name__ == "__main__"; or choose 0'
)


@dataclass(frozen=True)
class _SharedFlag:
    """A byte of shared memory as a flag."""

    memory: str
    position: int

    def write(self, value: int) -> None:
        _bytes(self.memory)[self.position] = value

    def set(self) -> None:
        self.write(1)

    def is_set(self) -> bool:
        return _bytes(self.memory)[self.position] != 0


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
        memory = memoryview(_Memory(self.memory).buf or b"")
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
        """Close its file. The mapping is left to the arrays, the last of which ends it."""
        self._buf = self._mmap = None
        self.close()


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


def _begin(begin: Callable[..., None] | None, args: tuple[Any, ...]) -> None:
    """Prepare a worker: signals are for its parent, and it ends when that does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if _TELLS_SENDER:
        threading.Thread(target=_end_when_told, daemon=True).start()
    if begin:
        begin(*args)


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _end_when_told() -> None:
    """Wait for the SIGTERM by which the pool of the parent ends its workers."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
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
    stopped: Flag,
) -> list[Note]:
    out = slot.array((len(indices), *shape), np.dtype(preprocess.dtype))
    return _decode_rows(_load_shared(shared), preprocess, indices, out, first, crops, stopped)
