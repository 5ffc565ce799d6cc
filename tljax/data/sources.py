"""Opens what a request names: folders, scikit-learn's digits, `tfds:` and `hf:` data sets.

Nothing is decoded here; a source gives random access to encoded files or pixels, with labels.
"""

import numpy as np

from tljax.data.examples import (
    Examples,
    Source,
    Splits,
    ambiguous,
    match_classes,
    printable,
    select,
    split_by_content,
)
from tljax.data.folders import (
    as_path,
    exists,
    open_folder,
    open_folder_splits,
    open_images,
    open_labelled_folder,
    suggestion,
    train_and_val,
)
from tljax.data.hubs import hub_has_validation, is_hub, open_hub_splits, open_labelled_hub
from tljax.runtime.errors import RequestError
from tljax.runtime.packages import install_command

__all__ = [
    "Examples",
    "Source",
    "Splits",
    "ambiguous",
    "as_path",
    "exists",
    "has_validation",
    "match_classes",
    "open_folder",
    "open_images",
    "open_labelled",
    "open_splits",
    "select",
]

VAL_FRACTION = 0.2


def open_splits(spec: str, *, val_fraction: float = VAL_FRACTION) -> Splits:
    """Opens a data set for training.

    A folder either holds ``train/`` and ``val/`` (or ``valid``, ``validation``, ``test``) with a
    folder for each class inside, or the class folders themselves. The latter, a ``train/`` without
    the like beside it, ``digits``, and data sets of one split are split by content: an example is
    for validation if and only if a hash of its content, as a fraction of the hash's range, is below
    ``val_fraction``. So no example changes sides when others are added, and copies of one image
    never end up on both.

    Args:
        spec: a folder (``./digits`` for one of that name), or one of

            - ``digits``: 1,797 handwritten digits of 8 x 8 pixels, from scikit-learn;
            - ``tfds:NAME``, ``tfds:NAME/CONFIG:VERSION``: from TensorFlow Datasets; it is prepared
              in ``$TFDS_DATA_DIR`` if need be;
            - ``hf:OWNER/NAME``, ``hf:OWNER/NAME:CONFIG``, ``hf:FOLDER``: from Hugging Face, or a
              folder of theirs: written by ``save_to_disk``, of parquet files, of images.
        val_fraction: the share of validation in a split by content, in [0, 1). With 0 the training
            images are their own validation.

    Raises:
        RequestError: there is no such data set, or it cannot be trained on.
    """
    if not 0 <= val_fraction < 1:
        raise RequestError(f"a validation share of {val_fraction} makes no sense: 0 <= share < 1")
    if spec == "digits":
        return split_by_content(_digits(), spec, val_fraction)
    if is_hub(spec):
        return open_hub_splits(spec, val_fraction)
    path = as_path(spec)
    if not exists(path):
        raise RequestError(
            f"{printable(spec)} is neither a data set that tljax knows (digits, tfds:NAME, hf:NAME)"
            f" nor a folder{suggestion(path)}"
        )
    return open_folder_splits(path, val_fraction)


def has_validation(spec: str) -> bool:
    """Whether a data set has a validation part, so that `open_splits` does not split it."""
    if is_hub(spec):
        return hub_has_validation(spec)
    path = as_path(spec)
    parts = train_and_val(path) if exists(path) and path.is_dir() else None
    return parts is not None and parts[1] is not None


def open_labelled(spec: str) -> Source:
    """Opens what an evaluation measures on.

    Args:
        spec: as for `open_splits`, of which the validation part is taken; or a folder of class
            folders, all of which is taken.

    Raises:
        RequestError: there is no such data, or it has no labels.
    """
    if spec == "digits":
        return open_splits(spec).val
    if is_hub(spec):
        return open_labelled_hub(spec, VAL_FRACTION)
    return open_labelled_folder(as_path(spec))


def _digits() -> Source:
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - optional and slow to import
    except ImportError as error:
        advice = install_command("scikit-learn")
        raise RequestError(f"the data set digits needs scikit-learn: {advice}") from error
    images, labels = load_digits(return_X_y=True)
    grey = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return Source(
        examples=np.repeat(grey, 3, axis=3),
        labels=np.asarray(labels, np.int32),
        classes=tuple("0123456789"),
        names=tuple(f"digit {index:04d}" for index in range(len(grey))),
    )
