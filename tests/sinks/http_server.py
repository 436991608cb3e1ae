"""A real HTTP server for a sink's other side, with failures by script: down, slow, broken off."""

from __future__ import annotations

import gzip
import socket
import threading
from collections import deque
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.sinks.contract.adapter import Slow

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator


class Asked(NamedTuple):
    """One request, its body unpacked."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Answer(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


BREAK = Answer(0)
"""Does the request, and then breaks the connection instead of an answer."""


class FakeServer:
    """Serves requests with `answer`, as long as `script` has nothing else for them.

    Attributes:
        script: what becomes of the next requests: an answer instead of the work, or `BREAK`.
        asked: all requests so far.
        may_work: requests wait for it before they are done.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.script: deque[Answer | None] = deque()
        self.asked: list[Asked] = []
        self.may_work = threading.Event()
        self.may_work.set()
        self.lock = threading.Lock()
        self.waiting = 0
        self._tls = tls
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    def answer(self, asked: Asked) -> Answer:
        """One request, one at a time."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = _Server(self.port, _handler(self), self._tls)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            server.shutdown()
            server.close_all()

    @contextmanager
    def down(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            if self._server is None:
                self.start()

    @contextmanager
    def slow(self) -> Iterator[Slow]:
        self.may_work.clear()
        slow = Slow(self.may_work.set)
        try:
            yield slow
        finally:
            self.may_work.set()

    def done(self, asked: Asked) -> Answer:
        with self.lock:
            self.asked.append(asked)
            said = self.script.popleft() if self.script else None
            self.waiting += 1
        assert self.may_work.wait(60)
        with self.lock:
            self.waiting -= 1
            if said is None:
                return self.answer(asked)
            if said is BREAK:
                self.answer(asked)
            return said


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, handler: Any, tls: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.tls = tls
        self.connections: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self.tls is not None:
            connection.settimeout(60)
            connection = self.tls.wrap_socket(connection, True, do_handshake_on_connect=False)
        self.connections.append(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or does not trust us, is no error here."""

    def close_all(self) -> None:
        self.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _handler(fake: FakeServer) -> Callable[..., BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", "0")))
            if headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            answer = fake.done(Asked(self.command, self.path, headers, body))
            if answer.status == 0:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in answer.headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815

        def log_message(self, *args: Any) -> None:
            """Tests look at `asked`."""

    return Handler
