"""Logits, features and activations for every image of a source, optionally cached on disk.

Pooled features (``stop=-1``) are for a linear probe. With the activations that enter a stage, the
later stages can be fine-tuned exactly without running the frozen prefix again.
"""

import sys
import timeit
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int, Key, Shaped

from tljax.data.augment import augment, epoch_key
from tljax.data.boxes import Crops, random_crops
from tljax.data.examples import Source, Splits
from tljax.data.loader import BatchRows, load_batches, shard_rows
from tljax.data.options import AugmentConfig, Loading
from tljax.features import store
from tljax.features.share import Share, share_of
from tljax.models import Model, abstract_activations, abstract_variables, apply
from tljax.runtime.errors import WriteError
from tljax.runtime.parallel import (
    data_mesh,
    gather_json,
    local_shards,
    pad_rows,
    replicate,
    round_up_to_devices,
    shard,
)
from tljax.runtime.prefetch import in_flight, prefetch
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.progress import track
from tljax.runtime.settings import Dtype
from tljax.runtime.types import Batch, Variables


class View(NamedTuple):
    """A random augmentation of every image, in place of the central crop.

    Attributes:
        config: the augmentations; see `AugmentConfig`.
        seed: seed of the run.
        number: number of the view; view ``k`` is the augmentation of epoch ``k``.
    """

    config: AugmentConfig
    seed: int
    number: int


class Outputs(NamedTuple):
    """The output of a stage for the images of a source that could be read.

    Of several processes each has some of the values; all of them know everything else.

    Attributes:
        values: ``[n, ...]`` output of the last stage that ran; an array, or a memory-mapped file.
            ``[m, ...]`` if this process has some of them.
        labels: ``[n]`` int32 class indices; -1 for an image without a label.
        indices: ``[n]`` int32 position of each image in the source.
        skipped: for images that could not be read, the reason by position in the source.
        rows: ``[m]`` which of the ``n`` images ``values`` are of, ascending; None for all.
    """

    values: Shaped[np.ndarray, "m ..."]
    labels: Int[np.ndarray, " n"]
    indices: Int[np.ndarray, " n"]
    skipped: dict[int, str]
    rows: Int[np.ndarray, " m"] | None = None

    @property
    def share(self) -> Share:
        """Return the values of this process; of those that all have, its part."""
        if self.rows is None:
            return share_of(self.values)
        return Share(self.values, self.rows, len(self.indices))

    def whole(self) -> "Outputs":
        """Gather the values of all processes, which call this together, on each of them."""
        if self.rows is None:
            return self
        return self._replace(values=self.share.whole(), rows=None)

    def pooled(self, prefix_tokens: int = 0) -> "Outputs":
        """Average maps or tokens over their positions, ``[n, channels]``; keep vectors unchanged.

        Args:
            prefix_tokens: number of leading tokens to leave out of the average; see `Stage`.
        """
        positions = tuple(range(1, self.values.ndim - 1))
        return self._replace(values=self.values[:, prefix_tokens:].mean(positions))


def compute_features(
    model: Model,
    variables: Variables,
    source: Source,
    loading: Loading,
    *,
    stop: str | int | None = -1,
    cache: bool = False,
    dtype: Dtype = "float32",
    view: View | None = None,
    description: str = "features",
) -> Outputs:
    """Compute the output of the stages before ``stop`` for every image of a source.

    With ``cache``, the result of an earlier call is reused. The cache, see `store`, is keyed by the
    weights, settings and code of those stages, the preprocessing, and the paths, sizes and times of
    the image files. A damaged file is detected and computed again. Several processes compute and
    keep a part of the values each, see `Outputs.whole`; they use no cache.

    Args:
        model: the network.
        variables: its variables.
        source: the images.
        loading: batch size, workers and devices; they do not change the values.
        stop: stage to stop before, by name or position; by default the last one, the head. None
            runs all stages and returns logits.
        cache: read the result from the cache, or write it there and map it into memory.
        dtype: dtype that the result is stored in.
        view: a random augmentation to apply to every image; by default the central crop.
        description: label of the progress bar.

    Raises:
        RequestError: an image cannot be read, and ``loading.on_bad_image`` is ``fail``.
        WriteError: the cache cannot be written, or has not enough space.
    """
    cache = cache and jax.process_count() == 1
    folder = (
        store.entry_folder(model, variables, stop, (source.cache_key, dtype, view))
        if cache
        else None
    )
    if folder:
        stored = store.read(folder)
        if stored is not None and not (stored[2] and loading.on_bad_image == "fail"):
            print(f"{description}  {len(stored[1])} images  from {folder}", file=sys.stderr)
            return _labeled(stored, source)
    mesh = data_mesh(loading.devices)
    key = view and epoch_key(view.seed, view.number)
    forward = partial(_forward, model, mesh, None, stop, dtype, view and view.config, key)
    skipped: dict[int, str] = {}
    batches = over_source(
        lambda variables, batch: forward(variables, batch.inputs, batch.indices, batch.boxes),
        variables,
        source,
        model.preprocess,
        loading,
        skipped,
        view and random_crops(view.config, view.seed, view.number),
    )
    batches = track_rows(batches, description, source)
    if not folder:
        return collect(batches, source, skipped)
    size = feature_bytes(model, len(source), stop, dtype)
    computed = store.write(folder, batches, size, skipped)
    print(f"{description}  cached in {folder}", file=sys.stderr)
    return _labeled(computed, source)


