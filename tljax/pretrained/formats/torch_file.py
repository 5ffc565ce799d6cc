"""Reading and writing of the files of ``torch.save``, without torch.

There are two containers of a pickle and the raw bytes of tensors: the zip archive of torch 1.6 and
later, and the older legacy stream (``torch/serialization.py``). Tensors are views of the file, and
only those that are returned are checked. Like torch, this module verifies no checksums. All errors
are of type ``ValueError``, without the name of the file. Time and memory are linear in the size of
the file, even for malicious files.
"""

import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from typing import IO, cast

import numpy as np

from tljax.pretrained.formats.torch_pickle import STORAGES, DamagedError, Tensor, load

CONTAINERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "student"),
    *("encoder", "backbone", "params", "params_ema", "weights"),
)
"""Keys under which training scripts store the weights, in the order in which they are tried."""

_STORAGE_OF = {dtype: storage for storage, dtype in STORAGES.items()}
_ZIP = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
_WHOLE_MODEL = "this file contains a whole model, not its weights"
_BIG_ENDIAN = "written on a big-endian machine; save it again on a little-endian one"


_Contents = tuple[object, dict[str, range]]
"""The saved object, with `Tensor` in place of tensors, and the position of each storage by key."""


def read(data: mmap.mmap) -> dict[str, np.ndarray]:
    """Read the state dict of a file of ``torch.save``.

    Args:
        data: the whole file, in either container (see `is_torch`).

    Returns:
        The state dict (see ``CONTAINERS``) as read-only views of ``data``.

    Raises:
        DamagedError: the file is truncated or damaged.
        ValueError: the file refers to code, contains no state dict, or is not supported.
    """
    checkpoint, storages = _read_zip(data) if is_zip(data) else _read_legacy(data)
    tensors = _state_dict(checkpoint, depth=3)
    if tensors is None:
        top = checkpoint if isinstance(checkpoint, dict) else {}
        # Among the objects in checkpoints only torch.nn.Module has this attribute.
        if any(isinstance(x, dict) and "_parameters" in x for x in (top, *top.values())):
            raise ValueError(f"{_WHOLE_MODEL}; load it with its code and save model.state_dict()")
        raise ValueError(
            "no state dict at the top level or under keys such as state_dict and model; the top "
            f"level has {', '.join(f'{key!r:.40}' for key in [*top][:5]) or 'no named values'}; "
            "save the state dict alone"
        )
    arrays = {}
    for key, tensor in tensors.items():
        try:
            arrays[key] = _view(data, storages.get(tensor.storage.key, range(0)), tensor)
        except ValueError as error:
            raise DamagedError(f"tensor {key!r:.80}: {error}") from error
    return arrays


def is_zip(data: mmap.mmap) -> bool:
    """Return True if a file starts like a zip archive."""
    return data[:4] == _ZIP


def is_torch(data: mmap.mmap) -> bool:
    """Return True if a file starts like a zip archive or a pickle."""
    return is_zip(data) or data[:1] == pickle.PROTO


