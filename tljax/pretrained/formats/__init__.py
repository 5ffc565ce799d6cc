"""Reading and writing of weight files as flat ``{key: array}`` dicts, without torch or Keras.

Reading never executes code from a file. Arrays are read-only views of the memory-mapped file, so
opening is fast and only the data that is used is read. If a file is modified in place while its
arrays are in use, they change. The writers here replace a file as a whole, which is safe.
"""

import hashlib
import json
import lzma
import mmap
import os
import tempfile
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from tljax.pretrained.formats import keras_file, npz, torch_file
from tljax.pretrained.formats.torch_pickle import DamagedError
from tljax.runtime.errors import RequestError
from tljax.runtime.files import atomic_write, open_path

# numpy names of the dtypes; safetensors' numpy reader copies, and lacks bfloat16 and float8.
_DTYPES = {
    **{f"{kind[0].upper()}{n}": f"{kind}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64)},
    **{f"F{n}": f"float{n}" for n in (16, 32, 64)},
    "BF16": "bfloat16",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit

_XZ = b"\xfd7zXZ\x00"
# Weights hardly compress; those decoded from a code book compress 14-fold.
_MAX_XZ_RATIO = 100

_NOT_WEIGHTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the weights; run git lfs pull",
    b"<": "a web page, not weights; download the file again",
    b"{": "JSON, not weights; pass the weight file, or the .index.json of a sharded one",
}


class Tensors(NamedTuple):
    """The contents of a weight file.

    Attributes:
        arrays: the tensors by key; read-only.
        metadata: the metadata of a safetensors header, or under ``keras`` the JSON configuration of
            a whole Keras model; empty for other formats.
    """

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]


def read_tensors(path: str | os.PathLike[str]) -> Tensors:
    """Read a weight file, detecting the format from its first bytes.

    Supported formats: safetensors, the zip and legacy formats of ``torch.save``, ``.npz`` of NumPy,
    and ``.h5``, ``.weights.h5`` and ``.keras`` of Keras (see `keras_file` for the keys), each
    optionally compressed with xz; and the ``.index.json`` of a sharded Hugging Face checkpoint.
    From a torch checkpoint the state dict is read: the first of `torch_file.CONTAINERS` that holds
    tensors (so averaged weights only if there are no others), otherwise the tensors at the top
    level.

    Args:
        path: path of the file.

    Returns:
        The tensors with the dtypes, shapes and values of the file; bfloat16 is that of ml_dtypes.

    Raises:
        RequestError: the file is missing, damaged, not a weight file, or would execute code.
    """
    path = Path(path)
    data = _map(path)
    is_index = data[:1] == b"{" and not _is_safetensors(data)
    tensors = _read_shards(path, data) if is_index else _read(path, data)
    if not tensors.arrays:
        raise RequestError(f"{path}: contains no tensors")
    return tensors


def write_safetensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file atomically.

    Equal inputs give equal bytes, except that the order of several metadata entries may vary.

    Args:
        path: path of the file; an existing one is replaced.
        arrays: the tensors by key, in any memory layout.
        metadata: text for the header, by key.

    Raises:
        RequestError: safetensors does not support a dtype, or the file cannot be written.
    """
    # The library ignores strides: it writes the memory of a transposed array without reordering.
    arrays = {key: np.asarray(array, order="C") for key, array in arrays.items()}
    with atomic_write(open_path(path)) as temporary:
        mode = temporary.stat().st_mode
        try:
            safetensors.numpy.save_file(arrays, temporary, dict(metadata) if metadata else None)
        except safetensors.SafetensorError as error:
            raise RequestError(f"{path}: cannot be written ({_one_line(error)})") from error
        temporary.chmod(mode)  # the library makes files readable by their owner only


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write an uncompressed archive of NumPy atomically.

    Args:
        path: path of the ``.npz`` file; an existing one is replaced.
        arrays: the tensors by key.

    Raises:
        RequestError: the file cannot be written.
    """
    with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType] - of names only


