"""Packed photographs: the pixels, labels and reasons of the files that they were packed from."""

import dataclasses
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import skimage.data
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from test_decode import encode, noise, smooth

import tljax.data.pack as pack_module
from tljax.data.decode import decode, decode_whole
from tljax.data.examples import Source, Splits, select
from tljax.data.loader import load_batches
from tljax.data.options import LabelOptions
from tljax.data.pack import pack
from tljax.data.packed import HEADER, INDEX, Job, Packed, describe_resize, find_damage, open_packed
from tljax.data.sources import has_validation, open_labeled, open_splits
from tljax.runtime.errors import RequestError, UnreadableImageError, WriteError
from tljax.runtime.preprocess import Preprocess
from tljax.runtime.task import Task


def source_of(examples: list[bytes | np.ndarray]) -> Source:
    names = [f"example {i}" for i in range(len(examples))]
    return Source(examples, np.arange(len(examples), dtype=np.int32) % 2, ("a", "b"), names)


def packed_of(folder: Path, examples: list[bytes | np.ndarray], **options) -> Packed:
    source = source_of(examples)
    pack(Splits(source, source), folder, **options)
    return open_packed(folder)[0]


def turned(format_: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(smooth(40, 56), format_, exif=exif)


PHOTOGRAPH = Image.fromarray(skimage.data.chelsea())
FILES = {
    "jpeg": encode(PHOTOGRAPH, "JPEG"),
    "progressive": encode(PHOTOGRAPH, "JPEG", progressive=True),
    "huge jpeg at a reduced resolution": encode(PHOTOGRAPH.resize((1803, 1201)), "JPEG"),
    "huge portrait": encode(PHOTOGRAPH.resize((1201, 2403)), "JPEG"),
    "png": encode(noise(33, 48), "PNG"),
    "webp": encode(smooth(48, 33), "WEBP"),
    "avif": encode(smooth(48, 33), "AVIF"),
    "cmyk": encode(PHOTOGRAPH.convert("CMYK"), "JPEG"),
    "gray": encode(noise(40, 30, 1), "PNG"),
    "alpha": encode(noise(40, 31, 4), "PNG"),
    "16 bits": encode(noise(40, 30, 1).astype(np.uint16) * 257, "PNG"),
    "palette": encode(PHOTOGRAPH.convert("P"), "PNG"),
    "animated": encode(
        Image.new("RGB", (31, 21), "red"), "GIF", save_all=True,
        append_images=[Image.new("RGB", (31, 21), "blue")],
    ),
    "smaller": encode(noise(5, 7), "PNG"),
    "a pixel": encode(noise(1, 1), "PNG"),
    "of the size": encode(noise(29, 29), "PNG"),
    "elongated": encode(noise(30, 203), "PNG"),
    "elongated portrait": encode(noise(217, 31), "PNG"),
    "without its end": encode(PHOTOGRAPH, "JPEG")[:-2],
    "pixels": noise(31, 45),
    "pixels of 16 bits": noise(31, 45).astype(np.uint16) * 257,
    "pixels of one channel": noise(31, 45)[:, :, :1],
    **{f"{name} turned {k}": turned(name, k) for name in ("JPEG", "TIFF") for k in range(1, 9)},
}  # fmt: skip
BROKEN = {
    "empty": b"",
    "html": b"<html>404",
    "cut short": FILES["png"][:200],
    "too elongated": encode(Image.new("L", (1, 2**20)), "PNG"),
    "floats": noise(9, 9).astype(np.float32),
    "five channels": noise(9, 9, 5),
}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_network_gets_the_bytes_that_it_gets_from_files(tmp_path, interpolation):
    packed = packed_of(tmp_path, [*FILES.values()], size=29, interpolation=interpolation)
    for size in (29, 28, 27, 26, 25, 16):
        preprocess = Preprocess(size, 29, interpolation)
        for index, (name, data) in enumerate(FILES.items()):
            actual, expected = decode(packed[index], preprocess), decode(data, preprocess)
            np.testing.assert_array_equal(actual, expected, err_msg=f"{name} {size}")


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    resize=st.integers(4, 40),
    margin=st.integers(0, 39),
)
@example(height=10, width=45, resize=10, margin=1)  # 45 - 9 is even, 20 - 9 is odd
def test_central_squares_of_whole_photographs_are_those_of_the_files(height, width, resize, margin):
    pixels = noise(height, width)
    preprocess = Preprocess(max(1, resize - margin), resize)
    whole = decode_whole(pixels, resize)
    assert (whole.height, whole.width) == (height, width)
    assert min(whole.pixels.shape[:2]) == resize
    assert max(whole.pixels.shape[:2]) <= 2 * resize
    long = int(resize * max(height, width) / min(height, width))
    assert max(whole.pixels.shape[:2]) > min(2 * resize - 4, long - 1)
    np.testing.assert_array_equal(decode(whole.pixels, preprocess), decode(pixels, preprocess))


