"""What a network, or its first stages, says of every image of a source; kept on disk if asked.

The logits; the pooled features for a probe (``stop="head"``); or the activations that enter any
stage, on which fine-tuning the rest is exact and skips the frozen prefix.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from tljax.data.loader import load_batches
from tljax.data.sources import Source
from tljax.files import cache_dir
from tljax.models import Model, abstract_variables, apply
from tljax.parallel import data_mesh, divisible, replicate, shard
from tljax.pretrained.formats import read_tensors, write_safetensors
from tljax.progress import track
from tljax.trees import flatten
from tljax.types import Batch, Variables


@dataclass(frozen=True)
class Loading:
    """How images are read and spread over devices. No result depends on it.

    Attributes:
        batch_size: images a step, rounded up to a multiple of the number of devices.
        workers: number of processes that decode; 0 decodes in threads.
        devices: number of devices; by default all.
        on_bad_image: ``skip`` leaves unreadable images out and lists them; ``fail`` stops.
    """

    batch_size: int = 32
    workers: int = 0
    devices: int | None = None
    on_bad_image: Literal["skip", "fail"] = "skip"


class Features(NamedTuple):
    """Activations of the images of a source that could be read.

    Attributes:
        values: ``[n, ...]`` float32: the output of the last stage that ran.
        labels: ``[n]`` int32.
        indices: ``[n]`` int32 position of each row in the source.
        skipped: reason by position, for the images that could not be read.
    """

    values: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    skipped: dict[int, str]

    def pooled(self) -> "Features":
        """Feature maps averaged over their positions, ``[n, channels]``; vectors as they are."""
        positions = tuple(range(1, self.values.ndim - 1))
        return self._replace(values=self.values.mean(positions))


def compute_features(
    model: Model,
    variables: Variables,
    source: Source,
    loading: Loading,
    *,
    stop: str | None = "head",
    cache: bool = False,
    description: str = "features",
) -> Features:
    """Runs the stages before ``stop`` over a whole source, or reads what an earlier run kept.

    The cache is keyed by content: the weights of those stages, their preprocessing, the bytes of
    the files. A file in it that is damaged is found and computed anew.

    Args:
        model: the network.
        variables: its variables.
        source: the images.
        loading: see `Loading`; changes no value.
        stop: stage to stop before; None runs to the logits.
        cache: look in the cache, and keep the result there.
        description: of the progress bar.

    Raises:
        RequestError: an image cannot be read, and ``loading.on_bad_image`` is ``fail``.
    """
    path = cache_dir() / "features" / f"{_key(model, variables, source, stop)}.safetensors"
    kept = _read(path) if cache else None
    if kept is not None and not (kept.skipped and loading.on_bad_image == "fail"):
        return kept._replace(labels=np.asarray(source.labels)[kept.indices])
    computed = _compute(model, variables, source, loading, stop, description)
    if cache:
        _write(path, computed)
    return computed


def advance(
    model: Model,
    variables: Variables,
    features: Features,
    loading: Loading,
    *,
    start: str,
    stop: str | None = None,
) -> Features:
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
    rows = np.arange(len(features.labels))
    values = [
        np.asarray(_forward(model, variables, shard(batch.images, mesh), start, stop))[batch.mask]
        for batch in feature_batches(features, rows, divisible(loading.batch_size, mesh))
    ]
    return features._replace(values=np.concatenate(values))


def feature_batches(features: Features, order: np.ndarray, batch_size: int) -> Iterator[Batch]:
    """Activations in the given order as batches of one shape; the tail is padded and masked."""
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        padded = np.pad(rows, (0, batch_size - len(rows)))
        mask = np.arange(batch_size) < len(rows)
        yield Batch(
            features.values[padded],
            np.where(mask, features.labels[padded], -1),
            mask,
            np.where(mask, features.indices[padded], -1),
        )


def feature_bytes(model: Model, count: int, stop: str) -> int:
    """Memory that the features of ``count`` images take at the stage before ``stop``, in bytes."""
    size = model.preprocess.size
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
    value = jax.eval_shape(
        lambda variables, x: apply(model, variables, x, stop=stop).value,
        abstract_variables(model),
        images,
    )
    return count * value.size * 4


@partial(jax.jit, static_argnums=(0, 3, 4))
def _forward(
    model: Model, variables: Variables, x: jax.Array, start: str | None, stop: str | None
) -> jax.Array:
    value = apply(model, variables, x, start=start, stop=stop).value
    return value.astype("float32")


def _compute(
    model: Model,
    variables: Variables,
    source: Source,
    loading: Loading,
    stop: str | None,
    description: str,
) -> Features:
    mesh = data_mesh(loading.devices)
    variables = replicate(variables, mesh)
    skipped: dict[int, str] = {}
    batches = load_batches(
        source,
        model.preprocess,
        batch_size=divisible(loading.batch_size, mesh),
        workers=loading.workers,
        on_bad_image=loading.on_bad_image,
        skipped=skipped,
    )
    values, indices = [], []
    for batch in track(
        batches,
        description=description,
        total=len(source),
        size=lambda batch: int((batch.indices >= 0).sum()),
    ):
        output = _forward(model, variables, shard(batch.images, mesh), None, stop)
        values.append(np.asarray(output)[batch.mask])
        indices.append(batch.indices[batch.mask])
    indices = np.concatenate(indices)
    return Features(np.concatenate(values), np.asarray(source.labels)[indices], indices, skipped)


def _key(model: Model, variables: Variables, source: Source, stop: str | None) -> str:
    """Of everything that the activations depend on."""
    prefix = model.stages[: model.position(stop) if stop else None]
    key = hashlib.sha256()
    for part in (prefix, model.preprocess, model.dtype, source.digest, jax.default_backend()):
        key.update(repr(part).encode())
    for path, leaf in sorted(flatten(variables).items()):
        if path.split("/")[1] in {stage.name for stage in prefix}:
            key.update(path.encode())
            key.update(np.ascontiguousarray(leaf).data)
    return key.hexdigest()


def _digest(values: np.ndarray, indices: np.ndarray) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(values).data)
    digest.update(np.ascontiguousarray(indices).data)
    return digest.hexdigest()


def _write(path: Path, features: Features) -> None:
    values, _, indices, skipped = features
    metadata = {
        "digest": _digest(values, indices),
        "skipped": json.dumps({str(i): reason for i, reason in skipped.items()}),
    }
    write_safetensors(path, {"values": values, "indices": indices}, metadata)


def _read(path: Path) -> Features | None:
    if not path.exists():
        return None
    try:
        arrays, metadata = read_tensors(path)
        values, indices = arrays["values"], arrays["indices"]
        if metadata["digest"] != _digest(values, indices):
            return None
        skipped = {int(i): reason for i, reason in json.loads(metadata["skipped"]).items()}
    except (ValueError, KeyError):  # RequestError is a ValueError
        return None
    return Features(values, np.empty(0, np.int32), indices, skipped)
