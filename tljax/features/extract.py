"""What a network, or its first stages, says of every image of a source; kept on disk if asked.

The logits; the pooled features for a probe (``stop=-1``); or the activations that enter any
stage, on which fine-tuning the rest is exact and skips the frozen prefix.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tljax.data.augment import augment, epoch_key
from tljax.data.loader import batch_rows, load_batches
from tljax.data.options import AugmentConfig, Loading
from tljax.data.sources import Source, Splits
from tljax.features import store
from tljax.models import Model, abstract_variables, apply
from tljax.runtime.errors import WriteError
from tljax.runtime.parallel import (
    data_mesh,
    divisible,
    gather,
    gather_json,
    local_rows,
    replicate,
    shard,
)
from tljax.runtime.progress import track
from tljax.runtime.settings import Dtype
from tljax.runtime.types import Batch, Preprocess, Variables


class View(NamedTuple):
    """One random augmentation of every image, instead of the central crop.

    Attributes:
        config: see `AugmentConfig`.
        seed: of the run.
        number: which view; view ``k`` is what epoch ``k`` would draw.
    """

    config: AugmentConfig
    seed: int
    number: int


class Outputs(NamedTuple):
    """What a stage returned for the images of a source that could be read.

    Attributes:
        values: ``[n, ...]`` the output of the last stage that ran; an array, or a file mapped into
            memory.
        labels: ``[n]`` int32.
        indices: ``[n]`` int32 position of each row in the source.
        skipped: reason by position, for the images that could not be read.
    """

    values: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    skipped: dict[int, str]

    def pooled(self, prefix_tokens: int = 0) -> "Outputs":
        """Average maps over their positions, ``[n, channels]``; vectors stay as they are.

        Args:
            prefix_tokens: how many tokens do not count; see `Stage`.
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
    """Run the stages before ``stop`` over a whole source, or map what an earlier run kept.

    The cache, see `store`, is keyed by content: the weights of those stages, their code and
    preprocessing, the bytes of the files. A file in it that is damaged is found and computed anew.
    Several processes compute a share each and all get everything; they use no cache.

    Args:
        model: the network.
        variables: its variables.
        source: the images.
        loading: see `Loading`; changes no value.
        stop: stage to stop before, by name or position, by default the head; None runs to the
            logits.
        cache: look in the cache, and keep the result there instead of in memory.
        dtype: in which the result is kept.
        view: a random augmentation of every image.
        description: of the progress bar.

    Raises:
        RequestError: an image cannot be read, and ``loading.on_bad_image`` is ``fail``.
        WriteError: the cache cannot be written, or has no room.
    """
    cache = cache and jax.process_count() == 1
    folder = store.folder(model, variables, stop, (source.digest, dtype, view)) if cache else None
    if folder:
        kept = store.read(folder)
        if kept is not None and not (kept[2] and loading.on_bad_image == "fail"):
            print(f"{description}  {len(kept[1])} images  from {folder}", file=sys.stderr)
            return _labelled(kept, source)
    skipped: dict[int, str] = {}
    batches = track(
        _forward_source(model, variables, source, loading, stop, dtype, view, skipped),
        description=description,
        total=len(source),
        size=lambda part: len(part[1]),
    )
    if not folder:
        return collect(batches, source, skipped)
    size = feature_bytes(model, len(source), stop, dtype)
    computed = store.write(folder, batches, size, skipped)
    print(f"{description}  kept in {folder}", file=sys.stderr)
    return _labelled(computed, source)


def _labelled(stored: store.Stored, source: Source) -> Outputs:
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
    """Compute what a probe learns from and is judged by: pooled features, cached if possible.

    Args:
        model: the network.
        variables: its variables.
        splits: the images.
        loading: see `Loading`.
        stop: stage to stop before, by name or position, by default the head.
        name: what the progress bars begin with.

    Raises:
        RequestError: as `compute_features`.
    """
    prefix_tokens = model.stages[model.position(stop) - 1].prefix_tokens

    def compute(source: Source, part: str) -> Outputs:
        described = f"{name}{part} features"
        run = partial(
            compute_features, model, variables, source, loading, stop=stop, description=described
        )
        try:
            return run(cache=True).pooled(prefix_tokens)
        except WriteError as error:
            print(f"note: {described} are not kept: {error}", file=sys.stderr)
            return run().pooled(prefix_tokens)

    return compute(splits.train, "train"), compute(splits.val, "val")


def images_per_second(
    model: Model, variables: Variables, loading: Loading, *, repeats: int = 5
) -> float:
    """Throughput of the pooled features: the median of a few batches, after compilation."""
    mesh = data_mesh(loading.devices)
    size, side = divisible(loading.batch_size, mesh), model.preprocess.size
    images = np.random.default_rng(0).integers(0, 256, (size, side, side, 3)).astype(np.uint8)
    arguments = replicate(variables, mesh), *shard((images, np.arange(size, dtype=np.int32)), mesh)
    forward = partial(_forward, model, mesh, None, -1, "float32", None, None)
    jax.block_until_ready(forward(*arguments))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(forward(*arguments))
        seconds.append(time.perf_counter() - began)
    return size / float(np.median(seconds))