def test_the_shapes_of_the_photographs_are_recorded_upright(tmp_path):
    packed = packed_of(tmp_path, [*FILES.values()], size=29)
    for index, name in enumerate(FILES):
        recorded = [int(packed.index[f"original_{side}"][index]) for side in ("height", "width")]
        if "huge" in name:
            assert recorded == ([1201, 1803] if "jpeg" in name else [2403, 1201])
        if "turned" in name:
            assert recorded == ([40, 56] if int(name[-1]) < 5 else [56, 40])


def test_every_record_is_as_high_as_the_short_side(tmp_path):
    packed = packed_of(tmp_path, [*FILES.values()], size=29)
    index = packed.index
    for height, width, turned_, length in zip(
        *(index[name] for name in ("height", "width", "transposed", "length")), strict=True
    ):
        rows, columns = (width, height) if turned_ else (height, width)
        assert rows == 29 <= columns <= 58
        assert length == 3 * rows * columns
        assert turned_ == (height > width)
    view = packed[list(FILES).index("huge portrait")]
    assert view.shape == (58, 29, 3)
    assert view.base is not None
    assert not view.flags.writeable


def test_unreadable_images_stay_examples_with_their_reasons(tmp_path):
    packed = packed_of(tmp_path, [FILES["png"], *BROKEN.values()], size=29)
    for index, data in enumerate(BROKEN.values(), start=1):
        with pytest.raises(UnreadableImageError) as expected:
            decode(data, Preprocess(16, 29))
        with pytest.raises(UnreadableImageError) as actual:
            packed[index]
        assert str(actual.value) == str(expected.value)
    skipped = {}
    source = open_labeled(f"packed:{tmp_path}")
    list(load_batches(source, Preprocess(16, 29), batch_size=4, skipped=skipped))
    assert [*skipped] == [1, 2, 3, 4, 5, 6]


def test_a_data_set_without_a_readable_image_is_refused(tmp_path):
    with pytest.raises(RequestError, match="no image can be read; example 0: the file is empty"):
        packed_of(tmp_path / "out", [*BROKEN.values()])


def test_packed_jpegs_are_close_to_the_pixels_and_smaller(tmp_path):
    files = [FILES["jpeg"], FILES["huge portrait"]]
    raw = packed_of(tmp_path / "raw", files, size=200)
    jpeg = packed_of(tmp_path / "jpeg", files, size=200, encoding="jpeg")
    assert jpeg.header.shards[0].bytes < raw.header.shards[0].bytes / 5
    preprocess = Preprocess(200, 200)
    for index in range(len(files)):
        assert isinstance(jpeg[index], bytes)
        difference = decode(jpeg[index], preprocess) - decode(raw[index], preprocess).astype(int)
        assert abs(difference).mean() < 2.5


# --- the data set ---------------------------------------------------------------------------------


def write_images(folder: Path, count: int = 12) -> Path:
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:02d} ä.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(np.roll(noise(20 + i, 31), i, 0), "PNG"))
    return folder


