"""The files that ``torch.save`` writes, read and written without torch.

Two containers hold the same pickle beside the raw bytes of the tensors: the zip archive of torch
1.6 and later, and the legacy stream before it (``torch/serialization.py``). Only the tensors that
are returned are looked at, and those are views of the file. Like torch, this verifies no checksums.
Every fault is a ``ValueError`` that does not name the file. Time and memory are linear in the size
of the file, whatever it holds.
"""

import io
import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import IO, NamedTuple, cast

import numpy as np

from tljax.pretrained.formats.torch_pickle import STORAGES, DamagedError, Tensor, load

CONTAINERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "student"),
    *("encoder", "backbone", "params", "params_ema", "weights"),
)
"""Where training scripts put the weights in a checkpoint, in the order they are looked for."""

_STORAGE_OF = {dtype: storage for storage, dtype in STORAGES.items()}
_ZIP = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
_WHOLE = "this file holds a whole model, not its weights"
_BIG_ENDIAN = "written on a big-endian machine; re-save it on a little-endian one"


class _Contents(NamedTuple):
    """What a container holds.

    Attributes:
        checkpoint: the object that was saved, with descriptions in place of tensors.
        storages: where in the file the bytes of each storage lie, by key.
    """

    checkpoint: object
    storages: dict[str, range]


def read(data: mmap.mmap) -> dict[str, np.ndarray]:
    """Reads what ``torch.save`` writes.

    Args:
        data: the whole file, of either container (see `is_torch`).

    Returns:
        The state dict (see ``CONTAINERS``) as read-only views of ``data``.

    Raises:
        DamagedError: the file is cut off, or was changed.
        ValueError: the file names code, holds no state dict, or cannot be read.
    """
    checkpoint, storages = _read_zip(data) if is_zip(data) else _read_legacy(data)
    tensors = _state_dict(checkpoint, depth=3)
    if tensors is None:
        at_top = checkpoint if isinstance(checkpoint, dict) else {}
        # Among the objects in checkpoints only torch.nn.Module has this attribute.
        if any(isinstance(x, dict) and "_parameters" in x for x in (at_top, *at_top.values())):
            raise ValueError(f"{_WHOLE}; load it where its code is and save model.state_dict()")
        raise ValueError(
            "no state dict at the top or under state_dict, model and the like; at the top are: "
            f"{', '.join(f'{key!r:.40}' for key in [*at_top][:5]) or 'no named values'}; "
            "re-save its state dict alone"
        )
    arrays = {}
    for key, tensor in tensors.items():
        try:
            arrays[key] = _view(data, storages.get(tensor.storage.key, range(0)), tensor)
        except ValueError as error:
            raise DamagedError(f"tensor {key!r:.80}: {error}") from error
    return arrays


def is_zip(data: mmap.mmap) -> bool:
    """Whether a file begins as a zip archive."""
    return data[:4] == _ZIP


def is_torch(data: mmap.mmap) -> bool:
    """Whether a file begins as a zip archive or as a pickle."""
    return is_zip(data) or data[:1] == pickle.PROTO


