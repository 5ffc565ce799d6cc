"""A reader of the HDF5 files that Keras writes, without the HDF5 library.

The library crashes or hangs on damaged files. This reader supports the format that h5py writes by
default (HDF5 1.0 to 2.0, "earliest"): groups as symbol tables, string attributes, contiguous and
compact datasets. It rejects compressed or chunked datasets, and soft links, external and virtual
data, which refer to other places. Arrays are views of the file. Time and memory are linear in the
size of the file, even for malicious files.

Source: HDF5 File Format Specification, version 3.0 (the HDF Group), whose names of messages and
fields are used here.
"""

import math
import mmap
import struct
from dataclasses import dataclass, field

import numpy as np

from tljax.pretrained.formats.torch_pickle import DamagedError

SIGNATURE = b"\x89HDF\r\n\x1a\n"

# Types of messages in object headers.
_DATASPACE, _LINKS, _DATATYPE, _EXTERNAL, _LAYOUT, _ATTRIBUTE, _CONTINUATION, _SYMBOLS = (
    *(0x01, 0x02, 0x03, 0x07, 0x08, 0x0C, 0x10, 0x11),
)
_INTEGER, _FLOAT, _STRING, _VARIABLE = 0, 1, 3, 9  # datatype classes
_COMPACT, _CONTIGUOUS = 0, 1  # layout classes
_SOFT_LINK = 2  # cache type of a symbol table entry
_UNDEFINED_ADDRESS = 2**64 - 1
_MAX_RANK = 32
_MAX_TEXT = 4096  # bytes per name

# Bit offset, precision, exponent location and size, mantissa location and size, exponent bias.
_FLOATS = {
    struct.pack("<HHBBBBI", 0, 16, 10, 5, 0, 10, 15): "f2",
    struct.pack("<HHBBBBI", 0, 32, 23, 8, 0, 23, 127): "f4",
    struct.pack("<HHBBBBI", 0, 64, 52, 11, 0, 52, 1023): "f8",
}


@dataclass(frozen=True)
class File:
    """An HDF5 file, which may be part of another file.

    Attributes:
        data: the outer file.
        span: position of the HDF5 file in ``data``; addresses are relative to its start.
    """

    data: mmap.mmap
    span: range
    _heaps: dict[int, dict[int, range]] = field(default_factory=dict)

    @property
    def root(self) -> "Object":
        """Return the root group.

        Raises:
            DamagedError: the file is truncated or damaged. All methods here may raise it.
            ValueError: the file uses an unsupported feature. All methods here may raise it.
        """
        if self.read(0, 8) != SIGNATURE:
            raise DamagedError("it does not start as an HDF5 file")
        version, offsets, lengths = self.unpack("<B4xBB", 8)
        if version != 0:
            raise ValueError(
                "an HDF5 version that Keras does not write; save the weights with Keras again"
            )
        base, end = self.unpack("<Q8xQ", 24)
        if (offsets, lengths, base) != (8, 8, 0) or end > len(self.span):
            raise DamagedError(f"it should have {end} bytes and has {len(self.span)}")
        return Object(self, self.unpack("<Q", 64)[0])

    def unpack(self, layout: str, at: int) -> tuple[int, ...]:
        """Unpack numbers at an address."""
        return struct.unpack(layout, self.read(at, struct.calcsize(layout)))

    def read(self, at: int, size: int) -> bytes:
        """Return the bytes at an address."""
        if not 0 <= at <= at + size <= len(self.span):
            raise DamagedError("an address lies beyond its end")
        return self.data[self.span.start + at : self.span.start + at + size]

    def text(self, at: int, end: int, max_size: int = _MAX_TEXT) -> str:
        """Return the zero-terminated text at an address."""
        self.read(at, 0)
        text = self.read(at, min(end, at + max_size, len(self.span)) - at)
        return _decode(text.partition(b"\0")[0])

    def heap_object(self, heap: int, index: int, size: int, max_size: int = _MAX_TEXT) -> bytes:
        """Return an object of a global heap, where variable-length texts are stored."""
        if heap not in self._heaps:
            self._heaps[heap] = self._global_heap(heap)
        span = self._heaps[heap].get(index, range(0))
        if size > min(len(span), max_size):
            raise DamagedError("a text is missing")
        return self.read(span.start, size)

    def _global_heap(self, at: int) -> dict[int, range]:
        if self.read(at, 4) != b"GCOL" or len(self._heaps) * 4096 > len(self.span):
            raise DamagedError("a text is missing")  # a heap has at least 4096 bytes
        end = at + self.unpack("<Q", at + 8)[0]
        self.read(end, 0)
        spans, at = {}, at + 16
        while at + 16 <= end:
            index, size = self.unpack("<H6xQ", at)
            if index == 0:
                break  # free space follows
            if size > end - at:
                raise DamagedError("a text is missing")
            spans[index] = range(at + 16, at + 16 + size)
            at += 16 + _padded(size)
        return spans