def assert_same_source(actual: Source, expected: Source) -> None:
    assert actual.names == list(expected.names)
    assert actual.classes == expected.classes
    assert actual.task == expected.task
    np.testing.assert_array_equal(actual.labels, expected.labels)
    assert actual.labels.dtype == expected.labels.dtype
    assert actual.extra.keys() == expected.extra.keys()
    for name, array in expected.extra.items():
        np.testing.assert_array_equal(actual.extra[name], array)
    np.testing.assert_array_equal(actual.groups, expected.groups)


@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        ("x", LabelOptions(target="x", weight_column="w", group="g")),
        ("x,y", LabelOptions(target="x,y", task="regression", units="m,s")),
        ("f,g2", LabelOptions(target="f,g2", task="multilabel")),
        ("o", LabelOptions(target="o", order="low,high")),
    ],
)
def test_a_table_comes_back_with_its_labels_groups_weights_and_notes(tmp_path, columns, labels):
    images = sorted(write_images(tmp_path / "images").rglob("*.png"))
    lines = ["path,x,y,f,g2,o,w,g"]
    lines += [
        f"{path},{i % 3}.5,{i},{i % 2},{i // 6},{('low', 'high')[i % 2]},{1 + i},p{i // 2}"
        for i, path in enumerate(images)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    splits = open_splits(str(tmp_path / "labels.csv"), val_fraction=0.4, labels=labels)
    pack(splits, tmp_path / "out", size=24)
    packed = open_splits(f"packed:{tmp_path / 'out'}")
    for actual, expected in zip(packed[:2], splits[:2], strict=True):
        assert_same_source(actual, expected)
        for index in range(len(expected)):
            pixels = [decode(one.read(index), Preprocess(20, 24)) for one in (actual, expected)]
            np.testing.assert_array_equal(*pixels)
    assert packed.notes == splits.notes
    assert has_validation(f"packed:{tmp_path / 'out'}")


def test_training_images_that_are_also_validated_on_are_stored_once(tmp_path):
    splits = open_splits(str(write_images(tmp_path / "images")), val_fraction=0)
    pack(splits, tmp_path / "out", size=24)
    packed = open_splits(f"packed:{tmp_path / 'out'}")
    assert packed.val is packed.train
    assert len(packed.train) == 12
    assert packed.notes == splits.notes


def test_batches_are_those_of_the_files(tmp_path):
    splits = open_splits(str(write_images(tmp_path / "images")))
    pack(splits, tmp_path / "out", size=24)
    packed = open_splits(f"packed:{tmp_path / 'out'}")
    options = {"batch_size": 5, "seed": 3}
    ours, theirs = (
        load_batches(one.train, Preprocess(20, 24), **options) for one in (packed, splits)
    )
    for actual, expected in zip(ours, theirs, strict=True):
        for name in ("inputs", "targets", "mask", "indices"):
            np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))


def test_packed_examples_are_pickled_without_their_pixels(tmp_path):
    packed = packed_of(tmp_path, [noise(300, 300)] * 4, size=256)
    np.testing.assert_array_equal(packed[0], packed[3])
    data = pickle.dumps(packed)
    assert len(data) < 5000
    np.testing.assert_array_equal(pickle.loads(data)[0], packed[0])


