"""Load: 64 connections, each sends its next request when the last one was answered.

`wrk` where it is installed, because it leaves the most CPU to the server. Otherwise this module as
a process of its own: `python -m benchmarks.load PORT SECONDS PATH TYPE BODY…`. Both print the
same line. Without a path the bodies are written as they are, one after the other, and counted when
the other side has closed: a protocol over TCP without answers.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from benchmarks.loop import loop_factory
from benchmarks.processes import Failed, last_words, output_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.peers.base import Service

CONNECTIONS = 64
START_SECONDS = 30.0
"""What a load may take longer than it was asked to."""
SEND_BYTES = 256 << 10
"""Bytes that the kernel takes from a connection ahead of the other side: what lies there when the
load ends is read behind that end, and hundreds of megabytes would make a longer run of it."""
END_OF_HEAD = b"\r\n\r\n"


class Load(NamedTuple):
    """What a load saw.

    Attributes:
        answers: requests that were answered.
        refused: answers that were no 2xx.
        broken: connections that failed.
        seconds: how long it went on.
    """

    answers: int
    refused: int
    broken: int
    seconds: float


def wrk_fits(seconds: float) -> bool:
    """Whether wrk is there and can run for this long: it only knows whole seconds."""
    return shutil.which("wrk") is not None and float(seconds).is_integer()


def send(tool: str, service: Service, bodies: Sequence[Path], seconds: float, folder: Path) -> Load:
    """Sends bodies for some seconds.

    Args:
        tool: `wrk` or `python`.
        service: to whom.
        bodies: files, sent in turn.
        seconds: how long; whole ones for wrk.
        folder: an empty one for the tool.

    Raises:
        Failed: it did not end well, or nobody answered.
    """
    files = [str(path) for path in bodies]
    if tool == "wrk" and service.path:
        script = str(Path(__file__).with_name("body.lua"))
        url = f"http://127.0.0.1:{service.port}{service.path}"
        options = ["-t1", f"-c{CONNECTIONS}", f"-d{seconds:.0f}s", "--timeout", "30s"]
        command = ["wrk", *options, "-s", script, url, "--", service.content_type, *files]
    else:
        where = [str(service.port), str(seconds), service.path, service.content_type]
        command = [sys.executable, "-m", "benchmarks.load", *where, *files]
    printed = output_of(command, folder, seconds + START_SECONDS)
    load = Load(**json.loads(printed.splitlines()[-1]))
    if not load.answers:
        raise Failed(f"{tool} got no answer: {last_words(folder)}")
    return load


def is_yes(received: bytes) -> bool | None:
    """Whether an answer is a 2xx; `None` while it is not whole.

    Knows only answers with a length, and only one at a time.
    """
    end = received.find(END_OF_HEAD)
    if end < 0:
        return None
    head = received[:end].lower()
    length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
    if len(received) < end + len(END_OF_HEAD) + length:
        return None
    return head.startswith(b"http/1.1 2")


class Client(asyncio.Protocol):
    """One connection: reads an answer to each request, tells whether it was a yes."""

    def __init__(self) -> None:
        self._received = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ready to send."""
        self._transport = cast("asyncio.Transport", transport)  # what TCP gives

    def send(self, request: bytes) -> None:
        """The next request; the last one was answered."""
        self._transport.write(request)

    def abort(self) -> None:
        """Closes at once."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """A piece of an answer."""
        self._received += data
        yes = is_yes(self._received)
        if yes is not None:
            self._received = b""
            self.answered(yes=yes)

    def answered(self, *, yes: bool) -> None:
        """The request was answered; what comes next is up to who made this."""
        raise NotImplementedError


class _Closed(Client):
    """A closed loop: sends the next request as soon as the last one was answered."""

    def __init__(self, sender: _Sender) -> None:
        super().__init__()
        self._sender = sender

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._sender.clients.append(self)
        self.send(next(self._sender.requests))

    def answered(self, *, yes: bool) -> None:
        self._sender.answers += 1
        self._sender.refused += not yes
        if self._sender.open:
            self.send(next(self._sender.requests))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._sender.broken += self._sender.open


class _Sender:
    """All connections, and what they count."""

    def __init__(self, requests: Sequence[bytes]) -> None:
        self.requests: Iterator[bytes] = itertools.cycle(requests)
        self.clients: list[Client] = []
        self.open = True
        self.answers = self.refused = self.broken = 0

    async def run(self, port: int, seconds: float) -> Load:
        loop = asyncio.get_running_loop()
        began = time.perf_counter()
        for _ in range(CONNECTIONS):
            await loop.create_connection(lambda: _Closed(self), "127.0.0.1", port)
        await asyncio.sleep(max(0.0, began + seconds - time.perf_counter()))
        self.open = False
        load = Load(self.answers, self.refused, self.broken, time.perf_counter() - began)
        for client in self.clients:
            client.abort()
        return load


async def stream(port: int, seconds: float, bodies: Sequence[bytes]) -> Load:
    """Writes bodies on all connections, and waits until the other side has read them."""
    began = time.perf_counter()
    written = 0

    async def write(first: int) -> None:
        nonlocal written
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        for body in itertools.islice(itertools.cycle(bodies), first, None):
            if time.perf_counter() >= began + seconds:
                break
            writer.write(body)
            await writer.drain()
            written += 1
        writer.write_eof()
        await reader.read()
        writer.close()

    await asyncio.gather(*(write(number % len(bodies)) for number in range(CONNECTIONS)))
    return Load(written, 0, 0, time.perf_counter() - began)


def request(path: str, content_type: str, body: bytes) -> bytes:
    """A POST, as it goes over the wire."""
    return (
        b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b"
    ) % (path.encode(), content_type.encode(), len(body), body)


if __name__ == "__main__":
    target, kind, *names = sys.argv[3:]
    at, lasting = int(sys.argv[1]), float(sys.argv[2])
    sent = [Path(name).read_bytes() for name in names]
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        if target:
            sender = _Sender([request(target, kind, body) for body in sent])
            load = runner.run(sender.run(at, lasting))
        else:
            load = runner.run(stream(at, lasting, sent))
    print(json.dumps(load._asdict()))
