"""Malicious pickles: no code runs, memory stays small, and the error is one line."""

import contextlib
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tljax.pretrained.formats import read_tensors
from tljax.runtime.errors import RequestError

LEGACY_HEADER = b"".join(
    pickle.dumps(value, 2)
    for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
)


def write_zip(path: Path, pickled: bytes) -> Path:
    """Write a checkpoint with one storage of 16 float32 elements, with key 0."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", np.arange(16, dtype=np.float32).tobytes())
    return path


def write_legacy(path: Path, pickled: bytes) -> Path:
    """Write the same in the legacy format."""
    storage = (16).to_bytes(8, "little") + np.arange(16, dtype=np.float32).tobytes()
    path.write_bytes(LEGACY_HEADER + pickled + pickle.dumps(["0"], 2) + storage)
    return path


both_formats = pytest.mark.parametrize("write", [write_zip, write_legacy])


def ops(*values: object) -> bytes:
    """Return the opcodes that push plain values; bytes are opcodes already."""
    return b"".join(
        value if isinstance(value, bytes) else pickle.dumps(value, 2)[2:-1] for value in values
    )


STORAGE = b"(" + ops("storage", b"ctorch\nFloatStorage\n", "0", "cpu", 16) + b"tQ"
HOOKS = b"ccollections\nOrderedDict\n)R"


def tensor(storage: bytes, offset: object, shape: object, stride: object) -> bytes:
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return rebuild + ops(storage, offset, shape, stride, False, HOOKS) + b"tR"


GOOD = tensor(STORAGE, 0, (4, 4), (4, 1))


def state_dict(*values: bytes) -> bytes:
    items = b"".join(ops(f"w{i}") + value for i, value in enumerate(values))
    return b"\x80\x02}(" + items + b"u."


DAMAGED = "truncated or damaged; download it again ("


def error_message(path: Path) -> str:
    """Return the error for a file, after checks that apply to every error."""
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(RequestError) as caught:
            read_tensors(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    # An opcode of one byte may create a list slot and a small object.
    assert peak < 1e6 + 150 * path.stat().st_size
    assert time.perf_counter() - start < 5
    return message.removeprefix(f"{path}: ")


@both_formats
def test_a_hand_made_pickle_is_read(tmp_path: Path, write: Any) -> None:
    arrays = read_tensors(write(tmp_path / "x", state_dict(GOOD))).arrays
    np.testing.assert_array_equal(arrays["w0"], np.arange(16).reshape(4, 4))


@both_formats
def test_the_stride_of_a_dimension_of_size_one_is_ignored(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "x", state_dict(tensor(STORAGE, 4, (1, 3), (2**100, 2))))
    np.testing.assert_array_equal(read_tensors(path).arrays["w0"], [[4, 6, 8]])


class Call:
    """An object whose pickle calls ``function``."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def touching(marker: Path) -> dict[str, bytes]:
    """Return pickles that create the file ``marker`` when Python's unpickler loads them."""
    shell, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    module = b"cbuiltins\n__import__\n" + ops("os") + b"\x85R"
    return {
        f"{os.system.__module__}.system": pickle.dumps({"w": Call(os.system, shell)}, 2),
        "__builtin__.eval": pickle.dumps([Call(eval, code)], 2),
        "builtins.exec": pickle.dumps((Call(exec, code),), 4),
        "builtins.__import__": b"\x80\x02cbuiltins\ngetattr\n("
        + ops(module, "system", b"tR", shell, b"\x85R."),
        "zipfile.os.system": b"\x80\x04" + ops("zipfile", "os.system", b"\x93", shell) + b"\x85R.",
        "os.system": b"\x80\x02cos\nsystem\n" + ops(shell) + b"\x85R.",
        "opcode b'i'": b"\x80\x02(" + ops(shell) + b"ios\nsystem\n.",
    }


@both_formats
@pytest.mark.parametrize("name", list(touching(Path("x"))))
def test_code_is_rejected_and_not_executed(tmp_path: Path, write: Any, name: str) -> None:
    marker = tmp_path / "it_ran"
    payload = touching(marker)[name]
    path = write(tmp_path / "x", payload)
    reason = error_message(path)
    assert not marker.exists()
    if not name.startswith("opcode"):
        assert f"refers to {name!r}" in reason
        assert "which is not data" in reason
    with contextlib.suppress(TypeError):
        pickle.loads(payload)
    assert marker.exists(), "the pickle does not execute code, so the test proves nothing"


