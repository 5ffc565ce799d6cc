"""Downloads are revalidated or noted as old, and stored complete and checked or not at all."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Literal

import pytest
from servers import TAGS, Handler, Server

from tljax.runtime.download import download
from tljax.runtime.errors import RequestError


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def refuse_html(path: Path) -> None:
    if path.read_bytes().startswith(b"<html"):
        raise ValueError("an HTML page")


def get(
    url: str,
    path: Path,
    revalidate: Literal["always", "by tag", "never"] = "always",
    check: Callable[[Path], object] = refuse_html,
    limit: int = 1000,
) -> bytes:
    download(url, path, check, limit=limit, revalidate=revalidate)
    return path.read_bytes()


def test_a_changed_file_is_fetched_again(server: Server, tmp_path: Path, capsys):
    assert get(server.url, tmp_path / "x") == b"first"
    server.body = b"second"
    assert get(server.url, tmp_path / "x") == b"second"
    assert server.requested == [None, None]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("revalidate", ["always", "by tag"])
def test_a_file_with_a_tag_is_fetched_again_only_if_the_tag_changed(
    server: Server, tmp_path: Path, revalidate, tag
):
    server.headers = {tag: TAGS[tag]}
    for _ in range(3):
        assert get(server.url, tmp_path / "x", revalidate) == b"first"
    assert server.requested == [None, TAGS[tag], TAGS[tag]]
    server.body, server.headers = b"second", {tag: "Fri, 27 Nov 2026 03:00:00 GMT"}
    assert get(server.url, tmp_path / "x", revalidate) == b"second"


def test_a_tag_is_not_used_for_another_file(server: Server, tmp_path: Path):
    """Two concurrent processes may leave the file of one and the tag of the other."""
    server.headers = TAGS
    get(server.url, tmp_path / "x")
    (tmp_path / "x").write_bytes(b"from another process")
    assert get(server.url, tmp_path / "x") == b"first"
    assert server.requested == [None, None]
    for damage in (b"", b"[]", b"{}", b"\xff"):
        (tmp_path / "x.json").write_bytes(damage)
        assert get(server.url, tmp_path / "x") == b"first"


def test_a_note_gives_the_date_of_a_copy_without_a_tag(server: Server, tmp_path: Path, capsys):
    for _ in range(2):
        assert get(server.url, tmp_path / "x", "by tag") == b"first"
    assert len(server.requested) == 1
    notes = capsys.readouterr().err
    assert notes.startswith(f"note: {server.url}: the copy of 20")
    assert f"delete {tmp_path / 'x'} to fetch it again" in notes
    assert len(notes.splitlines()) == 1


def test_a_file_with_a_known_hash_is_fetched_again_only_if_it_is_damaged(
    server: Server, tmp_path: Path, capsys
):
    def check(path: Path) -> None:
        if path.read_bytes() != b"first":
            raise ValueError("not the published file")

    for _ in range(2):
        assert get(server.url, tmp_path / "x", "never", check) == b"first"
    (tmp_path / "x").write_bytes(b"damaged")
    assert get(server.url, tmp_path / "x", "never", check) == b"first"
    assert len(server.requested) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert capsys.readouterr().err == ""
    (tmp_path / "x").write_bytes(b"damaged")
    server.body = b"another"
    with pytest.raises(RequestError, match=r"could not fetch .* \(not the published file\)"):
        get(server.url, tmp_path / "x", "never", check)


@pytest.mark.parametrize("status", [500, 502, 503])
def test_the_copy_is_used_with_a_note_if_the_server_fails(
    server: Server, tmp_path: Path, capsys, status: int
):
    get(server.url, tmp_path / "x")
    server.status, server.body = status, b"<html>"
    assert get(server.url, tmp_path / "x") == b"first"
    assert f"{server.url}: the copy of 20" in capsys.readouterr().err
    with pytest.raises(RequestError, match=rf"could not fetch .* \(HTTP Error {status}"):
        get(server.url, tmp_path / "y")


def test_the_copy_is_used_without_a_network_unless_it_fails_the_check(tmp_path: Path, capsys):
    with Server() as server:
        url = server.url
    (tmp_path / "x").write_bytes(b"old")
    assert get(url, tmp_path / "x") == b"old"
    assert "Connection refused" in capsys.readouterr().err
    (tmp_path / "x").write_bytes(b"<html>")  # earlier versions kept files that are not images
    with pytest.raises(RequestError, match=r"Connection refused.*; fetch it on another machine"):
        get(url, tmp_path / "x")


@pytest.mark.parametrize(
    ("status", "headers", "body", "reason"),
    [
        (404, {}, b"<html>", "HTTP Error 404: Not Found"),
        (304, {}, b"", "HTTP Error 304"),
        (302, {"Location": "/net.bin"}, b"", "infinite loop"),
        (302, {"Location": "file:///etc/passwd"}, b"", "not allowed"),
        (200, {}, b"<html>gone", "an HTML page"),
        (200, {}, b"", "it is empty"),
        (200, {}, bytes(1001), "it is larger than"),
        (200, {"Content-Length": "9999"}, b"cut", "it is larger than"),
        (200, {"Content-Length": "900"}, b"cut", "the connection closed before the end"),
        (200, {"Transfer-Encoding": "chunked"}, b"900\r\ncut", "IncompleteRead"),
    ],
)
def test_a_failed_download_leaves_no_file(
    server: Server, tmp_path: Path, status: int, headers: dict[str, str], body: bytes, reason: str
):
    server.status, server.headers, server.body = status, headers, body
    with pytest.raises(RequestError, match=f"could not fetch {server.url} .*{reason}") as error:
        get(server.url, tmp_path / "new" / "x")
    assert "\n" not in str(error.value)
    assert list(tmp_path.rglob("*x*")) == []


def test_the_copy_is_used_if_the_transfer_is_cut_off(server: Server, tmp_path: Path, capsys):
    get(server.url, tmp_path / "x")
    server.headers = {"Content-Length": "900"}
    assert get(server.url, tmp_path / "x") == b"first"
    assert "closed before the end" in capsys.readouterr().err


class Unreliable(BaseHTTPRequestHandler):
    """Sends half of the remaining body, as an HTTP range if it is requested."""

    log_message = Handler.log_message

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.requested.append(self.headers["Range"])
        is_current = self.headers["If-Range"] == server.headers.get("ETag")
        is_range = server.status == 206 and self.headers["Range"] and is_current
        start = int(self.headers["Range"][len("bytes=") : -1]) if is_range else 0
        rest = server.body[start:]
        self.send_response(206 if start else 200)
        if start:
            end, total = len(server.body) - 1, len(server.body)
            self.send_header("Content-Range", f"bytes {start}-{end}/{total}")
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: max(len(rest) // 2, 3)])


@pytest.fixture
def unreliable(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr("tljax.runtime.download._RESUME_DELAYS", (0, 0, None))
    server.RequestHandlerClass = Unreliable
    server.status, server.headers, server.body = 206, {"ETag": '"1"'}, b"0123456789"
    return server


def test_a_transfer_that_breaks_off_is_resumed(unreliable: Server, tmp_path: Path, capsys):
    assert get(unreliable.url, tmp_path / "x") == b"0123456789"
    assert unreliable.requested == [None, "bytes=5-", "bytes=8-"]
    assert capsys.readouterr().err == ""


def test_a_transfer_is_resumed_a_limited_number_of_times(unreliable: Server, tmp_path: Path):
    unreliable.body = b"0123456789" * 4
    with pytest.raises(RequestError, match="the connection closed before the end"):
        get(unreliable.url, tmp_path / "x")
    assert len(unreliable.requested) == 3
    assert list(tmp_path.iterdir()) == []


def test_parts_of_two_versions_are_not_joined(
    unreliable: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def replace_file(_: float) -> None:
        unreliable.body, unreliable.headers = b"abcdefghij", {"ETag": '"2"'}

    monkeypatch.setattr("tljax.runtime.download.time.sleep", replace_file)
    with pytest.raises(RequestError, match="the connection closed before the end"):
        get(unreliable.url, tmp_path / "x")
    assert unreliable.requested == [None, "bytes=5-"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"status": 200}, {"headers": {}}])
def test_without_ranges_or_tags_a_transfer_is_not_resumed(
    unreliable: Server, tmp_path: Path, change: dict[str, Any]
):
    vars(unreliable).update(change)
    with pytest.raises(RequestError, match="the connection closed before the end"):
        get(unreliable.url, tmp_path / "x")


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n", b"HTTP/1.1 999999 x\r\n\r\n"])
def test_a_response_that_is_not_http_is_a_one_line_error(tmp_path: Path, answer: bytes):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer)

        with ThreadPoolExecutor(1) as pool:
            pool.submit(serve)
            with pytest.raises(RequestError, match="could not fetch") as error:
                get(f"http://127.0.0.1:{port}/", tmp_path / "x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///x.jpg",
        "http://[::1",
        "http://127.0.0.1:99999/x.jpg",
        "http://127.0.0.1:0/x.jpg",
        "http://127.0.0.1:port/x.jpg",
        "http://127.0.0.1:9/x\n.jpg",
        "http://no such host/x.jpg",
        f"http://{'a' * 70}.example/x.jpg",
        "http://\udcff.example/x.jpg",
        "ftp://127.0.0.1/x.jpg",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
    ],
)
def test_an_invalid_address_is_a_one_line_error(tmp_path: Path, url: str):
    with pytest.raises(RequestError, match="could not fetch"):
        get(url, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_spaces_and_accents_in_an_address_are_escaped(server: Server, tmp_path: Path):
    assert get(f"{server.url}/with space/é%20.jpg?a=ü", tmp_path / "x") == b"first"


def test_a_file_that_cannot_be_written_is_named(server: Server, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="x: cannot be written"):
        get(server.url, tmp_path / "file" / "x")


def test_concurrent_downloads_never_see_half_a_file(server: Server, tmp_path: Path):
    server.body = bytes(10**6)
    server.headers = TAGS

    def fetch(_: int) -> int:
        return len(get(server.url, tmp_path / "x", limit=10**6))

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(fetch, range(40))) == {10**6}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.json"]
