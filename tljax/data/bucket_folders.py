"""Class folders in a bucket, as sources."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import numpy as np

from tljax.data.byte_ranges import BucketFiles, ShardFile
from tljax.data.byte_strings import ByteStrings
from tljax.data.folders import TRAIN, VAL
from tljax.data.parts import WHOLE, Parts, Unlabeled, name_part
from tljax.data.shard_fields import ShardFields
from tljax.runtime.errors import RequestError
from tljax.runtime.files import sha256


def bucket_folder_parts(url: str, files: Sequence[ShardFile]) -> Parts:
    """Divide the images of class folders in a bucket into parts; see `Parts`.

    Args:
        url: the folder, which has class folders, or has them in ``train/`` and ``val/``.
        files: all files below the folder.

    Raises:
        RequestError: there are no class folders, or the folder is a pattern.
    """
    if any(sign in url for sign in "*?[{"):
        raise RequestError(f"{url} has no shards: patterns are for shards, name the folder itself")
    root = f"{url.rstrip('/')}/"
    paths = [file.path.removeprefix(root) for file in files]
    folders = {path.partition("/")[0].lower() for path in paths if "/" in path}
    named = bool(folders & {*TRAIN}) and (bool(folders & {*VAL}) or len(folders) == 1)
    parts: dict[str, list[int]] = defaultdict(list)
    for number, path in enumerate(paths):
        part, _, rest = path.partition("/") if named else (WHOLE, "", path)
        if "/" in rest and "/." not in f"/{path}" and part.lower() in (WHOLE, *TRAIN, *VAL):
            parts[part.lower()].append(number)
    if not parts:
        raise RequestError(f"{url} has neither shards nor class folders with images")
    return {
        part: partial(_open, name_part(url, part), root, [files[i] for i in numbers], int(named))
        for part, numbers in parts.items()
    }


def _open(where: str, root: str, files: Sequence[ShardFile], depth: int) -> Unlabeled:
    """Open images whose class is the folder at a depth below the root."""
    paths = [file.path.removeprefix(root) for file in files]
    keys = ByteStrings.of(os.fsencode(path.split("/")[depth]) + b"/" for path in paths)
    identity = [(path, file.size, file.version) for path, file in zip(paths, files, strict=True)]
    examples = BucketFiles(
        root,
        ByteStrings.of(map(os.fsencode, paths)),
        np.array([file.size for file in files], np.int64),
        sha256(json.dumps(identity).encode()),
    )
    advice = "put the images of each class into a folder"
    fields = ShardFields(where, {}, keys, root)
    names = [file.path for file in files]
    return Unlabeled(where, examples, fields.features, fields.read, "folder", advice, names)