def test_the_digest_of_packed_data_reads_no_image_and_names_its_content(tmp_path, monkeypatch):
    one, same, other = (
        packed_of(tmp_path / name, [noise(20, 30) + k, noise(9, 9)], size=24)
        for name, k in (("one", 0), ("same", 0), ("other", 1))
    )
    monkeypatch.setattr(Packed, "__getitem__", None)
    digests = [
        dataclasses.replace(source_of([noise(1, 1)] * 2), examples=packed).digest
        for packed in (one, same, other)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_the_network_that_resizes_again_is_named(tmp_path, capsys):
    packed = packed_of(tmp_path, [noise(40, 50)] * 3, size=24)
    subset = select(source_of([b""] * 3), [1]).examples
    assert describe_resize(packed, Preprocess(20, 24)) is None
    assert describe_resize(subset, Preprocess(20, 30)) is None
    assert describe_resize(packed, Preprocess(20, 24, "bicubic")) == (
        "packed with the bilinear filter, the network expects another: tljax pack --interpolation "
        "bicubic gives it the pixels of the files"
    )
    source = open_labeled(f"packed:{tmp_path}")
    for _ in range(2):
        [batch] = load_batches(source, Preprocess(20, 31), batch_size=3)
    assert batch.inputs.shape == (3, 20, 20, 3)
    note = "note: data: packed at 24 pixels, the network resizes to 31: tljax pack --size 31 gives"
    assert capsys.readouterr().err.count(note) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LabelOptions(target="x"), "--target x has no effect on packed:"),
        (LabelOptions(group="x"), "--group x has no effect on packed:"),
        (LabelOptions(task="regression"), "was packed as classification: pack the images with it"),
        (LabelOptions(order="a,b"), "--order a,b: packed:.* was packed as classification"),
    ],
)
def test_other_labels_than_those_that_were_packed_are_refused(tmp_path, options, message):
    packed_of(tmp_path, [noise(9, 9)] * 2)
    with pytest.raises(RequestError, match=message):
        open_splits(f"packed:{tmp_path}", labels=options)
    same = open_splits(f"packed:{tmp_path}", labels=LabelOptions(task="classification"))
    assert same.train.task == Task()


def test_another_order_than_that_which_was_packed_is_refused_only_for_training(tmp_path):
    source = dataclasses.replace(source_of([noise(9, 9)] * 2), task=Task("ordinal"))
    pack(Splits(source, source), tmp_path)
    spec = f"packed:{tmp_path}"
    assert open_splits(spec, labels=LabelOptions(order="a,b")).train.classes == ("a", "b")
    with pytest.raises(RequestError, match=r"--order b,a: packed:.* was packed in another order"):
        open_splits(spec, labels=LabelOptions(order="b,a"))
    assert open_labeled(spec, LabelOptions(order="b,a")).classes == ("a", "b")


# --- the folder -----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


SMALL_SHARDS = 6 * 24**2 * 3  # three photographs of 24 pixels


def many(count: int = 20) -> Splits:
    images = [encode(np.roll(noise(30, 25 + i), i, 0), "PNG") for i in range(count)]
    images[4] = b"<html>"
    source = source_of(images)
    rows = np.arange(count)
    return Splits(select(source, rows[::2]), select(source, rows[1::2]), ("a note",))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "_SHARD_BYTES", SMALL_SHARDS)


@pytest.fixture
def expected(small_shards: None, tmp_path: Path) -> dict[str, bytes]:
    pack(many(), tmp_path / "expected", size=24)
    return contents(tmp_path / "expected")


def test_a_folder_holds_shards_an_index_and_a_header(expected):
    shards = [f"part-{k:05d}.bin" for k in range(7)]
    assert [*expected] == [".tljax", HEADER, INDEX, *shards]
    assert json.loads(expected[HEADER])["versions"]["pillow"] == PIL.__version__


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_are_the_same_for_any_number_of_processes(expected, tmp_path, workers):
    pack(many(), tmp_path / "out", size=24, workers=workers)
    assert contents(tmp_path / "out") == expected


def test_a_complete_folder_is_left_as_it_is(expected, tmp_path, monkeypatch):
    monkeypatch.setattr(Job, "__call__", None)
    monkeypatch.setattr(PIL, "__version__", "99")
    assert pack(many(), tmp_path / "expected", size=24).examples == 20
    assert contents(tmp_path / "expected") == expected


def test_a_complete_folder_that_was_damaged_is_not_called_packed(tmp_path):
    pack(many(), tmp_path / "out", size=24)
    os.truncate(tmp_path / "out" / "part-00000.bin", 9)
    with pytest.raises(RequestError, match=r"out was damaged after it was packed: remove it to pa"):
        pack(many(), tmp_path / "out", size=24)


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import tljax.data.pack as pack_module
from tljax.data.packed import Job
from test_packed import SMALL_SHARDS, many

pack_module._SHARD_BYTES = SMALL_SHARDS
original = Job.__call__
def slow(self, indices):
    if indices[0] >= 9:
        time.sleep(60)
    return original(self, indices)
