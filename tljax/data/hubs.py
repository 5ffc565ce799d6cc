"""Data sets of TensorFlow Datasets and Hugging Face, as sources.

Each package is imported when a data set of its kind is opened. TensorFlow is not needed to read
one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from tljax.data.examples import (
    Source,
    Splits,
    join_names,
    match_classes,
    split_by_content,
    without_example,
)
from tljax.data.folders import TRAIN, VAL, suggest_path
from tljax.runtime.errors import RequestError, UnreadableImageError, first_line
from tljax.runtime.files import sha256
from tljax.runtime.packages import install_command

_Parts = Mapping[str, Callable[[], Source]]  # opened when needed: reading the labels can be slow


def is_hub(spec: str) -> bool:
    """Return True for the name of a data set of a hub: ``tfds:...`` or ``hf:...``."""
    return spec.startswith(tuple(f"{kind}:" for kind in _KINDS))


def open_hub_splits(spec: str, val_fraction: float) -> Splits:
    """Open the training and validation splits of a data set, or split its only split by content.

    Examples without a label and classes without a training example are left out.

    Raises:
        RequestError: the data set or a package is missing, or it cannot be trained on.
    """
    parts = _open(spec)
    names = [name for name in TRAIN if name in parts] or list(parts)
    if names[0] not in TRAIN and len(names) > 1:
        raise RequestError(f"{spec} has no split named train, only {join_names(names)}: rename one")
    train, notes = _trainable(parts[names[0]](), f"{spec} {names[0]}")
    val = _validation({name: part for name, part in parts.items() if name != names[0]})
    if val is None:
        train, val, more = split_by_content(train, spec, val_fraction)
    else:
        val, more = match_classes(val, train.classes)
    return Splits(train, val, (*notes, *more))


def hub_has_validation(spec: str) -> bool:
    """Return True if a data set has a validation split with labels.

    Raises:
        RequestError: the data set or a package is missing.
    """
    parts = _open(spec)
    return len(parts) > 1 and _validation(parts) is not None


def open_labeled_hub(spec: str, val_fraction: float) -> Source:
    """Open the validation split of a data set or, if it has none, that of a split by content.

    Raises:
        RequestError: the data set or a package is missing, or no example has a label.
    """
    val = _validation(_open(spec))
    return open_hub_splits(spec, val_fraction).val if val is None else val


def _open(spec: str) -> _Parts:
    kind, _, name = spec.partition(":")
    if not name:
        raise RequestError(f"{spec} has no name: write {kind}:NAME")
    return {split.lower(): part for split, part in _KINDS[kind](spec, name).items()}


def _validation(parts: _Parts) -> Source | None:
    """Open the first validation split with labels; test splits of competitions have none."""
    sources = (parts[name]() for name in VAL if name in parts)
    return next((source for source in sources if (source.labels >= 0).any()), None)


def _trainable(source: Source, where: str) -> tuple[Source, list[str]]:
    unlabeled = np.count_nonzero(source.labels < 0)
    unused = without_example(source)
    used = [name for name in source.classes if name not in unused]
    if len(used) < 2:
        raise RequestError(
            f"{where} has examples of {join_names(used)}: training needs two classes"
        )
    notes = []
    if unlabeled:
        notes.append(f"left out {unlabeled} examples without a label")
    if unused:
        notes.append(f"left out classes without training examples: {join_names(unused)}")
    return (match_classes(source, used)[0] if notes else source), notes


def _source(spec: str, split: str, examples: Any, labels: np.ndarray, feature: Any) -> Source:
    names = tuple(f"{spec} {split}[{index}]" for index in range(len(labels)))
    return Source(examples, labels.astype(np.int32), tuple(feature.names), names)


def _feature(
    where: str, features: Mapping[str, object], kind: type, advice: str, preferred: object = None
) -> str:
    """Find the name of the only feature of a kind, or of the preferred one."""
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    candidates = [name for name in names if name == preferred] or names
    if len(candidates) != 1:
        existing = names or [f"{name}: {type(value).__name__}" for name, value in features.items()]
        raise RequestError(
            f"{where} has {len(names) or 'no'} {kind.__name__} features ({join_names(existing)});"
            f" {advice}"
        )
    return candidates[0]


@contextmanager
def _explained(spec: str, advice: str) -> Iterator[None]:
    """Convert any exception of a package to a one-line RequestError."""
    try:
        yield
    except Exception as error:
        reason = first_line(error).rstrip(".")
        raise RequestError(f"{spec} cannot be opened: {reason}; {advice}") from error


@dataclass(frozen=True, eq=False)
class _Rows:
    """The encoded images of a split. ``read`` can be pickled, as processes decode."""

    rows: Sequence[Any]
    read: Callable[[Any], bytes]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> bytes:
        return self.read(self.rows[int(index)])


def _tfds_image(parse: Callable[[bytes], dict[str, bytes]], name: str, record: bytes) -> bytes:
    return parse(record)[name]


def _hf_image(name: str, row: Mapping[str, Any]) -> bytes:
    image = row[name]
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise UnreadableImageError("the row has no image")
    if image["bytes"] is not None:
        return image["bytes"]
    try:
        return Path(image["path"]).read_bytes()
    except OSError as error:
        raise UnreadableImageError(f"cannot be read: {error.strerror}") from error


def _tfds_parts(spec: str, name: str) -> _Parts:
    try:
        # Its type annotations are wrong, and the type checker should not need it.
        tfds: Any = import_module("tensorflow_datasets")
    except ImportError as error:
        advice = install_command("tensorflow-datasets")
        raise RequestError(f"{spec} needs tensorflow-datasets: {advice}") from error
    advice = (
        f"check the name, or run `tfds build {name} --file_format=array_record --data_dir=FOLDER`"
        " where TensorFlow is installed and set TFDS_DATA_DIR=FOLDER"
        f" (now {tfds.core.constants.DATA_DIR})"
    )
    with _explained(spec, advice):
        # Some data sets need TensorFlow to be prepared; none does to be read.
        builder = tfds.builder(name, file_format="array_record")
        builder.download_and_prepare()
        features = dict(builder.info.features)
    keys = builder.info.supervised_keys or (None, None)
    other = "choose a data set for image classification"
    image = _feature(spec, features, tfds.features.Image, other, keys[0])
    label = _feature(spec, features, tfds.features.ClassLabel, other, keys[1])
    if features[image].np_dtype == np.float32:  # TFDS stores their bits as RGBA
        raise RequestError(f"{spec} has float32 images: choose a data set with uint8 images")

    def open_part(split: str) -> Source:
        # Parsing a single feature does not decode the others, such as masks.
        parse_image = partial(
            tfds.features.FeaturesDict({image: features[image]}).deserialize_example_np,
            decoders={image: tfds.decode.SkipDecoding()},
        )
        parse_label = tfds.features.FeaturesDict({label: features[label]}).deserialize_example_np
        with _explained(f"{spec} {split}", advice):
            records = builder.as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
            labels = np.fromiter((parse_label(record)[label] for record in records), np.int32)
        # The version alone does not identify the content: a builder under development changes it.
        # Nor do modification times, which copying changes.
        shards = list(map(_shard_identity, builder.info.splits[split].filepaths))
        identity = repr((builder.info.full_name, split, image, shards))
        fingerprint = sha256(identity.encode())
        examples = _Rows(records, partial(_tfds_image, parse_image, image), fingerprint)
        return _source(spec, split, examples, labels, features[label])

    return {split: partial(open_part, split) for split in builder.info.splits}


def _shard_identity(shard: Any) -> tuple[str, int, str]:
    """Return the name of a file, its length, and the hash of its first and last megabyte."""
    length, part = shard.stat().length, 2**20
    with shard.open("rb") as file:
        begin = file.read(part)
        file.seek(max(0, length - part))
        return shard.name, length, sha256(begin + file.read())


def _hf_parts(spec: str, name: str) -> _Parts:
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise RequestError(f"{spec} needs datasets: {install_command('datasets')}") from error
    base, _, config = (name, "", "") if Path(name).expanduser().is_dir() else name.partition(":")
    path = Path(base).expanduser()
    if not path.is_dir() and base.startswith(("/", "./", "../", "~")):
        raise RequestError(f"{spec}: {path} is not a folder{suggest_path(path)}")
    with _explained(spec, "check the name, the files or the connection"):
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            opened = datasets.load_from_disk(path)
        else:
            opened = datasets.load_dataset(str(path) if path.is_dir() else base, config or None)
    parts = opened if isinstance(opened, dict) else {str(opened.split or "all"): opened}

    def open_part(split: str, dataset: Any) -> Source:
        dataset = dataset.with_format(None)  # save_to_disk stores the format
        where = f"{spec} {split}"
        advice = (
            "give it one Image and one ClassLabel feature with the datasets library, write it with"
            " save_to_disk(FOLDER), and open hf:FOLDER"
        )
        image = _feature(where, dataset.features, datasets.Image, advice)
        label = _feature(where, dataset.features, datasets.ClassLabel, advice, "label")
        column = dataset.select_columns(label).with_format("arrow")[:].column(0)
        rows = dataset.select_columns(image).cast_column(image, datasets.Image(decode=False))
        fingerprint = f"{dataset._fingerprint} {image}"
        examples = _Rows(rows, partial(_hf_image, image), fingerprint)
        labels = column.fill_null(-1).to_numpy()
        return _source(spec, split, examples, labels, dataset.features[label])

    return {split: partial(open_part, split, dataset) for split, dataset in parts.items()}


_KINDS = {"tfds": _tfds_parts, "hf": _hf_parts}