class Object:
    """A group or a dataset.

    Attributes:
        address: address of its header, which identifies the object.
        members: addresses of the objects in a group by name; empty for a dataset.
    """

    def __init__(self, file: File, address: int) -> None:
        self._file = file
        self.address = address
        self._messages = _messages(file, address)
        self.members = self._members()

    def __getitem__(self, path: str) -> "Object":
        """Return the object at a path of names joined by slashes."""
        target = self
        for name in path.split("/"):
            if name not in target.members:
                raise DamagedError(f"{path!r:.80} is missing")
            target = Object(self._file, target.members[name])
        return target

    def texts(self, name: str) -> list[str] | None:
        """Return an attribute that is a text or a list of texts; None if it does not exist."""
        for span in self._spans(_ATTRIBUTE):
            attribute, datatype, shape, values = self._attribute(span)
            if attribute == name:
                return self._texts(datatype, math.prod(shape), values)
        return None

    def array(self) -> np.ndarray:
        """Return the dataset as a read-only view of the file."""
        file = self._file
        if self._spans(_EXTERNAL):
            raise ValueError("refused: its weights are in another file; save them in one file")
        messages = [self._spans(kind) for kind in (_DATASPACE, _DATATYPE, _LAYOUT)]
        if not all(messages):
            raise DamagedError("a dataset lacks its shape, type or position")
        space, datatype, layout = (spans[0] for spans in messages)
        shape, dtype = _shape(file, space), _dtype(file, datatype)
        version, kind = file.unpack("<BB", layout.start)
        if version not in (3, 4) or kind not in (_COMPACT, _CONTIGUOUS):
            raise ValueError(
                "its datasets are compressed, chunked or virtual, which Keras does not write; "
                "save the weights with Keras again"
            )
        if kind == _COMPACT:
            start, [size] = layout.start + 4, file.unpack("<H", layout.start + 2)
        else:
            start, size = file.unpack("<QQ", layout.start + 2)
        if math.prod(shape) * dtype.itemsize != size:
            raise DamagedError(f"a dataset of shape {shape} has {size} bytes")
        if size == 0:
            return np.zeros(shape, dtype)
        if start == _UNDEFINED_ADDRESS:
            raise ValueError("a dataset was never written; save the weights again")
        file.read(start + size, 0)
        return np.ndarray(shape, dtype, buffer=file.data, offset=file.span.start + start)

    def _spans(self, kind: int) -> list[range]:
        return [span for message, span in self._messages if message == kind]

    def _members(self) -> dict[str, int]:
        """Return the members of a group: a B-tree of symbol tables, with names in a heap."""
        if self._spans(_LINKS):
            raise ValueError("a group of a kind that Keras does not write, which may contain links")
        if not self._spans(_SYMBOLS):
            return {}
        file = self._file
        tree, heap = file.unpack("<QQ", self._spans(_SYMBOLS)[0].start)
        if file.read(heap, 4) != b"HEAP":
            raise DamagedError("a group has no names")
        length, names = file.unpack("<Q8xQ", heap + 8)
        members: dict[str, int] = {}
        pending, seen = [tree], {tree}
        while pending:
            node = pending.pop()
            signature = file.read(node, 4)
            if signature == b"TREE":
                [used] = file.unpack("<H", node + 6)
                children = [file.unpack("<Q", node + 32 + 16 * i)[0] for i in range(used)]
                if seen & set(children):
                    raise DamagedError("a group contains itself")
                seen.update(children)
                pending += children
            elif signature == b"SNOD":
                [used] = file.unpack("<H", node + 6)
                for i in range(used):
                    name, address, link = file.unpack("<QQI", node + 8 + 40 * i)
                    if link == _SOFT_LINK:
                        raise ValueError("refused: it contains a link in place of weights")
                    members[file.text(names + name, names + length)] = address
            else:
                raise DamagedError("a group has no members")
        return members

    def _attribute(self, span: range) -> tuple[str, range, tuple[int, ...], range]:
        """Return the name, datatype, shape and values of an attribute."""
        file = self._file
        version, shared, *sizes = file.unpack("<BBHHH", span.start)
        if version not in (1, 2, 3) or (version > 1 and shared):
            raise ValueError("an attribute of a kind that Keras does not write")
        at = span.start + (9 if version == 3 else 8)
        parts = []
        for size in sizes:
            parts.append(range(at, at + size))
            at += _padded(size) if version == 1 else size
        name, datatype, space = parts
        values = range(at, span.stop)
        return file.text(name.start, name.stop), datatype, _shape(file, space), values

    def _texts(self, datatype: range, count: int, values: range) -> list[str]:
        file = self._file
        kind, size = file.unpack("<B3xI", datatype.start)
        if count == 0:
            return []  # h5py writes empty lists with any datatype
        if kind % 16 not in (_STRING, _VARIABLE) or size == 0 or count * size > len(values):
            raise DamagedError("an attribute is not a text")
        places = range(values.start, values.start + count * size, size)
        # A single text may be the configuration of a model; the others are names.
        max_size = len(file.span) if count == 1 else _MAX_TEXT
        if kind % 16 == _STRING:
            return [file.text(at, at + size, max_size) for at in places]
        return [
            _decode(file.heap_object(heap, index, length, max_size))
            for length, heap, index in (file.unpack("<IQI", at) for at in places)
        ]


