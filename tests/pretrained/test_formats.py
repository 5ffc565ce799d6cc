"""Weight files of all formats: safetensors (compared with its library), shards, damaged files."""

import hashlib
import io
import json
import lzma
import resource
import struct
import tracemalloc
import zipfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from tljax.pretrained.formats import (
    Tensors,
    digest,
    read_tensors,
    torch_file,
    write_npz,
    write_safetensors,
    write_torch,
)
from tljax.runtime.errors import RequestError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
ARRAYS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "conv.bias": np.array([1, 2], np.float16),
    "count": np.array(7),
    "mask": np.array([True, False, True]),
}


def assert_same(arrays: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert set(arrays) == set(expected)
    for key, array in expected.items():
        assert arrays[key].dtype == array.dtype, key
        np.testing.assert_array_equal(arrays[key], array, strict=True)


def error_message(path: Path) -> str:
    with pytest.raises(RequestError) as caught:
        read_tensors(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def torch_bytes(new: bool) -> bytes:
    stream = io.BytesIO()
    state_dict = {key: torch.from_numpy(array) for key, array in ARRAYS.items()}
    torch.save({"state_dict": state_dict}, stream, _use_new_zipfile_serialization=new)
    return stream.getvalue()


def safetensors_bytes() -> bytes:
    return safetensors.torch.save(
        {key: torch.from_numpy(array) for key, array in ARRAYS.items()}, {"format": "pt"}
    )


FILES = {
    "safetensors": safetensors_bytes(),
    "zip": torch_bytes(new=True),
    "legacy": torch_bytes(new=False),
}
FILES |= {f"{name}.xz": lzma.compress(data) for name, data in FILES.items()}


@pytest.mark.parametrize("name", FILES)
def test_the_format_is_detected_from_the_contents_not_the_name(tmp_path: Path, name: str) -> None:
    for file_name in ("x", "x.safetensors", "x.pth", "x.h5"):
        (tmp_path / file_name).write_bytes(FILES[name])
        arrays, metadata = read_tensors(str(tmp_path / file_name))
        assert_same(arrays, ARRAYS)
        assert metadata == ({"format": "pt"} if name.startswith("safetensors") else {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_of_safetensors_is_read_and_written(tmp_path: Path, dtype: torch.dtype) -> None:
    state_dict = {"x": torch.arange(12).reshape(3, 4).to(dtype), "odd": torch.ones(1).to(dtype)}
    safetensors.torch.save_file(state_dict, tmp_path / "x")
    arrays = read_tensors(tmp_path / "x").arrays
    write_safetensors(tmp_path / "y", arrays)
    again = safetensors.torch.load_file(tmp_path / "y")
    for key, tensor in state_dict.items():
        elements = tensor.reshape(-1).view(torch.uint8)
        assert f"torch.{arrays[key].dtype.name}" == str(again[key].dtype) == str(dtype)
        assert arrays[key].shape == tuple(again[key].shape) == tuple(tensor.shape)
        assert arrays[key].tobytes() == elements.numpy().tobytes()
        assert torch.equal(again[key].reshape(-1).view(torch.uint8), elements)


arrays_of_any_kind = hypothesis.extra.numpy.arrays(
    dtype=st.sampled_from(["f8", "f4", ">f4", "f2", "i8", "i2", "u1", "?", ml_dtypes.bfloat16]),
    shape=hypothesis.extra.numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    elements=st.integers(0, 1),
)


@hypothesis.given(
    st.dictionaries(st.text().filter(lambda key: key != "__metadata__"), arrays_of_any_kind),
    st.dictionaries(st.text(), st.text()),
)
@hypothesis.settings(max_examples=50, deadline=None)
def test_the_safetensors_library_reads_written_files(
    tmp_path_factory: pytest.TempPathFactory,
    arrays: dict[str, np.ndarray],
    metadata: dict[str, str],
) -> None:
    path = tmp_path_factory.mktemp("written") / "x"
    write_safetensors(path, arrays, metadata)
    with safetensors.safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata
        assert set(file.keys()) == set(arrays)
        for key, array in arrays.items():
            np.testing.assert_array_equal(
                file.get_tensor(key).double().numpy(), array.astype("f8"), strict=True
            )
    if arrays:
        assert read_tensors(path).metadata == metadata


def test_arrays_of_any_memory_layout_and_jax_arrays_are_written(tmp_path: Path) -> None:
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    arrays = {"a": base.T, "b": base[::-1, 1:], "c": jnp.asarray(base)}
    write_safetensors(tmp_path / "x", arrays)  # pyright: ignore[reportArgumentType]
    assert_same(
        read_tensors(tmp_path / "x").arrays, {key: np.asarray(arrays[key]) for key in arrays}
    )


def test_arrays_of_written_safetensors_are_aligned(tmp_path: Path) -> None:
    arrays = {"a": np.ones(3, np.int8), "b": np.ones(3, np.float16), "c": np.ones(3)}
    write_safetensors(tmp_path / "x", arrays)
    assert all(array.flags.aligned for array in read_tensors(tmp_path / "x").arrays.values())


def test_writing_is_deterministic(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "1", ARRAYS, {"format": "pt"})
    write_safetensors(tmp_path / "2", dict(reversed(ARRAYS.items())), {"format": "pt"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_writing_safetensors_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_safetensors(path, ARRAYS)
    before = path.read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    try:
        with pytest.raises(
            RequestError, match=r"x: cannot be written \(.*File too large"
        ) as caught:
            write_safetensors(path, {"a": np.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_writing_torch_files_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_torch(path, ARRAYS)
    before = path.read_bytes()
    original, written = torch_file.little_endian, []

    def fail_at_third(array: np.ndarray) -> memoryview:
        written.append(array)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return original(array)

    monkeypatch.setattr(torch_file, "little_endian", fail_at_third)
    with pytest.raises(RequestError, match=r"x: cannot be written \(No space left on device\)"):
        write_torch(path, {key: array + array for key, array in ARRAYS.items()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    expected = (tmp_path / "ordinary").stat().st_mode
    for write in (write_safetensors, write_torch):
        write(tmp_path / "x", ARRAYS)
        assert (tmp_path / "x").stat().st_mode == expected


@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_unsupported_dtypes_and_paths_are_rejected(tmp_path: Path, write: type) -> None:
    with pytest.raises(RequestError, match=r'dtype "str128"|dtype <U4'):
        write(tmp_path / "x", {"a": np.array(["text"])})
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot be written"):
        write(tmp_path / "file" / "x", ARRAYS)
    (tmp_path / "folder").mkdir()
    with pytest.raises(RequestError, match="cannot be written"):
        write(tmp_path / "folder", ARRAYS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_reading_takes_no_memory_and_arrays_are_read_only(tmp_path: Path) -> None:
    for write in (write_safetensors, write_torch):
        write(tmp_path / "x", {"a": np.ones((1000, 1000), np.float32)})
        tracemalloc.start()
        array = read_tensors(tmp_path / "x").arrays["a"]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1e6
        assert array.flags.aligned
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 2


def test_published_resnet_files_are_read(shared_weights: Path) -> None:
    for path in sorted(shared_weights.glob("resnet*")):
        arrays, metadata = read_tensors(path)
        assert metadata == {"format": "pt"}
        expected = safetensors.torch.load_file(path)
        assert set(arrays) == set(expected)
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, expected[key].numpy(), strict=True)


def test_the_digest_matches_hashlib(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"weights" * 1_000_000)
    assert digest(tmp_path / "x", "sha256") == hashlib.sha256(b"weights" * 1_000_000).hexdigest()
    with pytest.raises(RequestError, match="no such file"):
        digest(tmp_path / "y", "sha256")


# Shards.


def write_index(folder: Path, shard_of: object) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shard_of}))
    return path


@pytest.mark.parametrize("name", ["safetensors", "bin"])
def test_shards_are_merged(tmp_path: Path, name: str) -> None:
    # The prefix "model." is on some keys of all shards only.
    parts = [
        {"model.a": np.arange(3.0)},
        {"model.b": np.arange(4), "head": np.ones((2, 2), np.float32)},
    ]
    shard_of = {}
    for number, part in enumerate(parts):
        file_name = f"model-{number:05}-of-00002.{name}"
        if name == "bin":
            torch.save({key: torch.from_numpy(part[key]) for key in part}, tmp_path / file_name)
        else:
            write_safetensors(tmp_path / file_name, part, {"format": "pt"})
        shard_of |= dict.fromkeys(part, file_name)
    arrays, metadata = read_tensors(write_index(tmp_path, shard_of))
    assert_same(arrays, parts[0] | parts[1])
    assert list(arrays) == list(shard_of)
    assert metadata == ({"format": "pt"} if name == "safetensors" else {})


def test_invalid_shard_indexes_are_rejected(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(tmp_path / "a", ARRAYS)
    write_safetensors(folder / "a", ARRAYS)
    assert "'x' is not in its shard a" in error_message(write_index(folder, {"x": "a"}))
    for name in ("../a", str(tmp_path / "a"), "./a"):
        assert "must be a file name without a folder" in error_message(
            write_index(folder, {"mask": name})
        )
    with pytest.raises(RequestError, match=r"model/b: no such file"):
        read_tensors(write_index(folder, {"mask": "b"}))
    for name in ("", ".", ".."):
        with pytest.raises(RequestError, match="folder"):
            read_tensors(write_index(folder, {"mask": name}))
    assert "contains no tensors" in error_message(write_index(folder, {}))
    for shard_of in (None, [], {"mask": 1}, {"mask": ["a"]}):
        assert "JSON, not weights" in error_message(write_index(folder, shard_of))
    index = write_index(folder, {"mask": "model.safetensors.index.json"})
    assert "JSON, not weights" in error_message(index)


# Damage.


def header_bytes(header: object, size: int = 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def entry(begin: object, end: object, shape: object = (4,), dtype: object = "F32") -> object:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 16), "b": entry(0, 16)},
        {"a": entry(0, 8, [2]), "b": entry(4, 16, [3])},
        {"a": entry(0, 4, [1]), "b": entry(8, 16, [2])},
        {"a": entry(4, 16, [3])},
        {"a": entry(0, 12, [3])},
        {"a": entry(0, 20, [5])},
        {"a": entry(0, 2**70, [2**68])},
        {"a": entry(16, 0), "b": entry(0, 16)},
        {"a": entry(0, 16, [5])},
        {"a": entry(0, 16, [2**62, 2**62])},
        {"a": entry(0, 16, [-2, -2])},
        {"a": entry(0, 16, [4.0])},
        {"a": entry(0, 16, [True, 4])},
        {"a": entry(0, 16, 4)},
        {"a": entry("0", 16)},
        {"a": entry(0, 16, dtype=7)},
        {"a": entry(0, 16, dtype="F5")},
        {"a\nb": entry(4, 16, [3])},
        {"a" * 5000: entry(4, 16, [3])},
        {"a": {"dtype": "F32"}},
        {"a": [0, 16]},
        {"a": entry(0, 16), "b": entry(16, 16, [0, 2**70])},
        {"a": entry(0, 16), "__metadata__": {"a": 1}},
        {"a": entry(0, 16), "__metadata__": "a"},
        b'{"a":' + b"[" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
        b'{"a"',
        b'{"\xff": 1}',
    ],
)
def test_inconsistent_safetensors_headers_are_rejected(tmp_path: Path, header: object) -> None:
    (tmp_path / "x").write_bytes(header_bytes(header))
    message = error_message(tmp_path / "x")
    assert message.startswith("truncated or damaged; download it again (")
    assert len(message) < 300


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 16, [4] + [1] * 64)}, "maximum supported dimension"),
        ({"a": entry(0, 16), "b": entry(16, 16, [0, 2**62])}, "array is too big"),
        ({"a": entry(0, 16, [16], dtype="F8_E8M0")}, "tensor 'a': dtype F8_E8M0 cannot be read"),
    ],
)
def test_valid_but_unsupported_safetensors_are_rejected(
    tmp_path: Path, header: object, message: str
) -> None:
    (tmp_path / "x").write_bytes(header_bytes(header))
    assert message in error_message(tmp_path / "x")


