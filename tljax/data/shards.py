"""Shards of images and labels: WebDataset tars, TFRecord files and ArrayRecords, and buckets."""

import glob
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import overload

import numpy as np

from tljax.data.array_records import ArrayRecords, index_array_record
from tljax.data.bucket_folders import bucket_folder_parts
from tljax.data.buckets import is_bucket, list_bucket
from tljax.data.byte_ranges import ByteRanges, ShardFile
from tljax.data.byte_strings import ByteStrings
from tljax.data.files import printable
from tljax.data.folders import TRAIN, VAL, expand_path
from tljax.data.listing import exists, suggest_path
from tljax.data.parts import WHOLE, Parts, Unlabeled, name_part
from tljax.data.shard_fields import ShardFields
from tljax.data.shard_index import ShardIndex, open_index
from tljax.data.tars import index_tar
from tljax.data.tf_examples import RecordImages
from tljax.data.tfrecords import index_tfrecord
from tljax.data.workers import cores
from tljax.runtime.errors import RequestError
from tljax.runtime.files import sha256

_KINDS: Mapping[str, tuple[re.Pattern[str], Callable[[ShardFile], ShardIndex]]] = {
    "tars": (re.compile(r".*(\.tar(\.(gz|bz2|xz|zst|lz4))?|\.tgz)", re.IGNORECASE), index_tar),
    "ArrayRecords": (
        re.compile(r".*\.array_?record(-\d+-of-\d+)?", re.IGNORECASE),
        index_array_record,
    ),
    "TFRecord files": (
        re.compile(r".*\.tfrecords?(-\d+-of-\d+)?|[^.]*-\d{5}-of-\d{5}", re.IGNORECASE),
        index_tfrecord,
    ),
}


def is_shards(spec: str) -> bool:
    """Return True for shards and for a folder in a bucket.

    Shards are a file with an extension such as ``.tar``, a pattern, or a folder that has such
    files, itself or in ``train/`` and ``val/``, and no other folders.
    """
    if is_bucket(spec):
        return True
    path = expand_path(spec)
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        return bool(_list_folder(str(path)))
    return is_pattern(spec) or _kind(spec) is not None


def is_pattern(spec: str) -> bool:
    """Return True for a pattern of several files, which is not the name of a file itself."""
    return any(sign in spec for sign in "*?{") and not exists(expand_path(spec))


def shard_parts(spec: str) -> Parts:
    """Find shards and return the parts that they are, none of which is opened.

    Args:
        spec: a file, a folder, or a pattern with ``*``, ``?``, ``[...]``, ``{a,b}`` and
            ``{0000..0099}``; all of them also as a URL of a bucket, where a folder may also have
            images in class folders. The first word of a file's name that is train, val, valid,
            validation or test says its part, otherwise the name of its folder does.

    Raises:
        RequestError: there is no shard, or a pattern names a missing one.
    """
    files = _find_files(spec)
    kinds = {file: _kind(file.path) for file in files}
    if not any(kinds.values()):
        if is_bucket(spec):
            return bucket_folder_parts(spec, files)
        raise RequestError(f"{printable(spec)} has no .tar, .tfrecord or .array_record file")
    parts: dict[str, list[ShardFile]] = defaultdict(list)
    for file, kind in kinds.items():
        if kind:
            parts[_part_of(file.path)].append(file)
    return {name: partial(_open, name_part(spec, name), some) for name, some in parts.items()}


def _kind(path: str) -> str | None:
    """Return which shards a file is by its name, None if it is none."""
    name = path.rpartition("/")[2]
    return next((kind for kind, (form, _) in _KINDS.items() if form.fullmatch(name)), None)


def _part_of(path: str) -> str:
    folder, _, name = path.rpartition("/")
    words = [*re.findall("[a-z]+", name.lower()), folder.rpartition("/")[2].lower()]
    return next((word for word in words if word in TRAIN + VAL), WHOLE)


def _list_folder(folder: str) -> list[str]:
    """List the shards of a folder and of its parts; none if it has other folders."""
    found, parts = list[str](), list[str]()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    parts.append(entry.path)
                    if entry.name.lower() not in TRAIN + VAL:
                        return []
                elif _kind(entry.name):
                    found.append(entry.path)
    except OSError:  # which is said when it is opened as a folder of images
        return []
    return sorted([*found, *(path for part in parts for path in _list_folder(part))])


def _find_files(spec: str) -> list[ShardFile]:
    files = [file for pattern in expand_braces(spec) for file in _match(pattern, spec)]
    return list(dict.fromkeys(files))


