"""A small real intake, a raw HTTP client and where the real data lies."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from ingestd.base.append import RecentIds
from ingestd.http.settings import HttpSettings
from ingestd.sources.http.source import HttpSource
from ingestd.sources.screening import ScreenedIntake

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ingestd.base.append import Append
    from ingestd.base.record import Format, InvalidRecord, Records


class MemoryIntake:
    """Keeps what it accepts. `gate` holds acceptance back; `errors` are raised first."""

    def __init__(self, form: Format = "json", name: str = "default", **more: Any) -> None:
        self.name = name
        self.format: Format = form
        self.record_bytes_max: int = more.get("record_bytes_max", 1024**2)
        self.json_depth_max: int = more.get("json_depth_max", 128)
        self.runs: list[Records] = []
        self.refused: list[InvalidRecord] = []
        self.principals: list[str] = []
        self.unkept = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()
        self.waiting = 0
        self.waiting_most = 0
        self.errors: list[Exception] = []
        self.recent_ids = RecentIds(1000)

    async def accept(self, append: Append) -> None:
        records = append.records
        self.principals.append(append.principal)
        self.unkept += append.unkept
        self.asked.set()
        if self.errors:
            raise self.errors.pop(0)
        self.waiting += len(records.payload)
        self.waiting_most = max(self.waiting_most, self.waiting)
        await self.gate.wait()
        self.waiting -= len(records.payload)
        check(records)
        self.runs.append(records)
        self.refused.extend(append.invalid)

    @property
    def items(self) -> list[bytes]:
        return [item for run in self.runs for item in run.items()]


def check(records: Records) -> None:
    """The promises of a run of records."""
    items = records.items()
    assert len(items) == records.count
    assert not records.payload or sum(map(len, items)) + (
        records.count if not records.layout else 0
    ) == len(records.payload)


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def slug(self) -> str:
        assert self.headers["content-type"] == "application/problem+json"
        assert self.json["status"] == self.status
        assert self.json["title"]
        return self.json["type"].removeprefix("urn:ingestd:problem:")


class Client:
    """One connection, driven byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def post(self, body: bytes, path: str = "/v1/records", **headers: str) -> None:
        head = [f"POST {path} HTTP/1.1", "Host: localhost"]
        if "Transfer_Encoding" not in headers:
            headers.setdefault("Content_Length", str(len(body)))
        head += [f"{k.replace('_', '-')}: {v}" for k, v in headers.items()]
        self.send("\r\n".join([*head, "", ""]).encode("latin-1") + body)

    async def reply(self, bodiless: bool = False) -> Reply:
        async with asyncio.timeout(60):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:-2])}
            length = 0 if bodiless else int(headers.get("content-length", 0))
            return Reply(int(head[0].split()[1]), headers, await self.reader.readexactly(length))

    async def closed(self) -> bool:
        """Whether the server closes, in time."""
        async with asyncio.timeout(60):
            try:
                return await self.reader.read() == b""
            except ConnectionResetError:
                return True


@contextlib.asynccontextmanager
async def serving(
    *intakes: MemoryIntake, on_request: Any = None, tracer: Any = None, **settings: Any
) -> Any:
    """A started source."""
    settings.setdefault("listen", "127.0.0.1:0")
    source = HttpSource(
        HttpSettings(**settings),
        {intake.name: intake for intake in intakes},
        default=intakes[0].name,
        on_request=on_request,
        screens={one.name: one for one in intakes if isinstance(one, ScreenedIntake)},
    )
    source.tracer = tracer
    await source.start()
    try:
        yield source
    finally:
        await source.close()


@contextlib.asynccontextmanager
async def connected(source: HttpSource) -> AsyncIterator[Client]:
    host, _, port = source.addresses[0].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def ask(source: HttpSource, body: bytes, path: str = "/v1/records", **headers: str) -> Reply:
    """One request on a connection of its own."""
    async with connected(source) as client:
        client.post(body, path, **headers)
        return await client.reply()


async def until(condition: Any, seconds: float = 60.0) -> None:
    """Waits for a condition, or fails."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
