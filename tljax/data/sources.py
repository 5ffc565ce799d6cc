"""Open data sets by name: folders, tables, shards, buckets, digits, and those of hubs or packed.

Nothing is decoded: a source gives random access to encoded files or pixels, with labels.
"""

import numpy as np

from tljax.data.examples import Source, Splits
from tljax.data.files import printable
from tljax.data.folders import (
    exists,
    expand_path,
    open_folder_splits,
    open_labeled_folder,
    suggest_path,
    train_and_val,
)
from tljax.data.hubs import hub_has_validation, is_hub, open_hub_splits, open_labeled_hub
from tljax.data.labels import order_source
from tljax.data.options import LabelOptions
from tljax.data.packed import HEADER
from tljax.data.packed_splits import is_packed, open_labeled_packed, open_packed_splits
from tljax.data.parts import Parts, has_validation_part, open_part, open_parts, open_validation_part
from tljax.data.shards import is_shards, shard_parts
from tljax.data.splits import split_source
from tljax.data.table_files import is_table
from tljax.data.tables import open_labeled_table, open_table_splits, table_has_validation
from tljax.runtime.errors import RequestError
from tljax.runtime.packages import install_command

VAL_FRACTION = 0.2


def open_splits(
    spec: str, *, val_fraction: float = VAL_FRACTION, labels: LabelOptions | None = None
) -> Splits:
    """Open the training and validation parts of a data set.

    A folder contains either ``train/`` and ``val/`` (or ``valid``, ``validation``, ``test``) with
    one folder per class inside, or the class folders themselves. Class folders, a ``train/``
    without a validation folder, ``digits``, and data sets with one split are split by content: an
    example is for validation if and only if a hash of its content, as a fraction of the hash's
    range, is below ``val_fraction``. So adding examples moves no other example to the other part,
    and copies of one image are never in both.

    With groups, no group is divided, and adding rows at the end of a table moves no group; see
    `tljax.data.splits.choose_validation_groups`. The files of a folder are sorted by name, so that
    adding files between them may move groups.

    Args:
        spec: a folder (``./digits`` for one of that name), or one of

            - a table: a .csv, .tsv, .parquet, .jsonl or .ndjson file with a column of paths and one
              or more columns of labels; see `tljax.data.labels.read_labels`;
            - shards of images and labels, WebDataset tars, TFRecord files or ArrayRecords: a file,
              a folder or a pattern such as ``train-{000..099}.tar``; see
              `tljax.data.shards.shard_parts`;
            - the URL of shards or of a folder in a bucket, such as ``gs://bucket/folder``;
            - ``digits``: 1,797 handwritten digits of 8 x 8 pixels, from scikit-learn;
            - ``tfds:NAME``, ``tfds:NAME/CONFIG:VERSION``: from TensorFlow Datasets; prepared in
              ``$TFDS_DATA_DIR`` if it is not there yet;
            - ``hf:OWNER/NAME``, ``hf:OWNER/NAME:CONFIG``: from the Hugging Face Hub;
            - ``hf:FOLDER``: a folder that the ``datasets`` library can read: written by
              ``save_to_disk``, or with parquet files or images;
            - ``packed:FOLDER``: written by `tljax.data.pack.pack`, with its parts and labels.
        val_fraction: fraction of the examples, or of the groups, to validate on if the data set has
            no validation part, in [0, 1). With 0, the training images are also the validation
            images.
        labels: how labels, groups and the split are read.

    Raises:
        RequestError: the data set does not exist or cannot be trained on, or ``val_fraction`` is
            out of its range.
    """
    if not 0 <= val_fraction < 1:
        raise RequestError(f"--val-fraction {val_fraction}: choose a number from 0 to below 1")
    labels = labels or LabelOptions()
    if is_hub(spec):
        return open_hub_splits(spec, val_fraction, labels)
    if is_packed(spec):
        return open_packed_splits(spec, labels)
    if spec != "digits" and is_shards(spec):
        return open_parts(spec, _shard_parts(spec, labels), val_fraction, labels)
    path = expand_path(spec)
    if exists(path / HEADER):
        raise RequestError(f"{printable(spec)} holds packed images: write packed:{printable(spec)}")
    if spec != "digits" and not exists(path):
        kinds = "neither a folder, a table, shards nor digits, tfds:NAME, hf:NAME or packed:FOLDER"
        raise RequestError(f"{printable(spec)} is {kinds}{suggest_path(path)}")
    if spec != "digits" and is_table(path):
        return open_table_splits(path, val_fraction, labels)
    if spec == "digits":
        return split_source(_digits(labels), spec, val_fraction)
    return open_folder_splits(path, val_fraction, labels)


def has_validation(spec: str, labels: LabelOptions | None = None) -> bool:
    """Return True if a data set has a validation part, so that `open_splits` does not split it."""
    if is_hub(spec):
        return hub_has_validation(spec, labels)
    if is_packed(spec):
        return True
    if is_shards(spec):
        labels = labels or LabelOptions()
        return has_validation_part(_shard_parts(spec, labels), labels)
    path = expand_path(spec)
    if is_table(path):
        return exists(path) and table_has_validation(path, labels or LabelOptions())
    parts = train_and_val(path) if exists(path) and path.is_dir() else None
    return parts is not None and parts[1] is not None


def open_labeled(spec: str, labels: LabelOptions | None = None) -> Source:
    """Open the labeled images to evaluate on.

    Args:
        spec: a data set as for `open_splits`, of which the validation part is used; or a folder of
            class folders, a table without a column for the split or shards that are no parts, all
            of which is used.
        labels: how labels and the split are read. For a table, give the task and the order of a
            network: what is inferred from few rows may differ.

    Raises:
        RequestError: the data set does not exist or has no labels.
    """
    labels = labels or LabelOptions()
    if spec == "digits":
        return open_splits(spec, labels=labels).val
    if is_hub(spec):
        return open_labeled_hub(spec, VAL_FRACTION, labels)
    if is_packed(spec):
        return open_labeled_packed(spec, labels)
    if is_shards(spec):
        parts = _shard_parts(spec, labels)
        source = open_validation_part(parts, labels)
        return open_part(next(iter(parts)), parts, labels) if source is None else source
    path = expand_path(spec)
    if is_table(path) and exists(path):
        return open_labeled_table(path, labels)
    return open_labeled_folder(path, labels)


def _shard_parts(spec: str, labels: LabelOptions) -> Parts:
    labels.refuse("root path_column split_column", spec)
    return shard_parts(spec)


def _digits(labels: LabelOptions) -> Source:
    labels.refuse("root target units group path_column split_column weight_column", "digits")
    kind = labels.kind or "classification"
    if kind not in ("classification", "ordinal"):
        raise RequestError(f"--task {kind}: digits has one class for each image")
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - optional and slow to import
    except ImportError as error:
        advice = install_command("scikit-learn")
        raise RequestError(f"the data set digits needs scikit-learn: {advice}") from error
    images, digits = load_digits(return_X_y=True)
    gray = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    source = Source(
        examples=np.repeat(gray, 3, axis=3),
        labels=np.asarray(digits, np.int32),
        classes=tuple("0123456789"),
        names=tuple(f"digit {index:04d}" for index in range(len(gray))),
    )
    return order_source(source, labels, "digits")[0] if kind == "ordinal" else source
