"""Nested dicts as flat dicts with path keys such as ``layer3/block0/conv1/kernel``."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a nested dict to ``{path: leaf}``, in the order of the tree."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{path}": leaf for path, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Invert `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def tree_digest(tree: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of the paths and bytes of all arrays of a tree, sorted by path."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(tree).items()):
        digest.update(path.encode())
        digest.update(array_bytes(leaf))
    return digest.hexdigest()


def array_bytes(array: Any) -> memoryview:
    """Return the bytes of an array of any dtype, including bfloat16, in C order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
