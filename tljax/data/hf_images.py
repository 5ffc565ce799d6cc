"""Images of a data set of the ``datasets`` library.

Processes that decode import this: it imports no JAX.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tljax.runtime.errors import UnreadableImageError


@dataclass(frozen=True, eq=False)
class HfImages:
    """Images as stored, read from memory-mapped Arrow files, as examples.

    Attributes:
        rows: a ``datasets.Dataset``, which is pickled as the paths of its files.
        image: the name of the Image feature, which is not decoded.
        fingerprint: see `tljax.data.examples.Examples`.
    """

    rows: Sequence[Mapping[str, Any]]
    image: str
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> bytes:
        image = self.rows[int(index)][self.image]
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise UnreadableImageError("the row has no image")
        if image["bytes"] is not None:
            return image["bytes"]
        try:
            return Path(image["path"]).read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"cannot be read: {error.strerror}") from error