def test_safetensors_headers_of_any_length_are_read(tmp_path: Path) -> None:
    # The safetensors library pads headers to 8 bytes; other writers do not.
    data = header_bytes(json.dumps({"a": entry(0, 16)}).encode() + b" " * 3)
    (tmp_path / "x").write_bytes(data[:-16] + np.arange(4, dtype="f4").tobytes())
    array = read_tensors(tmp_path / "x").arrays["a"]
    assert not array.flags.aligned
    np.testing.assert_array_equal(jnp.asarray(array), [0, 1, 2, 3])


@pytest.mark.parametrize("size", [1, 100])
def test_a_file_replaced_during_reading_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    write_safetensors(tmp_path / "x", {"a": np.ones(10)})
    safe_open = safetensors.safe_open

    def replace_then_open(path: Path, framework: str) -> object:
        write_safetensors(path, {"a": np.ones(size)})
        return safe_open(path, framework)

    monkeypatch.setattr(safetensors, "safe_open", replace_then_open)
    assert "damaged" in error_message(tmp_path / "x")


def other_zip_bytes(compressed: bool) -> bytes:
    stream = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", kind) as archive:
        archive.writestr("notes.txt", "no weights")
    return stream.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\x00", "not a weight file"),
        (b"x" * 100, "not a weight file"),
        (bytes(100), "not a weight file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n  <html>", "a web page"),
        (POINTER, "Git LFS pointer"),
        (
            b"\x89HDF\r\n\x1a\n" + bytes(100),
            "truncated or damaged; download it again (it should have 0 bytes",
        ),
        (b'{"architectures": ["ResNet"]}', "JSON, not weights"),
        (b'{"arch":{"name": "resnet18"}}', "JSON, not weights"),
        (b'{"weight_map":' + b"[" * 100_000, "JSON, not weights"),
        (b"{ not even JSON", "JSON, not weights"),
        (b"\x80\x02}.", "a pickle, but not of torch.save"),
        (b"\x80\x04]\x94.", "a pickle, but not of torch.save"),
        (
            other_zip_bytes(compressed=False),
            "a zip archive, but not of torch.save or Keras",
        ),
        (
            other_zip_bytes(compressed=True),
            "a zip archive, but not of torch.save or Keras",
        ),
        (lzma.compress(b"<html>"), "a web page"),
        (lzma.compress(FILES["zip.xz"]), "not a weight file"),
        (lzma.compress(bytes(10_000_000)), "expands it more than 100-fold"),
        (FILES["zip.xz"] + b"more", "bytes after the end of the xz stream"),
        (header_bytes({}, size=0), "contains no tensors"),
    ],
)
def test_the_error_for_other_files_names_their_kind(
    tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "x").write_bytes(data)
    assert message in error_message(tmp_path / "x")


