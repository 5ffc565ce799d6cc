"""The files of class folders, listed in parallel and remembered on this machine.

The folder ``indexes`` of the cache folder (``TLJAX_CACHE``) has a file for each large data set. It
is used as long as no folder of the data set has changed, by their times of modification, which the
operating system sets when a file is added, removed or renamed. So files that are written in place
may have changed: nothing but their names is remembered.
"""

import json
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Bool, Int, UInt64

from tljax.data.byte_strings import ByteStrings
from tljax.data.files import MISSING, Files
from tljax.data.listing import Visits, is_output, list_folders, signature, walk
from tljax.runtime.errors import WriteError
from tljax.runtime.files import atomic_write, cache_dir, sha256

FEWEST = 20_000
"""Number of files from which a data set is remembered: fewer are listed in a fraction of a second.

Some network file systems never change the times of folders: few have so many files there.
"""

VERSION = 2
"""Version of remembered indexes: increase it when other files become examples."""

_THREADS = 16  # more than cores, as they wait for the file system
_RECENT = 3  # seconds; a folder may change again without another time, which some round to 2 s


class Index(NamedTuple):
    """The files of class folders.

    Attributes:
        folders: the names of the class folders, in the byte order of their names.
        counts: ``[folders]`` number of files in each.
        files: the files, folder by folder, each in the byte order of their names.
        inodes: ``[files]`` as the folders list them; for a link, its own.
        links: ``[files]`` whether a file is a symbolic link.
    """

    folders: tuple[str, ...]
    counts: Int[np.ndarray, " folders"]
    files: Files
    inodes: UInt64[np.ndarray, " files"]
    links: Bool[np.ndarray, " files"]


def index_classes(path: Path) -> Index:
    """List the files of the class folders in a folder.

    Raises:
        RequestError: a folder cannot be listed.
    """
    root = "" if str(path) == "." else str(path)
    if index := _read(path, root):
        return index
    began = time.time()
    index, visits = _list(path, root)
    times = [modified for *_, modified in visits.folders.values()]
    dated = min(times) > 0 and max(times) < (began - _RECENT) * 1e9
    if len(index.files) >= FEWEST and dated and visits.repeatable:
        _write(path, root, index, visits)
    return index


def _list(path: Path, root: str) -> tuple[Index, Visits]:
    visits = Visits()
    folders = list_folders(path, visits)
    # A link to the data set or a folder above it would bring in the images of other classes.
    ancestors = {path.resolve(), *path.resolve().parents}
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = [*pool.map(partial(_list_class, root, ancestors), folders)]
    for part in parts:
        visits.add(part.visits)
    index = Index(
        folders=tuple(folder.name for folder in folders),
        counts=np.array([len(part.inodes) for part in parts], np.int64),
        files=Files(root, ByteStrings.concatenate([part.paths for part in parts])),
        inodes=_concatenate([part.inodes for part in parts], np.uint64),
        links=_concatenate([part.links for part in parts], np.bool_),
    )
    return index, visits


class _Part(NamedTuple):
    paths: ByteStrings
    inodes: np.ndarray
    links: np.ndarray
    visits: Visits


def _list_class(root: str, ancestors: set[Path], folder: Path) -> _Part:
    """List the files of a class folder as arrays, which take a tenth of the memory of entries."""
    visits, start = Visits(), len(os.path.join(root, ""))  # noqa: PTH118
    entries = [*walk(folder, set(ancestors), visits)]
    paths = ByteStrings.of(os.fsencode(entry.path[start:]) for entry in entries)
    inodes = np.fromiter((entry.inode() for entry in entries), np.uint64, len(entries))
    links = np.fromiter((entry.is_symlink() for entry in entries), np.bool_, len(entries))
    return _Part(paths, inodes, links, visits)


def _concatenate(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays])


def _place(path: Path) -> Path:
    return cache_dir() / "indexes" / f"{sha256(os.fsencode(path.resolve()))}.npz"


def _write(path: Path, root: str, index: Index, visits: Visits) -> None:
    """Remember an index, if the cache folder can be written."""
    start = len(os.path.join(root, ""))  # noqa: PTH118
    header = {
        "version": VERSION,
        "path": str(path.resolve()),
        "classes": index.folders,
        "folders": [["" if f == str(path) else f[start:], *s] for f, s in visits.folders.items()],
        "outputs": [folder[start:] for folder in visits.outputs],
    }
    arrays = {
        "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
        "counts": index.counts,
        "text": index.files.paths.data,
        "ends": index.files.paths.ends,
        "inodes": index.inodes,
        "links": np.flatnonzero(index.links),
    }
    with (
        suppress(OSError, WriteError),
        atomic_write(_place(path)) as temporary,
        temporary.open("wb") as file,
    ):
        np.savez(file, allow_pickle=False, **arrays)


def _read(path: Path, root: str) -> Index | None:
    """Read the index of an earlier call; None if there is none or a folder has changed."""
    try:
        with _place(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            if header["version"] != VERSION or header["path"] != str(path.resolve()):
                return None
            for folder, *before in header["folders"]:
                if signature(os.path.join(root, folder) or ".") != tuple(before):  # noqa: PTH118
                    return None
            if not all(is_output(os.path.join(root, x)) for x in header["outputs"]):  # noqa: PTH118
                return None
            files = Files(root, ByteStrings(file["text"], file["ends"]))
            inodes, links = file["inodes"], np.zeros(len(files), np.bool_)
            links[file["links"]] = True
            counts, folders = file["counts"], tuple(header["classes"])
    # A damaged file raises any of these.
    except (OSError, WriteError, BadZipFile, EOFError, KeyError, TypeError, ValueError, IndexError):
        return None
    modes = files.look_up(np.flatnonzero(links), "st_mode")
    if not np.all((modes == MISSING) | (modes & 0o170000 == stat.S_IFREG)):  # see `listing`
        return None
    return Index(folders, counts, files, inodes, links)
