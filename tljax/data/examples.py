"""What a data set is once it is open: random access to examples, labels, classes and names."""

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from tljax.runtime.errors import RequestError, UnreadableImageError
from tljax.runtime.files import sha256
from tljax.runtime.types import Array, Batch


class Examples(Protocol):
    """Random access to images: encoded files, or RGB pixels, ``[height, width, 3]`` uint8.

    An array of images, ``[n, height, width, 3]``, is one already. Asking for an example that cannot
    be read raises ``UnreadableImageError``.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> bytes | np.ndarray: ...


@runtime_checkable
class FingerprintedExamples(Examples, Protocol):
    """Examples that can be told from others without reading them."""

    @property
    def fingerprint(self) -> str:
        """Text that changes when the content of any example does."""
        ...


@dataclass(frozen=True, eq=False)
class Source:
    """Labelled examples in an order.

    Attributes:
        examples: the images; nothing is read before it is asked for.
        labels: ``[n]`` int32 indices into ``classes``; -1 where there is no label.
        classes: the names of the classes; empty where nothing is labelled.
        names: what a report calls each example: printable text.
        targets: what training learns, a tree of arrays ``[n, ...]``; None for ``labels``.
        extra: by name, further arrays ``[n, ...]`` that an objective is given: a teacher's logits,
            weights, boxes.
    """

    examples: Examples
    labels: np.ndarray
    classes: tuple[str, ...]
    names: Sequence[str]
    targets: Any = None
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes | np.ndarray:
        """One example: an encoded image file, or RGB pixels, ``[height, width, 3]`` uint8.

        Raises:
            UnreadableImageError: the file cannot be read.
        """
        return self.examples[index]

    def batch(self, inputs: Array, mask: np.ndarray, indices: np.ndarray) -> Batch:
        """Put what belongs to the examples at ``indices`` beside their inputs; -1 is padding."""
        rows = np.maximum(indices, 0)
        targets = self.labels if self.targets is None else self.targets
        targets, extra = jax.tree.map(lambda x: x[rows], (targets, dict(self.extra)))
        return Batch(inputs, targets, mask, indices, extra)

    @cached_property
    def digest(self) -> str:
        """Hex; changes if and only if a content, a label, the order or the classes change.

        Every example is read, except where a data set has a fingerprint: that is taken instead, so
        the digest may then change without a change of content.
        """
        header = json.dumps([self.classes, self.labels.tolist()]).encode()
        for path, leaf in jax.tree.leaves_with_path((self.targets, dict(self.extra))):
            header += f"{path} {leaf.dtype} {leaf.shape}".encode() + np.asarray(leaf).tobytes()
        examples, indices = self.examples, np.arange(len(self))
        if isinstance(examples, _Subset):
            examples, indices = examples.examples, examples.indices
        if isinstance(examples, FingerprintedExamples):
            contents = examples.fingerprint.encode() + indices.tobytes()
        else:
            contents = b"".join(_hashes(self))
        return sha256(header + contents)


class Splits(NamedTuple):
    """A data set to train on.

    Attributes:
        train: examples to learn from; every class has at least one.
        val: examples to measure on, with the same classes; may lack some.
        notes: remarks for a person, one line each.
    """

    train: Source
    val: Source
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Subset:
    examples: Examples
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        return self.examples[self.indices[index]]


def select(source: Source, indices: Sequence[int] | np.ndarray) -> Source:
    """The examples at ``indices``, in that order, with the same classes."""
    indices = np.asarray(indices, np.int64)
    examples, chosen = source.examples, indices
    if isinstance(examples, _Subset):  # one level, so that equal selections have equal digests
        examples, chosen = examples.examples, examples.indices[indices]
    targets, extra = jax.tree.map(lambda x: x[indices], (source.targets, dict(source.extra)))
    return Source(
        _Subset(examples, chosen),
        source.labels[indices],
        source.classes,
        [source.names[int(index)] for index in indices],
        targets,
        extra,
    )


def match_classes(source: Source, classes: Sequence[str]) -> tuple[Source, tuple[str, ...]]:
    """Gives a labelled source the class indices of a network, by the names of the classes.

    Args:
        source: examples under their own list of classes.
        classes: the network's classes, in the order of its logits.

    Classes of one name are matched in their order. Where the data has fewer of a name, the first
    gets its examples; see `ambiguous`.

    Returns:
        The examples whose class the network knows, labelled with indices into ``classes``; and
        notes for a person, one line each, on what the two lists do not share.

    Raises:
        RequestError: no example is of a class that the network knows.
    """
    of_network, of_data = [*map(normal, classes)], [*map(normal, source.classes)]
    position = {key: index for index, key in enumerate(_numbered(of_network))}
    found = [position.get(key, position.get((key[0], 0), -1)) for key in _numbered(of_data)]
    relabel = np.array([*found, -1], np.int32)  # an example without a label (-1) gets the last
    labels = relabel[source.labels]
    kept = np.flatnonzero(labels >= 0)
    if not kept.size:
        raise RequestError(
            f"no example is of a known class: the data has {shortened(source.classes)};"
            f" the network knows {shortened(classes)}"
        )
    missing = [name for name in of_network if name not in of_data]
    extra = [name for name in of_data if name not in of_network]
    empty = [name for name in map(normal, without_example(source)) if name in of_network]
    notes = [
        f"{len(same)} classes are called {name} ({' and '.join(map(str, same))}): of an image of "
        "theirs the most probable one is the label"
        for name, same in ambiguous(source.classes, classes).items()
    ]
    if missing:
        notes.append(
            f"{len(missing)} of {len(classes)} classes not in the data: {shortened(missing)}"
        )
    if empty:
        notes.append(
            f"{len(empty)} of {len(classes)} classes without an example: {shortened(empty)}"
        )
    if extra:
        left_out = len(source) - kept.size
        notes.append(f"left out {left_out} examples of unknown classes: {shortened(extra)}")
    known = replace(select(source, kept), labels=labels[kept], classes=tuple(classes))
    return known, tuple(notes)


def ambiguous(found: Sequence[str], classes: Sequence[str]) -> dict[str, list[int]]:
    """The names of which a network has more classes than the data, and their indices.

    ImageNet has two cranes and two maillots.
    """
    same: dict[str, list[int]] = {}
    for index, name in enumerate(classes):
        same.setdefault(normal(name), []).append(index)
    given = Counter(map(normal, found))
    return {name: indices for name, indices in same.items() if 0 < given[name] < len(indices)}


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name, and how often it occurred before."""
    before: Counter[str] = Counter()
    numbered = []
    for name in names:
        numbered.append((name, before[name]))
        before[name] += 1
    return numbered


