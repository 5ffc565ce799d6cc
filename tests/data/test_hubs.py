"""Data sets of TensorFlow Datasets and Hugging Face: the same examples in every format.

All are created by the tests, with the packages themselves and without TensorFlow.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_records import write_tfrecord

from tljax.data import hubs
from tljax.data.examples import Source, Splits, select
from tljax.data.hf_images import HfImages
from tljax.data.hubs import open_hub_splits, open_labeled_hub
from tljax.data.loader import load_batches
from tljax.data.options import LabelOptions
from tljax.data.sources import has_validation, open_labeled, open_splits
from tljax.runtime.errors import RequestError, StoppedError, UnreadableImageError
from tljax.runtime.preprocess import Preprocess

CLASSES = ["cat", "dog", "fox"]
KEYS = ("image", "label")

DTYPES = {"multilabel": np.float32, "regression": np.float64}


def content(index: int) -> bytes:
    """Return an encoded image, or for every fifth index bytes that cannot be decoded."""
    if index % 5 == 0:
        return f"not an image {index}".encode()
    file = io.BytesIO()
    Image.new("RGB", (9, 14), (index * 5, 0, 0)).save(file, "jpeg")
    return file.getvalue()


def label(index: int) -> int:
    return index % len(CLASSES)


def examples(*indices: int) -> dict[bytes, str]:
    return {content(i): CLASSES[label(i)] for i in indices}


def examples_of(source: Source) -> dict[bytes, str]:
    contents = [source.read(i) for i in range(len(source))]
    assert all(isinstance(data, bytes) for data in contents)
    assert source.labels.dtype == np.int32
    assert len({*contents}) == len(contents) == len({*source.names})
    return {bytes(data): source.classes[i] for data, i in zip(contents, source.labels, strict=True)}


@pytest.fixture(name="hf", autouse=True)
def _hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import datasets

    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path / "tljax"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return datasets


@pytest.fixture(name="tfds")
def _tfds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    return tfds


def rows(hf: Any, indices: range, **columns: Any) -> Any:
    """Create a data set with an image, a label and more columns, ``{name: (feature, values)}``."""
    columns = {
        "image": (hf.Image(), [{"bytes": content(i), "path": None} for i in indices]),
        "label": (hf.ClassLabel(names=CLASSES), [label(i) for i in indices]),
        **columns,
    }
    columns = {name: column for name, column in columns.items() if column}
    return hf.Dataset.from_dict(
        {name: values for name, (_, values) in columns.items()},
        features=hf.Features({name: feature for name, (feature, _) in columns.items()}),
    )


def save_to_disk(hf: Any, folder: Path, **splits: Any) -> str:
    hf.DatasetDict(splits).save_to_disk(folder)
    return f"hf:{folder}"


def tfds_builder(tfds: Any, dataset_name: str, splits: dict[str, range], **options: Any) -> Any:
    """Create a builder, registered with TFDS by name unless ``hidden`` is set."""
    image, names = tfds.features.Image, tfds.features.ClassLabel
    features = options.get("features") or {
        "image": image(encoding_format="jpeg"),
        "mask": image(encoding_format="png"),
        "label": names(names=CLASSES),
        "species": names(names=["feline", "canine"]),
    }

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=options.get("hidden", False)):
        VERSION = tfds.core.Version("3.2.0")
        name = dataset_name

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=options.get("keys"),
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            if options.get("needs_tensorflow"):
                import_module("tensorflow")
            return {split: self._generate_examples(indices) for split, indices in splits.items()}

        def _generate_examples(self, indices: range) -> Iterator[tuple[int, dict[str, Any]]]:
            given: dict[str, Callable[[int], Any]] = options.get("values", {})
            values: dict[str, Callable[[int], Any]] = given | {
                "image": lambda i: io.BytesIO(content(i)),
                "mask": lambda i: io.BytesIO(b"not a mask"),
                "label": label,
                "species": lambda i: 0,
            }
            for key, i in enumerate(indices):
                yield key, {name: values[name](i) for name in features}

    return Made(data_dir=tfds.core.constants.DATA_DIR, file_format="array_record")


@pytest.fixture(name="spec", params=["tfds", "save_to_disk", "parquet", "imagefolder"])
def _spec(request: pytest.FixtureRequest, tmp_path: Path, hf: Any) -> str:
    """Write 20 examples to train and 6 to test, in one of the formats."""
    splits = {"train": range(20), "test": range(20, 26)}
    folder = tmp_path / request.param
    if request.param == "tfds":
        tfds: Any = request.getfixturevalue("tfds")
        tfds_builder(tfds, "tiny_pets", splits, keys=KEYS, hidden=True).download_and_prepare()
        return "tfds:tiny_pets:3.*.*"
    if request.param == "save_to_disk":
        return save_to_disk(
            hf, folder, **{k: rows(hf, v).with_format("pandas") for k, v in splits.items()}
        )
    for split, indices in splits.items():
        if request.param == "parquet":
            rows(hf, indices).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        for i in indices if request.param == "imagefolder" else ():
            path = folder / split / CLASSES[label(i)] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content(i))
    return f"hf:{folder}"


def test_examples_are_the_stored_files_under_their_labels(spec):
    train, val, notes = open_splits(spec)
    assert examples_of(train) == examples(*range(20))
    assert examples_of(val) == examples(*range(20, 26))
    assert train.classes == val.classes == tuple(CLASSES)
    assert notes == ()
    assert train.names[3] == f"{spec} train[3]"
    assert examples_of(open_labeled(spec)) == examples_of(val)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["tfds", "save_to_disk"], indirect=True)
def test_workers_read_the_same_batches(spec):
    train, _, _ = open_splits(spec)
    source = select(train, range(19, 3, -1))
    skipped: list[dict[int, str]] = [{}, {}]
    load = partial(load_batches, source, Preprocess(size=2, resize=2), batch_size=4)
    here, there = (
        list(load(workers=workers, skipped=skipped[i])) for i, workers in enumerate((0, 2))
    )
    for batch, reference in zip(there, here, strict=True):
        for field, value in zip(batch, reference, strict=True):
            np.testing.assert_array_equal(field, value)
    assert skipped[0] == skipped[1]
    assert {*skipped[0].values()} == {"text, not an image"}
    assert sum(batch.inputs.any(axis=(1, 2, 3)).sum() for batch in here) == 16 - len(skipped[0])


def test_digest_reads_no_image(spec, monkeypatch):
    train, val, _ = open_splits(spec)
    monkeypatch.setattr(Source, "read", lambda *_: pytest.fail("read an image"))
    digests = [
        train.digest,
        val.digest,
        select(train, [0, 1]).digest,
        select(train, [1, 0]).digest,
        replace(train, classes=("a", "b", "c")).digest,
        replace(train, labels=np.roll(train.labels, 1)).digest,
    ]
    assert len({*digests}) == len(digests)
    assert open_splits(spec).train.digest == train.digest
    assert select(select(train, [5, 1, 0]), [2, 1]).digest == select(train, [0, 1]).digest


def test_digest_changes_with_the_content(hf, tfds, tmp_path):
    digests = {"hf": [], "tfds": []}
    for start in (0, 3):  # different images with the same name, labels and version
        for name in ("disk", "tiny_pets"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        indices = range(start, start + 30)
        spec = save_to_disk(hf, tmp_path / "disk", train=rows(hf, indices))
        digests["hf"].append(open_splits(spec, val_fraction=0).train.digest)
        tfds_builder(
            tfds, "tiny_pets", {"train": indices}, keys=KEYS, hidden=True
        ).download_and_prepare()
        train = open_splits("tfds:tiny_pets", val_fraction=0).train
        digests["tfds"].append(replace(train, labels=np.zeros(30, np.int32)).digest)
    for first, second in digests.values():
        assert first != second


def test_digest_does_not_change_when_files_are_copied(tfds, tmp_path):
    tfds_builder(
        tfds, "tiny_pets", {"train": range(30)}, keys=KEYS, hidden=True
    ).download_and_prepare()
    before = open_splits("tfds:tiny_pets", val_fraction=0).train.digest
    for shard in (tmp_path / "tiny_pets/3.2.0").iterdir():
        os.utime(shard, (0, 2e9))  # TFDS stores times in seconds
    assert open_splits("tfds:tiny_pets", val_fraction=0).train.digest == before


def test_a_validation_part_is_detected_without_splitting(spec, hf, tmp_path):
    assert has_validation(spec)
    train, unlabeled = (
        rows(hf, range(6), label=(hf.ClassLabel(names=CLASSES), labels))
        for labels in ([0, 1, 2, 0, 1, 2], [-1] * 6)
    )
    # A split without labels cannot validate, and the only split is for training.
    assert not has_validation(save_to_disk(hf, tmp_path / "a", train=train, test=unlabeled))
    assert not has_validation(save_to_disk(hf, tmp_path / "b", train=train))
    assert not has_validation(save_to_disk(hf, tmp_path / "c", test=train))


def test_one_split_is_split_by_content(hf, tmp_path):
    spec = save_to_disk(hf, tmp_path / "x", train=rows(hf, range(50)))
    train, val, notes = open_splits(spec, val_fraction=0.3)
    in_val = [
        i for i in range(50) if int(hashlib.sha256(content(i)).hexdigest()[:12], 16) < 0.3 * 16**12
    ]
    assert examples_of(val) == examples(*in_val)
    assert examples_of(train) == examples(*{*range(50)} - {*in_val})
    assert notes == (f"split by content: {len(train)} to train on, {len(val)} to validate on",)
    assert examples_of(open_labeled(spec)) == examples_of(open_splits(spec).val)

    rows(hf, range(50)).save_to_disk(tmp_path / "nameless")
    nameless = open_splits(f"hf:{tmp_path / 'nameless'}", val_fraction=0.3)
    assert examples_of(nameless.val) == examples_of(val)

    spec = save_to_disk(hf, tmp_path / "test", Test=rows(hf, range(50)))
    assert len(open_labeled(spec)) == 50  # the only split is used as a whole
    assert examples_of(open_splits(spec, val_fraction=0.3).train) == examples_of(train)


def test_examples_without_a_label_and_classes_without_an_example_are_left_out(hf, tmp_path):
    labels = [0, 2, None, -1, 0, 2]
    train = rows(hf, range(6), label=(hf.ClassLabel(names=CLASSES), labels))
    unlabeled = rows(hf, range(6), label=(hf.ClassLabel(names=CLASSES), [-1] * 6))
    spec = save_to_disk(
        hf, tmp_path / "x", train=train, validation=unlabeled, test=rows(hf, range(6, 10))
    )
    train, val, notes = open_splits(spec)
    cats, foxes = (
        dict.fromkeys(map(content, (0, 4)), "cat"),
        dict.fromkeys(map(content, (1, 5)), "fox"),
    )
    assert examples_of(train) == cats | foxes
    assert train.classes == val.classes == ("cat", "fox")
    assert examples_of(val) == examples(6, 8, 9)
    assert notes == (
        "left out 2 examples without a label",
        "left out classes without training examples: dog",
        "left out 1 examples of unknown classes: dog",
    )


def test_a_missing_image_is_reported_when_it_is_read(hf, tmp_path):
    images = [None, {"bytes": None, "path": None}, {"bytes": None, "path": str(tmp_path / "gone")}]
    stored = {"bytes": hf.Value("binary"), "path": hf.Value("string")}
    data = rows(hf, range(3), image=(stored, images))
    for row, reason in zip(data, ["the row has no", "the row has no", "No such file"], strict=True):
        with pytest.raises(UnreadableImageError, match=reason):
            HfImages([row], "image", "")[0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": None}, r"train has no Image features \(label: ClassLabel\); give it one Image"),
        ({"depth": "image"}, r"train has 2 Image features \(image, depth\); give it one Image"),
        ({"label": None}, r"train has no feature that can be a label \(none\); give it one Image"),
        (
            {"label": None, "fine": "label", "coarse": "label"},
            r"train has 2 features that can be labels \(fine, coarse\): choose one with --target",
        ),
        (
            {"label": [1] * 9},
            "train has training images of one class, dog: training needs two or more",
        ),
        ({"label": [-1] * 9}, "train has no example with a label: training needs some"),
    ],
)
def test_hf_columns_that_cannot_be_trained_on_are_refused(hf, tmp_path, columns, message):
    kinds = {
        "image": (hf.Image(), [None] * 9),
        "label": (hf.ClassLabel(names=CLASSES), [0] * 9),
    }
    columns = {
        name: (kinds["label"][0], kind) if isinstance(kind, list) else kind and kinds[kind]
        for name, kind in columns.items()
    }
    spec = save_to_disk(hf, tmp_path / "x", train=rows(hf, range(9), **columns))
    with pytest.raises(RequestError, match=message) as error:
        open_splits(spec)
    assert "\n" not in str(error.value)


def test_the_column_named_label_is_preferred(hf, tmp_path):
    species = (hf.ClassLabel(names=["feline", "canine"]), [0] * 9)
    spec = save_to_disk(hf, tmp_path / "x", train=rows(hf, range(9), species=species))
    assert open_splits(spec, val_fraction=0).train.classes == tuple(CLASSES)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:", "hf: has no name: write hf:NAME"),
        ("tfds:", "tfds: has no name: write tfds:NAME"),
        ("hf:owner/name", r"hf:owner/name cannot be opened: Couldn't reach .* check the name"),
        ("hf:owner/name:en", r"hf:owner/name:en cannot be opened: Couldn't reach 'owner/name'"),
        ("hf:./fodler", r"hf:./fodler: fodler is not a folder; did you mean folder\?"),
        ("hf:empty", "hf:empty cannot be opened: .* doesn't contain any data files; check the"),
        ("hf:folder:x", r"folder:x cannot be opened: BuilderConfig 'x' not found. Available: \['d"),
        (
            "hf:broken",
            "hf:broken cannot be opened: .* not a parquet file; check the name, the files",
        ),
        ("hf:parts", "hf:parts has no split named train, only test, extra: rename one"),
        ("tfds:nonesuch", "nonesuch cannot be opened: Dataset nonesuch not found; check the name"),
        ("tfds:mnist:1.0.0", "mnist:1.0.0 cannot be opened: .* cannot be loaded at version 1.0.0"),
    ],
)
def test_a_data_set_that_does_not_exist_is_refused_in_one_line(
    hf, tfds, tmp_path, monkeypatch, spec, message
):
    monkeypatch.chdir(tmp_path)
    rows(hf, range(9)).to_parquet("folder/train.parquet")
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/train.parquet").write_bytes(b"not parquet")
    save_to_disk(hf, Path("parts"), test=rows(hf, range(9)), extra=rows(hf, range(9)))
    with pytest.raises(RequestError, match=message) as error:
        open_splits(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ("label", {}, r"has no Image features \(label: ClassLabel\); choose a data set for image"),
        ("image", {}, r"has no feature that can be a label \(none\); choose a data set for image"),
        ("image mask label", {}, r"has 2 Image features \(image, mask\)"),
        (
            "image label",
            {"needs_tensorflow": True},
            "opened: .*tensorflow.*; check the name, or run",
        ),
    ],
)
def test_tfds_data_sets_without_the_right_features_are_refused_in_one_line(
    request, tfds, monkeypatch, features, options, message
):
    kinds = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "mask": tfds.features.Image(encoding_format="png"),
        "label": tfds.features.ClassLabel(names=CLASSES),
    }
    name = f"refused{request.node.callspec.indices['features']}"
    chosen = {feature: kinds[feature] for feature in features.split()}
    tfds_builder(tfds, name, {"train": range(9)}, features=chosen, **options)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(RequestError, match=f"tfds:{name} .*{message}") as error:
        open_splits(f"tfds:{name}")
    assert "\n" not in str(error.value)


def test_tfds_prepares_a_registered_data_set_and_supervised_keys_select_features(tfds, tmp_path):
    tfds_builder(tfds, "known", {"train": range(9)}, keys=KEYS)
    train = open_splits("tfds:known", val_fraction=0).train
    assert examples_of(train) == examples(*range(9))
    assert [*(tmp_path / "known/3.2.0").glob("*.array_record*")]


def prepare_and_edit(tfds: Any, file: str, **edits: str) -> None:
    tfds_builder(
        tfds, "tiny_pets", {"train": range(9)}, keys=KEYS, hidden=True
    ).download_and_prepare()
    path = Path(tfds.core.constants.DATA_DIR, "tiny_pets/3.2.0", file)
    text = path.read_text()
    for old, new in edits.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def test_tfds_in_tfrecord_files_is_read_without_tensorflow(tfds, tmp_path):
    from array_record.python.array_record_module import ArrayRecordReader

    prepare_and_edit(tfds, "dataset_info.json")
    before = open_splits("tfds:tiny_pets")
    folder = tmp_path / "tiny_pets/3.2.0"
    for path in folder.glob("*array_record*"):
        records = ArrayRecordReader(str(path)).read_all()
        write_tfrecord(path.with_name(path.name.replace("array_record", "tfrecord")), records)
        path.unlink()
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    after = open_splits("tfds:tiny_pets")
    assert examples_of(after.train) == examples_of(before.train)
    assert examples_of(after.val) == examples_of(before.val)


def test_tfds_in_another_format_is_refused_with_instructions_to_convert_it(tfds):
    prepare_and_edit(tfds, "dataset_info.json", array_record="riegeli")
    build = "`tfds build tiny_pets --file_format=array_record --data_dir=FOLDER`"
    with pytest.raises(RequestError, match=rf"\['riegeli'\]; .*{build}.* TFDS_DATA_DIR=FOLDER"):
        open_splits("tfds:tiny_pets")


def test_labels_of_tfds_are_read_once(tfds, monkeypatch):
    prepare_and_edit(tfds, "dataset_info.json")
    labels = open_splits("tfds:tiny_pets", val_fraction=0).train.labels
    reads = "tljax.data.array_records.ArrayRecords.__getitem__"
    monkeypatch.setattr(reads, lambda *_: pytest.fail("read a record"))
    np.testing.assert_array_equal(
        open_splits("tfds:tiny_pets", val_fraction=0).train.labels, labels
    )


def test_a_missing_shard_is_reported(tfds, tmp_path):
    prepare_and_edit(tfds, "dataset_info.json")
    for shard in (tmp_path / "tiny_pets/3.2.0").glob("*array_record*"):
        shard.unlink()
    with pytest.raises(RequestError, match=r"pets train cannot be opened: .*No such file.*run"):
        open_splits("tfds:tiny_pets")


def test_float_images_are_refused(tfds):
    prepare_and_edit(tfds, "features.json", uint8="float32", jpeg="png", **{'"3"': '"1"'})
    with pytest.raises(RequestError, match="tiny_pets has float32 images: choose a data set"):
        open_splits("tfds:tiny_pets")


@pytest.mark.parametrize(
    ("spec", "package", "extra"),
    [("hf:x", "datasets", "hf"), ("tfds:x", "tensorflow_datasets", "tfds")],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, spec, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    for opens in (open_splits, open_labeled):
        with pytest.raises(RequestError, match=rf'pip install "tljax\[{extra}\]"$'):
            opens(spec)


def test_the_packages_are_imported_lazily_and_import_no_framework(hf, tmp_path):
    spec = save_to_disk(hf, tmp_path / "x", train=rows(hf, range(30)))
    code = (
        "import sys, tljax.data.sources as s\n"
        "print({'datasets', 'tensorflow_datasets', 'pandas', 'pyarrow'} & {*sys.modules})\n"
        f"s.open_splits({spec!r})\n"
        "import tensorflow_datasets as tfds; tfds.builder\n"
        "print({'torch', 'tensorflow'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["set()", "set()"]


def test_sigterm_while_a_data_set_is_opened_is_not_a_fault_of_the_data(monkeypatch):
    def stop(*_, **__):
        raise StoppedError

    monkeypatch.setattr("tensorflow_datasets.builder", stop)
    with pytest.raises(StoppedError):
        open_splits("tfds:mnist")


@pytest.fixture(name="open_column")
def _open_column(hf: Any, tmp_path: Path) -> Callable[..., Splits]:
    """Return a function that writes columns to a data set of 8 rows and opens it."""

    def open_column(
        columns: dict[str, tuple[Any, list[Any]]], parquet: bool = False, **options: Any
    ) -> Splits:
        columns = {name: (feature, values * 2) for name, (feature, values) in columns.items()}
        data = rows(hf, range(8), **({"label": None} | columns))
        folder = tmp_path / f"data{len([*tmp_path.iterdir()])}"
        if parquet:
            data.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
            return open_hub_splits(f"hf:{folder}", 0, LabelOptions(**options))
        spec = save_to_disk(hf, folder, train=data)
        return open_hub_splits(spec, 0, LabelOptions(**options))

    return open_column


def kinds(hf: Any) -> dict[str, tuple[Any, list[Any]]]:
    """Return a feature and four values of each type that can be a label."""
    named = hf.ClassLabel(names=CLASSES)
    return {
        "classes": (hf.List(named), [[0, 2], [], None, [1, 1]]),
        "large": (hf.LargeList(named), [[0, 2], [], [-1], [1]]),
        "strings": (hf.List(hf.Value("string")), [["x, y", "z"], [], ["z", "", None], None]),
        "hot": (hf.List(hf.Value("int8"), length=3), [[0, 1, 0], [1, 1, 0], [None, 0, 1], None]),
        "bools": (hf.List(hf.Value("bool")), [[True, False], [True, True], [], [False, True]]),
        "array": (hf.Array2D((1, 3), "float32"), [[[0, 1.5, 0]], [[1, 1, 0]], [[2, 0, 1]], None]),
        "float": (hf.Value("float16"), [1.5, None, float("nan"), -4]),
        "flag": (hf.Value("bool"), [True, False, None, True]),
        "text": (hf.Value("string"), ["a", "b, c", "", None]),
        "int": (hf.Value("int32"), [10, 9, None, 9]),
    }


EXPECTED = {
    "classes": (
        CLASSES,
        [[1, 0, 1], [0, 0, 0], [0, 1, 0]],
        "3 labels, none of which applies to 2 rows, 25% of the values unknown",
    ),
    "large": (
        CLASSES,
        [[1, 0, 1], [0, 0, 0], [0, 0, 0], [0, 1, 0]],
        "3 labels, none of which applies to 4 rows",
    ),
    "strings": (
        ["x, y", "z"],
        [[1, 1], [0, 0], [0, 1]],
        "2 labels, none of which applies to 2 rows, 25% of the values unknown",
    ),
    "hot": (
        ["label 0", "label 1", "label 2"],
        [[0, 1, 0], [1, 1, 0], [np.nan, 0, 1]],
        "3 labels, 33% of the values unknown",
    ),
    "bools": (
        ["label 0", "label 1"],
        [[1, 0], [1, 1], [0, 1]],
        "2 labels, 25% of the values unknown",
    ),
    "array": (
        ["array 0", "array 1", "array 2"],
        [[0, 1.5, 0], [1, 1, 0], [2, 0, 1]],
        "numbers from 0 to 2, 0 to 1.5, 0 to 1, 25% of the values unknown",
    ),
    "float": (["float"], [[1.5], [-4]], "numbers from -4 to 1.5, 50% of the values unknown"),
    "flag": (["False", "True"], [1, 0, 1], "one of 2 classes"),
    "text": (["a", "b, c"], [0, 1], "one of 2 classes"),
}
NUMBERS, CLASS = ("array", "float"), ("flag", "text")
OTHER_KINDS = dict.fromkeys(NUMBERS, "regression") | dict.fromkeys(CLASS, "classification")


@pytest.mark.parametrize("parquet", [False, True])
@pytest.mark.parametrize("name", EXPECTED)
def test_the_only_feature_that_can_be_a_label_is_one(hf, open_column, name, parquet):
    train, val, notes = open_column({name: kinds(hf)[name]}, parquet)
    classes, labels, note = EXPECTED[name]
    assert train.classes == val.classes == tuple(classes)
    np.testing.assert_array_equal(train.labels, labels * 2)
    assert train.task.kind == OTHER_KINDS.get(name, "multilabel")
    assert train.labels.dtype == DTYPES.get(train.task.kind, np.int32)
    assert notes[0] == f"column {name}: {note}"
    left_out = 8 - 2 * len(labels)
    assert notes[1:-1] == (f"left out {left_out} examples without a label",) * bool(left_out)
    assert [train.read(0), len(train.names)] == [content(0), len(train)]


@pytest.mark.parametrize(
    ("options", "kind", "classes", "labels"),
    [
        ({"target": "int"}, "classification", ["9", "10"], [1, 0, 0]),
        ({"task": "classification"}, "classification", ["9", "10"], [1, 0, 0]),
        ({"task": "ordinal"}, "ordinal", ["9", "10"], [1, 0, 0]),
        ({"order": "10,9,8"}, "ordinal", ["10", "9", "8"], [0, 1, 1]),
        ({"task": "regression"}, "regression", ["int"], [[10], [9], [9]]),
    ],
)
def test_whole_numbers_are_what_the_task_says(hf, open_column, options, kind, classes, labels):
    train = open_column({"int": kinds(hf)["int"]}, **options).train
    assert (train.task.kind, train.classes) == (kind, tuple(classes))
    np.testing.assert_array_equal(train.labels, labels * 2)


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        (range(20), "classification"),
        (range(21), "regression"),
        ([*range(21)] * 5, "classification"),
    ],
)
def test_many_different_whole_numbers_are_quantities_unless_they_number_classes(
    hf, tmp_path, numbers, kind
):
    data = rows(hf, range(len(numbers)), label=(hf.Value("int64"), list(numbers)))
    spec = save_to_disk(hf, tmp_path / "x", train=data)
    assert open_hub_splits(spec, 0, LabelOptions(target="label")).train.task.kind == kind


def test_several_features_of_0_and_1_are_labels_and_other_numbers_are_numbers(hf, open_column):
    columns = {
        "a": (hf.Value("bool"), [True, False, None, None]),
        "b": (hf.Value("float64"), [0, None, float("nan"), 1]),
        "c, d": (hf.Value("uint8"), [1, 1, 0, None]),
        "age": (hf.Value("int64"), [30, 40, 50, 60]),
    }
    train, _, notes = open_column(columns, target="c, d,a,b")
    nan = np.nan
    labels = [[1, 1, 0], [1, 0, nan], [0, nan, nan], [nan, nan, 1]]
    np.testing.assert_array_equal(train.labels, labels * 2)
    assert train.classes == ("c, d", "a", "b")
    assert train.task.kind == "multilabel"
    assert notes[0] == "columns c, d, a, b: 3 labels, 42% of the values unknown"

    train = open_column(columns, target="age,b", units="years,mm").train
    np.testing.assert_array_equal(train.labels, [[30, 0], [40, nan], [50, nan], [60, 1]] * 2)
    assert train.task.units == ("years", "mm")


def test_columns_with_one_1_each_are_classes_if_the_task_says_so(hf, open_column):
    hot = hf.List(hf.Value("int8"))
    columns = {"x": (hot, [[0, 1], [1, 0], None, [1, 0]])}
    train = open_column(columns, task="classification").train
    assert (train.classes, [*train.labels]) == (("label 0", "label 1"), [1, 0, 0] * 2)
    with pytest.raises(
        RequestError, match="x: --task classification needs one 1 in every row, but row 2 has 2"
    ):
        open_column({"x": (hot, [[0, 1], [1, 1], [0, 0], [1, 0]])}, task="classification")


def test_a_class_each_is_a_label_or_a_number_if_the_task_says_so(hf, open_column):
    columns = {"x": (hf.ClassLabel(names=["1.5", "20", "3"]), [1, 0, None, -1])}
    train, _, notes = open_column(columns, task="multilabel")
    assert train.labels.tolist() == [[0, 1], [1, 0]] * 2
    assert train.classes == ("1.5", "20")
    assert notes[2] == "left out labels that apply to no training example: 3"
    assert open_column(columns, task="regression").train.labels.tolist() == [[20], [1.5]] * 2
    ordinal = open_column(columns, task="ordinal").train
    assert ordinal.classes == ("1.5", "3", "20")  # a step of the scale may have no example
    assert ordinal.labels.tolist() == [2, 0] * 2


def test_classes_go_before_lists_of_classes_and_these_before_all_others(hf, open_column):
    named = hf.ClassLabel(names=CLASSES)
    columns = {
        "caption": (hf.Value("string"), ["a", "b", "c", "d"]),
        "tags": (hf.List(named), [[0], [1, 2], [], [0]]),
        "box": (hf.List(hf.Value("float32")), [[1, 2], [3, 4], [5, 6], [7, 8]]),
    }
    assert open_column(columns).train.classes == tuple(CLASSES)
    assert open_column(columns, task="regression").train.classes == ("box 0", "box 1")
    species = (hf.ClassLabel(names=["feline", "canine"]), [0, 1, 1, 0])
    assert open_column(columns | {"x": species}).train.classes == ("feline", "canine")
    assert open_column(columns | {"x": species}, target="tags").train.classes == tuple(CLASSES)
    del columns["tags"]
    with pytest.raises(RequestError, match=r"2 features that can be labels \(caption, box\)"):
        open_column(columns)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ("int", {}, "int has whole numbers without names: say --target int"),
        (
            "classes",
            {"target": "clases"},
            "--target clases: hf:.* train has no such column; did you mean clas",
        ),
        ("classes", {"target": ","}, "--target ,: hf:.* train has no such column; choose classes"),
        (
            "classes flag",
            {"target": "classes,flag"},
            "columns classes, flag are learned together only if",
        ),
        ("classes", {"task": "regression"}, "no feature that can be a label for --task regression"),
        (
            "classes",
            {"target": "classes", "task": "ordinal"},
            r"classes \(lists of classes\) cannot be learned with --task ordinal",
        ),
        (
            "array",
            {"task": "multilabel"},
            "column array of hf:.* train has '2' in row 3: labels need 0 or 1",
        ),
        ("text", {"order": "a"}, "--order a lacks b, c: name all classes of hf"),
        (
            "text",
            {"units": "mm"},
            "--units mm has no effect on column text of hf:.* --task classif",
        ),
        (
            "float",
            {"units": "mm,kg"},
            "--units mm,kg: give 1, one for each number of column float of hf",
        ),
        ("flag", {"root": "x"}, "--root x has no effect on hf:.*: leave it out"),
        ("flag", {"path_column": "x"}, "--path-column x has no effect on hf:.*: leave it out"),
        ("flag", {"split_column": "x"}, "--split-column x has no effect on hf:.*: leave it out"),
        ("flag", {"group": "patient"}, "--group patient: hf:.* has no such column; choose flag"),
        ("flag hot", {"group": "hot"}, r"feature hot \(lists of whole numbers\) does not have one"),
        (
            "flag text",
            {"target": "flag", "weight_column": "text"},
            "--weight-column text: .* has 'a' in row 1: weights",
        ),
        (
            "flag int",
            {"target": "flag", "weight_column": "int"},
            "--weight-column int: .* has '' in row 3: weights",
        ),
    ],
)
def test_features_that_do_not_fit_the_options_are_refused(
    hf, open_column, columns, options, message
):
    chosen = {name: kinds(hf)[name] for name in columns.split()}
    with pytest.raises(RequestError, match=message) as error:
        open_column(chosen, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "values", "message"),
    [
        ("int8", [[0, 1], [1], [1, 0], [0, 0]], "x has lists of 1 to 2 numbers: all must have one"),
        (
            "int8",
            [[0, 5], [1, 3], [1, 0], [0, 0]],
            "x has lists of whole numbers other than 0 and 1",
        ),
        ("int8", [[0, -1], [1, 1], [1, 0], [0, 0]], "-1 stands beside 0 or 1: write 0 if a label"),
        ("int8", [[], None, [None], []], "column x of hf:.* train is empty: choose another"),
        ("int8", [[0, 0]] * 4, "train has no example with a label"),
        (
            "float32",
            [[0.5, 1], [0.5, 2], [0.5, 3], None],
            "x 0 is 0.5 in every example: nothing to",
        ),
        (
            "float32",
            [[0.5, float("inf")]] * 4,
            "column x of .* has 'inf' in row 1: --task regression needs",
        ),
        ("string", [[], None, [], [""]], "column x of hf:.* train names no label"),
        ("timestamp[s]", [[1], [2], [3], [4]], r"no feature that can be a label \(x: List\); give"),
    ],
)
def test_values_that_cannot_be_learned_are_refused(hf, open_column, dtype, values, message):
    with pytest.raises(RequestError, match=message) as error:
        open_column({"x": (hf.List(hf.Value(dtype)), values)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("many", [False, True])
def test_class_indices_without_a_name_are_refused(hf, tmp_path, many):
    # The datasets library checks them when it writes, but not when it reads.
    stored = hf.List(hf.Value("int64")) if many else hf.Value("int64")
    values = [[0], [7], [1], [-2]] if many else [0, 7, 1, -2]
    data = rows(hf, range(4), label=(stored, values))
    named = hf.ClassLabel(names=CLASSES)
    data.info.features["label"] = hf.List(named) if many else named
    spec = save_to_disk(hf, tmp_path / "x", train=data)
    with pytest.raises(RequestError, match="label has class indices -2, 7, but only 3 names"):
        open_splits(spec)


def test_validation_is_read_as_training_is(hf, tmp_path):
    """Here each part alone would be taken for something else, or have other labels."""
    strings = hf.List(hf.Value("string"))
    train, val = (
        rows(hf, indices, label=None, tags=(strings, tags), score=(hf.Value("int8"), scores))
        for indices, tags, scores in [
            (range(4), [["b"], ["a", "c"], [], ["a"]], [5, 1, 0, 30]),
            (range(4, 8), [["c", "d"], [], None, ["d"]], [0, 1, 1, None]),
        ]
    )
    spec = save_to_disk(hf, tmp_path / "x", train=train, test=val)
    splits = open_hub_splits(spec, 0.5, LabelOptions(target="tags"))
    assert splits.val.classes == ("a", "b", "c")
    assert splits.val.labels.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert splits.notes[1] == "left out unknown labels of the validation part: d"
    splits = open_hub_splits(spec, 0.5, LabelOptions(target="score", task="regression"))
    assert splits.val.labels.tolist() == [[0], [1], [1]]
    assert open_labeled_hub(spec, 0.5, LabelOptions(target="tags")).classes == ("c", "d")
    assert hubs.hub_has_validation(spec, LabelOptions(target="tags"))


def test_a_column_that_the_validation_part_lacks_is_unknown_there(hf, tmp_path):
    hot = hf.List(hf.Value("int8"))
    train = rows(hf, range(4), label=None, x=(hot, [[0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 1]]))
    val = rows(hf, range(4, 6), label=None, x=(hot, [[0, 1], [1, 0]]))
    spec = save_to_disk(hf, tmp_path / "x", train=train, test=val)
    splits = open_hub_splits(spec, 0.5)
    np.testing.assert_array_equal(splits.val.labels, [[0, 1, np.nan], [1, 0, np.nan]])
    assert splits.notes[-1] == "1 of 3 labels not in the data: label 2"


def test_groups_and_weights_are_features_by_name(hf, open_column):
    label = (hf.ClassLabel(names=CLASSES), [0, 1, 2, None])
    big = 2**62  # such numbers are not equal, though equal as float64
    patient = (hf.Value("int64"), [big, big + 1, None, 3])
    weight = (hf.Value("float32"), [1, 0, 2.5, 4])
    columns = {"label": label, "patient": patient, "w": weight}
    train, _, notes = open_column(columns, group="patient", weight_column="w")
    assert train.groups is not None
    assert train.groups.dtype == np.int32
    first, second, third = train.groups[:3]
    assert len({first, second, third, train.groups[5]}) == 4
    assert [*train.groups[3:5]] == [first, second]
    assert train.extra["weight"].tolist() == [1, 0, 2.5] * 2
    assert notes[1] == "2 images have no group: each is a group of its own"
    for name in ("flag", "text", "label"):
        feature = label if name == "label" else kinds(hf)[name]
        grouped = open_column({"label": label, name: feature}, group=name, target="label").train
        assert grouped.groups is not None
        assert len({*grouped.groups[:3]}) == 3


def test_a_group_in_both_given_splits_is_refused(hf, tmp_path):
    def part(indices: range, names: list[str | None]) -> Any:
        return rows(hf, indices, site=(hf.Value("string"), names))

    train = part(range(6), ["e", "d", "c", "b", "a", None])
    shared = save_to_disk(hf, tmp_path / "x", train=train, val=part(range(6, 9), ["c", "a", "e"]))
    options = LabelOptions(group="site")
    with pytest.raises(
        RequestError, match=r"3 groups are both in .* part: e, c, a: correct the spl"
    ):
        open_hub_splits(shared, 0, options)
    apart = save_to_disk(hf, tmp_path / "y", train=train, val=part(range(6, 9), ["f", None, ""]))
    assert len(open_hub_splits(apart, 0, options).val) == 3


def test_one_split_is_split_by_group(hf, tmp_path):
    names = [f"site {index // 6}" for index in range(60)]
    data = rows(hf, range(60), site=(hf.Value("string"), names))
    spec = save_to_disk(hf, tmp_path / "x", train=data)
    train, val, _ = open_hub_splits(spec, 0.3, LabelOptions(group="site"))
    assert train.groups is not None
    assert val.groups is not None
    assert not {*train.groups} & {*val.groups}
    assert len(train) + len(val) == 60
    assert 12 <= len(val) <= 24  # one group has 6 examples


def test_tfds_features_are_labels_alike(tfds):
    features = tfds.features
    made = {
        "image": features.Image(encoding_format="jpeg"),
        "tags": features.Sequence(features.ClassLabel(names=CLASSES)),
        "words": features.Sequence(features.Text()),
        "hot": features.Tensor(shape=(2,), dtype=np.bool_),
        "box": features.BBoxFeature(),
        "age": features.Scalar(np.float32),
        "flag": features.Scalar(np.bool_),
        "site": features.Text(),
    }
    values: dict[str, Callable[[int], Any]] = {
        "tags": lambda i: CLASSES[: i % 4],
        "words": lambda i: ["é, x", "y"][: i % 3],
        "hot": lambda i: np.array([i % 2, 1], bool),
        "box": lambda i: features.BBox(0.0, i / 20, 0.5 + i / 20, 0.9),
        "age": lambda i: np.nan if i == 3 else i / 2,
        "flag": lambda i: i % 2 == 0,
        "site": lambda i: f"s{i // 2}",
    }
    tfds_builder(tfds, "labels", {"train": range(8)}, features=made, values=values)

    def train_of(**options: Any) -> tuple[Source, list[int]]:
        train = open_hub_splits("tfds:labels", 0, LabelOptions(**options)).train
        numbers = {content(i): i for i in range(8)}  # TFDS shuffles
        return train, [numbers[bytes(train.examples[i])] for i in range(len(train))]

    train, order = train_of()  # a list of classes goes before all others
    assert train.labels.tolist() == [[float(j < i % 4) for j in range(3)] for i in order]
    assert train.classes == tuple(CLASSES)
    train, order = train_of(target="words", group="site")
    assert train.classes == ("y", "é, x")
    assert train.labels.tolist() == [[i % 3 > 1, i % 3 > 0] for i in order]
    assert train.groups is not None
    assert len({*zip(train.groups.tolist(), [i // 2 for i in order], strict=True)}) == 4
    train, order = train_of(target="hot")
    assert train.labels.tolist() == [[i % 2, 1] for i in order]
    train, order = train_of(target="age")
    assert train.labels.tolist() == [[i / 2] for i in order]
    assert len(order) == 7
    train, order = train_of(target="flag")
    assert train.labels.tolist() == [i % 2 == 0 for i in order]
    with pytest.raises(RequestError, match="box 0 is 0 in every example: nothing to learn"):
        train_of(target="box")
