"""Tars of images and labels, as WebDataset writes them: their headers say where everything is.

Formats: POSIX.1-2017, pax; GNU tar manual, "Basic Tar Format". Keys and extensions are those of
https://github.com/webdataset/webdataset.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tljax.data.byte_ranges import BlockReader, ShardFile
from tljax.data.byte_strings import ByteStrings
from tljax.data.shard_index import ShardIndex
from tljax.runtime.errors import RequestError

LABELS = ("cls", "txt", "json")
"""Extensions of members that may be labels."""

IMAGES = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "avif", "npy"),
    *("heic", "heif"),  # which are listed as unreadable, with the reason
)
"""Extensions of images; of several images of one example the first in this order is used."""

_MAX_LABEL = 2**20
_BLOCK = 512
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
_HIDDEN = re.compile(rb"(^|/)(\.[^./]|__MACOSX/)")  # such as ._1.jpg, which macOS adds
_OTHERS = {b"1": b"links", b"2": b"links", b"S": b"sparse files"}

_Place = tuple[int, int]  # start and length


class _Member(NamedTuple):
    name: bytes
    kind: bytes  # 0 for a file
    start: int
    size: int


def index_tar(file: ShardFile) -> ShardIndex:
    """Find the images and labels of a tar, of which only headers and labels are read.

    Members whose names are equal up to the first dot of their last part are one example. Its image
    has one of the extensions `IMAGES`, or any extension that ends in one of them if there is only
    one such member. Hidden files and what macOS adds are ignored; examples without an image, links
    and sparse files are left out. Of two members with one name the second counts, as when a tar is
    unpacked.

    Raises:
        RequestError: the tar is damaged, cut short or compressed.
    """
    reader, digest = BlockReader(file), hashlib.sha256()
    examples: dict[bytes, dict[str, _Place]] = {}
    labels: dict[str, dict[bytes, bytes]] = {name: {} for name in LABELS}
    skipped: list[bytes] = []
    for member in _members(reader, digest):
        if member.kind != b"0":
            skipped.append(_OTHERS.get(member.kind, b"members that are no files"))
            continue
        name = member.name.lstrip(b"/")
        while name.startswith(b"./"):
            name = name[2:].lstrip(b"/")
        if _HIDDEN.search(name):
            continue
        key, extension = _divide(name)
        if extension in LABELS and member.size > _MAX_LABEL:
            skipped.append(b"labels of more than 1 MiB")
        elif extension in LABELS:
            data = reader(member.start, member.size)  # now, as going back is slow in buckets
            digest.update(data)
            labels[extension][key] = _write_label(extension, data)
        else:
            examples.setdefault(key, {})[extension] = member.start, member.size
    return _index(examples, labels, skipped, digest.hexdigest())


def _divide(name: bytes) -> tuple[bytes, str]:
    """Divide a name at the first dot of its last part; the extension becomes lower case."""
    dot = name.find(b".", name.rfind(b"/") + 1)
    if dot < 0:
        return name, ""
    return name[:dot], name[dot + 1 :].decode("latin-1").lower()


def _write_label(extension: str, data: bytes) -> bytes:
    """Return a label as JSON; nothing if it is empty."""
    data = data.strip()
    if extension == "json" or not data:
        return data
    return json.dumps(data.decode("utf-8", "backslashreplace")).encode()


def _index(
    examples: dict[bytes, dict[str, _Place]],
    labels: dict[str, dict[bytes, bytes]],
    skipped: list[bytes],
    identity: str,
) -> ShardIndex:
    images = {key: _image(files) for key, files in examples.items()}
    keys = [key for key, image in images.items() if image]
    without = len({*images}.union(*labels.values())) - len(keys)
    places = np.array([images[key] for key in keys], np.int64).reshape(-1, 2)
    return ShardIndex(
        keys=ByteStrings.of(keys),
        starts=places[:, 0],
        lengths=places[:, 1],
        values={
            name: ByteStrings.of(cells.get(key, b"") for key in keys)
            for name, cells in labels.items()
            if cells
        },
        skipped=ByteStrings.of([*skipped, *([b"examples without an image"] * without)]),
        identity=identity,
    )


def _image(files: dict[str, _Place]) -> _Place | None:
    for extension in IMAGES:
        if extension in files:
            return files[extension]
    others = [place for name, place in files.items() if name.rpartition(".")[2] in IMAGES]
    return others[0] if len(others) == 1 else None


def _members(reader: BlockReader, digest: Any) -> Iterator[_Member]:
    """Yield the members of a tar except folders; hash the headers."""
    file, position = reader.file, 0
    if not file.size:
        raise RequestError(f"{file} is empty: copy it again")
    extended: dict[bytes, bytes] = {}  # what headers before say of the next member
    while position < file.size:
        header = reader(position, _BLOCK)
        if not any(header):
            return
        _check(header, file, position)
        digest.update(header)
        kind = header[156:157]
        start = position + _BLOCK if kind != b"S" else _end_of_map(reader, header, position)
        size = _number(extended.pop(b"size", b"") or header[124:136])
        if start + size > file.size:
            raise RequestError(
                f"{file} is cut short: it ends at byte {file.size} within a member: copy it again"
            )
        if kind == b"x":
            extended |= _records(reader(start, size), file, position)
        elif kind == b"L":
            extended[b"path"] = reader(start, size).rstrip(b"\0")
        elif kind not in b"gK":
            member = _member(header, extended, start, size)
            if member.kind != b"5":
                yield member
            extended = {}
        position = start + size + -size % _BLOCK


def _member(header: bytes, extended: dict[bytes, bytes], start: int, size: int) -> _Member:
    name, kind = extended.get(b"path") or _name(header), header[156:157]
    if kind in b"07\0":
        kind = b"5" if name.endswith(b"/") else b"0"  # folders of tars before POSIX
    if any(key.startswith(b"GNU.sparse") for key in extended):
        kind = b"S"
    return _Member(name, kind, start, size)


def _end_of_map(reader: BlockReader, header: bytes, position: int) -> int:
    """Return where the map of a sparse file ends, which continues in further blocks."""
    start, more = position + _BLOCK, header[482]
    while more:
        more = reader(start, _BLOCK).ljust(_BLOCK, b"\0")[504]
        start += _BLOCK
    return start


def _check(header: bytes, file: ShardFile, position: int) -> None:
    """Check a header by its checksum, which counts its own field as spaces.

    Raises:
        RequestError: it is none.
    """
    if position == 0 and header.startswith(_COMPRESSED):
        raise RequestError(f"{file} is compressed, which allows no random access: decompress it")
    if len(header) < _BLOCK:
        raise RequestError(f"{file} is cut short at byte {file.size}: copy it again")
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if total != _number(header[148:156]):
        what = f"is damaged at byte {position}" if position else "is no tar"
        raise RequestError(f"{file} {what}: copy it again")


def _number(field: bytes) -> int:
    """Read a number, octal or, if it is large, binary; -1 if it is neither."""
    if field[0] & 128:
        return int.from_bytes(field) & (1 << (8 * len(field) - 1)) - 1
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _records(data: bytes, file: ShardFile, position: int) -> dict[bytes, bytes]:
    """Read an extended header: lines of a length, a keyword and a value."""
    records = {}
    while data.strip(b"\0"):
        digits, _, _ = data.partition(b" ")
        if not digits.isdigit() or not len(digits) < int(digits) <= len(data):
            raise RequestError(f"{file} is damaged at byte {position}: copy it again")
        line, data = data[len(digits) + 1 : int(digits)], data[int(digits) :]
        keyword, _, value = line.rstrip(b"\n").partition(b"=")
        # The size is decimal, unlike that of other headers.
        records[keyword] = b"%o" % int(value) if keyword == b"size" else value
    return records
