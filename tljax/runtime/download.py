"""Downloads: what an address gives becomes a file, whole and checked, or none does."""

import json
import string
import sys
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from tljax.runtime.errors import RequestError
from tljax.runtime.files import written_whole
from tljax.runtime.progress import track

_TAGS = {"If-None-Match": "ETag", "If-Modified-Since": "Last-Modified"}  # asked by, given as


def download(
    url: str,
    path: Path,
    check: Callable[[Path], object],
    *,
    limit: int,
    ask: Literal["always", "by tag", "never"],
) -> None:
    """Make ``path`` what an address gives now, or say that it is a copy of an earlier date.

    A copy that is there already is asked for again, by the ETag or the date that came with it,
    which ``path``.json keeps. Where the server cannot be reached the copy is used, and stderr says
    so. What is empty, incomplete, too large or fails the check is never kept.

    Args:
        url: of http or https.
        path: the file.
        check: called with a file; raises a `ValueError` if it is not what it should be.
        limit: in bytes.
        ask: ``by tag`` uses a copy that came without ETag and date, and says so; ``never`` uses any
            copy that passes the check: for what a hash identifies.

    Raises:
        RequestError: it cannot be fetched or kept, or fails the check.
    """
    about = path.with_name(f"{path.name}.json")
    copy = _copy(path, about, check)
    if copy and (ask == "never" or (ask == "by tag" and not copy[1])):
        if ask == "by tag":
            _say_copy(url, copy, f"delete {path} to fetch it again")
        return
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("an address begins with http://HOST/ or https://HOST/")  # noqa: TRY301
        headers = {"User-Agent": "tljax", **(copy[1] if copy else {})}
        request = Request(quote(url, string.punctuation), headers=headers)  # noqa: S310 - see above
        with urlopen(request, timeout=30) as response, written_whole(path) as temporary:  # noqa: S310
            _receive(response, temporary, Path(parts.path).name, limit)
            check(temporary)
            written = temporary.stat().st_mtime_ns
        if ask != "never":
            given = {asked: response.headers[tag] for asked, tag in _TAGS.items()}
            tags = {asked: value for asked, value in given.items() if value}
            with written_whole(about) as temporary:
                temporary.write_text(json.dumps({"written": written, "tags": tags}), "utf-8")
    except RequestError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        answer = None
        if isinstance(error, HTTPError):
            error.close()
            answer = error.code
        if copy and answer == 304:
            return
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ValueError) or not copy or (answer or 500) < 500:
            raise RequestError(
                f"could not fetch {url} ({reason}); fetch it on another machine and pass the file"
            ) from None
        _say_copy(url, copy, reason)


def _receive(response: Any, file: Path, name: str, limit: int) -> None:
    total: int | None = getattr(response, "length", None)
    quiet = total is not None and total < 2**24
    chunks = iter(lambda: response.read(1 << 20), b"")
    chunks = track(chunks, description=name, total=total, unit="bytes", size=len, quiet=quiet)
    done = 0
    with file.open("wb") as out:
        for chunk in chunks:
            done += len(chunk)
            if max(done, total or 0) > limit:
                raise ValueError(f"it is larger than {limit >> 20:,} MiB")
            out.write(chunk)
    if total is not None and done < total:
        raise OSError("the connection closed before the end")
    if not done:
        raise ValueError("it is empty")


_Copy = tuple[int, dict[str, str]]


def _copy(path: Path, about: Path, check: Callable[[Path], object]) -> _Copy | None:
    """When a copy was written, in ns, and what to ask by; None if it does not pass the check."""
    try:
        check(path)
        written = path.stat().st_mtime_ns
    except (OSError, ValueError):
        return None
    try:  # of two processes either may have written either file
        kept = json.loads(about.read_text("utf-8"))
        return written, kept["tags"] if kept["written"] == written else {}
    except (OSError, ValueError, LookupError, TypeError):
        return written, {}


def _say_copy(url: str, copy: _Copy, why: str) -> None:
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(copy[0] / 1e9))
    print(f"note: {url}: the copy of {date} is used ({why})", file=sys.stderr)
