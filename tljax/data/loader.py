"""Sources to batches: grain reads and decodes ahead of the consumer, in threads or processes."""

import os
from collections.abc import Iterator, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import grain
import numpy as np
from absl import flags

from tljax.data.decode import decode, say
from tljax.data.sources import Source
from tljax.runtime.errors import RequestError, UnreadableImageError
from tljax.runtime.types import Batch, Preprocess


def num_batches(examples: Sized | int, batch_size: int) -> int:
    """The number of batches in one pass over a source, or over so many examples."""
    n = examples if isinstance(examples, int) else len(examples)
    return -(-n // batch_size)


def load_batches(
    source: Source,
    preprocess: Preprocess,
    *,
    batch_size: int,
    seed: int | None = None,
    epoch: int = 0,
    start: int = 0,
    shard: tuple[int, int] = (0, 1),
    multiple: int = 1,
    workers: int = 0,
    on_bad_image: Literal["skip", "fail"] = "skip",
    skipped: dict[int, str] | None = None,
) -> Iterator[Batch]:
    """Iterates once over a source in batches of a fixed shape.

    The same arguments give the same batches, whatever the number of workers or processes. Dropping
    the iterator early stops what decodes ahead.

    Args:
        source: the examples.
        preprocess: the geometry of the images.
        batch_size: the number of rows of a batch, over all processes together.
        seed: None keeps the order of the source; else the order is a permutation that depends on
            ``seed``, ``epoch`` and the number of examples alone. Not negative.
        epoch: which pass this is. Not negative.
        start: the number of batches to leave out at the beginning, to resume; they are not decoded.
        shard: (index of this process, number of processes). Every process gets equally many
            batches of ``batch_size // count`` rows; concatenated in the order of the processes,
            they are the batches of a single process.
        multiple: batches are padded to a multiple of so many rows, which devices can share.
        workers: the number of processes that decode; 0 decodes in threads. A process takes seconds
            to start and pays off for large sources, where threads contend for the interpreter. A
            script that uses them needs the ``if __name__ == "__main__"`` guard.
        on_bad_image: ``skip`` turns an image that cannot be read into a masked row of zeros that
            keeps its targets and index; ``fail`` raises.
        skipped: where such images are recorded, ``{index in the source: reason}``, when their batch
            is handed out.

    Yields:
        Batches of this process's rows; the last one is padded to its full size.

    Raises:
        RequestError: the arguments do not fit together; or, from the iteration and with ``fail``,
            an image cannot be read.
    """
    process, processes = shard
    if batch_size < 1 or (batch_size + -batch_size % multiple) % processes:
        raise RequestError(
            f"batch size {batch_size}: choose a positive multiple of {processes}, the number of"
            " processes"
        )
    if seed is not None and seed < 0:
        raise RequestError(f"seed {seed}: choose 0 or more")
    if start < 0:
        raise RequestError(f"first batch {start}: choose 0 or more")
    order = batch_rows(len(source), batch_size, seed, epoch, multiple)[start:]
    rows = order.reshape(len(order), processes, order.shape[1] // processes)[:, process]
    if not len(rows):
        return iter(())
    decoded = _dataset(_Decoded(source, preprocess, rows.ravel()), rows.shape[1], workers)
    return _iterate(source, rows, decoded, on_bad_image, skipped)


def refuse_none(source: Source, skipped: dict[int, str]) -> None:
    """Check that an image of a source could be read.

    Raises:
        RequestError: none could; the reason of the first is given.
    """
    if len(source) == len(skipped):
        index, reason = next(iter(skipped.items()), (0, "there is none"))
        raise RequestError(f"no image can be read; {source.names[index]}: {reason}")


def batch_rows(
    n: int, batch_size: int, seed: int | None = None, epoch: int = 0, multiple: int = 1
) -> np.ndarray:
    """Which of ``n`` examples stand in which batch of a pass.

    ``[batches, rows]`` int32, -1 for padding.

    The same arguments give the same answer for ever. ``rows`` is the batch size, rounded up to a
    multiple of ``multiple``; the arguments are those of `load_batches`.
    """
    order = np.arange(n)
    if seed is not None:
        # Sorting raw bits, as numpy promises never to change those; it does for its permutations.
        bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
        order = bits.argsort(kind="stable")
    rows = np.full((num_batches(n, batch_size), batch_size), -1, np.int32)
    rows.flat[:n] = order
    return np.pad(rows, ((0, 0), (0, -batch_size % multiple)), constant_values=-1)


@dataclass(frozen=True, eq=False)
class _Decoded:
    """Random access to images and what is wrong with them: what grain calls a data source."""

    source: Source
    preprocess: Preprocess
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> "_Row":
        example, fault, remarks = int(self.indices[index]), None, []
        image = np.zeros((self.preprocess.size, self.preprocess.size, 3), np.uint8)
        if example >= 0:
            try:
                image = decode(self.source.read(example), self.preprocess, remarks)
            except UnreadableImageError as error:
                fault = str(error)
        return image, fault, remarks


_Row = tuple[np.ndarray, str | None, list[str]]
_Rows = tuple[np.ndarray, tuple[str | None, ...], tuple[list[str], ...]]


def _stack(rows: Sequence[_Row]) -> _Rows:
    images, faults, remarks = zip(*rows, strict=True)
    return np.stack(images), faults, remarks


def _own(rows: _Rows) -> _Rows:
    """Copies images out of shared memory, where each array holds a file open."""
    return np.array(rows[0]), *rows[1:]


def _dataset(decoded: _Decoded, size: int, workers: int) -> grain.IterDataset[_Rows]:
    examples = grain.MapDataset.source(decoded)
    if workers == 0:
        # Threads share single images, so that the first batch comes as early as it can.
        threads = os.cpu_count() or 1
        ahead = grain.ReadOptions(threads, prefetch_buffer_size=max(2 * size, threads))
        return examples.to_iter_dataset(ahead).batch(size, batch_fn=_stack)
    if not flags.FLAGS.is_parsed():  # grain's processes read a flag, and fail without this
        flags.FLAGS.mark_as_parsed()
    # A process makes whole batches, as handing over single images costs too much. grain deals the
    # batches to the processes in turn, so the order stays.
    one_ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    batches = examples.batch(size, batch_fn=_stack).to_iter_dataset(one_ahead)
    processes = min(workers, len(decoded) // size)
    return batches.mp_prefetch(grain.MultiprocessingOptions(processes)).map(_own)


def _iterate(
    source: Source,
    rows: np.ndarray,
    decoded: grain.IterDataset[_Rows],
    on_bad_image: str,
    skipped: dict[int, str] | None,
) -> Iterator[Batch]:
    with closing(iter(decoded)) as batches:
        for indices, (images, faults, remarks) in zip(rows, batches, strict=True):
            for index in np.flatnonzero([*map(bool, remarks)]):
                say(source.names[indices[index]], *remarks[index])
            bad = {int(i): fault for i, fault in zip(indices, faults, strict=True) if fault}
            if bad and on_bad_image == "fail":
                index, fault = next(iter(bad.items()))
                raise RequestError(
                    f"{source.names[index]}: {fault}; repair or remove it, or skip bad images"
                )
            if skipped is not None:
                skipped.update(bad)
            mask = (indices >= 0) & [fault is None for fault in faults]
            yield source.batch(images, mask, indices)
