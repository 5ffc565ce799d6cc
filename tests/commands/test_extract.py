"""tljax extract: the file holds what `compute_features` computes, with names and classes."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from networks import random_pretrained
from safetensors import safe_open
from test_scripts import answer, call_script, messages, paint

from tljax.commands import extract as extract_command
from tljax.data.folders import open_folder
from tljax.data.options import Loading
from tljax.features.extract import Outputs, compute_features
from tljax.features.share import Share
from tljax.pretrained import load_pretrained, save


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of weights and class folders, with one image that cannot be read."""
    folder = tmp_path_factory.mktemp("extract")
    save(folder / "net.safetensors", random_pretrained("mobilenetv2_050", 5))
    for i in range(5):
        paint(folder / "photographs" / ("red", "blue")[i % 2] / f"{i} é.png", (200, 60, 60), i)
    (folder / "photographs" / "blue" / "2.txt").write_text("no picture")
    return folder


def extract(place: Path, data: object, out: object, *options: object):
    small = ("--weights", place / "net.safetensors", "--image-size", "64", "--batch-size", "4")
    return call_script(place, "extract", data, "--out", out, *small, *options)


def computed(place: Path, data: Path, stop: str | None):
    model, variables, _ = load_pretrained(place / "net.safetensors").with_size(64)
    source = open_folder(data)
    return source, compute_features(model, variables, source, Loading(4), stop=stop)


def read(path: Path) -> tuple[list[str], list[str] | None, np.ndarray]:
    """Read a file without tljax."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            labels = file["labels"].tolist() if "labels" in file else None
            return file["names"].tolist(), labels, file["embeddings"]
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        values = table["embedding"].combine_chunks()
        shape = json.loads(table.schema.metadata[b"shape"])
        labels = table["label"].to_pylist() if "label" in table.column_names else None
        return table["name"].to_pylist(), labels, values.flatten().to_numpy().reshape(-1, *shape)
    with safe_open(path, "numpy") as file:
        about = {name: json.loads(text) for name, text in file.metadata().items()}
        return about["names"], about.get("labels"), file.get_tensor("embeddings")


@pytest.mark.parametrize("suffix", ["npz", "parquet", "safetensors"])
@pytest.mark.parametrize(
    ("options", "stop", "average"),
    [
        ((), "head", False),
        (("--stage", "stage2"), "stage3", True),
        (("--stage", "stage2", "--maps"), "stage3", False),
        (("--stage", "head"), None, False),
    ],
    ids=["pool", "stage2", "maps", "head"],
)
def test_the_file_holds_the_computed_features(place, tmp_path, suffix, options, stop, average):
    out = tmp_path / "new" / f"features.{suffix}"
    done = extract(place, place / "photographs", out, "--json", *options)
    result = answer(done)
    source, expected = computed(place, place / "photographs", stop)
    if average:
        assert expected.values.ndim == 4
        expected = expected._replace(values=expected.values.mean((1, 2)))
    names, labels, values = read(out)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, expected.values)
    assert result["shape"] == list(values.shape)
    assert names == [source.names[i] for i in expected.indices]
    assert [Path(name).parent.name for name in names] == labels
    assert sorted(set(labels)) == ["blue", "red"]
    assert [*tmp_path.rglob("*.*")] == [out]
    bad = str(place / "photographs" / "blue" / "2.txt")
    assert list(result["skipped"]) == [bad]
    assert f"not read: {bad}: {result['skipped'][bad]}" in done.stdout.splitlines()


@pytest.mark.parametrize("suffix", ["npz", "parquet", "safetensors"])
def test_without_class_folders_there_are_no_labels(place, tmp_path, suffix):
    out = tmp_path / f"x.{suffix}"
    assert not answer(extract(place, place / "photographs" / "red", out, "--json"))["labeled"]
    names, labels, values = read(out)
    assert len(names) == len(values) == 3
    assert labels is None


def test_data_sets_are_extracted_by_name(place, tmp_path):
    answer(extract(place, "digits", tmp_path / "x.npz", "--stage", "stem", "--json"))
    names, labels, values = read(tmp_path / "x.npz")
    assert (len(names), len(set(labels)), len(values)) == (390, 10, 390)


@pytest.mark.parametrize(
    ("data", "out", "options", "said"),
    [
        (
            "photographs",
            "x.csv",
            (),
            "--out x.csv: choose a file that ends with .npz, .parquet, .s",
        ),
        ("photographs", "x", (), "--out x: choose a file that ends with"),
        ("photographs", "x.npz", ("--stage", "stage99"), "mobilenetv2_050 has no stage 'stage99'"),
        ("photographs", "photographs/red/x.npz", (), "is among the images of photographs"),
        (".", "x.npz", (), "is among the images of .: choose another folder"),
        ("nowhere", "x.npz", (), "nowhere does not exist"),
        ("photographs", "a.npz", (), "a.npz is a folder: name a file"),
        ("photographs", "net.safetensors/x.npz", (), "cannot be written (File exists)"),
        ("photographs/blue/2.txt", "x.npz", (), "2.txt is a file: choose a folder"),
    ],
)
def test_a_bad_request_is_one_line_before_any_work(place, monkeypatch, data, out, options, said):
    (place / "a.npz").mkdir(exist_ok=True)
    work = pytest.fail
    monkeypatch.setattr("tljax.features.extract.compute_features", lambda *_, **__: work("worked"))
    before = sorted(place.rglob("*"))
    done = extract(place, data, out, *options)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = messages(done.stderr)
    assert said in line
    assert sorted(place.rglob("*")) == before


def test_parquet_without_pyarrow_names_its_extra(place, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "tljax.commands.extract.find_spec",
        lambda name: None if name == "pyarrow" else found(name),
    )
    assert extract(place, "photographs", "x.parquet").stderr == (
        'error: --out x.parquet needs pyarrow: pip install "tljax[hf]", or choose .npz\n'
    )


def test_no_file_is_left_if_nothing_can_be_read_or_written(place, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.jpg").write_text("no picture")
    (tmp_path / "x.npz").write_text("of before")
    done = extract(place, tmp_path / "bad", tmp_path / "x.npz")
    assert done.returncode == 2
    assert "no image can be read" in done.stderr.splitlines()[-1]
    assert (tmp_path / "x.npz").read_text() == "of before"
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".safetensors"])
def test_rows_that_are_gathered_in_blocks_are_written_in_order(tmp_path, monkeypatch, suffix):
    values = np.arange(30, dtype=np.float32).reshape(5, 2, 3)
    blocks = [(values[rows], np.array(rows)) for rows in ([3, 0], [4, 1], [2])]
    monkeypatch.setattr(Share, "blocks", lambda self: iter(blocks))
    out, own = tmp_path / f"out{suffix}", np.array([3, 4])
    features = Outputs(values[own], np.zeros(5, np.int32), np.arange(5), {}, rows=own)
    with extract_command._all_rows(features, out) as found:
        extract_command._write(out, suffix, {"names": list("abcde")}, found)
    np.testing.assert_array_equal(read(out)[2], values)
    assert list(tmp_path.iterdir()) == [out]
