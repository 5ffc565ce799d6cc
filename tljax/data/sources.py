"""Open data sets by name: folders, scikit-learn's digits, `tfds:` and `hf:` data sets.

Nothing is decoded: a source gives random access to encoded files or pixels, with labels.
"""

import numpy as np

from tljax.data.examples import (
    Source,
    Splits,
    printable,
    split_by_content,
)
from tljax.data.folders import (
    exists,
    expand_path,
    open_folder_splits,
    open_labeled_folder,
    suggest_path,
    train_and_val,
)
from tljax.data.hubs import hub_has_validation, is_hub, open_hub_splits, open_labeled_hub
from tljax.runtime.errors import RequestError
from tljax.runtime.packages import install_command

VAL_FRACTION = 0.2


def open_splits(spec: str, *, val_fraction: float = VAL_FRACTION) -> Splits:
    """Open the training and validation parts of a data set.

    A folder contains either ``train/`` and ``val/`` (or ``valid``, ``validation``, ``test``) with
    one folder per class inside, or the class folders themselves. Class folders, a ``train/``
    without a validation folder, ``digits``, and data sets with one split are split by content: an
    example is for validation if and only if a hash of its content, as a fraction of the hash's
    range, is below ``val_fraction``. So adding examples moves no other example to the other part,
    and copies of one image are never in both.

    Args:
        spec: a folder (``./digits`` for one of that name), or one of

            - ``digits``: 1,797 handwritten digits of 8 x 8 pixels, from scikit-learn;
            - ``tfds:NAME``, ``tfds:NAME/CONFIG:VERSION``: from TensorFlow Datasets; prepared in
              ``$TFDS_DATA_DIR`` if it is not there yet;
            - ``hf:OWNER/NAME``, ``hf:OWNER/NAME:CONFIG``: from the Hugging Face Hub;
            - ``hf:FOLDER``: a folder that the ``datasets`` library can read: written by
              ``save_to_disk``, or with parquet files or images.
        val_fraction: fraction of the examples to validate on in a split by content, in [0, 1). With
            0, the training images are also the validation images.

    Raises:
        RequestError: the data set does not exist or cannot be trained on, or ``val_fraction`` is
            out of its range.
    """
    if not 0 <= val_fraction < 1:
        raise RequestError(f"--val-fraction {val_fraction}: choose a number from 0 to below 1")
    if spec == "digits":
        return split_by_content(_digits(), spec, val_fraction)
    if is_hub(spec):
        return open_hub_splits(spec, val_fraction)
    path = expand_path(spec)
    if not exists(path):
        kinds = "neither a folder nor digits, tfds:NAME or hf:NAME"
        raise RequestError(f"{printable(spec)} is {kinds}{suggest_path(path)}")
    return open_folder_splits(path, val_fraction)


def has_validation(spec: str) -> bool:
    """Return True if a data set has a validation part, so that `open_splits` does not split it."""
    if is_hub(spec):
        return hub_has_validation(spec)
    path = expand_path(spec)
    parts = train_and_val(path) if exists(path) and path.is_dir() else None
    return parts is not None and parts[1] is not None


def open_labeled(spec: str) -> Source:
    """Open the labeled images to evaluate on.

    Args:
        spec: a data set as for `open_splits`, of which the validation part is used; or a folder of
            class folders, all of which is used.

    Raises:
        RequestError: the data set does not exist or has no labels.
    """
    if spec == "digits":
        return open_splits(spec).val
    if is_hub(spec):
        return open_labeled_hub(spec, VAL_FRACTION)
    return open_labeled_folder(expand_path(spec))


def _digits() -> Source:
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - optional and slow to import
    except ImportError as error:
        advice = install_command("scikit-learn")
        raise RequestError(f"the data set digits needs scikit-learn: {advice}") from error
    images, labels = load_digits(return_X_y=True)
    gray = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return Source(
        examples=np.repeat(gray, 3, axis=3),
        labels=np.asarray(labels, np.int32),
        classes=tuple("0123456789"),
        names=tuple(f"digit {index:04d}" for index in range(len(gray))),
    )
