"""Downloads: asked for again, or said to be old; whole and checked, or not kept at all."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
from servers import TAGS, Server

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
    ask: Literal["always", "by tag", "never"] = "always",
    check: Callable[[Path], object] = refuse_html,
    limit: int = 1000,
) -> bytes:
    download(url, path, check, limit=limit, ask=ask)
    return path.read_bytes()


def test_what_changes_is_fetched_again(server: Server, tmp_path: Path, capsys):
    assert get(server.url, tmp_path / "x") == b"first"
    server.body = b"second"
    assert get(server.url, tmp_path / "x") == b"second"
    assert server.asked == [None, None]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("ask", ["always", "by tag"])
def test_what_has_a_tag_is_fetched_again_only_if_that_changed(
    server: Server, tmp_path: Path, ask, tag
):
    server.headers = {tag: TAGS[tag]}
    for _ in range(3):
        assert get(server.url, tmp_path / "x", ask) == b"first"
    assert server.asked == [None, TAGS[tag], TAGS[tag]]
    server.body, server.headers = b"second", {tag: "Fri, 27 Nov 2026 03:00:00 GMT"}
    assert get(server.url, tmp_path / "x", ask) == b"second"


def test_a_tag_is_never_taken_for_that_of_another_file(server: Server, tmp_path: Path):
    """Two processes at once may leave the file of one and the tag of the other."""
    server.headers = TAGS
    get(server.url, tmp_path / "x")
    (tmp_path / "x").write_bytes(b"of another process")
    assert get(server.url, tmp_path / "x") == b"first"
    assert server.asked == [None, None]
    for damage in (b"", b"[]", b"{}", b"\xff"):
        (tmp_path / "x.json").write_bytes(damage)
        assert get(server.url, tmp_path / "x") == b"first"


def test_large_files_without_a_tag_are_said_to_be_old(server: Server, tmp_path: Path, capsys):
    for _ in range(2):
        assert get(server.url, tmp_path / "x", "by tag") == b"first"
    assert len(server.asked) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"note: {server.url}: the copy of 20")
    assert f"delete {tmp_path / 'x'} to fetch it again" in said
    assert len(said.splitlines()) == 1


def test_what_a_hash_identifies_is_fetched_again_only_if_it_is_damaged(
    server: Server, tmp_path: Path, capsys
):
    def check(path: Path) -> None:
        if path.read_bytes() != b"first":
            raise ValueError("not the published file")

    for _ in range(2):
        assert get(server.url, tmp_path / "x", "never", check) == b"first"
    (tmp_path / "x").write_bytes(b"damaged")
    assert get(server.url, tmp_path / "x", "never", check) == b"first"
    assert len(server.asked) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert capsys.readouterr().err == ""
    (tmp_path / "x").write_bytes(b"damaged")
    server.body = b"another"
    with pytest.raises(RequestError, match=r"could not fetch .* \(not the published file\)"):
        get(server.url, tmp_path / "x", "never", check)


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_server_that_fails_leaves_the_copy_which_is_said_to_be_one(
    server: Server, tmp_path: Path, capsys, status: int
):
    get(server.url, tmp_path / "x")
    server.status, server.body = status, b"<html>"
    assert get(server.url, tmp_path / "x") == b"first"
    assert f"{server.url}: the copy of 20" in capsys.readouterr().err
    with pytest.raises(RequestError, match=rf"could not fetch .* \(HTTP Error {status}"):
        get(server.url, tmp_path / "y")


def test_without_a_network_the_copy_is_used_unless_it_fails_the_check(tmp_path: Path, capsys):
    with Server() as server:
        url = server.url
    (tmp_path / "x").write_bytes(b"old")
    assert get(url, tmp_path / "x") == b"old"
    assert "Connection refused" in capsys.readouterr().err
    (tmp_path / "x").write_bytes(b"<html>")  # earlier versions kept what no image is
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
def test_what_is_no_good_is_not_kept(
    server: Server, tmp_path: Path, status: int, headers: dict[str, str], body: bytes, reason: str
):
    server.status, server.headers, server.body = status, headers, body
    with pytest.raises(RequestError, match=f"could not fetch {server.url} .*{reason}") as error:
        get(server.url, tmp_path / "new" / "x")
    assert "\n" not in str(error.value)
    assert list(tmp_path.rglob("*x*")) == []


def test_a_transfer_that_is_cut_off_leaves_the_copy(server: Server, tmp_path: Path, capsys):
    get(server.url, tmp_path / "x")
    server.headers = {"Content-Length": "900"}
    assert get(server.url, tmp_path / "x") == b"first"
    assert "closed before the end" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n", b"HTTP/1.1 999999 x\r\n\r\n"])
def test_what_is_no_http_is_one_line(tmp_path: Path, answer: bytes):
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
def test_a_broken_address_is_one_line(tmp_path: Path, url: str):
    with pytest.raises(RequestError, match="could not fetch"):
        get(url, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_spaces_and_accents_in_an_address_are_escaped(server: Server, tmp_path: Path):
    assert get(f"{server.url}/with space/é%20.jpg?a=ü", tmp_path / "x") == b"first"


def test_a_disk_that_is_full_is_not_the_servers_fault(server: Server, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="x: cannot be written"):
        get(server.url, tmp_path / "file" / "x")


def test_several_at_once_never_see_half_a_file(server: Server, tmp_path: Path):
    server.body = bytes(10**6)
    server.headers = TAGS

    def one(_: int) -> int:
        return len(get(server.url, tmp_path / "x", limit=10**6))

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(one, range(40))) == {10**6}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.json"]
