"""Batches of decoded images: grain asks for batches ahead, which `workers` decodes."""

from collections.abc import Iterator, Sized
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Literal

import grain
import numpy as np
from jaxtyping import Float, Int

from tljax.data.boxes import Crops
from tljax.data.examples import Source
from tljax.data.packed import Packed, describe_resize
from tljax.data.pictures import print_remarks
from tljax.data.workers import CropRows, Decoder, Flag, Note, concurrent_batches, decoder
from tljax.runtime.errors import RequestError
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
    crops: Crops | None = None,
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
        crops: random crops in place of the central one.
        workers: number of processes that decode images; 0 decodes in threads, one for each core.
            Processes start once for the whole program, in a second; on many cores they are faster,
            as threads contend for the interpreter. A script that uses them needs the
            ``if __name__ == "__main__"`` guard.
        on_bad_image: ``skip`` replaces an image that cannot be read by a masked row of zeros with
            its targets and index; ``fail`` raises.
        skipped: a dict that such images are added to, ``{index in the source: reason}``, when their
            batch is yielded.

    Yields:
        This process's rows of each batch: inputs ``[rows, size, size, channels]`` of the dtype of
        ``preprocess``; the last batch is padded to its full size. With ``crops``, packed pixels
        come as whole photographs, with the boxes that `augment` crops on the device.

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
    if note := describe_resize(source.examples, preprocess):
        print_remarks("data", note)
    rows = batch_rows(len(source), batch_size, seed, epoch, multiple, frequencies)
    rows = shard_rows(rows[start:], shard)
    if not len(rows):
        return iter(())
    decode, stopped = decoder(workers)
    batches = _Batches(source, preprocess, crops, rows, decode)
    ahead = concurrent_batches(workers, rows.shape[1])
    options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
    decoded = grain.MapDataset.source(batches).to_iter_dataset(options)
    return _iterate(source, rows, decoded, stopped, on_bad_image, skipped)


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


_Loaded = tuple[np.ndarray, np.ndarray | None, list[Note]]
"""Images, the boxes to crop on the device, and what is to be said of them."""


@dataclass(frozen=True, eq=False)
class _Batches:
    """Random access to decoded batches, as a grain data source."""

    source: Source
    preprocess: Preprocess
    crops: Crops | None
    rows: BatchRows
    decode: Decoder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> _Loaded:
        rows, preprocess, boxes = self.rows[index], self.preprocess, None
        examples, positions = self.source.locate(rows)
        crops, shape = self.crops and CropRows(self.crops, rows), preprocess.shape
        if self.crops and isinstance(examples, Packed) and examples.canvas:
            # Cropped on the device, as the host would take longer than to copy.
            boxes = examples.canvas_boxes(self.crops, rows, positions, preprocess)
            crops, shape = None, examples.canvas
        images = np.empty((len(rows), *shape), preprocess.dtype)
        return images, boxes, self.decode(examples, preprocess, positions, images, crops)


def _iterate(
    source: Source,
    rows: BatchRows,
    decoded: grain.IterDataset[_Loaded],
    stopped: Flag,
    on_bad_image: str,
    skipped: dict[int, str] | None,
) -> Iterator[Batch]:
    with closing(iter(decoded)) as batches, ExitStack() as end:
        end.callback(stopped.set)
        for indices, (images, boxes, notes) in zip(rows, batches, strict=True):
            mask = indices >= 0
            for note in notes:
                index = int(indices[note.row])
                print_remarks(source.names[index], *note.remarks)
                if note.fault is None:
                    continue
                if on_bad_image == "fail":
                    name = source.names[index]
                    raise RequestError(f"{name}: {note.fault}; repair, remove or skip it")
                if skipped is not None:
                    skipped[index] = note.fault
                mask[note.row] = False
            yield source.batch(images, mask, indices)._replace(boxes=boxes)
