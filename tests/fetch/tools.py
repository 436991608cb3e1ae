"""A server that does what it is told, an intake that keeps what it takes, a source to its end."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
from typing import TYPE_CHECKING, Any, NamedTuple

from aiohttp import web
from backports import zstd

from ingestd.base.clock import SystemClock
from ingestd.sources.fetch import FetchSettings
from ingestd.sources.fetch.position import Position, from_offset
from ingestd.sources.fetch.source import FetchSource
from tests.sources.source_tools import check

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from ingestd.base.append import Append, SourceOffset
    from ingestd.base.record import Format, InvalidRecord, Records

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Intake:
    """Keeps records and offsets, each append whole. `errors` are raised first, in order."""

    def __init__(self, form: Format = "json", record_bytes_max: int = 1024**2) -> None:
        self.name = "default"
        self.format: Format = form
        self.record_bytes_max = record_bytes_max
        self.json_depth_max = 128
        self.runs: list[Records] = []
        self.refused: list[InvalidRecord] = []
        self.offsets: dict[str, SourceOffset] = {}
        self.errors: list[Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = 0
        self.unkept = 0

    async def accept(self, append: Append) -> None:
        self.unkept += append.unkept
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        await self.gate.wait()
        check(append.records)
        self.runs.append(append.records)
        self.refused.extend(append.invalid)
        if append.offset is not None:
            self.offsets[append.offset.key] = append.offset

    async def offset(self, key: str) -> SourceOffset | None:
        return self.offsets.get(key)

    @property
    def items(self) -> list[bytes]:
        return [item for run in self.runs for item in run.items()]

    @property
    def position(self) -> Position:
        """Of the only URL there is."""
        (offset,) = self.offsets.values()
        return from_offset(offset)


class Asked(NamedTuple):
    """A request that the server got."""

    path: str
    headers: dict[str, str]


class Server:
    """Answers every path with one handler.

    Attributes:
        url: its own, without a path.
        asked: the requests so far.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.asked: list[Asked] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.asked.append(Asked(request.path_qs, headers))
        return await self._handler(request)

    @property
    def paths(self) -> list[str]:
        return [one.path for one in self.asked]


@contextlib.asynccontextmanager
async def serving(
    handler: Handler, *, host: str = "127.0.0.1", port: int = 0, ssl: Any = None
) -> AsyncIterator[Server]:
    """The server, on a port of its own."""
    server = Server(handler)
    app = web.Application()
    app.router.add_route("GET", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1, auto_decompress=False)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, ssl_context=ssl)
        await site.start()
        scheme = "https" if ssl else "http"
        server.url = f"{scheme}://{host}:{runner.addresses[0][1]}"
        yield server
    finally:
        await runner.cleanup()


class Raw:
    """A server that sends bytes as they are, and closes.

    Attributes:
        url: its own, without a path.
        asked: the requests so far.
    """

    def __init__(self, answer: Callable[[Asked], bytes]) -> None:
        self._answer = answer
        self.asked: list[Asked] = []
        self.url = ""

    async def speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, path, _ = head[0].split()
            assert method == "GET"
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            self.asked.append(Asked(path, headers))
            writer.write(self._answer(self.asked[-1]))
            await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def speaking(answer: Callable[[Asked], bytes]) -> AsyncIterator[Raw]:
    """A server that answers each request with the bytes that a function gives."""
    raw = Raw(answer)
    server = await asyncio.start_server(raw.speak, "127.0.0.1", 0)
    raw.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield raw


def reply(body: bytes = b"", status: str = "200 OK", **headers: str | int) -> bytes:
    """An answer, with nothing in its head but what is said."""
    head = [f"HTTP/1.1 {status}"]
    head += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*head, "", ""]).encode() + body


def chunked(*parts: bytes, ended: bool = True) -> bytes:
    """A body in chunks; the last one is the end, or missing."""
    chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in parts if part]
    return b"".join(chunks) + (b"0\r\n\r\n" if ended else b"")


def answers(*bodies: bytes, **headers: str) -> Handler:
    """A handler that gives the bodies in turn, the last one for ever."""
    left = list(bodies)

    async def handle(_: web.Request) -> web.StreamResponse:
        body = left.pop(0) if len(left) > 1 else left[0]
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(body=body, headers=named)

    return handle


async def send_part(
    request: web.Request, body: bytes, size: int, *, total: int | None = None, **headers: str
) -> web.StreamResponse:
    """Says that the whole body comes, sends only a part, and leaves."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    response = web.StreamResponse(headers=named)
    response.content_length = len(body) if total is None else total
    await response.prepare(request)
    await response.write(body[:size])
    assert request.transport is not None
    request.transport.close()
    return response


def settings(*urls: str, **more: Any) -> FetchSettings:
    """Settings that do not make a test wait."""
    more = {
        "allow_private": True,
        "backoff": "1ms",
        "backoff_max": "5ms",
        "attempts_max": 3,
        "silence_timeout": "10s",
        **more,
    }
    return FetchSettings(urls=urls, **more)


@contextlib.asynccontextmanager
async def fetching(
    intake: Intake, *urls: str, options: Any = None, **more: Any
) -> AsyncIterator[FetchSource]:
    """A started source."""
    source = FetchSource(
        settings(*urls, **more),
        intake,
        clock=SystemClock(),
        stderr=io.StringIO(),
        **(options or {}),
    )
    await source.start()
    try:
        yield source
    finally:
        await source.close()


async def fetch(intake: Intake, *urls: str, **more: Any) -> FetchSource:
    """A source that ran to its end."""
    async with fetching(intake, *urls, **more) as source, asyncio.timeout(60):
        await source.wait_finished()
    return source


def lines(first: int, last: int) -> bytes:
    """JSON lines with these numbers, the last one excluded."""
    return b"".join(b'{"n": %d, "text": "%s"}\n' % (n, b"x" * (n % 50)) for n in range(first, last))


def packed(body: bytes, encoding: str, parts: int = 3) -> bytes:
    """Compressed, as so many members or frames."""
    pack = {"gzip": gzip.compress, "zstd": zstd.compress}[encoding]
    step = len(body) // parts + 1
    return b"".join(pack(body[at : at + step]) for at in range(0, len(body), step))
