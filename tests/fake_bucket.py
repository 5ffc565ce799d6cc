"""Emulator of Google Cloud Storage: the part of its JSON API that gcsfs and TensorStore use.

Objects are in memory. Pages of lists are short, and an object appears when all its bytes have come,
as in the service.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import count
from typing import Any, NamedTuple
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

PAGE = 5

# gcsfs reads it when it is imported; otherwise it asks for the kind of the bucket by gRPC.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

needs_gcsfs = pytest.mark.skipif(
    find_spec("gcsfs") is None, reason="needs gcsfs: pip install 'tljax[gcs]'"
)


class Object(NamedTuple):
    """Content of an object, and a number that changes with it."""

    content: bytes
    generation: int


class Answer:
    """Answer of the server: status, content and headers."""

    def __init__(self, status: int, content: Any, **headers: str) -> None:
        self.status, self.headers = status, headers
        self.content = content if isinstance(content, bytes) else json.dumps(content).encode()


class RefusedError(Exception):
    """A request is refused, with a status and a reason."""

    def answer(self) -> Answer:
        status, reason = self.args
        return Answer(status, {"error": {"code": status, "message": reason}})


@contextmanager
def serve_bucket() -> Iterator["FakeStorage"]:
    """Serve ``gs://bucket`` to this process and to those that it starts."""
    from fsspec.config import conf

    storage = FakeStorage()
    threading.Thread(target=storage.serve_forever, daemon=True).start()
    anonymous = {name: {**conf.get(name, {}), "token": "anon"} for name in ("gs", "gcs")}
    with (
        storage,
        mock.patch.dict(os.environ, storage.environment),
        mock.patch.dict(conf, anonymous),
    ):
        yield storage
        storage.shutdown()


