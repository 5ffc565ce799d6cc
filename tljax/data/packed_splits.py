"""Open packed photographs as a data set: ``packed:FOLDER``."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tljax.data.byte_strings import ByteStrings
from tljax.data.examples import Source, Splits, select
from tljax.data.files import printable
from tljax.data.labels import split_names
from tljax.data.options import LabelOptions
from tljax.data.packed import open_packed
from tljax.runtime.errors import RequestError
from tljax.runtime.settings import Kind
from tljax.runtime.task import Task

_PREFIX = "packed:"


def is_packed(spec: str) -> bool:
    """Return True for the name of packed photographs: ``packed:FOLDER``."""
    return spec.startswith(_PREFIX)


def packed_folder(spec: str) -> Path:
    """Return the folder that ``packed:FOLDER`` names."""
    return Path(spec.removeprefix(_PREFIX)).expanduser()


def open_packed_splits(spec: str, labels: LabelOptions | None = None) -> Splits:
    """Open packed photographs: the parts and their labels are those that were packed.

    Args:
        spec: ``packed:FOLDER``.
        labels: options of labels, none of which may ask for other labels than those that were
            packed.

    Raises:
        RequestError: the folder holds no packed photographs, they are damaged, or they have other
            labels.
    """
    folder = packed_folder(spec)
    packed, arrays = open_packed(folder)
    header = packed.header
    try:
        source = Source(
            examples=packed,
            labels=arrays["labels"],
            classes=header.classes,
            names=_names(arrays),
            extra={
                name.removeprefix("extra/"): array
                for name, array in arrays.items()
                if name.startswith("extra/")
            },
            task=_task(**header.task),
            groups=arrays.get("groups"),
        )
        part = arrays["part"]
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"{printable(folder)} is damaged ({error!s:.100}): pack the images again"
        ) from error
    _check_labels(spec, source, labels or LabelOptions())
    train, val = (select(source, np.flatnonzero(part == number)) for number in (0, 1))
    return Splits(train, val if len(val) else train, header.notes)


def open_labeled_packed(spec: str, labels: LabelOptions | None = None) -> Source:
    """Open the validation part of packed photographs, or the training part if there is none.

    Ordered classes may be in another order than ``labels`` says, as networks match them by name.

    Raises:
        RequestError: as for `open_packed_splits`.
    """
    labels = labels or LabelOptions()
    return open_packed_splits(spec, replace(labels, task=labels.kind, order=None)).val


def _task(kind: Kind, **of_outputs: Sequence[Any]) -> Task:
    return Task(kind, **{name: tuple(values) for name, values in of_outputs.items()})


def _names(arrays: dict[str, np.ndarray]) -> list[str]:
    names = ByteStrings(arrays["name_bytes"], arrays["name_ends"])
    return [name.decode("utf-8") for name in names.tolist()]


def _check_labels(spec: str, source: Source, labels: LabelOptions) -> None:
    """Refuse options that ask for other labels than those that were packed.

    Raises:
        RequestError: there is one.
    """
    labels.refuse("root target units group path_column split_column weight_column", spec)
    kind, packed = labels.kind, source.task.kind
    if kind not in (None, packed):
        flag = f"--order {labels.order}" if labels.order else f"--task {kind}"
        raise RequestError(f"{flag}: {spec} was packed as {packed}: pack the images with it")
    if labels.order and tuple(split_names(labels.order, source.classes)) != source.classes:
        raise RequestError(
            f"--order {labels.order}: {spec} was packed in another order: pack the images with it"
        )
