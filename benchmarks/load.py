"""Load: 64 connections, each sends its next request when the last one was answered.

`wrk` where it is installed, because it leaves the most CPU to the server. Otherwise this module as
a process of its own: `python -m benchmarks.load PORT SECONDS BODY…`. Both print the same line.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from benchmarks.loop import loop_factory
from benchmarks.processes import Failed, last_words, output_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CONNECTIONS = 64
START_SECONDS = 30.0
"""What a load may take longer than it was asked to."""
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


def send(tool: str, port: int, bodies: Sequence[Path], seconds: float, folder: Path) -> Load:
    """Sends bodies to `/v1/records` for some seconds.

    Args:
        tool: `wrk` or `python`.
        port: on 127.0.0.1.
        bodies: files, sent in turn.
        seconds: how long; whole ones for wrk.
        folder: an empty one for the tool.

    Raises:
        Failed: it did not end well, or nobody answered.
    """
    files = [str(path) for path in bodies]
    if tool == "wrk":
        script = str(Path(__file__).with_name("body.lua"))
        url = f"http://127.0.0.1:{port}/v1/records"
        options = ["-t1", f"-c{CONNECTIONS}", f"-d{seconds:.0f}s", "--timeout", "30s"]
        command = ["wrk", *options, "-s", script, url, "--", *files]
    else:
        command = [sys.executable, "-m", "benchmarks.load", str(port), str(seconds), *files]
    printed = output_of(command, folder, seconds + START_SECONDS)
    load = Load(**json.loads(printed.splitlines()[-1]))
    if not load.answers:
        raise Failed(f"{tool} got no answer: {last_words(folder)}")
    return load


class _Client(asyncio.Protocol):
    """One connection: sends, reads an answer, sends the next."""

    def __init__(self, sender: _Sender) -> None:
        self._sender = sender
        self._received = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # what TCP gives
        self._sender.transports.append(self._transport)
        self._transport.write(next(self._sender.requests))

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(END_OF_HEAD)
        if end < 0:
            return
        head = self._received[:end].lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(self._received) < end + len(END_OF_HEAD) + length:
            return
        self._received = b""
        self._sender.answers += 1
        self._sender.refused += not head.startswith(b"http/1.1 2")
        if self._sender.open:
            self._transport.write(next(self._sender.requests))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._sender.broken += self._sender.open


class _Sender:
    """All connections, and what they count."""

    def __init__(self, bodies: Sequence[bytes]) -> None:
        self.requests: Iterator[bytes] = itertools.cycle([_request(body) for body in bodies])
        self.transports: list[asyncio.Transport] = []
        self.open = True
        self.answers = self.refused = self.broken = 0

    async def run(self, port: int, seconds: float) -> Load:
        loop = asyncio.get_running_loop()
        began = time.perf_counter()
        for _ in range(CONNECTIONS):
            await loop.create_connection(lambda: _Client(self), "127.0.0.1", port)
        await asyncio.sleep(max(0.0, began + seconds - time.perf_counter()))
        self.open = False
        load = Load(self.answers, self.refused, self.broken, time.perf_counter() - began)
        for transport in self.transports:
            transport.abort()
        return load


def _request(body: bytes) -> bytes:
    return (
        b"POST /v1/records HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Content-Type: application/x-ndjson\r\nContent-Length: %d\r\n\r\n%b"
    ) % (len(body), body)


if __name__ == "__main__":
    sender = _Sender([Path(path).read_bytes() for path in sys.argv[3:]])
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        load = runner.run(sender.run(int(sys.argv[1]), float(sys.argv[2])))
    print(json.dumps(load._asdict()))
