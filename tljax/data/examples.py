"""Data sets: random access to examples, with labels, classes and names."""

import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Float, UInt8

from tljax.data.files import MISSING, Files, Names, Subset, in_chunks
from tljax.runtime.errors import RequestError, UnreadableImageError
from tljax.runtime.files import sha256
from tljax.runtime.task import CLASSIFICATION, Task
from tljax.runtime.types import Array, Batch


class Examples(Protocol):
    """Random access to images: encoded files, or pixels ``[height, width, channels]``.

    Pixels are uint8, uint16 or floating point. An array of images ``[n, height, width, channels]``
    satisfies the protocol. Reading an example that
    cannot be read raises ``UnreadableImageError``. An optional attribute ``fingerprint``, a string
    that changes whenever the content of any example does, spares `Source.digest` reading them all.
    An optional method ``describe``, see `tljax.data.files.Files.describe`, spares it
    `Source.fingerprint`.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> bytes | np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Source:
    """An ordered set of images with labels.

    Attributes:
        examples: the images, read on access.
        labels: ``[n]`` int32 indices into ``classes``, -1 for an example without a label; for the
            task ``multilabel`` ``[n, classes]`` floats of 0 and 1, for ``regression`` ``[n,
            classes]`` numbers, where NaN is unknown.
        classes: the names of the classes, labels or numbers; empty if there are no labels.
        names: the name of each example in reports; printable text.
        targets: training targets, a tree of arrays ``[n, ...]``; None trains on ``labels``.
        extra: further arrays ``[n, ...]`` by name, such as a teacher's logits or boxes; objectives
            receive them as ``batch.extra``. ``weight`` is the weight of each example in the loss.
        task: what the labels are.
        groups: ``[n]`` int32 number of the group of each example, such as a patient; None if every
            example is a group of its own.

    Raises:
        RequestError: an array has another length than the examples.
    """

    examples: Examples
    labels: np.ndarray
    classes: tuple[str, ...]
    names: Sequence[str]
    targets: Any = None
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    task: Task = CLASSIFICATION
    groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        arrays = {"labels": self.labels, "names": self.names, "groups": self.groups, **self.extra}
        for name, array in arrays.items():
            if array is not None and len(array) != len(self.examples):
                raise RequestError(
                    f"a source of {len(self.examples)} examples has {len(array)} {name}: give one "
                    "per example"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes | np.ndarray:
        """Read one example: an encoded image file, or pixels ``[height, width, channels]``.

        Raises:
            UnreadableImageError: the file cannot be read.
        """
        return self.examples[index]

    def locate(self, indices: np.ndarray | None = None) -> tuple[Examples, np.ndarray]:
        """Return the examples that this is a selection of, and where ``indices`` are among them.

        An index of -1 stays; by default all are located.
        """
        indices = np.arange(len(self)) if indices is None else indices
        if not isinstance(self.examples, Subset):
            return self.examples, indices
        return self.examples.examples, np.where(indices < 0, -1, self.examples.indices[indices])

    def batch(self, inputs: Array, mask: np.ndarray, indices: np.ndarray) -> Batch:
        """Build a batch from inputs and the targets and extra arrays at ``indices``.

        Args:
            inputs: ``[batch, ...]`` images or activations.
            mask: ``[batch]`` bool; False for padding and for images that could not be read.
            indices: ``[batch]`` int32 positions in this source; -1 for padding, which gets the
                targets and extra arrays of the first example.
        """
        rows = np.maximum(indices, 0)
        targets = self.labels if self.targets is None else self.targets
        targets, extra = jax.tree.map(lambda x: x[rows], (targets, dict(self.extra)))
        return Batch(inputs, targets, mask, indices, extra)

    @cached_property
    def digest(self) -> str:
        """Compute a SHA-256 hex digest of the examples in their order, and of all that labels them.

        Every example is read, unless ``examples`` has a fingerprint. That is hashed instead, so the
        digest may then change although no content does.
        """
        header = json.dumps([self.classes, self.labels.tolist()]).encode()
        for path, leaf in jax.tree.leaves_with_path((self.targets, dict(self.extra))):
            header += f"{path} {leaf.dtype} {leaf.shape}".encode() + np.asarray(leaf).tobytes()
        if self.task.kind != "classification":  # digests of class folders are as they ever were
            header += self.task.kind.encode()
        if self.groups is not None:
            header += b"groups" + np.asarray(self.groups, np.int64).tobytes()
        examples, indices = self.locate()
        if fingerprint := getattr(examples, "fingerprint", None):
            contents = fingerprint.encode() + indices.tobytes()
        else:
            contents = hash_examples(self).tobytes()
        return sha256(header + contents)

    @cached_property
    def fingerprint(self) -> str:
        """Compute a SHA-256 hex digest that identifies the examples without reading files.

        Of files it covers the paths in their folder and the sizes, so that it stays the same if the
        folder is moved or copied, or if a file is overwritten by one of the same size. Of other
        examples it is the `digest`. It covers all that labels them, too.
        """
        return self._identify(times=False)

    @cached_property
    def cache_key(self) -> str:
        """Compute a `fingerprint` that changes, too, whenever a file of this machine is written."""
        return self._identify(times=True)

    @property
    def file_sizes(self) -> list[int | None] | None:
        """Look up the size in bytes of each file, None for one that does not exist.

        It is None for examples that are not files.
        """
        examples, indices = self.locate()
        if not isinstance(examples, Files):
            return None
        return [None if x == MISSING else x for x in examples.status[indices, 0].tolist()]

    def _identify(self, *, times: bool) -> str:
        examples, indices = self.locate()
        describe = getattr(examples, "describe", None)
        if describe is None:
            return self.digest
        identity = hashlib.sha256(json.dumps([self.classes, self.task.kind]).encode())
        groups = None if self.groups is None else np.asarray(self.groups, np.int64)
        arrays = self.labels, self.targets, dict(self.extra), groups
        for path, leaf in jax.tree.leaves_with_path(arrays):
            identity.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
            identity.update(np.asarray(leaf).tobytes())
        for part in describe(indices, times=times):
            identity.update(part)
        return identity.hexdigest()


class Splits(NamedTuple):
    """The training and validation parts of a data set.

    Attributes:
        train: training examples; every class has at least one.
        val: validation examples under the same classes, some of which may have no example.
        notes: remarks to print, one line each.
    """

    train: Source
    val: Source
    notes: tuple[str, ...] = ()


def select(source: Source, indices: Sequence[int] | np.ndarray) -> Source:
    """Select the examples at ``indices``, in that order, and keep the list of classes."""
    indices = np.arange(len(source))[np.asarray(indices, np.int64)]
    # Selections are not nested, so that equal ones have equal digests.
    examples, positions = source.locate(indices)
    hashes = source.examples.hashes if isinstance(source.examples, Subset) else None
    arrays = source.labels, source.targets, dict(source.extra), source.groups, hashes
    labels, targets, extra, groups, hashes = jax.tree.map(lambda x: x[indices], arrays)
    names = source.names
    return replace(
        source,
        examples=Subset(examples, positions, hashes),
        labels=labels,
        names=names[indices] if isinstance(names, Names) else [names[i] for i in indices.tolist()],
        targets=targets,
        extra=extra,
        groups=groups,
    )


def match_classes(source: Source, classes: Sequence[str]) -> tuple[Source, tuple[str, ...]]:
    """Relabel a source with a network's classes, labels or numbers, matching them by name.

    Those with the same name are matched in order. If the source has fewer classes of a name than
    the network, the first of the network gets all their examples; see `find_ambiguous_names`.

    Args:
        source: examples labeled with their own list of classes.
        classes: the network's classes, labels or numbers, in the order of its outputs.

    Returns:
        The examples whose class the network has, labeled with indices into ``classes``; or all
        examples, with one column per label or number of the network, NaN if the source does not
        have it. And notes to print, one line each, on the differences between the two lists.

    Raises:
        RequestError: no example belongs to a class of the network, or they have no label in common.
    """
    if not source.task.has_classes:
        return _match_columns(source, classes)
    network_names, data_names = [*map(normal, classes)], [*map(normal, source.classes)]
    position = {key: index for index, key in enumerate(_numbered(network_names))}
    matches = [position.get(key, position.get((key[0], 0), -1)) for key in _numbered(data_names)]
    # The last entry is for examples without a label, which are labeled -1.
    labels = np.array([*matches, -1], np.int32)[source.labels]
    retained = np.flatnonzero(labels >= 0)
    if not retained.size:
        lists = f"the data has {join_names(source.classes)}; the network has {join_names(classes)}"
        raise RequestError(f"the data and the network have no class in common: {lists}")
    missing = [name for name in network_names if name not in data_names]
    unknown = [name for name in data_names if name not in network_names]
    empty = [name for name in map(normal, without_example(source)) if name in network_names]
    notes = [
        f"{len(indices)} classes are called {name} ({' and '.join(map(str, indices))}):"
        " each of its images is labeled with the most probable one"
        for name, indices in find_ambiguous_names(source.classes, classes).items()
    ]
    notes += [
        f"{len(names)} of {len(classes)} classes {fault}: {join_names(names)}"
        for names, fault in ((missing, "not in the data"), (empty, "without an example"))
        if names
    ]
    if unknown:
        excluded = len(source) - retained.size
        notes.append(f"left out {excluded} examples of unknown classes: {join_names(unknown)}")
    selected = select(source, retained)
    return replace(selected, labels=labels[retained], classes=tuple(classes)), tuple(notes)


def _match_columns(source: Source, names: Sequence[str]) -> tuple[Source, tuple[str, ...]]:
    """Put the columns of labels or numbers into a network's order; NaN for those that it lacks."""
    word = "numbers" if source.task.kind == "regression" else "labels"
    network_keys, data_keys = (
        _numbered([*map(normal, names)]),
        _numbered([*map(normal, source.classes)]),
    )
    position = {key: column for column, key in enumerate(data_keys)}
    columns = [position.get(key, -1) for key in network_keys]
    if max(columns, default=-1) < 0:
        lists = f"the data has {join_names(source.classes)}; the network has {join_names(names)}"
        raise RequestError(f"the data and the network have none of the {word} in common: {lists}")
    labels = _take_columns(source.labels, columns, np.nan)
    missing = [name for name, column in zip(names, columns, strict=True) if column < 0]
    unused = [
        name for name, key in zip(source.classes, data_keys, strict=True) if key not in network_keys
    ]
    notes = []
    if missing:
        notes.append(
            f"{len(missing)} of {len(names)} {word} not in the data: {join_names(missing)}"
        )
    if unused:
        notes.append(f"left out {word} that the network does not have: {join_names(unused)}")
    return replace(source, labels=labels, classes=tuple(names)), tuple(notes)


