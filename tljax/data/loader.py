"""Batches of decoded images: grain reads and decodes ahead, in threads or processes."""

import os
from collections.abc import Iterator, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import grain
import numpy as np
from absl import flags
from jaxtyping import Float, Int

from tljax.data.decode import decode
from tljax.data.examples import Source
from tljax.data.pictures import print_remarks
from tljax.runtime.errors import RequestError, UnreadableImageError
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.types import Batch

BatchRows = Int[np.ndarray, "batches rows"]
"""Indices of the examples of each batch; -1 for padding."""


def num_batches(examples: Sized | int, batch_size: int) -> int:
    """Return the number of batches in one pass over a source or a number of examples."""
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
    frequencies: Float[np.ndarray, " n"] | None = None,
    workers: int = 0,
    on_bad_image: Literal["skip", "fail"] = "skip",
    skipped: dict[int, str] | None = None,
) -> Iterator[Batch]:
    """Iterate once over a source in batches of a fixed shape.

    The batches do not depend on the number of workers or processes. Deleting the iterator stops
    decoding ahead.

    Args:
        source: the examples.
        preprocess: the sizes and the filter that images are resized and cropped with, the number
            of channels and the dtype.
        batch_size: number of rows of a batch, over all processes together.
        seed: seed of the shuffling, 0 or more; the order is a permutation that depends on ``seed``,
            ``epoch`` and the number of examples only. None keeps the order of the source.
        epoch: index of the pass, 0 or more; each one is shuffled differently.
        start: number of batches to skip at the beginning, to resume; they are not decoded.
        shard: (index of this process, number of processes). Each process gets the same number of
            batches of ``batch_size // processes`` rows; concatenated in the order of the processes,
            they are the batches of a single process.
        multiple: pad batches to a multiple of this number of rows, to divide them among devices.
        frequencies: how often each example is drawn, relative to the others; see `batch_rows`.
        workers: number of processes that decode images; 0 decodes in threads. Processes take
            seconds to start and are faster for large sources, where threads contend for the
            interpreter. A script that uses them needs the ``if __name__ == "__main__"`` guard.
        on_bad_image: ``skip`` replaces an image that cannot be read by a masked row of zeros with
            its targets and index; ``fail`` raises.
        skipped: a dict that such images are added to, ``{index in the source: reason}``, when their
            batch is yielded.

    Yields:
        This process's rows of each batch: inputs ``[rows, size, size, channels]`` of the dtype of
        ``preprocess``; the last batch is padded to its full size.

    Raises:
        RequestError: an argument is out of its range; or, during the iteration and with ``fail``,
            an image cannot be read.
    """
    _, processes = shard
    if batch_size < 1 or (batch_size + -batch_size % multiple) % processes:
        raise RequestError(
            f"batch size {batch_size}: choose a positive multiple of {processes}, the process count"
        )
    if seed is not None and seed < 0:
        raise RequestError(f"seed {seed}: choose 0 or more")
    if start < 0:
        raise RequestError(f"first batch {start}: choose 0 or more")
    rows = batch_rows(len(source), batch_size, seed, epoch, multiple, frequencies)
    rows = shard_rows(rows[start:], shard)
    if not len(rows):
        return iter(())
    decoded = _dataset(_Decoded(source, preprocess, rows.ravel()), rows.shape[1], workers)
    return _iterate(source, rows, decoded, on_bad_image, skipped)


def require_readable_image(source: Source, skipped: dict[int, str]) -> None:
    """Check that at least one image of a source could be read.

    Args:
        source: the images.
        skipped: the reason by index, for each image that could not be read.

    Raises:
        RequestError: no image could be read; the message gives the reason for the first one.
    """
    if len(source) == len(skipped):
        index, reason = next(iter(skipped.items()), (0, "there is none"))
        raise RequestError(f"no image can be read; {source.names[index]}: {reason}")


