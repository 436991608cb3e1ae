"""What one client can hold: bytes, windows, streams, places, heads. Nobody else is kept out."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.append import DeliveryWaiter
from ingestd.sources.http.ingestion import HEAD_BYTES_FREE
from tests.attacks.holders import WINDOW, ZSTD, chunk, noise
from tests.attacks.smuggling import CHUNKED, HOST, LINE
from tests.daemon.harness import daemon
from tests.sources.source_tools import Client, MemoryIntake, ask, serving, until

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MIB = 1024**2
ONE, OTHER = "127.0.0.3", "127.0.0.4"


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """A piece is old after 20 ms here, and room is asked for again at once."""
    monkeypatch.setattr("ingestd.http.body.PIECE_SECONDS", 0.02)
    monkeypatch.setattr("ingestd.sources.http.stream.ROOM_SECONDS", 0.01)


@contextlib.asynccontextmanager
async def at(source: Any, address: str) -> AsyncIterator[Client]:
    port = int(source.addresses[0].rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


def begin(client: Client, data: bytes, more: bytes = b"") -> None:
    client.send(LINE + HOST + CHUNKED + more + b"\r\n" + chunk(data))


def window() -> bytes:
    packer = zstd.ZstdCompressor(options=WINDOW)
    return packer.compress(noise()) + packer.flush(packer.FLUSH_BLOCK)


async def test_idle_streams_keep_nobody_out():
    """48 streams that have said one line held all of `http.inflight_bytes_max` for ever."""
    intake = MemoryIntake()
    async with serving(intake, streams_max=100) as source, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(at(source, ONE)) for _ in range(50)]
        for client in clients:
            begin(client, b"1\n")
        await until(lambda: len(intake.items) == 50)
        await until(lambda: source._handler.ingestion.admission.bytes == 0)
        async with at(source, OTHER) as other:
            other.post(b'"%b"' % (b"x" * MIB))
            assert (await other.reply()).status in (202, 413)
        for client in clients:  # each goes on
            client.send(chunk(b"2\n") + b"0\r\n\r\n")
        assert [(await one.reply()).json["accepted"] for one in clients] == [2] * 50


async def test_a_client_has_a_share_of_the_streams():
    intake = MemoryIntake()
    async with (
        serving(intake, streams_max=4, body_timeout="1s", body_rate_min=0) as source,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = [await stack.enter_async_context(at(source, ONE)) for _ in range(4)]
        for client in clients:
            begin(client, b"1\n")
        await until(lambda: len(intake.items) == 2)
        async with at(source, OTHER) as other:
            begin(other, b"3\n")
            await until(lambda: intake.items[-1] == b"3")
            assert source._handler.ingestion.admission.streams == 3
        await until(lambda: source._handler.ingestion.admission.streams == 2)


async def test_a_window_is_counted_before_it_is_allocated():
    """One client's windows have a share; what has gone gives its place back."""
    intake = MemoryIntake()
    async with serving(intake) as source, contextlib.AsyncExitStack() as stack:
        room = source._handler.ingestion.admission
        held = [await stack.enter_async_context(at(source, ONE)) for _ in range(2)]
        refused = await stack.enter_async_context(at(source, ONE))
        begin(held[0], window(), ZSTD)
        await until(lambda: room._lasting > 8 * MIB)
        begin(held[1], window(), ZSTD)
        reply = await held[1].reply()
        assert (reply.status, reply.slug) == (429, "over-share")
        assert reply.json["accepted"] == 0
        begin(refused, window(), ZSTD)
        assert (await refused.reply()).slug == "over-share"
        async with at(source, OTHER) as other:
            begin(other, window(), ZSTD)
            await until(lambda: room._lasting > 16 * MIB)
        await until(lambda: room._lasting < 9 * MIB)
        async with at(source, OTHER) as other:
            other.post(b"1")
            assert (await other.reply()).status == 202
    assert room._lasting == room.bytes == 0


