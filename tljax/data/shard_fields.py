"""Labels that shards have beside the images: which fields there are, and their values."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tljax.data.buckets import is_bucket, read_bucket
from tljax.data.byte_strings import ByteStrings
from tljax.data.examples import normal
from tljax.data.hub_labels import Feature, Values
from tljax.runtime.errors import RequestError, UnreadableImageError

_CLASSES = {"cls", "label", "class"}
"""Fields whose whole numbers are classes, by the last part of their names."""

_NAMES = ("classnames.txt", "classes.txt")
_SAMPLE = 1000  # examples whose values say what a field is
_TYPES: dict[type, Values] = {bool: "bool", int: "int", float: "float", str: "text"}


class ShardFields:
    """The fields of the examples of shards.

    The values of a field are JSON. The field ``json`` of a tar has objects with further fields.
    The first 1,000 examples say what a field is. Without any there is the field ``folder``, the
    last folder of the key of each example.

    The names of numbered classes are the lines of ``classnames.txt``, ``classes.txt`` or
    ``FIELD.labels.txt`` in the folder of the shards or in the one above, if there is such a file.

    Args:
        where: the name of the data in errors.
        columns: the JSON of each field by name; empty where it is missing.
        keys: the path of each example.
        folder: the folder of the shards, a path or URL.
    """

    def __init__(
        self, where: str, columns: Mapping[str, ByteStrings], keys: ByteStrings, folder: str
    ) -> None:
        self.where, self.columns, self.keys, self.folder = where, columns, keys, folder
        self._indices: dict[str, list[int | None]] = {}

    @cached_property
    def features(self) -> dict[str, Feature | str]:
        """The fields by name; of one that cannot be a label the name of its type."""
        names = {name: None for name in self.columns if name != "json"}
        if "json" in self.columns:
            names |= {name: None for row in self._objects(_SAMPLE) for name in row}
        if not names and any(b"/" in key for key in self.keys[:_SAMPLE]):
            names = {"folder": None}
        features = {name: _describe(self._values(name, _SAMPLE)) for name in names}
        for name, feature in features.items():
            is_class = name.rpartition("/")[2] in _CLASSES or name == "folder"
            if is_class and feature in (Feature("int"), Feature("text")):
                features[name], self._indices[name] = self._read_classes(name)
        return features

    def read(self, names: Sequence[str]) -> dict[str, Sequence[Any]]:
        """Return the values of fields, None where one is missing; of classes the indices.

        Raises:
            RequestError: a field has a list in some examples only.
        """
        columns: dict[str, Sequence[Any]] = {
            name: self._indices.get(name) or self._values(name) for name in names
        }
        for name, values in columns.items():
            feature = self.features[name]
            if isinstance(feature, Feature) and feature.many:
                columns[name] = [x if x is None or isinstance(x, list) else [x] for x in values]
            elif any(isinstance(value, list | dict) for value in values):
                raise RequestError(f"{self.where}: the field {name} has lists in some examples")
        return columns

    def _values(self, name: str, count: int | None = None) -> list[Any]:
        """Return the values of a field in all examples, or the first ones."""
        if name in self.columns:
            return [self._parse(name, cell) for cell in self.columns[name][:count].tolist()]
        if "json" in self.columns:
            return [row.get(name) for row in self._objects(count)]
        folders = [key.rpartition(b"/")[0] for key in self.keys[:count].tolist()]
        return [x.rpartition(b"/")[2].decode("utf-8", "backslashreplace") for x in folders]

    def _objects(self, count: int | None = None) -> Iterator[dict[str, Any]]:
        for cell in self.columns["json"][:count].tolist():
            row = self._parse("json", cell)
            yield row if isinstance(row, dict) else {} if row is None else {"json": row}

    def _parse(self, name: str, cell: bytes) -> Any:
        try:
            return json.loads(cell) if cell else None
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"{self.where}: {cell[:40]!r} is no JSON: correct the field {name}"
            ) from error

    def _read_classes(self, name: str) -> tuple[Feature, list[int | None]]:
        """Read the classes that a field numbers or names, and the index of each example's."""
        texts = [
            None if value in (None, "", -1, "-1") else normal(str(value))
            for value in self._values(name)
        ]
        found = sorted({text for text in texts if text is not None})
        numbers = [text for text in found if text.isascii() and text.isdigit()]
        names = self._class_names(name) if len(numbers) == len(found) else ()
        if names and len(names) <= max(map(int, found)):
            raise RequestError(
                f"{self.where}: the field {name} has numbers up to {max(map(int, found))}, but the"
                f" file with its names has {len(names)}, of 0 to {len(names) - 1}"
            )
        if names:
            return Feature("class", names), [None if x is None else int(x) for x in texts]
        if len(numbers) == len(found):
            found.sort(key=int)
        position = {text: index for index, text in enumerate(found)}
        return Feature("class", tuple(found)), [None if x is None else position[x] for x in texts]

    def _class_names(self, field: str) -> tuple[str, ...]:
        """Read the names of numbered classes from a file beside the shards."""
        files = [*_NAMES, f"{field.rpartition('/')[2]}.labels.txt"]
        for path in (f"{folder}/{x}" for folder in _with_parent(self.folder) for x in files):
            with suppress(OSError, UnreadableImageError):
                is_url = is_bucket(path)
                data = read_bucket(path, 0, 2**24) if is_url else Path(path).read_bytes()
                lines = data.decode("utf-8", "backslashreplace").splitlines()
                return tuple(normal(line.strip()) for line in lines)
        return ()


def _with_parent(folder: str) -> tuple[str, str]:
    return folder, folder.rpartition("/")[0]


def _describe(values: Sequence[Any]) -> Feature | str:
    """Describe a field by some of its values."""
    known = [value for value in values if value is not None]
    many = any(isinstance(value, list) for value in known)
    items = [x for value in known for x in (value if isinstance(value, list) else [value])]
    types = {type(item) for item in items if item is not None}
    kind = float if types == {int, float} else next(iter(types), None)
    if kind in _TYPES and types <= {int, kind}:
        return Feature(_TYPES[kind], many=many)
    return " or ".join(sorted(kind.__name__ for kind in types)) or "empty"