def batch_rows(
    n: int,
    batch_size: int,
    seed: int | None = None,
    epoch: int = 0,
    multiple: int = 1,
    frequencies: Float[np.ndarray, " n"] | None = None,
) -> BatchRows:
    """Assign ``n`` examples to the batches of a pass.

    The assignment never changes between versions.

    Args:
        n: number of examples.
        batch_size: number of rows of a batch.
        seed: seed of the shuffling; None keeps the order.
        epoch: index of the pass.
        multiple: pad batches to a multiple of this number of rows.
        frequencies: ``[n]`` how often each example is drawn, relative to the others: ``n`` examples
            are drawn with replacement, each as often as its share of the sum, rounded up or down at
            random (systematic sampling). By default each is drawn once. Needs a seed.

    Returns:
        ``[batches, rows]`` int32 indices of examples, -1 for padding, where ``rows`` is the batch
        size rounded up to a multiple of ``multiple``.
    """
    order = np.arange(n)
    if seed is not None:
        # numpy guarantees the raw bits of a generator across versions, but not its permutations.
        bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
        order = bits.argsort(kind="stable")
        if frequencies is not None:
            ends = np.cumsum(frequencies, dtype=np.float64)
            points = (np.arange(n) + bits[0] / 2**64) * (ends[-1] / n)
            order = np.minimum(np.searchsorted(ends, points, side="right"), n - 1)[order]
    rows = np.full((num_batches(n, batch_size), batch_size), -1, np.int32)
    rows.flat[:n] = order
    return np.pad(rows, ((0, 0), (0, -batch_size % multiple)), constant_values=-1)


def shard_rows(rows: BatchRows, shard: tuple[int, int]) -> BatchRows:
    """Return one process's part, ``[batches, rows / processes]``, of the rows of all batches.

    Args:
        rows: ``[batches, rows]``, from `batch_rows`.
        shard: (index of the process, number of processes).
    """
    process, processes = shard
    return rows.reshape(len(rows), processes, rows.shape[1] // processes)[:, process]


@dataclass(frozen=True, eq=False)
class _Decoded:
    """Random access to decoded images with their faults and remarks, as a grain data source."""

    source: Source
    preprocess: Preprocess
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> "_Row":
        example, fault, remarks = int(self.indices[index]), None, []
        image = np.zeros(self.preprocess.shape, self.preprocess.dtype)
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


def _dataset(decoded: _Decoded, size: int, workers: int) -> grain.IterDataset[_Rows]:
    examples = grain.MapDataset.source(decoded)
    if workers == 0:
        # Threads decode single images rather than batches, so that the first batch is early.
        threads = os.cpu_count() or 1
        ahead = grain.ReadOptions(threads, prefetch_buffer_size=max(2 * size, threads))
        return examples.to_iter_dataset(ahead).batch(size, batch_fn=_stack)
    if not flags.FLAGS.is_parsed():  # grain's processes read an absl flag
        flags.FLAGS.mark_as_parsed()
    # Processes decode whole batches, as transferring single images is slow. grain assigns batches
    # to processes round-robin, so their order is kept.
    one_ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    batches = examples.batch(size, batch_fn=_stack).to_iter_dataset(one_ahead)
    processes = min(workers, len(decoded) // size)
    batches = batches.mp_prefetch(grain.MultiprocessingOptions(processes))
    # Arrays are copied out of shared memory, where each one keeps a file open.
    return batches.map(lambda rows: (np.array(rows[0]), *rows[1:]))


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
                print_remarks(source.names[indices[index]], *remarks[index])
            bad = {int(i): fault for i, fault in zip(indices, faults, strict=True) if fault}
            if bad and on_bad_image == "fail":
                index, fault = next(iter(bad.items()))
                raise RequestError(f"{source.names[index]}: {fault}; repair, remove or skip it")
            if skipped is not None:
                skipped.update(bad)
            mask = (indices >= 0) & [fault is None for fault in faults]
            yield source.batch(images, mask, indices)
