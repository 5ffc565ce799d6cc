"""Packing of the images of a run: they are decoded once, before epochs that read them."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from tljax.data.examples import Splits
from tljax.data.pack import pack
from tljax.data.packed import HEADER
from tljax.data.packed_splits import open_packed_splits
from tljax.models import Model, abstract_variables
from tljax.runtime.errors import RequestError
from tljax.runtime.files import cache_dir, sha256
from tljax.runtime.preprocess import Preprocess
from tljax.train.adapt import add_adapter
from tljax.train.freeze import first_trainable_stage, label
from tljax.train.inputs import cache_location
from tljax.train.recipes import Plan


def pack_images(
    mode: Literal["auto", "always"], model: Model, splits: Splits, plan: Plan, workers: int
) -> Splits:
    """Pack the images of a run in the cache folder, and return sources that read them from there.

    They are packed at the size and with the filter of the network, so that central squares are the
    same bytes. Random crops are cut from the packed photographs. One line on stderr says what is
    done. Another process that packs the same images is waited for.

    Args:
        mode: ``always``, or ``auto`` to pack only where it is likely to save time: on a GPU or TPU,
            if the images are decoded in two epochs or more and half of the free disk space holds
            them.
        model: the network, with its head.
        splits: the images.
        plan: the phases of training.
        workers: as for `tljax.data.pack.pack`.

    Raises:
        RequestError: ``always``, and the network takes other images than RGB of 8 bits; or the
            cache folder cannot be written.
    """
    preprocess = model.preprocess
    if preprocess.channels != 3 or preprocess.dtype != "uint8":
        if mode == "always":
            raise RequestError("--pack always: images with --channels are not packed: leave it out")
        return _unpacked(splits, "images with --channels are read from their files")
    folder = _place(splits, preprocess)
    size = 4 * preprocess.resize**2 * (len(splits.train) + len(splits.val))  # of 4:3
    found = (folder / HEADER).exists()
    if mode == "auto" and (
        reason := _reason_against(model, splits, plan, 0 if found else size, folder)
    ):
        return _unpacked(splits, reason)
    _print(
        f"images are packed at {preprocess.resize} pixels, about {size / 1e9:.1f} GB in {folder}"
    )
    if not found:
        resize = {"size": preprocess.resize, "interpolation": preprocess.interpolation}
        pack(splits, folder, **resize, workers=workers, wait=True)
    packed = open_packed_splits(f"packed:{folder}")
    train = replace(splits.train, examples=packed.train.examples)
    if splits.val is splits.train:
        return splits._replace(train=train, val=train)
    val = replace(splits.val, examples=packed.val.examples)
    return splits._replace(train=train, val=val)


def _place(splits: Splits, preprocess: Preprocess) -> Path:
    """Return the folder of the images, which depends on them and on how they are resized."""
    images = splits.train.cache_key, splits.val.cache_key
    key = sha256(repr((images, preprocess.resize, preprocess.interpolation)).encode())
    return cache_dir() / "packed" / key[:16]


def _reason_against(
    model: Model, splits: Splits, plan: Plan, size: int, folder: Path
) -> str | None:
    """Return why packing is not likely to save time; None if it is."""
    if jax.default_backend() == "cpu":
        return "a CPU takes longer to train on images than to decode them"
    examples = getattr(splits.train.examples, "examples", splits.train.examples)  # of a subset
    if isinstance(examples, np.ndarray):
        return "they are in memory"
    if epochs_on_images(model, splits, plan) < 2:
        return "fewer than two epochs decode them"
    free = shutil.disk_usage(next(part for part in folder.parents if part.exists())).free
    if size > free / 2:
        return f"they take {size / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB free"
    return None


def epochs_on_images(model: Model, splits: Splits, plan: Plan) -> int:
    """Return the number of epochs that start from images instead of cached activations."""
    variables = jax.eval_shape(
        lambda: add_adapter(model, abstract_variables(model), plan.config, jax.random.key(0))
    )
    starts = (
        first_trainable_stage(model, label(variables["params"], phase.table))
        for phase in plan.phases
    )
    return sum(
        phase.epochs
        for phase, start in zip(plan.phases, starts, strict=True)
        if cache_location(model, splits, plan.config, start) == "none"
    )


def _unpacked(splits: Splits, reason: str) -> Splits:
    _print(f"images are not packed: {reason}")
    return splits


def _print(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)
