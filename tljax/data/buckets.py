"""Files in buckets, such as ``gs://bucket/folder``, through fsspec.

fsspec lists a folder with the sizes of its files in one request a page and reads ranges of bytes
without state, so that threads share it. Processes that decode import this: it imports no JAX.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tljax.runtime.errors import RequestError, UnreadableImageError, first_line
from tljax.runtime.files import object_version
from tljax.runtime.packages import BUCKETS, install_command


class BucketFile(NamedTuple):
    """A file of a bucket: its URL, its size in bytes, and text that changes with its content."""

    url: str
    size: int
    version: str


def is_bucket(spec: str) -> bool:
    """Return True for a URL, such as ``gs://bucket/folder``."""
    return re.match(r"[a-z][a-z0-9+.-]*://", spec) is not None


def list_bucket(url: str) -> list[BucketFile]:
    """List the files below a folder of a bucket, or those that match a glob, by their URLs.

    Raises:
        RequestError: the bucket cannot be reached or the folder has no file.
    """
    with _explained(url):
        system, path = _locate(url)
        is_pattern = any(sign in path for sign in "*?[")
        found = system.glob(path, detail=True) if is_pattern else system.find(path, detail=True)
        scheme = url.partition("://")[0]
        files = [
            BucketFile(
                name if "://" in name else f"{scheme}://{name.lstrip('/')}",
                info["size"],
                object_version(info),
            )
            for name, info in sorted(found.items())
            if info["type"] == "file"
        ]
    if not files:
        raise RequestError(f"{url} has no file: check the address")
    return files


def read_bucket(url: str, start: int, end: int) -> bytes:
    """Read a range of bytes of a file in a bucket.

    Raises:
        UnreadableImageError: the file cannot be read.
    """
    try:
        system, path = _locate(url)
        return system.cat_file(path, start=start, end=end)
    except Exception as error:  # each package has errors of its own
        raise UnreadableImageError(f"cannot be read: {first_line(error)}") from error


def _locate(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, of which fsspec keeps one a process, and the path in it."""
    from fsspec.core import url_to_fs  # noqa: PLC0415 - slow to import

    return url_to_fs(url)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Convert any exception of a package to a one-line RequestError."""
    try:
        yield
    except ImportError as error:
        if package := BUCKETS.get(url.partition(":")[0]):
            raise RequestError(f"{url} needs {package}: {install_command(package)}") from error
        raise RequestError(f"{url} cannot be opened: {first_line(error)}") from error
    except Exception as error:
        advice = "check the address, the connection and the credentials"
        raise RequestError(f"{url} cannot be opened: {first_line(error)}; {advice}") from error
