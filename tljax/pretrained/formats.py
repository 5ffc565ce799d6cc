"""Weight files of other projects as flat ``{key: array}`` dicts. No torch; no file runs code.

Arrays are read-only views of the file, mapped into memory: opening costs next to nothing, and only
what is used is read. A file that changes while its arrays are in use changes them; everything
written here replaces the old file as a whole, which is safe.
"""

import hashlib
import json
import lzma
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tljax.errors import RequestError
from tljax.files import written_whole
from tljax.pretrained import torch_file
from tljax.pretrained.torch_file import Buffer
from tljax.pretrained.torch_pickle import DamagedError

_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_SAFETENSORS_OF = {dtype: name for name, dtype in _SAFETENSORS.items()}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit

_XZ = b"\xfd7zXZ\x00"
# Weights hardly shrink; those decoded from a code book shrink 14-fold.
_MAX_XZ_RATIO = 100

_NOT_WEIGHTS = {
    b"\x89HDF": "a Keras HDF5 file, and reading those is not supported yet",
    b"version https://git-lfs": "a Git LFS pointer, not the weights; fetch them with git lfs pull",
    b"<": "a web page, not weights; the download went wrong, fetch it again",
    b"{": "JSON, not weights; give the weight file, or the .index.json of a sharded one",
}

_PREFIXES = ("module.", "model.")


class Tensors(NamedTuple):
    """What a weight file holds.

    Attributes:
        arrays: the tensors by key; read-only.
        metadata: the free text of a safetensors header; empty for other formats.
    """

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]


def read_tensors(path: str | os.PathLike[str]) -> Tensors:
    """Reads a weight file. Its first bytes tell the format, its name does not.

    Understood are safetensors, ``torch.save``'s zip and legacy formats, each of these packed with
    xz, and the ``.index.json`` beside the shards of a Hugging Face checkpoint. Of a torch
    checkpoint the state dict is taken: what lies under ``state_dict``, else ``model_state_dict``,
    else ``model``, else ``state_dict_ema`` (averaged weights only where there are no others), else
    the tensors at the top. A ``module.`` or ``model.`` that begins every key is removed.

    Args:
        path: the file.

    Returns:
        The tensors with the dtypes, shapes and values of the file; bfloat16 is ml_dtypes'.

    Raises:
        RequestError: the file is missing, damaged, not a weight file, or asks to run code.
    """
    path = Path(path)
    data = _map(path)
    tensors = _read_shards(path, data) if _is_index(data) else _read(path, data)
    if not tensors.arrays:
        raise RequestError(f"{path}: holds no tensors")
    return tensors._replace(arrays=_without_prefix(tensors.arrays))