async def test_an_unfinished_line_is_held_while_it_is_there():
    intake = MemoryIntake()
    async with serving(intake) as source, at(source, ONE) as client:
        room = source._handler.ingestion.admission
        begin(client, b'1\n"' + b"x" * 500_000)
        await until(lambda: intake.items == [b"1"])
        await until(lambda: room.bytes == room._lasting == 500_001)
        client.send(chunk(b'"\n'))
        await until(lambda: len(intake.items) == 2)
        await until(lambda: room.bytes == room._lasting == 0)


async def test_a_stream_without_room_waits_and_goes_on():
    intake = MemoryIntake()
    async with serving(intake, inflight_bytes_max=2 * MIB) as source, at(source, ONE) as client:
        room = source._handler.ingestion.admission
        begin(client, b"1\n")
        await until(lambda: intake.items == [b"1"])
        with room.enter(OTHER) as hold:
            hold.grow(2 * MIB)
            client.send(chunk(b"2\n" * 1000))
            await until(lambda: room._turned_away)
            assert len(intake.items) == 1
        client.send(b"0\r\n\r\n")
        assert (await client.reply()).json["accepted"] == 1001


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_zlib_counts_its_window_too(encoding):
    import zlib

    pack = zlib.compressobj(wbits=31 if encoding == "gzip" else 15)
    intake = MemoryIntake()
    async with serving(intake) as source, at(source, ONE) as client:
        begin(
            client, pack.compress(b"1\n") + pack.flush(zlib.Z_SYNC_FLUSH),
            b"Content-Encoding: %b\r\n" % encoding.encode(),
        )  # fmt: skip
        await until(lambda: intake.items == [b"1"])
        await until(lambda: source._handler.ingestion.admission.bytes == 64 * 1024)


class Waiting(MemoryIntake):
    """Accepts, and never says what becomes of the records."""

    watch: DeliveryWaiter | None = None

    async def accept(self, append):
        await super().accept(append)
        self.watch = append.waiter
        self.runs.clear()

    def stop_waiting(self, watch):
        assert watch is self.watch
        self.watch = None


async def test_a_body_is_given_up_while_its_client_waits():
    intake = Waiting("bytes")
    async with serving(intake) as source, at(source, ONE) as client:
        body = b"a body of its own " * 1000
        client.post(body, Prefer="wait=60")
        await until(lambda: intake.watch is not None)
        assert source._handler.ingestion.admission.bytes == 0
        del body
        gc.collect()
        assert not [
            one for one in gc.get_objects() if isinstance(one, tuple) and len(one) > 2
            and isinstance(one[2], bytes) and one[2].startswith(b"a body of its own a")
        ]  # fmt: skip


async def test_who_has_gone_waits_no_more():
    intake = Waiting()
    async with serving(intake) as source:
        async with at(source, ONE) as client:
            client.post(b"1", Prefer="wait=60")
            await until(lambda: intake.watch is not None)
        await until(lambda: source._handler.ingestion.admission.requests == 0)
        assert intake.watch is None


