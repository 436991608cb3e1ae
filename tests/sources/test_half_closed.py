"""Clients that end their own direction of a connection and wait for the answer (`nc -N`)."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.admin.server import AdminServer
from ingestd.base.metrics import Metrics
from ingestd.config.network import split_address
from ingestd.settings import AdminSettings
from tests.access.tools import Files, on_both_loops
from tests.admin.test_admin_server import View
from tests.sources.source_tools import MemoryIntake, connected, serving, until

if TYPE_CHECKING:
    from pathlib import Path

HEAD = b"POST /v1/records HTTP/1.1\r\nHost: 127.0.0.1\r\n"


def request(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def answers(source: Any, data: bytes) -> bytes:
    """All that comes for this and the end of the client's direction, until the server's."""
    async with connected(source) as client, asyncio.timeout(60):
        client.send(data)
        client.writer.write_eof()
        return await client.reader.read()


LARGE = b'{"n": 1}\n' * 500_000


@on_both_loops
async def test_what_was_asked_whole_is_answered() -> None:
    for body in (b"1", LARGE):
        intake = MemoryIntake()
        async with serving(intake, records_max=10**6) as source:
            answer = await answers(source, request(body))
            assert answer.startswith(b"HTTP/1.1 202 ")
        assert sum(run.count for run in intake.runs) == max(1, body.count(b"\n"))


@on_both_loops
async def test_all_of_a_pipeline_is_answered() -> None:
    intake = MemoryIntake()
    async with serving(intake) as source:
        answer = await answers(source, b"".join(request(b"%d" % n) for n in range(100)))
    assert answer.count(b"HTTP/1.1 202 ") == len(intake.items) == 100


@on_both_loops
async def test_the_answer_comes_however_long_the_commit_takes() -> None:
    intake = MemoryIntake()
    intake.gate.clear()
    async with serving(intake) as source, connected(source) as client:
        client.send(request(b"1"))
        client.writer.write_eof()
        await intake.asked.wait()
        await asyncio.sleep(0.05)
        intake.gate.set()
        assert (await client.reply()).status == 202
        assert await client.closed()


@on_both_loops
async def test_chunked_bodies_and_streams_that_have_ended_are_answered() -> None:
    intake = MemoryIntake()
    async with serving(intake) as source:
        chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n1\n\r\n0\r\n\r\n"
        assert (await answers(source, chunked)).startswith(b"HTTP/1.1 202 ")
        async with connected(source) as client:
            client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n2\n\r\n")
            await until(lambda: len(intake.items) == 2)  # a stream now
            client.send(b"2\r\n3\n\r\n0\r\n\r\n")
            client.writer.write_eof()
            assert (await client.reply()).json["accepted"] == 2
    assert intake.items == [b"1", b"2", b"3"]


@on_both_loops
async def test_half_a_request_is_none() -> None:
    seen: list[int] = []
    intake = MemoryIntake()
    more = {"on_request": lambda _route, _name, status, _seconds, _slug: seen.append(status)}
    async with serving(intake, **more) as source:
        for data in (b"", b"POST /v1", HEAD, HEAD + b"Content-Length: 9\r\n\r\n1"):
            assert await answers(source, data) == b""
        answer = await answers(source, request(b"1") + HEAD + b"Content-Length: 9\r\n\r\n1")
        assert answer.startswith(b"HTTP/1.1 202 ")
        await until(lambda: len(seen) == 3)
    assert intake.items == [b"1"]
    # The half one behind a whole one is told so if that still has to be answered.
    assert sorted(seen) in ([202, 400, 499], [202, 499, 499])


@on_both_loops
async def test_an_idle_connection_ends_with_its_client() -> None:
    async with serving(MemoryIntake()) as source, connected(source) as client:
        client.send(request(b"1"))
        assert (await client.reply()).status == 202
        client.writer.write_eof()
        assert await client.closed()
        await until(lambda: source._server.open == 0)


@on_both_loops
async def test_the_admin_server_too() -> None:
    admin = AdminServer(AdminSettings(listen="127.0.0.1:0"), View(), Metrics("1"))
    await admin.start()
    try:
        for data, expected in ((b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"alive\n"),
                               (b"GET /livez HTTP/1.0\r\n\r\n", b"alive\n"),
                               (b"GET /livez HT", b"")):  # fmt: skip
            reader, writer = await asyncio.open_connection(*split_address(admin.addresses[0]))
            writer.write(data)
            writer.write_eof()
            async with asyncio.timeout(60):
                answer = await reader.read()
            assert answer.endswith(expected)
            assert bool(answer) == bool(expected)
            writer.close()
    finally:
        await admin.close()


class Tls:
    """A client that sends `close_notify` and goes on listening, as TLS 1.3 has it."""

    def __init__(self, context: ssl.SSLContext, address: str, *, with_fin: bool = False) -> None:
        self.with_fin = with_fin
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        self.address = split_address(address)

    async def _do(self, call: Any) -> Any:
        """What it gives; what is to be sent then waits for more."""
        while True:
            try:
                return call()
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self.reader.read(65536)
                self.incoming.write(data) if data else self.incoming.write_eof()

    async def _flush(self) -> None:
        if data := self.outgoing.read():
            self.writer.write(data)
            await self.writer.drain()

    async def ask(self, data: bytes) -> bytes:
        self.reader, self.writer = await asyncio.open_connection(*self.address)
        async with asyncio.timeout(60):
            await self._do(self.tls.do_handshake)
            for start in range(0, len(data), 16384):
                self.tls.write(data[start : start + 16384])
                if not self.with_fin:
                    await self._flush()
            with contextlib.suppress(ssl.SSLWantReadError):
                self.tls.unwrap()
            await self._flush()  # the end of the handshake, request, close_notify, FIN at once
            if self.with_fin:
                self.writer.write_eof()
            answer = b""
            with contextlib.suppress(ssl.SSLError):
                while more := await self._do(lambda: self.tls.read(65536)):
                    answer += more
        self.writer.close()
        return answer


@pytest.mark.parametrize("with_fin", [False, True], ids=["close_notify", "close_notify and FIN"])
@pytest.mark.parametrize("body", [b"1", LARGE], ids=["small", "large"])
def test_under_tls(tmp_path: Path, body: bytes, with_fin: bool) -> None:
    files = Files(tmp_path)
    context = ssl.create_default_context(cafile=files.ca)

    async def ask() -> None:
        intake = MemoryIntake()
        tls = {"certificate": files.server()}
        async with serving(intake, tls=tls, records_max=10**6) as source:
            for data, number in ((request(body), 1), (request(b"1") * 3, 3), (b"", 0)):
                client = Tls(context, source.addresses[0], with_fin=with_fin)
                answer = await client.ask(data)
                assert answer.count(b"HTTP/1.1 202 ") == number
            await until(lambda: source._server.open == 0)
        assert len(intake.runs) == 4

    @on_both_loops
    async def test() -> None:
        await ask()

    for factory in test.pytestmark[0].args[1]:  # type: ignore[attr-defined]
        test(factory)


@on_both_loops
async def test_an_end_without_close_notify_ends_a_connection(tmp_path: Path) -> None:
    """Under TLS it may be somebody else's word: before, in, and after the handshake."""
    files = Files(tmp_path)
    context = ssl.create_default_context(cafile=files.ca)
    async with serving(MemoryIntake(), tls={"certificate": files.server()}) as source:
        for sent in ("nothing", "hello", "handshake", "request", "half"):
            client = Tls(context, source.addresses[0])
            client.reader, client.writer = await asyncio.open_connection(*client.address)
            if sent in ("nothing", "hello"):
                with contextlib.suppress(ssl.SSLWantReadError):
                    client.tls.do_handshake()
                client.writer.write(client.outgoing.read() if sent == "hello" else b"")
            else:
                await client._do(client.tls.do_handshake)
                if sent != "handshake":
                    client.tls.write(request(b"12")[: -1 if sent == "half" else None])
                await client._flush()
            client.writer.write_eof()
            async with asyncio.timeout(60):
                await client.reader.read()
            client.writer.close()
        await until(lambda: source._server.open == source._server._greetings == 0)