def _labeled(stored: store.Stored, source: Source) -> Outputs:
    values, indices, skipped = stored
    return Outputs(values, np.asarray(source.labels)[indices], indices, skipped)


def split_features(
    model: Model,
    variables: Variables,
    splits: Splits,
    loading: Loading,
    *,
    stop: str | int = -1,
    name: str = "",
) -> tuple[Outputs, Outputs]:
    """Compute the pooled features of the training and validation images, cached if possible.

    Args:
        model: the network.
        variables: its variables.
        splits: the images.
        loading: batch size, workers and devices.
        stop: stage to stop before, by name or position; by default the last one, the head.
        name: prefix of the labels of the progress bars.

    Raises:
        RequestError: an image cannot be read, and ``loading.on_bad_image`` is ``fail``.
    """
    prefix_tokens = model.stages[model.position(stop) - 1].prefix_tokens

    def compute(source: Source, part: str) -> Outputs:
        label = f"{name}{part} features"
        run = partial(
            compute_features, model, variables, source, loading, stop=stop, description=label
        )
        try:
            return run(cache=True).pooled(prefix_tokens)
        except WriteError as error:
            print(f"note: {label} are not cached: {error}", file=sys.stderr)
            return run().pooled(prefix_tokens)

    return compute(splits.train, "train"), compute(splits.val, "val")


def images_per_second(model: Model, variables: Variables, loading: Loading) -> float:
    """Measure the throughput of pooled features: the median of five batches, after compilation."""
    mesh = data_mesh(loading.devices)
    size, preprocess = round_up_to_devices(loading.batch_size, mesh), model.preprocess
    images = np.random.default_rng(0).integers(0, 256, (size, *preprocess.shape))
    images = images.astype(preprocess.dtype)
    arguments = replicate(variables, mesh), *shard((images, np.arange(size, dtype=np.int32)), mesh)
    forward = partial(_forward, model, mesh, None, -1, "float32", None, None)
    jax.block_until_ready(forward(*arguments))
    seconds = timeit.repeat(lambda: jax.block_until_ready(forward(*arguments)), number=1, repeat=5)
    return size / float(np.median(seconds))


def run_from_stage(
    model: Model,
    variables: Variables,
    features: Outputs,
    loading: Loading,
    *,
    start: str,
    stop: str | None = None,
) -> Outputs:
    """Run the stages from ``start`` on activations that were computed before.

    Of several processes each runs them on its share, and keeps the result of it.

    Args:
        model: the network.
        variables: its variables.
        features: the activations that enter ``start``.
        loading: batch size and devices.
        start: first stage to run.
        stop: stage to stop before; None runs all later stages and returns logits.
    """
    mesh = data_mesh(loading.devices)
    variables = replicate(variables, mesh)
    forward = partial(_forward, model, mesh, start, stop, "float32", None, None)
    inputs, rows, _ = features.share
    size = round_up_to_devices(loading.batch_size, mesh) // jax.process_count()
    starts = range(0, max(gather_json(len(inputs))), size)
    indices = np.arange(size, dtype=np.int32)  # only augmentation needs those of images
    batches = ((pad_rows(inputs[start : start + size], size), indices) for start in starts)
    on_devices = prefetch(shard(batch, mesh) for batch in batches)
    outputs = in_flight(forward(variables, *arrays) for arrays in on_devices)
    values = np.concatenate([local_shards(output) for output in outputs])[: len(inputs)]
    return features._replace(values=values, rows=rows if jax.process_count() > 1 else None)


def process_shard() -> tuple[int, int]:
    """Return the index of this process and the number of processes."""
    return jax.process_index(), jax.process_count()


def process_rows(rows: BatchRows) -> BatchRows:
    """Return this process's part, ``[batches, rows / processes]``, of the rows of all batches."""
    return shard_rows(rows, process_shard())