def write_zip(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict that ``torch.load(weights_only=True)`` reads. Equal input, equal bytes.

    Args:
        file: an empty file, open for writing.
        arrays: the state dict; each array gets a storage of its own.

    Raises:
        ValueError: torch has no storage class for an array's dtype; nothing has been written.
    """
    state_dict = [b"\x80\x02", _ORDERED_DICT, b"("]
    for number, (key, array) in enumerate(arrays.items()):
        if array.dtype.name not in _STORAGE_OF:
            raise ValueError(f"tensor {key!r:.80}: torch has no storage for dtype {array.dtype}")
        storage = f"ctorch\n{_STORAGE_OF[array.dtype.name]}\n".encode()
        persistent_id = _pickled(("storage", storage, str(number), "cpu", array.size)) + b"Q"
        stride = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
        arguments = (persistent_id, 0, array.shape, stride, False, _ORDERED_DICT)
        rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
        state_dict += [_pickled(key), rebuild, _pickled(arguments), b"R"]
    with zipfile.ZipFile(file, "w") as archive:
        _add(archive, "archive/data.pkl", b"".join([*state_dict, b"u."]))
        _add(archive, "archive/byteorder", b"little")
        for number, array in enumerate(arrays.values()):
            _add(archive, f"archive/data/{number}", little_endian(array))
        _add(archive, "archive/version", b"3\n")


def little_endian(array: np.ndarray) -> memoryview:
    """The bytes of an array of any byte order and layout, in C order; a copy only where needed."""
    array = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    return array.reshape(-1).view(np.uint8).data


def _pickled(value: object) -> bytes:
    """A value in the opcodes of protocol 2; bytes are opcodes already."""
    match value:
        case bytes():
            return value
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if value < 2**31:
            return b"J" + struct.pack("<i", value)
        case int():
            return b"\x8a\x08" + struct.pack("<q", value)
        case str():
            text = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(text)) + text
        case tuple():
            return b"(" + b"".join(map(_pickled, value)) + b"t"
        case _:
            raise TypeError(type(value))


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Adds an entry whose bytes begin at a multiple of 64, as torch's do, so that views align."""
    info = zipfile.ZipInfo(name)  # dated 1980: equal input, equal bytes
    info.file_size = len(data)  # tells zipfile whether the entry needs 64-bit sizes
    assert archive.fp is not None
    padding = -(archive.fp.tell() + 30 + len(name) + 4) % 64
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(info, "w") as entry:
        entry.write(data)


def _read_zip(data: mmap.mmap) -> _Contents:
    """An archive with the pickle in one entry, and each storage in one."""
    spans = zip_spans(data)
    root = next(iter(spans), "").partition("/")[0]
    if f"{root}/data.pkl" not in spans:
        raise ValueError(
            "a zip archive, but not one that torch.save or Keras wrote (it has no data.pkl and no "
            "model.weights.h5)"
        )
    if f"{root}/constants.pkl" in spans:
        raise ValueError(f"{_WHOLE} (TorchScript); save model.state_dict()")
    order = spans.get(f"{root}/byteorder")
    if order and data[order.start : order.stop] != b"little":
        raise ValueError(_BIG_ENDIAN)
    pickled = spans[f"{root}/data.pkl"]
    checkpoint = load(io.BytesIO(data[pickled.start : pickled.stop])).root
    folder = f"{root}/data/"
    storages = {
        name.removeprefix(folder): span for name, span in spans.items() if name.startswith(folder)
    }
    return _Contents(checkpoint, storages)


def _read_legacy(data: mmap.mmap) -> _Contents:
    """Five pickles (magic number, protocol, system, checkpoint, keys of the storages).

    Then for each key the number of elements as an int64 and the elements.
    """
    stream = _stream(data)
    if load(stream).root != _LEGACY_MAGIC or load(stream).root != _LEGACY_PROTOCOL:
        raise ValueError("a pickle, but not one that torch.save wrote")
    system = load(stream).root
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError(_BIG_ENDIAN)
    checkpoint, itemsizes = load(stream)
    keys = load(stream).root
    storages = {}
    position = stream.tell()
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key not in itemsizes:
            raise DamagedError("it lists a storage that no tensor uses")
        start = position + 8
        numel = int.from_bytes(data[position:start], "little", signed=True)
        position = start + numel * itemsizes[key]
        if not start <= position <= len(data):
            raise DamagedError(f"storage {key!r:.80} ends beyond the end of the file")
        storages[key] = range(start, position)
    return _Contents(checkpoint, storages)


def _stream(data: mmap.mmap) -> IO[bytes]:
    """The data as a file at its beginning. A mapping is close enough to one, and is not copied."""
    data.seek(0)
    return cast("IO[bytes]", data)


def zip_spans(data: mmap.mmap) -> dict[str, range]:
    """Where the bytes of each entry of an archive lie.

    Raises:
        DamagedError: the archive is cut off, or was changed.
        ValueError: an entry is compressed.
    """
    try:
        with zipfile.ZipFile(_stream(data)) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            directory = archive.start_dir
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
        raise DamagedError("the zip archive has no directory") from error
    spans = {}
    free = 0
    for info in infos:
        name, header = info.filename, info.header_offset
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(
                "a zip archive, but not one that torch.save or Keras wrote "
                f"({name!r:.80} is compressed)"
            )
        if not free <= header <= directory - 30 or name in spans:
            raise DamagedError(f"zip entry {name!r:.80} overlaps another")
        start = header + 30 + sum(struct.unpack_from("<HH", data, header + 26))
        free = start + info.file_size
        if free > directory:
            raise DamagedError(f"zip entry {name!r:.80} is longer than the file")
        spans[name] = range(start, free)
    return spans


def _state_dict(node: object, depth: int) -> dict[str, Tensor] | None:
    """The tensors under the first container that leads to any, else the node's own.

    What lies beside them (epoch numbers, optimizer state) is passed over. The depth is bounded
    because a pickle can hold itself.
    """
    if not isinstance(node, dict) or depth == 0:
        return None
    for name in CONTAINERS:
        if tensors := _state_dict(node.get(name), depth - 1):
            return tensors
    return {key: value for key, value in node.items() if isinstance(value, Tensor)} or None


def _view(data: mmap.mmap, span: range, tensor: Tensor) -> np.ndarray:
    """The tensor as a view of the file, which never reaches outside of its storage.

    It may not be larger than its storage either: a few bytes expanded to terabytes (stride 0) would
    cost nothing here and everything to the first who copies them.
    """
    storage, shape, stride = tensor.storage, tensor.shape, tensor.stride
    if (
        not (isinstance(shape, tuple) and isinstance(stride, tuple))
        or not len(shape) == len(stride) <= 64  # numpy's limit
        or not all(
            type(number) is int and number >= 0
            for number in (storage.offset, storage.numel, tensor.offset, *shape, *stride)
        )
    ):
        raise ValueError("its shape, strides or offset make no sense")
    start = span.start + storage.offset * storage.dtype.itemsize
    size = storage.numel * storage.dtype.itemsize
    if start + size > span.stop:
        raise ValueError(f"its storage should have {size} bytes and has {span.stop - start}")
    if 0 in shape:
        return np.zeros(shape, tensor.dtype)
    itemsize = tensor.dtype.itemsize
    reach = tensor.offset + 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if max(reach, math.prod(shape)) * itemsize > size:
        raise ValueError(f"needs more than the {size} bytes of its storage, or was expanded")
    return np.ndarray(
        shape,
        tensor.dtype,
        buffer=data,
        offset=start + tensor.offset * itemsize,
        # The stride of a dimension of size 1 means nothing and may be any number.
        strides=[
            step * itemsize if n > 1 else itemsize for n, step in zip(shape, stride, strict=True)
        ],
    )