def match_part(part: Source, train: Source, *, by_name: bool) -> tuple[Source, tuple[str, ...]]:
    """Relabel the validation part of a data set with the names of its training part.

    Unlike `match_classes`, this knows that both parts were labeled alike. So if labels are names
    that an image is given, in folders, cells or lists, one that no image of the part is given
    applies to none of them; `match_classes` must take it for unknown, as must this for columns.

    Args:
        part: the validation part, read as the same task. Examples without a label are left out.
        train: the training part.
        by_name: whether labels of the task ``multilabel`` are names, not columns of 0 and 1.

    Returns:
        The part, and notes to print.

    Raises:
        RequestError: the two have no class in common, or not the same numbers.
    """
    part = replace(select(part, np.flatnonzero(is_labeled(part.labels))), task=train.task)
    if train.task.has_classes:
        return match_classes(part, train.classes)
    if part.classes == train.classes:
        return part, ()
    if train.task.kind == "regression":
        raise RequestError(
            f"the validation part has the numbers {join_names(part.classes)}, the training part"
            f" {join_names(train.classes)}: they must be the same"
        )
    if not by_name:
        return match_classes(part, train.classes)
    columns = [part.classes.index(x) if x in part.classes else -1 for x in train.classes]
    labels = _take_columns(part.labels, columns, 0)
    unknown = [name for name in part.classes if name not in train.classes]
    note = f"left out unknown labels of the validation part: {join_names(unknown)}"
    return replace(part, labels=labels, classes=train.classes), (note,) * bool(unknown)