def split_by_content(source: Source, where: str, val_fraction: float) -> Splits:
    """Splits a source by a hash of each example's content, as `open_splits` says.

    Args:
        source: labelled examples; all are read.
        where: what an error calls the source.
        val_fraction: the share of validation, in [0, 1). With 0 the training images are their own
            validation.

    Raises:
        RequestError: a class is left without an example to train on, or validation without any.
    """
    if not val_fraction:
        note = f"no validation images: all figures are of the {len(source)} training images"
        return Splits(source, source, (note,))
    in_val = np.array([int.from_bytes(h[:6]) / 2**48 < val_fraction for h in _hashes(source)], bool)
    train, val = select(source, np.flatnonzero(~in_val)), select(source, np.flatnonzero(in_val))
    advice = "add images, change the share, or lay the folder out as train/ and val/"
    lost = without_example(train)
    if lost:
        raise RequestError(
            f"all images of {shortened(lost)} in {where} fall into the"
            f" validation share of {val_fraction}: {advice}"
        )
    if not len(val):
        raise RequestError(
            f"none of the {len(source)} images in {where} falls into the validation share of"
            f" {val_fraction}: {advice}, or measure on the training images: --val-fraction 0"
        )
    notes = [f"split by content: {len(train)} to train on, {len(val)} to validate on"]
    unseen = without_example(val)
    if unseen:
        notes.append(f"no validation image of {shortened(unseen)}")
    return Splits(train, val, tuple(notes))


def _hashes(source: Source) -> list[bytes]:
    """The SHA-256 of each example's content; one that cannot be read counts as empty."""

    def hash_one(index: int) -> bytes:
        try:
            data = source.read(index)
        except UnreadableImageError:
            data = b""
        if isinstance(data, np.ndarray):
            data = repr(data.shape).encode() + data.tobytes()
        return hashlib.sha256(data).digest()

    def hash_chunk(indices: range) -> list[bytes]:
        return [hash_one(index) for index in indices]

    everything = range(len(source))
    chunks = (everything[start : start + 256] for start in everything[::256])
    with ThreadPoolExecutor() as pool:
        return [digest for chunk in pool.map(hash_chunk, chunks) for digest in chunk]


def without_example(source: Source) -> list[str]:
    """The classes that no example of a source belongs to."""
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
    return [name for name, count in zip(source.classes, counts, strict=True) if not count]


def normal(name: str) -> str:
    """A name in the form of Unicode in which names are compared; file names of macOS have another.

    See https://unicode.org/reports/tr15, normalisation form C.
    """
    return unicodedata.normalize("NFC", name)


def printable(path: str | PathLike[str]) -> str:
    """A path that any report can hold: bytes that are not UTF-8 show as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shortened(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more