def feature_rows(
    features: Outputs, rows: BatchRows
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the inputs, mask and indices of batches of activations, as `Source.batch` takes them.

    Args:
        features: the activations.
        rows: ``[batches, rows]`` row numbers in ``features``; -1 for padding, which is masked.
    """
    for row in rows:
        mask = row >= 0
        inputs = np.asarray(features.values[np.where(mask, row, 0)])
        yield inputs, mask, np.where(mask, features.indices[row], -1)


def feature_bytes(
    model: Model, count: int, stop: str | int | None, dtype: Dtype = "float32"
) -> int:
    """Compute the size in bytes of the features of ``count`` images before stage ``stop``."""
    value = abstract_activations(model, abstract_variables(model), stop)
    return count * value.size * jnp.dtype(dtype).itemsize


# The key is a traced argument, so that all views share one compiled program.
@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _forward(
    model: Model,
    mesh: Mesh,
    start: str | None,
    stop: str | int | None,
    dtype: Dtype,
    augmentation: AugmentConfig | None,
    key: Key[jax.Array, ""] | None,
    variables: Variables,
    x: Shaped[jax.Array, "batch ..."],
    indices: Int[jax.Array, " batch"],
    boxes: Float[jax.Array, "batch 7"] | None = None,
) -> Shaped[jax.Array, "batch ..."]:
    if augmentation is not None and key is not None:
        preprocess = model.preprocess
        crop = boxes, preprocess.interpolation
        x = augment(x, indices, key, preprocess.size, augmentation, *crop)
    value = apply(model, variables, x, start=start, stop=stop).value.astype(dtype)
    return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, PartitionSpec("data")))


def trace_forward(
    model: Model,
    mesh: Mesh,
    variables: Variables,
    images: jax.ShapeDtypeStruct,
    *,
    start: str | None = None,
    stop: str | int | None = None,
    dtype: Dtype = "float32",
) -> jax.stages.Traced:
    """Trace the program that `compute_features` and `run_from_stage` run, to compile it elsewhere.

    Args:
        model: the network.
        mesh: devices that the program is for.
        variables: its variables; shapes and shardings are enough.
        images: shape and sharding of a batch of images, or of the activations that enter ``start``.
        start: first stage to run.
        stop: stage to stop before.
        dtype: dtype of the result.
    """
    indices = jax.ShapeDtypeStruct(images.shape[:1], np.int32, sharding=images.sharding)
    return _forward.trace(model, mesh, start, stop, dtype, None, None, variables, images, indices)


def over_source(
    forward: Callable[[Variables, Batch], jax.Array],
    variables: Variables,
    source: Source,
    preprocess: Preprocess,
    loading: Loading,
    skipped: dict[int, str],
    crops: Crops | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run a function over the images of a source, in batches over all processes together.

    Loading, transfer and computation overlap: two batches wait on the devices, and two outputs are
    computed before the first is read.

    Args:
        forward: maps the variables, replicated on all devices, and a batch on the devices to
            ``[batch, ...]``, sharded along its first axis.
        variables: variables of the network.
        source: the images.
        preprocess: the sizes and the filter that images are resized and cropped with.
        loading: batch size, workers and devices.
        skipped: dict that the images which this process could not read are added to: the reason by
            position in the source.
        crops: random crops in place of the central one.

    Yields:
        The rows of this process: values ``[n, ...]`` and positions in the source ``[n]``, without
        padding and without images that could not be read.
    """
    mesh = data_mesh(loading.devices)
    variables = replicate(variables, mesh)
    # Small sources get a smaller batch: a power of two, so that few programs are compiled.
    enough = 1 << max(len(source) - 1, 0).bit_length()
    batches = load_batches(
        source,
        preprocess,
        batch_size=round_up_to_devices(min(loading.batch_size, enough), mesh),
        shard=process_shard(),
        crops=crops,
        workers=loading.workers,
        on_bad_image=loading.on_bad_image,
        skipped=skipped,
    )
    on_devices = prefetch((batch, shard(batch, mesh)) for batch in batches)
    for values, batch in in_flight((forward(variables, on), batch) for batch, on in on_devices):
        mask = np.asarray(batch.mask)
        yield local_shards(values)[mask], np.asarray(batch.indices)[mask]


def track_rows(
    batches: Iterator[tuple[np.ndarray, np.ndarray]], description: str, source: Source
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Show the progress of the batches of `over_source`, of all processes together."""
    left, processes = len(source), jax.process_count()

    def size(part: tuple[np.ndarray, np.ndarray]) -> int:
        nonlocal left
        count = min(len(part[1]) * processes, left)
        left -= count
        return count

    return track(batches, description=description, total=len(source), size=size)


def gather_skipped(skipped: dict[int, str]) -> None:
    """Add the images that the other processes could not read to those of this one."""
    for others in gather_json(list(skipped.items())):
        skipped |= dict(others)


def collect(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], source: Source, skipped: dict[int, str]
) -> Outputs:
    """Concatenate the batches of `over_source`, with the images that all processes skipped."""
    values, indices = map(np.concatenate, zip(*batches, strict=True))
    gather_skipped(skipped)
    if jax.process_count() == 1:
        return _labeled((values, indices, skipped), source)
    read = np.delete(np.arange(len(source), dtype=np.int32), list(skipped))
    return _labeled((values, read, skipped), source)._replace(rows=np.searchsorted(read, indices))