def write_torch(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a state dict for ``torch.load(weights_only=True)`` atomically.

    Equal inputs give equal bytes.

    Args:
        path: path of the ``.pth`` file; an existing one is replaced.
        arrays: the state dict, in any memory layout.

    Raises:
        RequestError: torch does not support a dtype, or the file cannot be written.
    """
    path = Path(path)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        try:
            torch_file.write_zip(file, arrays)
        except ValueError as error:
            raise RequestError(f"{path}: {error}") from error


def write_keras(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], names: Mapping[str, str]
) -> None:
    """Write a file for ``load_weights`` of Keras atomically.

    Equal inputs give equal bytes.

    Args:
        path: path of the file; an existing one is replaced. A name that ends in ``.weights.h5``
            selects the format of Keras 3, any other ``.h5`` one that Keras 2 can read as well.
        arrays: all weights by key (see `keras_file`), in the order of the model's layers.
        names: name of each layer in Keras, by the first part of its keys.

    Raises:
        RequestError: the file cannot be written.
    """
    path = Path(path)
    with atomic_write(path) as temporary:
        keras_file.write(temporary, arrays, names, legacy=not path.name.endswith(".weights.h5"))


def digest(path: str | os.PathLike[str], algorithm: str) -> str:
    """Return the hash of a file in hexadecimal digits, with constant memory use.

    Args:
        path: path of the file.
        algorithm: name of the algorithm in hashlib.

    Raises:
        RequestError: the file cannot be read.
    """
    with _open(Path(path)) as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _open(path: Path) -> BufferedReader:
    if path.is_dir():
        raise RequestError(f"{path}: a folder; pass the weight file inside it")
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
            raise RequestError(f"{path}: empty; download it again") from error


def _is_safetensors(data: mmap.mmap) -> bool:
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= _MAX_HEADER


def _read_shards(path: Path, data: mmap.mmap) -> Tensors:
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
            raise RequestError(f"{path}: shard {name!r:.80} must be a file name without a folder")
        shards[name] = _read(path.parent / name, _map(path.parent / name))
    for key, name in shard_of.items():
        if key not in shards[name].arrays:
            raise RequestError(f"{path}: tensor {key!r:.80} is not in its shard {name}")
    metadata = {key: text for shard in shards.values() for key, text in shard.metadata.items()}
    return Tensors({key: shards[name].arrays[key] for key, name in shard_of.items()}, metadata)


def _read(path: Path, data: mmap.mmap) -> Tensors:
    try:
        if data[: len(_XZ)] != _XZ:
            return _parse(path, data)
        # The arrays keep the unpacked file mapped after its name is removed.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            with atomic_write(Path(folder, "unpacked")) as unpacked:
                unpacked.write_bytes(_unpack(data))
            return _parse(Path(folder, "unpacked"), _map(Path(folder, "unpacked")))
    except DamagedError as error:
        raise RequestError(f"{path}: truncated or damaged; download it again ({error})") from error
    except ValueError as error:
        raise RequestError(f"{path}: {error}") from error


def _unpack(data: mmap.mmap) -> bytes:
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
            f"refused: xz expands it more than {_MAX_XZ_RATIO}-fold, which weights never need"
        )
    return unpacked


def _parse(path: Path, data: mmap.mmap) -> Tensors:
    """Parse the file at ``path``, whose bytes are ``data``."""
    if _is_safetensors(data):
        return _read_safetensors(path, data)
    if npz.is_npz(data):
        return Tensors(npz.read(path), {})
    if span := keras_file.hdf5_span(data):
        graph = keras_file.configuration(data, span)
        return Tensors(keras_file.read(data, span), {"keras": graph} if graph else {})
    if torch_file.is_torch(data):
        return Tensors(torch_file.read(data), {})
    for prefix, problem in _NOT_WEIGHTS.items():
        if data[:64].lstrip().startswith(prefix):
            raise ValueError(problem)
    raise ValueError(
        f"not a weight file (it starts with {data[:8]!r}); "
        "supported are safetensors, torch.save, Keras and .npz files"
    )


def _read_safetensors(path: Path, data: mmap.mmap) -> Tensors:
    """Read safetensors; the library checks that tensors fill the file without gap or overlap.

    It opens the path again, when another file may have replaced the mapped one.
    """
    arrays = {}
    position = 8 + int.from_bytes(data[:8], "little")
    try:
        with safetensors.safe_open(path, "np") as file:
            for key in file.offset_keys():
                header = file.get_slice(key)
                dtype = header.get_dtype()
                if dtype not in _DTYPES:
                    raise ValueError(f"tensor {key!r:.80}: dtype {dtype} cannot be read")
                arrays[key] = np.ndarray(
                    header.get_shape(), _DTYPES[dtype], buffer=data, offset=position
                )
                position += arrays[key].nbytes
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, TypeError) as error:  # TypeError: too small a buffer
        raise DamagedError(_one_line(error)) from error
    if position != len(data):
        raise DamagedError("the file was replaced while it was read")
    return Tensors(arrays, metadata)


def _one_line(error: Exception) -> str:
    """Return a library's message on one line, shortened, because it may quote from a file."""
    return f"{' '.join(str(error).split()):.200}"
