"""Inputs of the trained stages: images, or cached activations of the frozen stages."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from tljax.data.boxes import Crops, random_crops
from tljax.data.examples import Source, Splits, balancing_weights
from tljax.data.loader import BatchRows, batch_rows, load_batches
from tljax.data.options import Loading
from tljax.features import store
from tljax.features.extract import (
    Outputs,
    View,
    compute_features,
    feature_rows,
    process_rows,
    process_shard,
    run_from_stage,
)
from tljax.models import Model, abstract_activations, abstract_variables
from tljax.runtime.errors import RequestError, WriteError
from tljax.runtime.free_memory import free_memory
from tljax.runtime.parallel import data_mesh, gather_json
from tljax.runtime.settings import Dtype
from tljax.runtime.types import Batch, Variables
from tljax.train.options import FitConfig

Place = Literal["memory", "disk", "none"]


@dataclass(frozen=True)
class Inputs:
    """Training batches, and logits of the validation images.

    Attributes:
        splits: training and validation images.
        config: configuration of the run.
        loading: options of how images are read, the batch size and the devices.
        seed: seed of the run.
        start: stage that the batches enter as activations; None for images.
        train: activations of the training images, one element per cached view; epochs use the views
            one after the other. All processes have all of them. Empty for images.
        val: activations of the validation images; None for images.
        skipped: {position: reason} of the training and validation images that this process could
            not read.
    """

    splits: Splits
    config: FitConfig
    loading: Loading
    seed: int
    start: str | None
    train: tuple[Outputs, ...]
    val: Outputs | None
    skipped: tuple[dict[int, str], dict[int, str]]

    def batches(self, model: Model, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, each with the rows of this process.

        The examples of a batch depend only on seed, epoch and batch size, not on the cache, the
        number of devices or the number of processes.

        Args:
            model: network whose preprocessing applies.
            epoch: number of the epoch over all phases, from 1.
            first: index of the first batch, to resume.
        """
        if not self.train:
            return load_batches(
                self.splits.train,
                model.preprocess,
                batch_size=self.loading.batch_size,
                seed=self.seed,
                epoch=epoch,
                start=first,
                shard=process_shard(),
                multiple=self._multiple,
                frequencies=self._frequencies,
                crops=self._crops(epoch),
                workers=self.loading.workers,
                on_bad_image=self.loading.on_bad_image,
                skipped=self.skipped[0],
            )
        view, rows = self.rows(epoch)
        batches = feature_rows(view, rows[first:])
        return (self.splits.train.batch(*arrays) for arrays in batches)

    def rows(self, epoch: int) -> tuple[Outputs, BatchRows]:
        """Return the cached view of an epoch, and which of its rows this process feeds.

        Args:
            epoch: number of the epoch over all phases, from 1.

        Returns:
            The view, and ``[batches, rows]`` row numbers in it; -1 for padding and for images that
            could not be read.
        """
        view, examples = self.train[(epoch - 1) % len(self.train)], len(self.splits.train)
        row_of = np.full(examples + 1, -1, np.int32)  # the last one is for padding
        row_of[view.indices] = np.arange(len(view.indices))
        size, multiple = self.loading.batch_size, self._multiple
        rows = batch_rows(examples, size, self.seed, epoch, multiple, self._frequencies)
        return view, process_rows(row_of[rows])

    def row_batches(self, view: Outputs, rows: BatchRows, steps: int) -> Batch:
        """Join batches of a view, whose inputs are row numbers instead of activations.

        Args:
            view: see `rows`.
            rows: ``[batches, rows]`` part of its rows.
            steps: number of batches to pad to with batches of padding.

        Returns:
            A batch with leaves ``[steps, rows, ...]``.
        """
        rows = np.pad(rows, ((0, steps - len(rows)), (0, 0)), constant_values=-1)
        mask = rows >= 0
        indices = np.where(mask, view.indices[rows], -1)
        return self.splits.train.batch(np.where(mask, rows, 0), mask, indices)

    @property
    def _multiple(self) -> int:
        """Return what the number of rows of a batch is a multiple of."""
        return data_mesh(self.loading.devices).size * self.config.accumulate

    def _crops(self, epoch: int) -> Crops | None:
        config = self.config
        return random_crops(config.augmentation, self.seed, epoch) if config.augment else None

    @cached_property
    def _frequencies(self) -> Float[np.ndarray, " n"] | None:
        """Return how often each training image is drawn, relative to the others."""
        return balancing_weights(self.splits.train) if self.config.balance else None

    def logits(self, model: Model, variables: Variables) -> Outputs:
        """Compute the logits of the validation images, and gather those of all processes.

        Raises:
            RequestError: no validation image can be read.
        """
        if self.val is not None and self.start is not None:
            logits = run_from_stage(model, variables, self.val, self.loading, start=self.start)
            return logits.whole()
        logits = compute_features(
            model, variables, self.splits.val, self.loading, stop=None, description="validation"
        )
        self.skipped[1].update(logits.skipped)
        _check_val(logits)
        return logits.whole()

    def pooled(self, model: Model, variables: Variables) -> Outputs:
        """Compute the inputs of the head for all training images, without augmentation."""
        head = model.stages[-1].name
        if self.start is not None and not self.config.augment:
            if self.start == head:
                return self.train[0]
            return run_from_stage(
                model, variables, self.train[0], self.loading, start=self.start, stop=head
            )
        features = compute_features(
            model, variables, self.splits.train, self.loading, stop=head, description="features"
        )
        self.skipped[0].update(features.skipped)
        return features

    def all_skipped(self) -> tuple[dict[int, str], dict[int, str]]:
        """Return ``skipped`` of all processes together."""
        parts = gather_json([sorted(part.items()) for part in self.skipped])
        train, val = (dict(pair for part in parts for pair in part[k]) for k in (0, 1))
        return train, val

    def check_classes(self) -> None:
        """Check that every class has a readable training image, after an epoch has read them all.

        Raises:
            RequestError: no image of a class can be read.
        """
        labels = np.delete(self.splits.train.labels, list(self.all_skipped()[0]), axis=0)
        _check_classes(self.splits.train, labels)


