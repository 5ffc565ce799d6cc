"""Weight files of other projects as flat ``{key: array}`` dicts. No torch; no file runs code.

Arrays are read-only views of the file, mapped into memory: opening costs next to nothing, and only
what is used is read. A file that changes while its arrays are in use changes them; everything
written here replaces the old file as a whole, which is safe.
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

from tljax.pretrained.formats import keras_file, torch_file
from tljax.pretrained.formats.torch_pickle import DamagedError
from tljax.runtime.errors import RequestError
from tljax.runtime.files import written_whole

# The library's own readers of bytes know neither bfloat16 nor float8, and copy.
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
# Weights hardly shrink; those decoded from a code book shrink 14-fold.
_MAX_XZ_RATIO = 100

_NOT_WEIGHTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the weights; fetch them with git lfs pull",
    b"<": "a web page, not weights; the download went wrong, fetch it again",
    b"{": "JSON, not weights; give the weight file, or the .index.json of a sharded one",
}


class Tensors(NamedTuple):
    """What a weight file holds.

    Attributes:
        arrays: the tensors by key; read-only.
        metadata: the free text of a safetensors header; of a whole model of Keras its
            configuration, under ``keras``; empty for other formats.
    """

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]


def read_tensors(path: str | os.PathLike[str]) -> Tensors:
    """Reads a weight file. Its first bytes tell the format, its name does not.

    Understood are safetensors, ``torch.save``'s zip and legacy formats, Keras' ``.h5``,
    ``.weights.h5`` and ``.keras`` (see `keras_file` for their keys), each of these packed with xz,
    and the ``.index.json`` beside the shards of a Hugging Face checkpoint. Of a torch checkpoint
    the state dict is taken: what lies under the first of `torch_file.CONTAINERS` (averaged weights
    only where there are no others), else the tensors at the top.

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
    return tensors


def write_safetensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, all or nothing.

    Equal input, equal bytes; but the order of several metadata is left to chance.

    Args:
        path: the file; an old one is replaced.
        arrays: the tensors by key, in any memory layout.
        metadata: free text for the header.

    Raises:
        RequestError: safetensors has no name for a dtype, or the file cannot be written.
    """
    # The library writes the memory of an array as it lies, transposed ones too.
    arrays = {key: np.asarray(array, order="C") for key, array in arrays.items()}
    with written_whole(Path(path)) as temporary:
        mode = temporary.stat().st_mode
        try:
            safetensors.numpy.save_file(arrays, temporary, dict(metadata) if metadata else None)
        except safetensors.SafetensorError as error:
            raise RequestError(f"{path}: cannot be written ({_one_line(error)})") from error
        temporary.chmod(mode)  # the library lets its owner alone read a file


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


def write_keras(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], names: Mapping[str, str]
) -> None:
    """Writes a file for ``load_weights`` of Keras, all or nothing.

    Equal input, equal bytes.

    Args:
        path: ``.weights.h5``, which Keras 3 reads, or any other ``.h5``, which Keras 2 reads too;
            an old one is replaced.
        arrays: every weight by key (see `keras_file`), in the order of the model's layers.
        names: what Keras calls each layer, by the first part of its keys.

    Raises:
        RequestError: the file cannot be written.
    """
    path = Path(path)
    with written_whole(path) as temporary:
        keras_file.write(temporary, arrays, names, legacy=not path.name.endswith(".weights.h5"))


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits; see `digest`."""
    return digest(path, "sha256")


def digest(path: str | os.PathLike[str], algorithm: str) -> str:
    """The hash of a file in hexadecimal digits; memory use does not grow with the file.

    Args:
        path: the file.
        algorithm: a name that hashlib knows.

    Raises:
        RequestError: the file cannot be read.
    """
    with _open(Path(path)) as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


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


def _is_index(data: mmap.mmap) -> bool:
    return data[:1] == b"{" and not _is_safetensors(data)


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
            raise RequestError(f"{path}: shard {name!r:.80} is not the name of a file beside it")
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
        # The arrays keep their mapping of the unpacked file after its name is gone.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            with written_whole(Path(folder, "unpacked")) as unpacked:
                unpacked.write_bytes(_unpack(data))
            return _parse(Path(folder, "unpacked"), _map(Path(folder, "unpacked")))
    except DamagedError as error:
        raise RequestError(f"{path}: truncated or damaged, fetch it again ({error})") from error
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
            f"refused: xz expands it more than {_MAX_XZ_RATIO}-fold, as weights never do"
        )
    return unpacked


def _parse(path: Path, data: mmap.mmap) -> Tensors:
    """The tensors of a file whose bytes are ``data``."""
    if _is_safetensors(data):
        return _read_safetensors(path, data)
    if span := keras_file.hdf5_span(data):
        graph = keras_file.configuration(data, span)
        return Tensors(keras_file.read(data, span), {"keras": graph} if graph else {})
    if torch_file.is_torch(data):
        return Tensors(torch_file.read(data), {})
    for beginning, problem in _NOT_WEIGHTS.items():
        if data[:64].lstrip().startswith(beginning):
            raise ValueError(problem)
    raise ValueError(
        f"not a weight file (it begins with {data[:8]!r}); "
        "safetensors and what torch.save and Keras write can be read"
    )


def _read_safetensors(path: Path, data: mmap.mmap) -> Tensors:
    """The library checks that the tensors fill the file in their order, without gap or overlap.

    It opens the path anew, and by then another file may have that name.
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
    except (safetensors.SafetensorError, TypeError) as error:  # numpy's, for too small a buffer
        raise DamagedError(_one_line(error)) from error
    if position != len(data):
        raise DamagedError("it was replaced while it was read")
    return Tensors(arrays, metadata)


def _one_line(error: Exception) -> str:
    """The message of a library, which may quote from a file."""
    return f"{' '.join(str(error).split()):.200}"