def advance(
    model: Model,
    variables: Variables,
    features: Outputs,
    loading: Loading,
    *,
    start: str,
    stop: str | None = None,
) -> Outputs:
    """Runs further stages, from ``start``, over activations that were computed before.

    Args:
        model: the network.
        variables: its variables.
        features: activations that enter ``start``.
        loading: for the batch size and the devices.
        start: first stage to run.
        stop: stage to stop before; None runs to the logits.
    """
    mesh = data_mesh(loading.devices)
    variables = replicate(variables, mesh)
    forward = partial(_forward, model, mesh, start, stop, "float32", None, None)
    rows = batch_rows(len(features.labels), loading.batch_size, multiple=mesh.size)
    outputs = [
        gather(local_rows(forward(variables, *shard((inputs, indices), mesh))))
        for inputs, _, indices in feature_rows(features, process_rows(rows))
    ]
    return features._replace(values=np.concatenate(outputs)[rows.ravel() >= 0])


def process_shard() -> tuple[int, int]:
    """Which of how many processes this one is."""
    return jax.process_index(), jax.process_count()


def process_rows(rows: np.ndarray) -> np.ndarray:
    """This process's part, ``[batches, rows / processes]``, of all rows of all batches."""
    process, processes = process_shard()
    return rows.reshape(len(rows), processes, rows.shape[1] // processes)[:, process]


def feature_rows(
    features: Outputs, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cut activations into batches of one shape: inputs, mask and indices, as `Source.batch` takes.

    Args:
        features: the activations.
        rows: ``[batches, rows]`` of ``features``, -1 for padding, which comes out masked.
    """
    for row in rows:
        mask = row >= 0
        inputs = np.asarray(features.values[np.where(mask, row, 0)])
        yield inputs, mask, np.where(mask, features.indices[row], -1)


def feature_bytes(
    model: Model, count: int, stop: str | int | None, dtype: Dtype = "float32"
) -> int:
    """What the features of ``count`` images take at the stage before ``stop``, in bytes."""
    size = model.preprocess.size
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
    value = jax.eval_shape(
        lambda variables, x: apply(model, variables, x, stop=stop).value,
        abstract_variables(model),
        images,
    )
    return count * value.size * jnp.dtype(dtype).itemsize


def augmentable(model: Model) -> Model:
    """The model whose preprocessing keeps the margin around the crop, for `augment` to cut from."""
    preprocess = model.preprocess
    return replace(model, preprocess=replace(preprocess, size=preprocess.resize))


# The key of a view is an argument, or every view would compile its own.
@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _forward(
    model: Model,
    mesh: Mesh,
    start: str | None,
    stop: str | int | None,
    dtype: Dtype,
    augmentation: AugmentConfig | None,
    key: jax.Array | None,
    variables: Variables,
    x: jax.Array,
    indices: jax.Array,
) -> jax.Array:
    if augmentation is not None and key is not None:
        x = augment(x, indices, key, model.preprocess.size, augmentation)
    value = apply(model, variables, x, start=start, stop=stop).value.astype(dtype)
    return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, PartitionSpec("data")))


def _forward_source(
    model: Model,
    variables: Variables,
    source: Source,
    loading: Loading,
    stop: str | int | None,
    dtype: Dtype,
    view: View | None,
    skipped: dict[int, str],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    mesh = data_mesh(loading.devices)
    augmentation = view and view.config
    key = view and epoch_key(view.seed, view.number)
    forward = partial(_forward, model, mesh, None, stop, dtype, augmentation, key)
    preprocess = (augmentable(model) if view else model).preprocess
    return over_source(
        lambda variables, batch: forward(variables, *shard((batch.inputs, batch.indices), mesh)),
        variables,
        source,
        preprocess,
        loading,
        skipped,
    )


def over_source(
    forward: Callable[[Variables, Batch], jax.Array],
    variables: Variables,
    source: Source,
    preprocess: Preprocess,
    loading: Loading,
    skipped: dict[int, str],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What a network makes of the images of a source, in batches of all processes together.

    Args:
        forward: the variables, on all devices, and a batch on the host to ``[batch, ...]``, split
            along its first axis over the devices.
        variables: of the network.
        source: the images.
        preprocess: how they are cut.
        loading: how they are read.
        skipped: is filled in with the reason by position, of this process.

    Yields:
        Values and positions in the source, without padding and what could not be read.
    """
    mesh = data_mesh(loading.devices)
    variables = replicate(variables, mesh)
    # One photograph need not fill a batch of 32; a power of two, so that few programs are compiled.
    enough = 1 << max(len(source) - 1, 0).bit_length()
    for batch in load_batches(
        source,
        preprocess,
        batch_size=divisible(min(loading.batch_size, enough), mesh),
        shard=process_shard(),
        workers=loading.workers,
        on_bad_image=loading.on_bad_image,
        skipped=skipped,
    ):
        values = gather(local_rows(forward(variables, batch)))
        mask = gather(np.asarray(batch.mask))
        yield values[mask], gather(np.asarray(batch.indices))[mask]


def collect(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], source: Source, skipped: dict[int, str]
) -> Outputs:
    """All that `over_source` yields, in memory, with what any process could not read."""
    values, indices = map(np.concatenate, zip(*batches, strict=True))
    for others in gather_json(list(skipped.items())):
        skipped |= dict(others)
    return Outputs(values, np.asarray(source.labels)[indices], indices, skipped)