def _match(pattern: str, spec: str) -> list[ShardFile]:
    if is_bucket(pattern):
        return [ShardFile(*file) for file in list_bucket(pattern)]
    path = str(expand_path(pattern))
    if os.path.isdir(path):  # noqa: PTH112
        paths = _list_folder(path)
    elif os.path.exists(path):  # noqa: PTH110
        paths = [path]
    else:
        paths = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - of text
    try:
        files = [ShardFile.local(path) for path in paths if not os.path.isdir(path)]  # noqa: PTH112
    except OSError as error:
        raise RequestError(f"{printable(spec)} cannot be read: {error.strerror}") from error
    if not files:
        raise RequestError(f"{printable(pattern)} does not exist{suggest_path(Path(path))}")
    return files


def expand_braces(pattern: str) -> list[str]:
    """Expand ``{a,b}`` and ``{00..99}`` as shells do."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    choices = match[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") or last.startswith("0") else 0
        choices = [str(x).zfill(width) for x in range(int(first), int(last) + 1)]
    start, end = pattern[: match.start()], pattern[match.end() :]
    return [text for choice in choices for text in expand_braces(start + choice + end)]


def _open(where: str, files: Sequence[ShardFile]) -> Unlabeled:
    """Open the shards of a part."""
    kinds = {_kind(file.path) or "" for file in files}
    if len(kinds) > 1:
        raise RequestError(f"{where} has {' and '.join(sorted(kinds))}: choose with a pattern")
    kind = kinds.pop()
    threads = 16 if is_bucket(files[0].path) else cores()
    with ThreadPoolExecutor(threads) as pool:
        indexes = list(pool.map(partial(open_index, build=_KINDS[kind][1]), files))
    lengths = [len(index.keys) for index in indexes]
    if not any(lengths):
        raise RequestError(f"{where} has no image: write members such as 0001.jpg and 0001.cls")
    number = np.repeat(np.arange(len(files), dtype=np.int32), lengths)
    starts = np.concatenate([index.starts for index in indexes])
    names = _short_names(files)
    identities = [index.identity for index in indexes]
    fingerprint = sha256(json.dumps([names, identities]).encode())
    if kind == "ArrayRecords":
        image, *others = sorted({index.image for index in indexes})
        if others:
            raise RequestError(f"{where} has images in the features {image} and {others[0]}")
        examples = RecordImages(ArrayRecords(tuple(files), number, starts), image, fingerprint)
    else:
        sizes = np.concatenate([index.lengths for index in indexes])
        examples = ByteRanges(tuple(files), number, starts, sizes, fingerprint)
    keys = ByteStrings.concatenate([index.keys for index in indexes])
    columns = _merge_values(indexes, lengths)
    fields = ShardFields(where, columns, keys, files[0].path.rpartition("/")[0])
    skipped = Counter(what.decode() for index in indexes for what in index.skipped)
    return Unlabeled(
        where=where,
        examples=examples,
        features=fields.features,
        read=fields.read,
        preferred="label",
        advice="write a field cls with the number or the name of the class",
        names=_Names(tuple(names), number, keys),
        notes=tuple(f"left out {count} {what}" for what, count in sorted(skipped.items())),
    )


def _short_names(files: Sequence[ShardFile]) -> list[str]:
    """Return the names of files, with folders where names alone would be equal."""
    names = [file.name for file in files]
    if len({*names}) == len(names):
        return names
    paths = [file.path.split("/") for file in files]
    depth = next(i for i, folders in enumerate(zip(*paths, strict=False)) if len({*folders}) > 1)
    return ["/".join(path[depth:]) for path in paths]


def _merge_values(indexes: Sequence[ShardIndex], lengths: Sequence[int]) -> dict[str, ByteStrings]:
    empty = [ByteStrings.of([b""] * length) for length in lengths]
    return {
        name: ByteStrings.concatenate(
            [index.values.get(name, none) for index, none in zip(indexes, empty, strict=True)]
        )
        for name in dict.fromkeys(name for index in indexes for name in index.values)
    }


@dataclass(frozen=True, eq=False)
class _Names(Sequence[str]):
    """The names of examples in shards, ``SHARD/KEY``, made when they are looked at."""

    shards: tuple[str, ...]
    number: np.ndarray
    keys: ByteStrings

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        key = self.keys[index].decode("utf-8", "backslashreplace")
        return f"{printable(self.shards[int(self.number[index])])}/{key}"