Job.__call__ = slow
pack_module.pack(many(), Path({out!r}), size=24)
"""


@pytest.fixture
def killed(tmp_path: Path, small_shards: None) -> Path:
    """Return a folder whose writer was killed in the middle of its fourth shard."""
    out = tmp_path / "out"
    script = KILLED.format(tests=str(Path(__file__).parent), out=str(out))
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        while not (out / "unfinished" / "part-00002.npz").exists() and process.poll() is None:
            time.sleep(0.02)
        with pytest.raises(RequestError, match=f"another process packs into {out}: wait for it"):
            pack(many(), out, size=24)
        process.send_signal(signal.SIGKILL)
    return out


@pytest.mark.slow
def test_a_killed_call_is_resumed_and_ends_with_the_same_bytes(killed, expected):
    assert not (killed / HEADER).exists()
    first = killed / "part-00000.bin"
    (killed / "part-00001.bin").write_bytes(b"damaged")
    before = first.stat().st_mtime_ns
    pack(many(), killed, size=24)
    assert contents(killed) == expected
    assert first.stat().st_mtime_ns == before


@pytest.mark.slow
def test_an_unfinished_folder_is_only_resumed_with_the_same_images_and_options(killed):
    before = contents(killed)
    for message, splits, options in (
        ("was packed with size 24, not 25", many(), {"size": 25}),
        ("was packed with encoding raw, not jpeg", many(), {"size": 24, "encoding": "jpeg"}),
        ("was packed with other images: choose", many(22), {"size": 24}),
    ):
        with pytest.raises(RequestError, match=message):
            pack(splits, killed, **options)
    with pytest.raises(RequestError, match="holds no packed images"):
        open_packed(killed)
    assert contents(killed) == before


def test_a_full_disk_is_one_line_and_the_same_call_resumes(expected, tmp_path, monkeypatch):
    original = Job.__call__

    def full(self, indices):
        if indices[0] >= 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, indices)

    monkeypatch.setattr(Job, "__call__", full)
    out = tmp_path / "out"
    with pytest.raises(
        WriteError, match=r"part-00003.bin: cannot be written \(No space left.*repeat"
    ):
        pack(many(), out, size=24)
    monkeypatch.setattr(Job, "__call__", original)
    before = (out / "part-00002.bin").stat().st_mtime_ns
    pack(many(), out, size=24)
    assert contents(out) == expected
    assert (out / "part-00002.bin").stat().st_mtime_ns == before


def test_a_disk_without_the_space_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 24**2 * 2 - 1))
    with pytest.raises(RequestError, match=r"the images take 0.0 GB or more, and 0.0 GB are free"):
        packed_of(tmp_path, [noise(9, 9)] * 2, size=24)
    assert not [*tmp_path.glob("part-*")]
    assert len(packed_of(tmp_path, [noise(9, 9)] * 2, size=23)) == 2  # a smaller size is accepted


def test_files_that_a_killed_process_left_are_removed(expected, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("part-00000.bin", "header.json", ".tljax"):
        (out / f".{name}.0123456789abcdef.part").write_bytes(b"x")
    pack(many(), out, size=24)
    assert contents(out) == expected


@pytest.mark.parametrize("name", ["photograph.jpg", "part-00000.bin", "part-1.bin.part"])
def test_a_folder_with_something_else_is_refused_and_kept(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(RequestError, match=f"{tmp_path} holds something else, {name}: choose an"):
        packed_of(tmp_path, [noise(9, 9)])
    assert contents(tmp_path) == {name: b"mine"}
    with pytest.raises(RequestError, match="cannot be read as a folder: Not a directory"):
        packed_of(tmp_path / name, [noise(9, 9)])


def test_a_size_of_a_few_pixels_is_refused(tmp_path):
    with pytest.raises(RequestError, match="size 3: choose 4 or more"):
        packed_of(tmp_path / "out", [noise(9, 9)], size=3)


def test_a_source_with_targets_is_refused(tmp_path):
    source = dataclasses.replace(source_of([noise(9, 9)]), targets=np.zeros(1))
    with pytest.raises(RequestError, match="a source with targets cannot be packed"):
        pack(Splits(source, source), tmp_path)


# --- damage ---------------------------------------------------------------------------------------


def change_header(folder: Path, **values: object) -> None:
    header = json.loads((folder / HEADER).read_bytes())
    (folder / HEADER).write_text(json.dumps({**header, **values}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / HEADER).unlink(), "holds no packed images: make them with tljax pack"),
        (lambda out: (out / HEADER).write_text("{}"), "header.json is damaged or of another"),
        (lambda out: (out / HEADER).write_text("[" * 10**5), "header.json is damaged or of"),
        (lambda out: change_header(out, version=2), "ValueError: format 'tljax packed images', v"),
        (lambda out: change_header(out, shards=[["../x", 3, ""]]), "a shard in another folder"),
        (lambda out: change_header(out, examples=3), "arrays of different lengths"),
        (lambda out: change_header(out, unreadable={"7": "x"}), "index.npz is damaged"),
        (lambda out: change_header(out, shards=[]), "a photograph in an unknown shard"),
        (lambda out: change_header(out, encoding="zip"), "encoding 'zip'"),
        (lambda out: change_header(out, task={"kind": "x"}), "there is no task 'x'"),
        (lambda out: (out / INDEX).write_bytes(b"PK"), "index.npz is damaged (checksum mismatch)"),
        (lambda out: os.truncate(out / "part-00000.bin", 9), "has 9 bytes instead of 3456: rest"),
        (lambda out: (out / "part-00000.bin").unlink(), "cannot be read (No such file"),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path, change, message):
    packed_of(tmp_path, [noise(9, 9)] * 2, size=24)
    change(tmp_path)
    with pytest.raises(RequestError) as error:
        open_splits(f"packed:{tmp_path}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"), [("offset", -1), ("offset", 3), ("length", 0), ("height", 25), ("shard", 1)]
)
def test_an_index_that_leads_out_of_its_files_is_refused(tmp_path, name, value):
    packed_of(tmp_path, [noise(9, 9)] * 2, size=24)
    with np.load(tmp_path / INDEX) as file:
        arrays = dict(file)
    arrays[name][1] = value if name != "offset" else arrays[name][1] + value
    arrays["offset"][1] -= 10**6 if value == -1 else 0
    change_header(tmp_path, index=pack_module._save(tmp_path / INDEX, arrays))
    with pytest.raises(RequestError, match=r"index.npz is damaged \(a photograph "):
        open_packed(tmp_path)


def test_objects_in_an_index_are_not_unpickled(tmp_path):
    packed_of(tmp_path, [noise(9, 9)] * 2, size=24)
    with np.load(tmp_path / INDEX) as file:
        arrays = {**file, "labels": np.array([print, print], object)}
    change_header(tmp_path, index=pack_module._save(tmp_path / INDEX, arrays))
    with pytest.raises(RequestError, match=r"index.npz is damaged \(Object arrays cannot be"):
        open_packed(tmp_path)


def test_a_changed_byte_is_found_by_its_checksum(tmp_path):
    packed = packed_of(tmp_path, [noise(9, 9)] * 2, size=24)
    [shard] = packed.header.shards
    assert find_damage(tmp_path, shard) is None
    with (tmp_path / shard.name).open("r+b") as file:
        file.write(b"?")
    assert find_damage(tmp_path, shard) == f"{tmp_path / shard.name}: its checksum differs"


def test_a_packed_folder_without_its_prefix_is_named(tmp_path):
    packed_of(tmp_path, [noise(9, 9)] * 2)
    with pytest.raises(RequestError, match=f"holds packed images: write packed:{tmp_path}"):
        open_splits(str(tmp_path))


def test_processes_that_read_packed_images_import_no_jax():
    code = "import sys, tljax.data.packed; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_files_are_copied_and_moved_as_a_folder(tmp_path):
    packed = packed_of(tmp_path / "out", [noise(9, 9)] * 2, size=9)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    np.testing.assert_array_equal(open_packed(tmp_path / "moved")[0][1], noise(9, 9))
    with pytest.raises(RequestError, match=r"part-00000.bin cannot be read \(No such"):
        packed[0]
