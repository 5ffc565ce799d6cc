"""What enters the stages that train: photographs, or activations that were computed once."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np

from tljax.data.loader import batch_rows, load_batches
from tljax.data.options import Loading
from tljax.data.sources import Source, Splits
from tljax.features import store
from tljax.features.extract import (
    Outputs,
    View,
    advance,
    augmentable,
    compute_features,
    feature_bytes,
    feature_rows,
    process_rows,
    process_shard,
)
from tljax.models import Model
from tljax.runtime.errors import RequestError, WriteError
from tljax.runtime.parallel import data_mesh, gather_json
from tljax.runtime.types import Batch, Variables
from tljax.train.memory import free_memory
from tljax.train.options import FitConfig

Place = Literal["memory", "disk", "none"]


@dataclass(frozen=True)
class Inputs:
    """Batches for training, and logits of the validation images.

    Attributes:
        splits: the images.
        config: of the run.
        loading: how images are read.
        seed: of the run.
        start: the stage that the batches enter; None for photographs.
        train: activations, one view after the other, epoch by epoch; none for photographs.
        val: activations; None for photographs.
        skipped: reason by position, for the images of train and val that this process could not
            read.
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
        """This process's rows of the batches of an epoch.

        The examples of a batch depend on seed, epoch and batch size alone: photographs or
        activations, one device or eight, one process or many.

        Args:
            model: for its preprocessing.
            epoch: from 1, over all phases.
            first: the batch to begin with, to resume.
        """
        mesh = data_mesh(self.loading.devices)
        size, multiple = self.loading.batch_size, mesh.size * self.config.accumulate
        if not self.train:
            return load_batches(
                self.splits.train,
                (augmentable(model) if self.config.augment else model).preprocess,
                batch_size=size,
                seed=self.seed,
                epoch=epoch,
                start=first,
                shard=process_shard(),
                multiple=multiple,
                workers=self.loading.workers,
                on_bad_image=self.loading.on_bad_image,
                skipped=self.skipped[0],
            )
        view = self.train[(epoch - 1) % len(self.train)]
        examples = len(self.splits.train)
        row_of = np.full(examples + 1, -1, np.int32)  # the last one is what padding finds
        row_of[view.indices] = np.arange(len(view.indices))
        rows = batch_rows(examples, size, self.seed, epoch, multiple)[first:]
        cut = feature_rows(view, process_rows(row_of[rows]))
        return (self.splits.train.batch(*parts) for parts in cut)

    def logits(self, model: Model, variables: Variables) -> Outputs:
        """Logits of the validation images."""
        if self.val is not None and self.start is not None:
            return advance(model, variables, self.val, self.loading, start=self.start)
        logits = self._compute(model, variables, self.splits.val, None, "validation")
        self.skipped[1].update(logits.skipped)
        _refuse_none(logits)
        return logits

    def pooled(self, model: Model, variables: Variables) -> Outputs:
        """What enters the head, for every training image, without augmentation."""
        head = model.stages[-1].name
        if self.start is not None and not self.config.augment:
            if self.start == head:
                return self.train[0]
            return advance(
                model, variables, self.train[0], self.loading, start=self.start, stop=head
            )
        features = self._compute(model, variables, self.splits.train, head, "features")
        self.skipped[0].update(features.skipped)
        return features

    def everyones_skipped(self) -> tuple[dict[int, str], dict[int, str]]:
        """``skipped`` of all processes together."""
        parts = gather_json([sorted(part.items()) for part in self.skipped])
        train, val = ({i: why for part in parts for i, why in part[k]} for k in (0, 1))
        return train, val

    def refuse_lost_class(self) -> None:
        """For photographs, which are seen to be unreadable only when an epoch has been through.

        Raises:
            RequestError: no image of a class can be read.
        """
        labels = np.delete(self.splits.train.labels, list(self.everyones_skipped()[0]))
        _refuse_lost_class(self.splits.train, labels)

    def _compute(
        self, model: Model, variables: Variables, source: Source, stop: str | None, description: str
    ) -> Outputs:
        return compute_features(
            model, variables, source, self.loading, stop=stop, description=description
        )


def open_inputs(
    model: Model,
    variables: Variables,
    splits: Splits,
    config: FitConfig,
    loading: Loading,
    seed: int,
    start: str,
) -> Inputs:
    """Compute the activations that enter ``start`` once, where that is exact or asked for.

    Args:
        model: the network.
        variables: its variables.
        splits: the images.
        config: of the run.
        loading: how images are read.
        seed: of the run.
        start: the first stage that trains.

    Raises:
        RequestError: no image of a class, or of the validation set, can be read.
    """
    place = cache_place(model, splits, config, start)
    photographs = Inputs(splits, config, loading, seed, None, (), None, ({}, {}))
    if place == "none":
        return photographs

    def compute(source: Source, part: str, view: View | None = None) -> Outputs:
        return compute_features(
            model,
            variables,
            source,
            loading,
            stop=start,
            cache=place == "disk",
            dtype=config.cache_dtype,
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
        val = compute(splits.val, "val")
    except WriteError as error:
        if config.cache == "disk":
            raise WriteError(f"{error}, or --cache none") from error
        print(f"note: nothing is cached: {error}", file=sys.stderr)
        return photographs
    _refuse_lost_class(splits.train, train[0].labels)
    _refuse_none(val)
    return replace(
        photographs, start=start, train=train, val=val, skipped=(train[0].skipped, val.skipped)
    )


def _refuse_lost_class(source: Source, labels: np.ndarray) -> None:
    lost = sorted(set(range(len(source.classes))) - set(labels.tolist()))
    if lost:
        name = source.classes[lost[0]]
        raise RequestError(f"no image of class '{name}' in the training data can be read")


def _refuse_none(val: Outputs) -> None:
    if not len(val.labels):
        raise RequestError("no image of the validation data can be read")


def cache_bytes(model: Model, splits: Splits, config: FitConfig, start: str) -> int:
    """What the activations that enter ``start`` take, all views together."""
    views = config.cache_views if config.augment else 1
    count = len(splits.train) * views + len(splits.val)
    return feature_bytes(model, count, start, config.cache_dtype)


def cache_place(model: Model, splits: Splits, config: FitConfig, start: str) -> Place:
    """Choose where the activations that enter ``start`` go.

    ``none`` where they do not stay the same. ``auto`` is half of the memory that is free, or else
    the disk, if they fit. All processes choose the same.
    """
    random = config.augment and not config.cache_views
    moving = random or config.attacker is not None
    if config.cache == "none" or model.position(start) == 0 or moving:
        return "none"
    if config.cache != "auto":
        return config.cache
    size = cache_bytes(model, splits, config, start)
    if size <= min(gather_json(free_memory())) / 2:
        return "memory"
    return "disk" if jax.process_count() == 1 and size <= store.room() else "none"
