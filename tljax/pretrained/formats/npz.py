"""Reading of the ``.npz`` archives of NumPy, which the authors of Vision Transformers publish.

Members are checked before they are read: sizes in their headers may be wrong, and objects would
need code to be executed. All errors are of type ``ValueError``, without the name of the file.
"""

import math
import mmap
import zipfile
import zlib
from pathlib import Path

import numpy as np

from tljax.pretrained.formats.torch_pickle import DamagedError

_MAX_RATIO = 100
"""Largest allowed expansion of a compressed archive; weights hardly compress."""

_SUFFIX = b".npy"


def is_npz(data: mmap.mmap) -> bool:
    """Return True if a file starts like a zip archive whose first member is an array."""
    length = int.from_bytes(data[26:28], "little")
    return data[:4] == b"PK\x03\x04" and data[30 : 30 + length].endswith(_SUFFIX)


def read(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of an archive.

    Args:
        path: path of the file.

    Raises:
        DamagedError: the file is truncated or damaged.
        ValueError: it holds objects, expands too much, or has a member that is no array.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > _MAX_RATIO * path.stat().st_size:
                raise ValueError(
                    f"refused: it expands more than {_MAX_RATIO}-fold, which weights never need"
                )
            return {
                member.filename.removesuffix(_SUFFIX.decode()): _array(archive, member)
                for member in members
            }
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise DamagedError(f"zip: {' '.join(str(error).split()):.200}") from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    name = f"{member.filename!r:.80}"
    with archive.open(member) as file:
        try:
            version = np.lib.format.read_magic(file)
            header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, is_fortran, dtype = header(file)
        except Exception as error:  # the reader of a damaged header may raise anything
            raise DamagedError(f"{name} is no array") from error
        if dtype.hasobject or dtype.kind not in "biuf":
            raise ValueError(f"{name} holds {dtype}, which is not read: only numbers are")
        data = file.read()
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise DamagedError(f"{name} has {len(data)} bytes, which its shape does not fit")
    array = np.frombuffer(data, dtype)
    return array.reshape(shape[::-1]).T if is_fortran else array.reshape(shape)
