"""Data sets of TensorFlow Datasets and Hugging Face, as sources.

Each package is imported when a data set of its kind is opened. TensorFlow is not needed to read
one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from tljax.data.array_records import open_array_records
from tljax.data.byte_ranges import ShardFile
from tljax.data.examples import Source, Splits, join_names
from tljax.data.hf_images import HfImages
from tljax.data.hub_labels import Feature, Values
from tljax.data.listing import suggest_path
from tljax.data.options import LabelOptions
from tljax.data.parts import (
    Parts,
    Unlabeled,
    has_validation_part,
    open_parts,
    open_validation_part,
)
from tljax.data.shard_index import open_column
from tljax.data.tf_examples import RecordImages
from tljax.data.tfrecords import open_tfrecords
from tljax.runtime.errors import RequestError, first_line
from tljax.runtime.files import sha256
from tljax.runtime.packages import install_command


def is_hub(spec: str) -> bool:
    """Return True for the name of a data set of a hub: ``tfds:...`` or ``hf:...``."""
    return spec.startswith(tuple(f"{kind}:" for kind in _KINDS))


def open_hub_splits(spec: str, val_fraction: float, labels: LabelOptions | None = None) -> Splits:
    """Open the training and validation splits of a data set; see `tljax.data.parts.open_parts`.

    Raises:
        RequestError: the data set, a feature or a package is missing, or it cannot be trained on.
    """
    labels = labels or LabelOptions()
    return open_parts(spec, _open(spec, labels), val_fraction, labels)


def hub_has_validation(spec: str, labels: LabelOptions | None = None) -> bool:
    """Return True if a data set has a validation split with labels.

    Raises:
        RequestError: the data set, a feature or a package is missing.
    """
    labels = labels or LabelOptions()
    return has_validation_part(_open(spec, labels), labels)


def open_labeled_hub(spec: str, val_fraction: float, labels: LabelOptions | None = None) -> Source:
    """Open the validation split of a data set or, if it has none, that of a split by content.

    Raises:
        RequestError: the data set, a feature or a package is missing, or no example has a label.
    """
    labels = labels or LabelOptions()
    source = open_validation_part(parts := _open(spec, labels), labels)
    return open_parts(spec, parts, val_fraction, labels).val if source is None else source


def _open(spec: str, labels: LabelOptions) -> Parts:
    kind, _, name = spec.partition(":")
    if not name:
        raise RequestError(f"{spec} has no name: write {kind}:NAME")
    labels.refuse("root path_column split_column", spec)
    return {split.lower(): part for split, part in _KINDS[kind](spec, name).items()}


def _image_feature(
    where: str, features: Mapping[str, object], kind: type, advice: str, preferred: object = None
) -> str:
    """Find the name of the only image feature, or of the preferred one."""
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


def _tfds_parts(spec: str, name: str) -> Parts:
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
        builder = _tfds_builder(tfds, name)
        features = dict(builder.info.features)
    keys = builder.info.supervised_keys or (None, None)
    other = "choose a data set for image classification"
    image = _image_feature(spec, features, tfds.features.Image, other, keys[0])
    if features[image].np_dtype == np.float32:  # TFDS stores their bits as RGBA
        raise RequestError(f"{spec} has float32 images: choose a data set with uint8 images")

    described = {
        name: _tfds_feature(tfds, feature) for name, feature in features.items() if name != image
    }

    def open_split(split: str) -> Unlabeled:
        where = f"{spec} {split}"
        with _explained(where, advice):
            paths = builder.info.splits[split].filepaths
            # The version alone does not identify the content: a builder under development changes
            # it. Nor do modification times, which copying changes.
            shards = list(map(_shard_identity, paths))
            files = [ShardFile.local(str(path)) for path in paths]
        is_tfrecord = builder.info.file_format.value == "tfrecord"
        records = open_tfrecords(files) if is_tfrecord else open_array_records(files)
        fingerprint = sha256(repr((builder.info.full_name, split, image, shards)).encode())

        def read_one(name: str) -> list[Any]:
            parse = tfds.features.FeaturesDict({name: features[name]}).deserialize_example_np
            with _explained(where, advice):
                return [_python_value(parse(records[i])[name]) for i in range(len(records))]

        def read(names: Sequence[str]) -> dict[str, Sequence[Any]]:
            # The labels lie among the images, so that all the data are read for them.
            return {
                name: open_column(f"{fingerprint} {name}", partial(read_one, name))
                for name in names
            }

        examples = RecordImages(records, image, fingerprint)
        return Unlabeled(where, examples, described, read, keys[1], other)

    return {split: partial(open_split, split) for split in builder.info.splits}


def _tfds_builder(tfds: Any, name: str) -> Any:
    """Prepare a data set, and return its builder."""
    # Some data sets need TensorFlow to be prepared; none does to be read.
    try:
        builder = tfds.builder(name, file_format="array_record")
    except ValueError:  # it is prepared in another format, of which tfrecord can be read
        builder = tfds.builder(name)
        if builder.info.file_format.value != "tfrecord":
            raise
    builder.download_and_prepare()
    return builder


def _tfds_feature(tfds: Any, feature: Any) -> Feature | str:
    """Describe a feature; return the name of its type if it cannot be a label."""
    if isinstance(feature, tfds.features.Sequence):
        inner = _tfds_feature(tfds, feature.feature)
        if isinstance(inner, Feature) and not inner.many:
            return inner._replace(many=True)
    elif isinstance(feature, tfds.features.ClassLabel):
        return Feature("class", tuple(feature.names or ()))
    elif isinstance(feature, tfds.features.Text):
        return Feature("text")
    elif isinstance(feature, tfds.features.Tensor) and _is_row(feature.shape):
        kind = np.dtype(feature.np_dtype).kind
        if values := _TENSOR_VALUES.get(kind):
            return Feature(values, many=bool(feature.shape))
    return type(feature).__name__


_TENSOR_VALUES: dict[str, Values] = {"b": "bool", "i": "int", "u": "int", "f": "float"}


def _is_row(shape: tuple[int | None, ...]) -> bool:
    """Return True for the shape of one value, or of a row or column of values."""
    sizes = [size for size in shape if size != 1]
    return None not in sizes and len(sizes) < 2


def _python_value(value: Any) -> Any:
    """Convert an array or string of TFDS to lists, numbers and str."""
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, list):
        return [_python_value(item) for item in value]
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def _shard_identity(shard: Any) -> tuple[str, int, str]:
    """Return the name of a file, its length, and the hash of its first and last megabyte."""
    length, part = shard.stat().length, 2**20
    with shard.open("rb") as file:
        begin = file.read(part)
        file.seek(max(0, length - part))
        return shard.name, length, sha256(begin + file.read())


def _hf_parts(spec: str, name: str) -> Parts:
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

    def open_split(split: str, dataset: Any) -> Unlabeled:
        dataset = dataset.with_format(None)  # save_to_disk stores the format
        where = f"{spec} {split}"
        advice = (
            "give it one Image and one ClassLabel feature with the datasets library, write it with"
            " save_to_disk(FOLDER), and open hf:FOLDER"
        )
        image = _image_feature(where, dataset.features, datasets.Image, advice)

        def read(names: Sequence[str]) -> dict[str, list[Any]]:
            with _explained(where, "check the files"):
                table = dataset.select_columns([*names]).with_format("arrow")[:]
                return {name: table.column(name).to_pylist() for name in names}

        described = {
            name: _hf_feature(datasets, feature)
            for name, feature in dataset.features.items()
            if name != image
        }
        rows = dataset.select_columns(image).cast_column(image, datasets.Image(decode=False))
        fingerprint = f"{dataset._fingerprint} {image}"
        examples = HfImages(rows, image, fingerprint)
        return Unlabeled(where, examples, described, read, "label", advice)

    return {split: partial(open_split, split, dataset) for split, dataset in parts.items()}


def _hf_feature(datasets: Any, feature: Any) -> Feature | str:
    """Describe a feature; return the name of its type if it cannot be a label."""
    arrays = (datasets.Array2D, datasets.Array3D, datasets.Array4D, datasets.Array5D)
    if isinstance(feature, datasets.List | datasets.LargeList):
        inner = _hf_feature(datasets, feature.feature)
        if isinstance(inner, Feature) and not inner.many:
            return inner._replace(many=True)
    elif isinstance(feature, datasets.ClassLabel):
        return Feature("class", tuple(feature.names or ()))
    elif isinstance(feature, datasets.Value) and (values := _value_kind(feature.dtype)):
        return Feature(values)
    elif isinstance(feature, arrays) and _is_row(feature.shape):
        values = _value_kind(feature.dtype)
        if values and values != "text":
            return Feature(values, many=True)
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def _value_kind(dtype: str) -> Values | None:
    """Return what the values of an Arrow type are, None if they cannot be labels."""
    return _ARROW_VALUES.get(dtype.rstrip("0123456789"))


_ARROW_VALUES: dict[str, Values] = {
    "bool": "bool",
    "int": "int",
    "uint": "int",
    "float": "float",
    "double": "float",
    "string": "text",
    "large_string": "text",
    "string_view": "text",
}

_KINDS = {"tfds": _tfds_parts, "hf": _hf_parts}