def _take_columns(labels: np.ndarray, columns: Sequence[int], missing: float) -> np.ndarray:
    """Return columns of ``[n, names]`` labels; a column -1 is filled with ``missing``."""
    return np.pad(labels, ((0, 0), (0, 1)), constant_values=missing)[:, columns]


def find_ambiguous_names(
    data_classes: Sequence[str], classes: Sequence[str]
) -> dict[str, list[int]]:
    """Find names that more classes of a network have than of the data, and their indices.

    ImageNet, for example, has two classes named crane and two named maillot.

    Args:
        data_classes: the classes of the data.
        classes: the network's classes, in the order of its logits.
    """
    indices: dict[str, list[int]] = {}
    for index, name in enumerate(classes):
        indices.setdefault(normal(name), []).append(index)
    counts = Counter(map(normal, data_classes))
    return {name: same for name, same in indices.items() if 0 < counts[name] < len(same)}


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Pair each name with the number of its earlier occurrences."""
    counters: dict[str, count[int]] = defaultdict(count)
    return [(name, next(counters[name])) for name in names]


def hash_examples(source: Source) -> UInt8[np.ndarray, "n 32"]:
    """Compute the SHA-256 of each example; one that cannot be read is hashed as empty."""
    if isinstance(source.examples, Subset) and source.examples.hashes is not None:
        return source.examples.hashes

    def hash_one(index: int) -> bytes:
        try:
            data = source.read(index)
        except UnreadableImageError:
            data = b""
        if isinstance(data, np.ndarray):
            data = repr(data.shape).encode() + data.tobytes()
        return hashlib.sha256(data).digest()

    def hash_chunk(indices: np.ndarray) -> bytes:
        return b"".join(map(hash_one, indices.tolist()))

    hashes = b"".join(in_chunks(hash_chunk, np.arange(len(source)), 256))
    return np.frombuffer(hashes, np.uint8).reshape(-1, 32)


def with_hashes(source: Source) -> Source:
    """Return a source that remembers the SHA-256 of each example, as do its selections."""
    hashes = hash_examples(source)
    return replace(source, examples=Subset(*source.locate(), hashes))


def is_labeled(labels: np.ndarray) -> np.ndarray:
    """Return ``[n]`` bool: whether anything is known of each example, from `Source.labels`."""
    return np.asarray(labels >= 0 if labels.ndim == 1 else ~np.isnan(labels).all(1))


def without_example(source: Source) -> list[str]:
    """List the classes of a source that have no example, the labels that apply to none."""
    if source.task.kind == "regression":
        return []
    if source.labels.ndim == 2:
        applies = (source.labels == 1).any(0)
        return [name for name, any_ in zip(source.classes, applies, strict=True) if not any_]
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
    return [name for name, count in zip(source.classes, counts, strict=True) if not count]


def format_labels(source: Source, labels: np.ndarray) -> list[str]:
    """Return labels as text: the name of a class, names of labels, or numbers, joined by ``|``.

    A label that is unknown is followed by a question mark; a number that is unknown is empty.

    Args:
        source: names the labels, and says what they are.
        labels: labels of some examples in the form of ``source.labels``.
    """
    names = source.classes
    if labels.ndim == 1:
        return [names[label] if label >= 0 else "" for label in labels.tolist()]
    if source.task.kind == "regression":
        return ["|".join("" if x != x else f"{x:.12g}" for x in row) for row in labels.tolist()]  # noqa: PLR0124
    marks = {0.0: None, 1.0: ""}
    return [
        "|".join(
            name + mark
            for name, x in zip(names, row, strict=True)
            if (mark := marks.get(x, "?")) is not None
        )
        for row in labels.tolist()
    ]


def balancing_weights(source: Source) -> Float[np.ndarray, " n"]:
    """Return a weight per example with which all classes have the same sum, with mean 1.

    With several labels an example has the mean weight of those that apply to it, each weighted by
    the inverse of its number of examples; examples to which none applies count as one more label.
    """
    labels = source.labels
    if labels.ndim == 1:
        weights = 1 / np.maximum(np.bincount(labels), 1)[labels]
    else:
        applies = labels == 1
        applies = np.concatenate([applies, ~applies.any(1, keepdims=True)], axis=1)
        weights = (applies / np.maximum(applies.sum(0), 1)).sum(1) / applies.sum(1)
    return weights / weights.mean()


def normal(name: str) -> str:
    """Normalize a name to Unicode form C, so that names from macOS compare equal.

    Source: https://unicode.org/reports/tr15.
    """
    return unicodedata.normalize("NFC", name)


def join_names(names: Sequence[str]) -> str:
    """Join the first five names and the number of further ones."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more
