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

from tljax.data import hubs
from tljax.data.examples import Source, select
from tljax.data.loader import load_batches
from tljax.data.sources import has_validation, open_labeled, open_splits
from tljax.runtime.errors import RequestError, StoppedError, UnreadableImageError
from tljax.runtime.types import Preprocess

CLASSES = ["cat", "dog", "fox"]
KEYS = ("image", "label")


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
            values: dict[str, Callable[[int], Any]] = {
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


@pytest.mark.parametrize(
    "spec", ["tfds", pytest.param("save_to_disk", marks=pytest.mark.slow)], indirect=True
)
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
    monkeypatch.setattr(hubs._Rows, "__getitem__", lambda *_: pytest.fail("read an image"))
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
            hubs._hf_image("image", row)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": None}, r"train has no Image features \(label: ClassLabel\); give it one Image"),
        ({"depth": "image"}, r"train has 2 Image features \(image, depth\); give it one Image"),
        ({"label": None}, r"train has no ClassLabel features \(image: Image\); give it one Image"),
        (
            {"label": None, "fine": "label", "coarse": "label"},
            r"train has 2 ClassLabel features \(fine, coarse\)",
        ),
        ({"label": [1] * 9}, "train has examples of dog: training needs two classes"),
        ({"label": [-1] * 9}, "train has examples of none: training needs two classes"),
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
        ("image", {}, r"has no ClassLabel features \(image: Image\); choose a data set for image"),
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


def test_a_tfrecord_is_refused_with_instructions_to_convert_it(tfds):
    prepare_and_edit(tfds, "dataset_info.json", array_record="tfrecord")
    build = "`tfds build tiny_pets --file_format=array_record --data_dir=FOLDER`"
    with pytest.raises(RequestError, match=rf"\['tfrecord'\]; .*{build}.* TFDS_DATA_DIR=FOLDER"):
        open_splits("tfds:tiny_pets")


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