def write_zip(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a state dict for ``torch.load(weights_only=True)``. Equal inputs give equal bytes.

    Args:
        file: an empty file, open for writing.
        arrays: the state dict; each array gets its own storage.

    Raises:
        ValueError: torch has no storage class for the dtype of an array; nothing has been written.
    """
    state_dict = [b"\x80\x02", _ORDERED_DICT, b"("]
    for number, (key, array) in enumerate(arrays.items()):
        if array.dtype.name not in _STORAGE_OF:
            raise ValueError(f"tensor {key!r:.80}: torch has no storage for dtype {array.dtype}")
        storage = f"ctorch\n{_STORAGE_OF[array.dtype.name]}\n".encode()
        persistent_id = [_opcodes("storage"), storage, *map(_opcodes, (str(number), "cpu"))]
        persistent_id += [_opcodes(array.size), b"tQ"]
        stride = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
        geometry = map(_opcodes, (0, array.shape, stride, False))  # offset first
        rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
        state_dict += [_opcodes(key), rebuild, b"((", *persistent_id, *geometry]
        state_dict += [_ORDERED_DICT, b"tR"]
    with zipfile.ZipFile(file, "w") as archive:
        _add(archive, "archive/data.pkl", b"".join([*state_dict, b"u."]))
        _add(archive, "archive/byteorder", b"little")
        for number, array in enumerate(arrays.values()):
            _add(archive, f"archive/data/{number}", little_endian(array))
        _add(archive, "archive/version", b"3\n")


def little_endian(array: np.ndarray) -> memoryview:
    """Return the bytes of an array in little-endian C order, copying only if necessary."""
    array = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    return array.reshape(-1).view(np.uint8).data


def _opcodes(value: object) -> bytes:
    """Return the pickle opcodes of a plain value in protocol 2, without header and end."""
    return pickletools.optimize(pickle.dumps(value, 2))[2:-1]


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Add an entry whose data starts at a multiple of 64 bytes, so that views are aligned."""
    info = zipfile.ZipInfo(name)  # dated 1980, so that equal inputs give equal bytes
    info.file_size = len(data)  # tells zipfile whether the entry needs 64-bit sizes
    assert archive.fp is not None
    padding = -(archive.fp.tell() + 30 + len(name) + 4) % 64
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(info, "w") as entry:
        entry.write(data)


def _read_zip(data: mmap.mmap) -> _Contents:
    """Read an archive with one entry for the pickle and one per storage."""
    spans = zip_spans(data)
    root = next(iter(spans), "").partition("/")[0]
    if f"{root}/data.pkl" not in spans:
        raise ValueError(
            "a zip archive, but not of torch.save or Keras (it has no data.pkl and no "
            "model.weights.h5)"
        )
    if f"{root}/constants.pkl" in spans:
        raise ValueError(f"{_WHOLE_MODEL} (TorchScript); save model.state_dict()")
    order = spans.get(f"{root}/byteorder")
    if order and data[order.start : order.stop] != b"little":
        raise ValueError(_BIG_ENDIAN)
    pickled = spans[f"{root}/data.pkl"]
    checkpoint = load(io.BytesIO(data[pickled.start : pickled.stop])).root
    folder = f"{root}/data/"
    storages = {
        name.removeprefix(folder): span for name, span in spans.items() if name.startswith(folder)
    }
    return checkpoint, storages


def _read_legacy(data: mmap.mmap) -> _Contents:
    """Read five pickles (magic number, protocol, system, checkpoint, storage keys) and storages.

    Each storage is the number of elements as an int64, followed by the elements.
    """
    stream = _stream(data)
    if load(stream).root != _LEGACY_MAGIC or load(stream).root != _LEGACY_PROTOCOL:
        raise ValueError("a pickle, but not of torch.save")
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
    return checkpoint, storages


def _stream(data: mmap.mmap) -> IO[bytes]:
    """Rewind the mapping and return it as a file, whose interface it has, without copying."""
    data.seek(0)
    return cast("IO[bytes]", data)


def zip_spans(data: mmap.mmap) -> dict[str, range]:
    """Return the position of the data of each entry of an archive.

    Raises:
        DamagedError: the archive is truncated or damaged.
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
                f"a zip archive, but not of torch.save or Keras ({name!r:.80} is compressed)"
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
    """Return the tensors under the first of ``CONTAINERS`` that has any, else the node's own.

    Other values, such as epoch numbers and optimizer state, are ignored. The depth is limited
    because a pickle can contain itself.
    """
    if not isinstance(node, dict) or depth == 0:
        return None
    for name in CONTAINERS:
        if tensors := _state_dict(node.get(name), depth - 1):
            return tensors
    return {key: value for key, value in node.items() if isinstance(value, Tensor)} or None


def _view(data: mmap.mmap, span: range, tensor: Tensor) -> np.ndarray:
    """Return the tensor as a view of the file that does not exceed its storage.

    A view larger than its storage is rejected: with stride 0 a few bytes could be expanded to
    terabytes, which would exhaust the memory when they are copied.
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
        raise ValueError("its shape, strides or offset are invalid")
    start = span.start + storage.offset * storage.dtype.itemsize
    size = storage.numel * storage.dtype.itemsize
    if start + size > span.stop:
        raise ValueError(f"its storage should have {size} bytes and has {span.stop - start}")
    if 0 in shape:
        return np.zeros(shape, tensor.dtype)
    itemsize = tensor.dtype.itemsize
    end = tensor.offset + 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if max(end, math.prod(shape)) * itemsize > size:
        raise ValueError(f"it needs more than the {size} bytes of its storage, or was expanded")
    return np.ndarray(
        shape,
        tensor.dtype,
        buffer=data,
        offset=start + tensor.offset * itemsize,
        # The stride of a dimension of size 1 is arbitrary.
        strides=[
            step * itemsize if n > 1 else itemsize for n, step in zip(shape, stride, strict=True)
        ],
    )