@both_formats
@pytest.mark.parametrize(
    "name",
    [
        "builtins.__import__",
        "builtins.open",
        "builtins.setattr",
        "collections.OrderedDict.__init__.__globals__",
        "importlib.import_module",
        "operator.attrgetter",
        "runpy.run_path",
        "socket.socket",
        "torch._utils._rebuild_tensor_v2.__globals__",
    ],
)
def test_standard_library_functions_are_rejected(tmp_path: Path, write: Any, name: str) -> None:
    module, _, attribute = name.partition(".")
    payload = b"\x80\x04" + ops(module, attribute, b"\x93") + b"."
    assert f"refers to {name!r}" in error_message(write(tmp_path / "x", payload))


@both_formats
@pytest.mark.parametrize(
    "name",
    [
        "argparse.Namespace",
        "builtins.getattr",
        "functools.partial",
        "math.cos",
        "signal.SIGTERM",
        "torch.load",
        "torch.storage._load_from_bytes",
        "numpy.load",
        "numpy.core.multiarray.fromfile",
        "line\nbreak.x",
        "x" * 5000,
    ],
)
def test_other_names_are_replaced_by_inert_objects(tmp_path: Path, write: Any, name: str) -> None:
    """The object is called twice and gets items, elements and attributes."""
    module, _, attribute = name.partition(".")
    text = ops(str(tmp_path / "text"))
    program = ops(module, attribute, b"\x93") + text + b"\x85R" + text + b"\x85R"
    program += b"(" + ops("key", "value") + b"u" + text + b"a(" + text + b"e"
    program += ops({"__class__": "x"}) + b"b"
    path = write(tmp_path / "x", b"\x80\x04}(" + ops("w") + GOOD + ops("z") + program + b"u.")
    arrays = read_tensors(path).arrays
    np.testing.assert_array_equal(arrays["w"], np.arange(16).reshape(4, 4))
    assert list(arrays) == ["w"]


@both_formats
def test_names_are_not_normalized(tmp_path: Path, write: Any) -> None:
    payload = b"\x80\x02cos.\\path\nsys\\Dtem\n."
    assert "refers to 'os.\\\\path.sys\\\\Dtem'" in error_message(write(tmp_path / "x", payload))
    payload = b"\x80\x02cos\nsystem\n and then nonsense"
    assert "refers to 'os.system'" in error_message(write(tmp_path / "x", payload))


@both_formats
@pytest.mark.parametrize(
    "value",
    {
        "call a dtype": b"ctorch\nfloat32\n)R",
        "call a storage class": b"ctorch\nFloatStorage\n)R",
        "call a tensor": GOOD + b")R",
        "call a text": ops("os.system") + b")R",
        "call with no tuple": b"ccollections\nOrderedDict\n]R",
        "new object of a text": ops("x") + b")\x81",
        "new object with keywords": b"cbuiltins\nset\n)}\x92",
        "extension": b"\x82\x01",
        "text persistent id": b"Pos.system\n",
        "persistent id that is no storage": ops(("module", "x", "y", "z")) + b"Q",
        "persistent id in a persistent id": STORAGE + b"Q",
        "persistent id of a list": b"]Q",
        "storage in place of a type": ops(("storage", "FloatStorage", "0", "cpu", 16)) + b"Q",
        "function as type": b"(" + ops("storage", b"cbuiltins\nset\n", "0", "cpu", 16) + b"tQ",
        "tensor of a tensor": tensor(GOOD, 0, (4,), (1,)),
        "tensor of bytes": tensor(ops("0"), 0, (4,), (1,)),
        "items for a tensor": GOOD + b"(NNu",
        "elements for a dict": b"}(Ne",
        "elements for a tensor": GOOD + b"Na",
        "empty stack": b"R",
        "no mark": b"u",
        "unknown memo": b"h\x07",
        "text that is not": b"X\x01\x00\x00\x00\xff",
        "fewer arguments": b"ctorch._utils\n_rebuild_tensor_v2\n)R",
    }.items(),
    ids=lambda item: item[0] if isinstance(item, tuple) else None,
)
def test_malformed_pickles_are_rejected(
    tmp_path: Path, write: Any, value: tuple[str, bytes]
) -> None:
    reason = error_message(write(tmp_path / "x", state_dict(GOOD, value[1])))
    assert reason == DAMAGED + "the pickle is invalid)"


HUGE = 2**62


