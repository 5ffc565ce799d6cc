"""Downloads of single files over HTTP: complete, checked and cached."""

import json
import string
import sys
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from tljax.runtime.errors import RequestError
from tljax.runtime.files import atomic_write
from tljax.runtime.progress import track

_RESUME_DELAYS = (1, 5, None)
"""Seconds before each attempt to resume a transfer; None gives up."""

_VALIDATORS = {"If-None-Match": "ETag", "If-Modified-Since": "Last-Modified"}
"""Request headers that revalidate a cached copy, and the response headers they repeat."""


def download(
    url: str,
    path: Path,
    check: Callable[[Path], object],
    *,
    limit: int,
    revalidate: Literal["always", "by tag", "never"],
) -> None:
    """Download a file, or reuse the cached copy at ``path`` if it is current.

    A cached copy is revalidated with the ETag or Last-Modified date of its response, which is kept
    in ``path``.json. If the server cannot be reached or fails, the copy is used and a note on
    stderr gives its date. An empty, incomplete or too large file, or one that fails the check, is
    never kept. The file appears whole: processes that download it at once do not disturb each
    other. A transfer that breaks off is resumed where the server supports it.

    Args:
        url: address, http or https.
        path: local file.
        check: called with a file; raises a `ValueError` if its content is wrong.
        limit: largest allowed size in bytes.
        revalidate: when the server is asked for a newer version of a copy that passes the check:
            ``always``; ``by tag`` only if the copy came with an ETag or date (otherwise a note on
            stderr says that it may be old); ``never``, for files that a hash identifies.

    Raises:
        RequestError: the file cannot be fetched or written, or fails the check.
    """
    tags_path = path.with_name(f"{path.name}.json")
    copy = _cached_copy(path, tags_path, check)
    if copy and (revalidate == "never" or (revalidate == "by tag" and not copy[1])):
        if revalidate == "by tag":
            _note_copy(url, copy, f"delete {path} to fetch it again")
        return
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("an address begins with http://HOST/ or https://HOST/")  # noqa: TRY301
        headers = {"User-Agent": "tljax", **(copy[1] if copy else {})}
        request = Request(quote(url, string.punctuation), headers=headers)  # noqa: S310 - see above
        with urlopen(request, timeout=30) as response, atomic_write(path) as temporary:  # noqa: S310
            _receive(response, request, temporary, Path(parts.path).name, limit)
            check(temporary)
            written = temporary.stat().st_mtime_ns
        if revalidate != "never":
            tags = {k: v for k, tag in _VALIDATORS.items() if (v := response.headers[tag])}
            with atomic_write(tags_path) as temporary:
                temporary.write_text(json.dumps({"written": written, "tags": tags}), "utf-8")
    except RequestError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        status = None
        if isinstance(error, HTTPError):
            error.close()
            status = error.code
        if copy and status == 304:
            return
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ValueError) or not copy or (status or 500) < 500:
            raise RequestError(
                f"could not fetch {url} ({reason}); fetch it on another machine and pass the file"
            ) from None
        _note_copy(url, copy, reason)


def _receive(response: Any, request: Request, file: Path, name: str, limit: int) -> None:
    total: int | None = getattr(response, "length", None)
    quiet = total is not None and total < 2**24
    chunks = _chunks(response, request, total)
    chunks = track(chunks, description=name, total=total, unit="bytes", size=len, quiet=quiet)
    received = 0
    with file.open("wb") as out:
        for chunk in chunks:
            received += len(chunk)
            if max(received, total or 0) > limit:
                raise ValueError(f"it is larger than {limit >> 20:,} MiB")
            out.write(chunk)
    if not received:
        raise ValueError("it is empty")


def _chunks(response: Any, request: Request, total: int | None) -> Iterator[bytes]:
    """Yield the body of a response, and resume a transfer that breaks off, if that is safe."""
    tag = response.headers["ETag"] or response.headers["Last-Modified"]
    received = 0
    for delay in _RESUME_DELAYS:
        error: Exception = OSError("the connection closed before the end")
        try:
            with response:
                while chunk := response.read(1 << 20):
                    received += len(chunk)
                    yield chunk
            if received == (total or received):
                return
        except (OSError, HTTPException) as failure:
            error = failure
        if delay is None or not (received and total and tag):
            raise error
        time.sleep(delay)
        request.add_header("Range", f"bytes={received}-")
        request.add_header("If-Range", tag)  # of another version, the server sends the whole file
        response = urlopen(request, timeout=30)  # noqa: S310 - the same address
        if response.headers["Content-Range"] != f"bytes {received}-{total - 1}/{total}":
            response.close()
            raise error


_Copy = tuple[int, dict[str, str]]
"""Time of writing in ns since the epoch, and the request headers that revalidate the copy."""


def _cached_copy(path: Path, tags_path: Path, check: Callable[[Path], object]) -> _Copy | None:
    try:
        check(path)
        written = path.stat().st_mtime_ns
    except (OSError, ValueError):
        return None
    try:  # of two processes, one may have written the file and the other its tags
        record = json.loads(tags_path.read_text("utf-8"))
        return written, record["tags"] if record["written"] == written else {}
    except (OSError, ValueError, LookupError, TypeError):
        return written, {}


def _note_copy(url: str, copy: _Copy, reason: str) -> None:
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(copy[0] / 1e9))
    print(f"note: {url}: the copy of {date} is used ({reason})", file=sys.stderr)