def test_folders_and_missing_files_are_rejected(tmp_path: Path) -> None:
    assert "a folder" in error_message(tmp_path)
    assert "no such file" in error_message(tmp_path / "x")
    assert "no such file" in error_message(tmp_path / "x\0y")


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_detected(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x"
    step = 5 if name.startswith("zip") else 1  # an archive is mostly padding
    for length in range(0, len(FILES[name]), step):
        path.write_bytes(FILES[name][:length])
        with pytest.raises(RequestError):
            read_tensors(path)


@pytest.mark.parametrize("name", FILES)
@hypothesis.given(data=st.data())
@hypothesis.settings(
    max_examples=100,
    deadline=timedelta(seconds=1),
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_damaged_bytes_cause_no_crash_and_no_large_allocation(
    tmp_path: Path, name: str, data: st.DataObject
) -> None:
    damaged = bytearray(FILES[name])
    flip = st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255))
    for position, value in data.draw(st.lists(flip, min_size=1, max_size=6)):
        damaged[position] = value
    (tmp_path / "x").write_bytes(damaged)
    tensors = Tensors({}, {})
    tracemalloc.start()
    try:
        tensors = read_tensors(tmp_path / "x")
    except RequestError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1e7  # the dictionary of xz takes 8 MiB
    assert sum(array.copy().nbytes for array in tensors.arrays.values()) < 10_000