@both_formats
@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (1, (4, 4), (4, 1)),
        (-1, (4, 4), (4, 1)),
        (0, (17,), (1,)),
        (0, (4, 4), (5, 1)),
        (15, (2,), (1,)),
        (3, (4,), (-1,)),
        (0, (-4, -4), (4, 1)),
        (0, (-1, 0), (1, 1)),
        (0, (HUGE, HUGE), (0, 0)),
        (0, (17,), (0,)),
        (0, (0, HUGE, HUGE), (1, 1, 1)),
        (0, (0, 2**100), (1, 1)),
        (HUGE, (1,), (1,)),
        (2**64, (1,), (1,)),
        (0, (2,), (2**100,)),
        (0, (4,), (1, 1)),
        (0, (1,) * 65, (1,) * 65),
        (0, (4.0,), (1,)),
        (0.0, (4,), (1,)),
        (True, (4,), (1,)),
        (0, (True,), (1,)),
        (0, ("4",), (1,)),
        (None, (4,), (1,)),
        (0, None, None),
        (0, [4], [1]),
        (0, "4", "1"),
        (0, ((4,),), (1,)),
        (0, {"a": 1}, {"a": 1}),
    ],
)
def test_tensors_beyond_their_storage_are_rejected(
    tmp_path: Path, write: Any, offset: object, shape: object, stride: object
) -> None:
    path = write(tmp_path / "x", state_dict(tensor(STORAGE, offset, shape, stride)))
    assert error_message(path).startswith(DAMAGED + "tensor 'w0': ")


@both_formats
@pytest.mark.parametrize("numel", [17, -1, HUGE, 2**100, None, "16", 16.0, True])
def test_storages_beyond_the_file_are_rejected(tmp_path: Path, write: Any, numel: object) -> None:
    storage = b"(" + ops("storage", b"ctorch\nFloatStorage\n", "0", "cpu", numel) + b"tQ"
    path = write(tmp_path / "x", state_dict(tensor(storage, 0, (4,), (1,))))
    assert error_message(path).startswith(DAMAGED + "tensor 'w0': ")


@pytest.mark.parametrize("view", [("1", 1, 16), ("1", -1, 4), ("1", HUGE, 1), ("1", None, 4)])
def test_partial_storages_beyond_their_storage_are_rejected(
    tmp_path: Path, view: tuple[object, ...]
) -> None:
    storage = b"(" + ops("storage", b"ctorch\nFloatStorage\n", "0", "cpu", 16, view) + b"tQ"
    path = write_legacy(tmp_path / "x", state_dict(tensor(storage, 0, (1,), (1,))))
    assert error_message(path).startswith(DAMAGED + "tensor 'w0': ")


@pytest.mark.parametrize("numel", [17, -1, HUGE])
def test_wrong_storage_lengths_in_legacy_files_are_rejected(tmp_path: Path, numel: int) -> None:
    path = write_legacy(tmp_path / "x", state_dict(GOOD))
    path.write_bytes(path.read_bytes()[:-72] + struct.pack("<q", numel) + bytes(64))
    assert "storage '0' ends beyond" in error_message(path)


@pytest.mark.parametrize("keys", [["1"], [0], [["0"]], "0", [], {"0": "0"}])
def test_wrong_storage_lists_in_legacy_files_are_rejected(tmp_path: Path, keys: object) -> None:
    path = tmp_path / "x"
    path.write_bytes(LEGACY_HEADER + state_dict(GOOD) + pickle.dumps(keys, 2) + bytes(72))
    error_message(path)