class FakeStorage(ThreadingHTTPServer):
    """Server of one bucket, ``gs://bucket``.

    Attributes:
        objects: objects of the bucket by their names.
        requests: method and name of the object of all requests.
        downloads: names of the objects whose content was read.
        refuses: tells by method and name which requests are forbidden, with status 403.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.objects: dict[str, Object] = {}
        self.requests: list[tuple[str, str]] = []
        self.downloads: list[str] = []
        self.refuses = lambda method, name: False
        self._numbers = count(1)
        self._uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self._lock = threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead gcsfs and TensorStore to this server, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "FSSPEC_GCS_TOKEN": "anon",
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        }

    def handle_error(self, *_arguments: object) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the objects below a prefix, without it."""
        return sorted(
            name.removeprefix(prefix) for name in list(self.objects) if name.startswith(prefix)
        )

    def answer(self, method: str, url: str, headers: Any, body: bytes) -> Answer:
        """Answer a request.

        Raises:
            RefusedError: it is refused.
        """
        parts = urlsplit(url)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        match = re.fullmatch(r"/(?:(upload|download)/)?storage/v1/b/([^/]+)(/o)?/?(.*)", parts.path)
        if not match or match[2] != "bucket":
            raise RefusedError(404, "The specified bucket does not exist.")
        name = unquote(match[4])
        self.requests.append((method, name or query.get("name", "")))
        if self.refuses(*self.requests[-1]):
            raise RefusedError(403, "forbidden")
        with self._lock:
            if match[1] == "upload":
                return self._upload(query, headers, body)
            if name:
                act = self._delete if method == "DELETE" else self._read
                return act(name, query, headers)
            about = {"kind": "storage#bucket", "id": "bucket", "name": "bucket"}
            return Answer(200, self._list(query) if match[3] else about)

    def _delete(self, name: str, query: dict[str, str], _headers: Any) -> Answer:
        self._check(name, query)
        del self.objects[name]
        return Answer(204, b"")

    def _check(self, name: str, query: dict[str, str]) -> Object:
        found = self.objects.get(name)
        if found is None:
            raise RefusedError(404, f"No such object: bucket/{name}")
        if query.get("ifGenerationMatch", str(found.generation)) != str(found.generation):
            raise RefusedError(412, "conditionNotMet")
        return found

    def _read(self, name: str, query: dict[str, str], headers: Any) -> Answer:
        content, generation = found = self._check(name, query)
        if query.get("ifGenerationNotMatch") == str(generation):
            return Answer(304, b"")
        if query.get("alt") != "media":
            return Answer(200, self._describe(name, found))
        self.downloads.append(name)
        about = {"x-goog-generation": str(generation), "ETag": str(generation)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers["Range"] or "")
        if not asked:
            return Answer(200, content, **about)
        start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        if start >= len(content):
            raise RefusedError(416, "range not satisfiable")
        about["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return Answer(206, content[start:stop], **about)

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items: dict[str, dict[str, Any] | None] = {}  # None is a prefix
        for name in sorted(self.objects):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if name >= query.get("endOffset", "\U0010ffff"):
                continue
            folder, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if found:
                items[f"{prefix}{folder}{delimiter}"] = None
            else:
                items[name] = self._describe(name, self.objects[name])
        rest = [key for key in items if key > query.get("pageToken", "")]
        page = rest[: min(PAGE, int(query.get("maxResults", PAGE)))]
        more = {"nextPageToken": page[-1]} if len(rest) > len(page) else {}
        return {
            "kind": "storage#objects",
            "items": [item for key in page if (item := items[key])],
            "prefixes": [key for key in page if items[key] is None],
            **more,
        }

    def _upload(self, query: dict[str, str], headers: Any, body: bytes) -> Answer:
        if key := query.get("upload_id"):
            return self._continue_upload(key, headers["Content-Range"], body)
        about: dict[str, Any] = {}
        if query["uploadType"] == "resumable":
            about = json.loads(body or b"{}")
            key = str(next(self._numbers))
            self._uploads[key] = query.get("name") or about["name"], query, bytearray()
            return Answer(
                200, {}, Location=f"{self.url}/upload/storage/v1/b/bucket/o?upload_id={key}"
            )
        if query["uploadType"] == "multipart":
            boundary = headers.get_param("boundary").encode()
            first, second = body.split(b"--" + boundary)[1:3]
            about = json.loads(first.partition(b"\n\n")[2] or first.partition(b"\r\n\r\n")[2])
            body = second.partition(b"\n\n")[2].removesuffix(b"\n")
        return self._write(query.get("name") or about["name"], query, body)

    def _continue_upload(self, key: str, content_range: str, body: bytes) -> Answer:
        name, query, received = self._uploads[key]
        received += body
        if content_range.endswith(("/*", f"/{len(received) + 1}")):
            return Answer(308, b"", Range=f"bytes=0-{len(received) - 1}")
        return self._write(name, query, bytes(received))

    def _write(self, name: str, query: dict[str, str], content: bytes) -> Answer:
        found = self.objects.get(name)
        expected = query.get("ifGenerationMatch")
        if expected is not None and int(expected) != (found.generation if found else 0):
            raise RefusedError(412, "conditionNotMet")
        self.objects[name] = Object(content, next(self._numbers))
        return Answer(200, self._describe(name, self.objects[name]))

    @staticmethod
    def _describe(name: str, found: Object) -> dict[str, Any]:
        time = f"2026-11-28T00:00:00.{found.generation % 1000:03}Z"
        return {
            "kind": "storage#object",
            "id": f"bucket/{name}/{found.generation}",
            "name": name,
            "bucket": "bucket",
            "generation": str(found.generation),
            "metageneration": "1",
            "size": str(len(found.content)),
            "timeCreated": time,
            "updated": time,
            "etag": str(found.generation),
            "md5Hash": hashlib.md5(found.content).hexdigest(),
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer is one packet, for which the client does not wait

    def _respond(self) -> None:
        server = self.server
        assert isinstance(server, FakeStorage)
        size = int(self.headers["Content-Length"] or 0)
        body = self.rfile.read(size)
        if len(body) < size:  # the process was killed
            self.close_connection = True
            return
        try:
            answer = server.answer(self.command, self.path, self.headers, body)
        except RefusedError as refusal:
            answer = refusal.answer()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_GET = do_POST = do_PUT = do_DELETE = _respond  # noqa: N815 - of http.server

    def log_message(self, *_arguments: object) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]