def _messages(file: File, address: int) -> list[tuple[int, range]]:
    """Return the type and position of every message in an object header."""
    version, count, length = file.unpack("<BxH4xI", address)
    if version != 1:
        raise DamagedError("an object has no header")
    messages, blocks = [], [range(address + 16, address + 16 + length)]
    for block in blocks:
        at = block.start
        while at + 8 <= block.stop and len(messages) < count:
            kind, size, flags = file.unpack("<HHB", at)
            span = range(at + 8, at + 8 + size)
            file.read(span.stop, 0)
            if kind == _CONTINUATION:
                start, length = file.unpack("<QQ", span.start)
                blocks.append(range(start, start + length))
            if flags & 2 and kind in (_DATASPACE, _DATATYPE):
                raise ValueError("a dataset of a kind that Keras does not write")
            messages.append((kind, span))
            at = span.stop
    return messages


def _shape(file: File, at: range) -> tuple[int, ...]:
    version, rank = file.unpack("<BB", at.start)
    if version not in (1, 2) or rank > _MAX_RANK:
        raise DamagedError("the shape of a dataset is invalid")
    return file.unpack(f"<{rank}Q", at.start + (8 if version == 1 else 4))


def _dtype(file: File, at: range) -> np.dtype:
    kind, bits, size = file.unpack("<BB2xI", at.start)
    order = ">" if bits & 1 else "<"
    if kind % 16 == _INTEGER and size in (1, 2, 4, 8):
        return np.dtype(f"{order}{'i' if bits & 8 else 'u'}{size}")
    if kind % 16 == _FLOAT:
        dtype = _FLOATS.get(file.read(at.start + 8, 12))
        if dtype and int(dtype[1]) == size:
            return np.dtype(order + dtype)
    raise ValueError("a dataset contains other data than plain numbers")


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _decode(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise DamagedError("a name is not valid UTF-8") from None
