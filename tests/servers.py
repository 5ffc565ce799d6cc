"""HTTP server of one file with configurable answers."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TAGS = {"ETag": '"1"', "Last-Modified": "Fri, 27 Nov 2026 02:00:00 GMT"}


class Server(ThreadingHTTPServer):
    """Answer with ``status``, ``headers`` and ``body``, or with 304 to matching `TAGS`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.body, self.headers = 200, b"first", dict[str, str]()
        self.requested: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/net.bin"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.requested.append(self.headers["If-None-Match"] or self.headers["If-Modified-Since"])
        current = server.requested[-1] in server.headers.values()
        self.send_response(304 if current and server.status == 200 else server.status)
        length = {} if "Content-Length" in server.headers else {"Content-Length": len(server.body)}
        for name, value in {**server.headers, **length}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if not current:
            self.wfile.write(server.body)

    def log_message(self, *_arguments: object) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]