def write_safetensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, all or nothing. Equal input, equal bytes.

    Args:
        path: the file; an old one is replaced.
        arrays: the tensors by key, in any memory layout.
        metadata: free text for the header.

    Raises:
        RequestError: safetensors has no name for a dtype, or the file cannot be written.
    """
    path = Path(path)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    # The widest elements first, so that every tensor is aligned.
    keys = sorted(arrays, key=lambda key: (-arrays[key].dtype.itemsize, key))
    end = 0
    for key in keys:
        array = arrays[key]
        if array.dtype.name not in _SAFETENSORS_OF:
            raise RequestError(f"{path}: {key}: safetensors cannot hold dtype {array.dtype}")
        begin, end = end, end + array.nbytes
        dtype = _SAFETENSORS_OF[array.dtype.name]
        header[key] = {"dtype": dtype, "shape": array.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            file.write(torch_file.little_endian(arrays[key]))


def write_torch(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict for ``torch.load(weights_only=True)``, all or nothing.

    Equal input, equal bytes.

    Args:
        path: the ``.pth`` file; an old one is replaced.
        arrays: the state dict, in any memory layout.

    Raises:
        RequestError: torch cannot hold a dtype, or the file cannot be written.
    """
    path = Path(path)
    with written_whole(path) as temporary, temporary.open("wb") as file:
        try:
            torch_file.write_zip(file, arrays)
        except ValueError as error:
            raise RequestError(f"{path}: {error}") from error


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits; memory use does not grow with the file.

    Raises:
        RequestError: the file cannot be read.
    """
    with _open(Path(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(path: Path) -> BufferedReader:
    if path.is_dir():
        raise RequestError(f"{path}: a folder; give the weight file inside it")
    if not path.is_file():
        raise RequestError(f"{path}: no such file; check the path")
    try:
        return path.open("rb")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from error


def _map(path: Path) -> mmap.mmap:
    with _open(path) as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise RequestError(f"{path}: empty; fetch it again") from error


def _is_index(data: Buffer) -> bool:
    return data[:1] == b"{" and not _is_safetensors(data)


def _is_safetensors(data: Buffer) -> bool:
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= _MAX_HEADER


def _read_shards(path: Path, data: Buffer) -> Tensors:
    try:
        index = json.loads(data[:])
    except (ValueError, RecursionError):
        index = None
    shard_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shard_of, dict) or not all(
        isinstance(name, str) for name in shard_of.values()
    ):
        raise RequestError(f"{path}: {_NOT_WEIGHTS[b'{']}")
    shards = {}
    for name in sorted(set(shard_of.values())):
        if Path(name).name != name:
            raise RequestError(f"{path}: shard {name!r:.80} is not the name of a file beside it")
        shards[name] = _read(path.parent / name, _map(path.parent / name))
    for key, name in shard_of.items():
        if key not in shards[name].arrays:
            raise RequestError(f"{path}: tensor {key!r:.80} is not in its shard {name}")
    metadata = {key: text for shard in shards.values() for key, text in shard.metadata.items()}
    return Tensors({key: shards[name].arrays[key] for key, name in shard_of.items()}, metadata)


def _read(path: Path, data: Buffer) -> Tensors:
    try:
        return _parse(_unpacked(data))
    except DamagedError as error:
        raise RequestError(f"{path}: truncated or damaged, fetch it again ({error})") from error
    except ValueError as error:
        raise RequestError(f"{path}: {error}") from error


def _unpacked(data: Buffer) -> Buffer:
    if data[: len(_XZ)] != _XZ:
        return data
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 28)
    try:
        unpacked = unpacker.decompress(data, _MAX_XZ_RATIO * len(data))
    except lzma.LZMAError as error:
        raise DamagedError(f"xz: {error}") from error
    if unpacker.unused_data:
        raise DamagedError("bytes after the end of the xz stream")
    if not unpacker.eof:
        if unpacker.needs_input:
            raise DamagedError("the xz stream does not end")
        raise ValueError(
            f"refused: xz expands it more than {_MAX_XZ_RATIO}-fold, as weights never do"
        )
    return unpacked


def _parse(data: Buffer) -> Tensors:
    if _is_safetensors(data):
        return _read_safetensors(data)
    if data[:4] == b"PK\x03\x04":
        return Tensors(torch_file.read_zip(data), {})
    if data[:1] == b"\x80":
        return Tensors(torch_file.read_legacy(data), {})
    for beginning, problem in _NOT_WEIGHTS.items():
        if data[:64].lstrip().startswith(beginning):
            raise ValueError(problem)
    raise ValueError(
        f"not a weight file (it begins with {data[:8]!r}); "
        "safetensors and what torch.save writes can be read"
    )


def _read_safetensors(data: Buffer) -> Tensors:
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise DamagedError(f"its header alone takes {start} bytes, it has {len(data)}")
    try:
        header = json.loads(data[8:start])
    except (ValueError, RecursionError) as error:
        raise DamagedError("its safetensors header is not JSON") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DamagedError("its safetensors metadata is not text")
    entries = sorted(_entries(header))
    end = start + max((entry.end for entry in entries), default=0)
    if end != len(data):
        raise DamagedError(f"it should have {end} bytes and has {len(data)}")
    arrays = {}
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise DamagedError(f"tensor {entry.key!r:.80} overlaps another or leaves a gap")
        if math.prod(entry.shape) * entry.dtype.itemsize != entry.end - entry.begin:
            raise DamagedError(f"the shape of tensor {entry.key!r:.80} does not fit its bytes")
        offset = start + entry.begin
        arrays[entry.key] = np.ndarray(entry.shape, entry.dtype, buffer=data, offset=offset)
        position = entry.end
    return Tensors(arrays, metadata)


class _Entry(NamedTuple):
    """A tensor in a safetensors header; bytes are counted from the end of the header."""

    begin: int
    end: int
    key: str
    dtype: np.dtype
    shape: list[int]


def _entries(header: Mapping[str, object]) -> Iterator[_Entry]:
    for key, value in header.items():
        match value:
            case {
                "dtype": str(dtype),
                "shape": [*shape],
                "data_offsets": [int(begin), int(end)],
            } if len(shape) <= 64 and all(type(size) is int and size >= 0 for size in shape):
                if dtype not in _SAFETENSORS:
                    raise ValueError(f"tensor {key!r:.80}: dtype {dtype!r:.20} cannot be read")
                yield _Entry(begin, end, key, np.dtype(_SAFETENSORS[dtype]), shape)
            case _:
                raise DamagedError(f"the header's entry for tensor {key!r:.80}")


def _without_prefix(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in arrays):
            arrays = {key.removeprefix(prefix): array for key, array in arrays.items()}
    return arrays