# --- archives of NumPy ---------------------------------------------------------------------------


def npz_bytes(member: bytes, *, compressed: bool = False) -> bytes:
    """Return an archive with one member of any bytes."""
    stream = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", kind) as archive:
        archive.writestr("a.npy", member)
    return stream.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_archives_of_numpy_are_read(tmp_path: Path) -> None:
    arrays = {
        "block/kernel": np.arange(6.0).reshape(2, 3),
        "b": np.array([1, 2], np.float32),
        "n": np.ones(1),
    }
    write_npz(tmp_path / "ours.npz", arrays)
    untyped: dict[str, Any] = dict(arrays)
    np.savez_compressed(tmp_path / "compressed.npz", **untyped)
    untyped = {key: np.asfortranarray(x) for key, x in arrays.items()}
    np.savez(tmp_path / "fortran.npz", **untyped)
    for name in ("ours.npz", "compressed.npz", "fortran.npz"):
        assert_same(read_tensors(tmp_path / name).arrays, arrays)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as file:
        assert_same(dict(file), arrays)


ARRAY = npy_bytes(np.ones(1000, np.float32))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npz_bytes(ARRAY)[:-100], "truncated or damaged; download it again (zip: "),
        (npz_bytes(ARRAY)[:2000], "truncated or damaged; download it again (zip: "),
        (npz_bytes(ARRAY[:-4]), "'a.npy' has 3996 bytes, which its shape does not fit"),
        (npz_bytes(ARRAY + b"more"), "'a.npy' has 4004 bytes, which its shape does not fit"),
        (npz_bytes(ARRAY.replace(b"(1000,)", b"(10**9,")), "'a.npy' is no array"),
        (npz_bytes(ARRAY.replace(b"(1000,)", b"(9999,)")), "which its shape does not fit"),
        (npz_bytes(b"text"), "'a.npy' is no array"),
        (npz_bytes(npy_bytes(np.array([{}]))), "'a.npy' holds object, which is not read"),
        (npz_bytes(bytes(10**7), compressed=True), "refused: it expands more than 100-fold"),
    ],
)
def test_damaged_archives_of_numpy_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.npz").write_bytes(data)
    assert message in error_message(tmp_path / "x.npz")