@both_formats
@pytest.mark.parametrize(
    "beside",
    {
        "object array": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
        + ops((0,), b"C\x01b")
        + b"tR("
        + ops(1, (HUGE,), b"cnumpy\ndtype\n", ("O8", False, True), b"R", False, [HUGE])
        + b"tb",
        "state of a function": b"ccollections\nOrderedDict\n" + ops({"__code__": None}) + b"b",
        "slots of a function": b"cbuiltins\nset\n" + ops((None, {"__defaults__": (1,)})) + b"b",
        "state of a tensor": GOOD + ops({"__class__": "x"}) + b"b",
        "hooks": b"ctorch._utils\n_rebuild_parameter\n("
        + GOOD
        + b"\x88"
        + ops({"hook": "os.system"})
        + b"tR",
        "call with much": b"cbuiltins\nset\n(" + b"N" * 9 + b"tR",
        "new object the old way": b"(cbuiltins\nset\no",
        "new instance the old way": b"(Nioptparse\nValues\n",
        "items for a class": b"cbuiltins\ndict\n(NNu",
        "class beside its source": b"("
        + ops("module", b"c__main__\nNet\n", "net.py", "import os")
        + b"tQ",
        "tensor with attributes": b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n"
        b"_rebuild_tensor_v2\nctorch\nTensor\n("
        + ops(STORAGE, 0, (4,), (1,), False, HOOKS)
        + b"t}tR",
        "tuple that is deep": b")" + b"\x85" * 50_000,
        "list that is deep": b"]" * 50_000 + b"a" * 49_999,
        "list of a thousand laughs": b"]q\x00" + b"]q\x01(h\x00h\x00eq\x00" * 10_000,
        "memo far away": b"Nr\xff\xff\xff\xff",
        "dict keyed by a deep tuple": b"}(" + b")" + b"\x85" * 50_000 + b"Nu",
        "dict keyed by lists": b"}(]Nu",
        "dict keyed by a tuple of 2**60 parts": b"}(" + b")" + b"q\x00h\x00\x86" * 60 + b"Nu",
        "dict with one such key": b"})" + b"q\x00h\x00\x86" * 60 + b"Ns",
        "set of a deep tuple": b"\x8f()" + b"\x85" * 50_000 + b"\x90",
        "frozen set of a deep tuple": b"()" + b"\x85" * 50_000 + b"\x91",
        "state of a dtype": b"ctorch\nfloat32\n"
        + ops((3, ">", None, None, None, -1, -1, 0))
        + b"b",
    }.items(),
    ids=lambda item: item[0] if isinstance(item, tuple) else None,
)
def test_malicious_objects_beside_the_weights_are_ignored(
    tmp_path: Path, write: Any, beside: tuple[str, bytes]
) -> None:
    path = write(tmp_path / "x", b"\x80\x02}(" + ops("w") + GOOD + ops("z") + beside[1] + b"u.")
    tracemalloc.start()
    try:
        arrays = read_tensors(path).arrays
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1e6 + 150 * path.stat().st_size
    np.testing.assert_array_equal(arrays["w"], np.arange(16).reshape(4, 4))
    # Reading the file does not affect the next one.
    arrays = read_tensors(write(tmp_path / "y", state_dict(GOOD))).arrays
    np.testing.assert_array_equal(arrays["w0"], np.arange(16).reshape(4, 4))


@both_formats
@pytest.mark.parametrize("code", [b"\x8d", b"\x8e", b"\x96"])
def test_false_lengths_allocate_no_memory(tmp_path: Path, write: Any, code: bytes) -> None:
    payload = b"\x80\x04" + code + struct.pack("<Q", HUGE) + bytes(1000)
    assert "the pickle is invalid" in error_message(write(tmp_path / "x", payload))


@both_formats
@pytest.mark.parametrize(
    "build",
    {
        "dicts": b"](" + b"]" * 20_000 + b"eq\x00(" + b"ccollections\nOrderedDict\nq\x01"
        + b"h\x01h\x00\x85R" * 20_000,
        "sizes": b"}("
        + ops("n", 2**2000, b"q\x70", "shape", b"(" + b"h\x70" * 40_000 + b"tq\x71", "w")
        + tensor(STORAGE, 0, b"h\x71", b"h\x71") + b"u",
        "calls": b"(" + b"N" * 50_000 + b"tq\x00cbuiltins\nset\nq\x01" + b"h\x01h\x00R" * 50_000,
        "states": b"}(" + b"".join(ops(f"{i}", None) for i in range(20_000)) + b"uq\x00"
        + b"cx\ny\nq\x01" + b"h\x01)Rh\x00b" * 20_000,
    }.items(),
    ids=lambda item: item[0] if isinstance(item, tuple) else None,
)  # fmt: skip
def test_malicious_pickles_take_no_quadratic_time(
    tmp_path: Path, write: Any, build: tuple[str, bytes]
) -> None:
    error_message(write(tmp_path / "x", b"\x80\x02" + build[1] + b"."))


def test_compressed_or_overlapping_zip_entries_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", state_dict(GOOD))
        archive.writestr("archive/data/0", bytes(10_000_000))
    assert "is compressed" in error_message(path)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", state_dict(GOOD))
        archive.writestr("archive/data/0", bytes(64))
        archive.writestr("archive/data/1", bytes(64))
        archive.infolist()[2].header_offset = archive.infolist()[1].header_offset
    assert "entry 'archive/data/1' overlaps another" in error_message(path)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", state_dict(GOOD))
        archive.writestr("archive/data/0", bytes(64))
        archive.infolist()[1].file_size = archive.infolist()[1].compress_size = HUGE
    assert "entry 'archive/data/0' is longer than the file" in error_message(path)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", state_dict(GOOD))
    assert "storage should have 64 bytes and has 0" in error_message(path)