def open_inputs(
    model: Model,
    variables: Variables,
    splits: Splits,
    config: FitConfig,
    loading: Loading,
    seed: int,
    start: str,
) -> Inputs:
    """Open the inputs of the trained stages; compute and cache activations where configured.

    Args:
        model: the network.
        variables: variables of ``model``.
        splits: training and validation images.
        config: configuration of the run, see its ``cache``.
        loading: options of how images are read.
        seed: seed of the run.
        start: first trained stage.

    Raises:
        RequestError: no image of a class, or no validation image, can be read.
        WriteError: the configured cache on disk cannot be written.
    """
    place = cache_location(model, splits, config, start)
    images = Inputs(splits, config, loading, seed, None, (), None, ({}, {}))
    if place == "none":
        return images

    def compute(source: Source, part: str, view: View | None = None) -> Outputs:
        return compute_features(
            model,
            variables,
            source,
            loading,
            stop=start,
            cache=place == "disk",
            dtype=cached_dtype(model, config, start),
            view=view,
            description=f"{part} up to {start}",
        )

    try:
        if config.augment:
            train = tuple(
                compute(splits.train, f"view {k + 1}", View(config.augmentation, seed, k + 1))
                for k in range(config.cache_views)
            )
        else:
            train = (compute(splits.train, "train"),)
        train = tuple(view.whole() for view in train)  # an epoch is shuffled over all rows
        val = compute(splits.val, "val")
    except WriteError as error:
        if config.cache == "disk":
            raise WriteError(f"{error}, or --cache none") from error
        print(f"note: nothing is cached: {error}", file=sys.stderr)
        return images
    _check_classes(splits.train, train[0].labels)
    _check_val(val)
    skipped = train[0].skipped, val.skipped
    return replace(images, start=start, train=train, val=val, skipped=skipped)


def _check_classes(source: Source, labels: Shaped[np.ndarray, "n ..."]) -> None:
    if not source.task.has_classes:
        return
    if missing := sorted(set(range(len(source.classes))) - set(labels.tolist())):
        name = source.classes[missing[0]]
        raise RequestError(f"no image of class '{name}' in the training data can be read")


def _check_val(val: Outputs) -> None:
    if not len(val.labels):
        raise RequestError("no image of the validation data can be read")


def cache_bytes(model: Model, splits: Splits, config: FitConfig, start: str) -> int:
    """Return the bytes of the activations that enter ``start``, of all views and images."""
    views = config.cache_views if config.augment else 1
    count = len(splits.train) * views + len(splits.val)
    return (
        count
        * _entering(model, start).size
        * jnp.dtype(cached_dtype(model, config, start)).itemsize
    )


def cached_dtype(model: Model, config: FitConfig, start: str) -> Dtype:
    """Return the dtype of the cached activations: bfloat16 also where they are computed in it."""
    return "bfloat16" if _entering(model, start).dtype == jnp.bfloat16 else config.cache_dtype


@lru_cache(maxsize=32)
def _entering(model: Model, start: str) -> jax.ShapeDtypeStruct:
    """Cache the shape of the activations of an image: tracing takes a tenth of a second or more."""
    return abstract_activations(model, abstract_variables(model), start)


def cache_location(model: Model, splits: Splits, config: FitConfig, start: str) -> Place:
    """Choose where to cache the activations that enter ``start``, alike on all processes.

    ``none`` if they change from epoch to epoch. ``auto`` takes memory if half of the free memory
    holds them, else the disk if they fit.
    """
    changing = config.attacker is not None or (config.augment and not config.cache_views)
    if config.cache == "none" or model.position(start) == 0 or changing:
        return "none"
    if config.cache != "auto":
        return config.cache
    size = cache_bytes(model, splits, config, start)
    if size <= min(gather_json(free_memory())) / 2:
        return "memory"
    return "disk" if jax.process_count() == 1 and size <= store.available_bytes() else "none"
