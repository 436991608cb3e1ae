"""A proxy in front of a daemon that refuses, loses answers and breaks off, and other helpers."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

from tests.daemon.harness import Daemon, written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


class Proxy:
    """Passes requests on to the daemon at `port`, except for those that `fault` spoils.

    Attributes:
        port: of the daemon; requests are broken off while it is 0.
        retry_after: of a refusal, seconds.
        fault: gets the number of a request, from 1: "503", "lose" (the answer), "hang", or "".
        times: of the requests.
        seen: key, encoding and length of each request.
    """

    def __init__(self, fault: Callable[[int], str] = lambda _: "") -> None:
        self.port = 0
        self.fault = fault
        self.retry_after = 0
        self.seen: list[tuple[str, str, int]] = []
        self.times: list[float] = []
        self.faults: Counter[str] = Counter()
        self.connections = 0
        self.came = threading.Condition()
        self.released = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                proxy.connections += 1
                super().setup()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                key = self.headers["Idempotency-Key"]
                with proxy.came:
                    encoding = self.headers.get("Content-Encoding", "")
                    proxy.seen.append((key, encoding, len(body)))
                    proxy.times.append(time.monotonic())
                    kind = proxy.fault(len(proxy.seen))
                    proxy.faults[kind] += bool(kind)
                    proxy.came.notify_all()
                if kind == "hang":
                    proxy.released.wait(600)
                    self.close_connection = True
                elif kind.isdigit():
                    self.answer(int(kind), b"{}", {"Retry-After": str(proxy.retry_after)})
                else:
                    self.forward(body, lose=kind == "lose")

            def forward(self, body: bytes, *, lose: bool) -> None:
                headers = {k: v for k, v in self.headers.items() if k not in {"Host", "Connection"}}
                link = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=60)
                try:
                    link.request("POST", self.path, body, headers)
                    answer = link.getresponse()
                    content = answer.read()
                except (OSError, http.client.HTTPException):
                    lose = True
                finally:
                    link.close()
                if lose:
                    self.close_connection = True
                else:
                    told = {k: v for k, v in answer.headers.items() if k == "Retry-After"}
                    self.answer(answer.status, content, told)

            def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def until(self, requests: int, timeout: float = 60) -> None:
        """Waits until so many requests have come."""
        with self.came:
            assert self.came.wait_for(lambda: len(self.seen) >= requests, timeout)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Answers:
    """A server that gives each request the next of these answers, and hangs up.

    Attributes:
        url: of it.
        keys: of the requests.
    """

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.keys: list[str] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        for answer in self._answers:
            link, _ = self._server.accept()
            with link, link.makefile("rb") as file:
                file.readline()
                headers = http.client.parse_headers(file)
                file.read(int(headers["Content-Length"]))
                self.keys.append(headers["Idempotency-Key"])
                link.sendall(answer)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)
        self._server.close()


@contextlib.contextmanager
def restarting(proxy: Proxy, folder: Path, *flags: str, after: int) -> Iterator[list[Daemon]]:
    """A daemon behind the proxy that is ended after so many requests, and started again.

    The last one of the list is the one that runs at the end; its life ends with the block.
    """
    daemons: list[Daemon] = []

    def begin() -> None:
        one = Daemon(*flags, cwd=folder)
        daemons.append(one)
        proxy.port = one.port

    def restart() -> None:
        proxy.until(after)
        daemons[0].terminate()
        daemons[0].wait()
        begin()

    begin()
    thread = threading.Thread(target=restart)
    thread.start()
    try:
        yield daemons
        thread.join(120)
        assert len(daemons) == 2, "the restart did not come"
    finally:
        for one in daemons:
            one.__exit__()


def closed_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def arrived(folder: Path, member: str = "n") -> list[Any]:
    """That member of all records which the jsonl sink wrote, in its order."""
    return [json.loads(line)[member] for line in written(folder)]


def arrives(folder: Path, daemon: Daemon, numbers: Sequence[Any], member: str = "n") -> None:
    """Each number arrived exactly once."""
    daemon.until_settled()
    assert Counter(arrived(folder, member)) == Counter(numbers)


def until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