async def test_a_client_that_fills_a_bound_leaves_room_for_the_first_request_of_others():
    intake = MemoryIntake()
    intake.gate.clear()
    async with (
        serving(intake, requests_max=16, inflight_bytes_max=8 * MIB) as source,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = [await stack.enter_async_context(at(source, ONE)) for _ in range(16)]
        with source._handler.ingestion.admission.enter(ONE) as hold:
            hold.grow(8 * MIB - 100_000)
            for client in clients[:15]:
                client.post(b'"%b"' % (b"x" * 5000))
            await until(lambda: source._handler.ingestion.admission.requests == 16)
            clients[15].post(b"1")
            assert (await clients[15].reply()).slug == "busy"
            other = await stack.enter_async_context(at(source, OTHER))
            other.post(b'"%b"' % (b"x" * 60_000))
            await until(lambda: source._handler.ingestion.admission.requests == 17)
            intake.gate.set()
            assert (await other.reply()).status == 202


async def test_a_large_head_counts_as_long_as_it_is_there():
    intake = MemoryIntake()
    intake.gate.clear()
    async with serving(intake) as source, at(source, ONE) as client:
        room = source._handler.ingestion.admission
        lines = b"".join(b"h%d: v\r\n" % n for n in range(100))
        client.send(LINE + HOST + lines + b"Content-Length: 1\r\n\r\n1")
        await intake.asked.wait()
        assert room.bytes > HEAD_BYTES_FREE + 30_000
        intake.gate.set()
        assert (await client.reply()).status == 202
        assert room.bytes == 0


async def test_heads_behind_an_answer_count_as_what_they_take(monkeypatch):
    """One client's connections are cut at its share; another one's are not."""
    monkeypatch.setattr("ingestd.http.server.CLIENT_HELD_MAX", 400_000)
    intake = MemoryIntake()
    intake.gate.clear()
    lines = b"".join(b"h%d: v\r\n" % n for n in range(100))
    request = LINE + HOST + lines + b"Content-Length: 1\r\n\r\n1"
    async with serving(intake) as source, contextlib.AsyncExitStack() as stack:
        mine = [await stack.enter_async_context(at(source, ONE)) for _ in range(6)]
        other = await stack.enter_async_context(at(source, OTHER))
        other.send(request * 2)
        for client in mine:
            client.send(request * 8)
        await until(lambda: 1 < source._server.open < 7)
        await until(lambda: source._server._held_by[OTHER])
        assert source._server._held_by[ONE] <= 400_000
        intake.gate.set()
        assert [(await other.reply()).status for _ in range(2)] == [202, 202]


async def test_an_error_of_any_length_is_told_in_short():
    watch = DeliveryWaiter(2)
    watch.died(0, 1, "rejected", "x" * 10**6)
    assert len(watch.failed[0].error) == 500


async def test_a_wait_of_thousands_of_digits_is_a_long_wait():
    intake = Waiting()
    async with serving(intake, wait_max="10ms") as source:
        reply = await ask(source, b"1", Prefer="wait=" + "9" * 5000)
    assert reply.status == 202


async def test_who_was_cut_waits_with_new_connections_and_others_do_not(monkeypatch):
    monkeypatch.setattr("ingestd.http.server.CLIENT_HELD_MAX", 100_000)
    monkeypatch.setattr("ingestd.http.server.CUT_SECONDS", 4.0)  # longer than the other one needs
    intake = MemoryIntake()
    intake.gate.clear()
    lines = b"".join(b"h%d: v\r\n" % n for n in range(90))
    request = LINE + HOST + lines + b"Content-Length: 1\r\n\r\n1"
    async with serving(intake) as source, contextlib.AsyncExitStack() as stack:
        cut = await stack.enter_async_context(at(source, ONE))
        cut.send(request * 8)
        await until(lambda: source._server.rest_of(ONE) > 0)
        assert not source._server.rest_of(OTHER)
        intake.gate.set()
        again = await stack.enter_async_context(at(source, ONE))
        again.post(b"1")
        late = asyncio.create_task(again.reply())
        other = await stack.enter_async_context(at(source, OTHER))
        other.post(b"1")
        assert (await other.reply()).status == 202
        assert not late.done()
        assert (await late).status == 202


def test_large_requests_that_come_in_one_turn_are_answered(tmp_path):
    """96 connections of one client, each with a body that is read in one piece."""
    body = b"".join(b'{"n":%d,"text":"%s"}\n' % (n, b"x" * 80) for n in range(1200))
    request = LINE + HOST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with daemon(cwd=tmp_path) as one, contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(("127.0.0.1", one.port)))
            for _ in range(96)
        ]
        for connection in connections:
            connection.settimeout(60)
            connection.sendall(LINE + HOST + b"Content-Length: 8\r\n\r\n" + b'{"a":1}\n')
            assert connection.recv(4096).startswith(b"HTTP/1.1 202 ")
        for _ in range(3):
            os.kill(one.pid, signal.SIGSTOP)
            for connection in connections:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(request))
                connection.sendall(request)
            os.kill(one.pid, signal.SIGCONT)
            for connection in connections:
                assert connection.recv(4096).startswith(b"HTTP/1.1 202 ")
        one.terminate()
        assert one.wait() == 0
