"""Slow clients, idle ones, and too many connections of one client: real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket

import pytest

from ingestd.http.deadlines import GRACE_SECONDS, MinimumRate
from ingestd.http.peer import ClientConnections, client_of
from tests.attacks.smuggling import CHUNKED, HOST, LINE
from tests.sources.source_tools import Client, MemoryIntake, ask, connected, serving, until

IDLE = 500


@pytest.fixture
def intake():
    return MemoryIntake()


@contextlib.asynccontextmanager
async def connected_from(source, address: str):
    port = int(source.addresses[0].rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def begun(source, data: bytes):
    """A client whose first bytes are there before the server accepts it: they are never late."""
    host, _, port = source.addresses[0].rpartition(":")
    sock = socket.create_connection((host, int(port)))
    sock.sendall(data)
    sock.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


WHOLE = LINE + HOST + b"Content-Length: 1\r\n\r\n1"


# -- the head --------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1])
async def test_a_slow_head(intake, before):
    """A head that comes a byte at a time is ended with 408, also behind a request."""
    first = WHOLE if before else LINE[:1]
    async with (
        serving(intake, header_timeout=0.3, keepalive_timeout=60) as source,
        begun(source, first) as client,
    ):
        for _ in range(before):
            assert (await client.reply()).status == 202

        async def trickle():
            for byte in LINE[0 if before else 1 :] + b"X: " + b"y" * 1000:
                client.send(bytes([byte]))
                await asyncio.sleep(0.01)

        sending = asyncio.create_task(trickle())
        reply = await client.reply()
        assert (reply.status, reply.slug) == (408, "header-timeout")
        assert reply.headers["connection"] == "close"
        assert await client.closed()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    assert len(intake.items) == before


async def test_a_connection_that_says_nothing(intake):
    """Closed without a word: an answer could be taken for that to its first request."""
    async with serving(intake, header_timeout=0.1, keepalive_timeout=60) as source:
        async with connected(source) as client:
            assert await client.closed()
        async with begun(source, WHOLE) as client:
            assert (await client.reply()).status == 202
            await asyncio.sleep(0.3)
            client.post(b"2")  # idle between requests is another matter
            assert (await client.reply()).status == 202


async def test_a_head_that_comes_just_in_time(intake):
    """The idle timeout does not end a head that has begun."""

    def has_begun(source):
        return any(one._head_timer for one in source._server.connections)

    async with serving(intake, header_timeout=60, keepalive_timeout=0.2) as source:
        for _ in range(100):
            async with begun(source, WHOLE) as client:
                assert (await client.reply()).status == 202
                client.send(LINE)
                await until(lambda: has_begun(source) or not source._server.open)
                if not source._server.open:
                    continue  # this process was late, and the connection idle for too long
                await asyncio.sleep(0.4)
                client.send(HOST + b"Content-Length: 1\r\n\r\n2")
                assert (await client.reply()).status == 202
                break
        else:
            raise AssertionError("no head has begun in time")


async def test_a_client_that_leaves_as_its_time_is_up(intake, caplog):
    """The loss of the connection and the end of its time in one turn of the loop."""
    async with serving(intake) as source:
        async with connected(source) as client:
            client.send(LINE)
            await until(lambda: source._server.open)
            await until(lambda: source._server.connections[0]._head_bytes)
            source._server.connections[0].transport.abort()
            source._server.connections[0]._end_head()
            await until(lambda: not source._server.open)
        await asyncio.sleep(0)
        gc.collect()
    assert not caplog.records


async def test_an_answer_before_the_408(intake):
    """A request that is in progress when the next head is late is answered first."""
    intake.gate.clear()
    async with serving(intake, header_timeout=0.1) as source, begun(source, WHOLE) as client:
        await intake.asked.wait()
        client.send(LINE)
        await until(lambda: next(iter(source._server.connections)).last)
        intake.gate.set()
        assert (await client.reply()).status == 202
        assert (await client.reply()).slug == "header-timeout"
        assert await client.closed()


# -- the body --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_trickles(intake, monkeypatch, chunked):
    """Slower than `http.body_rate_min`: 408, long before `http.body_timeout`."""
    monkeypatch.setattr("ingestd.http.deadlines.GRACE_SECONDS", 0.2)
    async with (
        serving(intake, body_rate_min=10_000, body_timeout=60) as source,
        connected(source) as client,
    ):
        more = CHUNKED if chunked else b"Content-Length: 1000000\r\n"
        # A document: chunked lines would be a stream, which may be as slow as it likes.
        client.send(LINE + HOST + more + b"Content-Type: application/json\r\n\r\n")

        async def trickle():
            for _ in range(10_000):
                client.send(b"2\r\n1\n\r\n" if chunked else b"1\n")
                await asyncio.sleep(0.01)

        sending = asyncio.create_task(trickle())
        reply = await client.reply()
        assert (reply.status, reply.slug) == (408, "body-timeout")
        assert "http.body_rate_min" in reply.json["detail"]
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        assert source._handler.ingestion.admission.bytes == 0
    assert not intake.asked.is_set()


async def test_a_body_that_is_fast_enough(intake, monkeypatch):
    monkeypatch.setattr("ingestd.http.deadlines.GRACE_SECONDS", 0.2)
    # This process may be late, which is not to be taken for a slow client.
    monkeypatch.setattr("ingestd.http.deadlines.LATE_SECONDS", 0.02)
    async with serving(intake, body_rate_min=100) as source, connected(source) as client:
        client.post(b"", Content_Length="2000")
        for _ in range(100):
            client.send(b"1\n" * 10)
            await asyncio.sleep(0.005)
        assert (await client.reply()).json["accepted"] == 1000


def test_pace():
    pace = MinimumRate(100, 1000.0)
    assert pace.due == 1000.0 + GRACE_SECONDS
    assert not pace.is_slow(100 * GRACE_SECONDS, pace.due)
    assert pace.is_slow(100 * GRACE_SECONDS + 100 * GRACE_SECONDS - 1, pace.due)


def test_pace_looks_at_each_window_by_itself():
    pace = MinimumRate(100, 0.0)
    assert not pace.is_slow(10**9, pace.due)
    assert pace.is_slow(10**9, pace.due)


def test_pace_does_not_blame_a_client_for_our_delay():
    pace = MinimumRate(100, 0.0)
    assert not pace.is_slow(0, pace.due + 60)
    assert pace.due == 60 + 2 * GRACE_SECONDS
    assert pace.is_slow(0, pace.due)


def test_pace_can_be_switched_off():
    assert MinimumRate(0, 0.0).due == float("inf")


async def test_a_body_that_was_announced_takes_little(intake):
    """Saying that one has much to send takes nothing from others."""
    async with serving(intake, inflight_bytes_max=20_000_000) as source:
        async with contextlib.AsyncExitStack() as stack:
            for n in range(1, 10):
                client = await stack.enter_async_context(connected_from(source, f"127.0.1.{n}"))
                client.post(b"1", Content_Length="16000000")
            await until(lambda: source._handler._active == 9)
            assert source._handler.ingestion.admission.bytes < 1_000_000
            assert (await ask(source, b"1")).status == 202
        await until(lambda: not source._handler._active)
        assert source._handler.ingestion.admission.bytes == 0


# -- connections -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["idle", "asked"])
async def test_a_connection_ends_whose_last_answers_nobody_reads(intake, ends):
    """Too few to hold back the next request, and more than the kernel takes."""
    more = {"idle": b"", "asked": b"Connection: close\r\n"}[ends]
    request = LINE + HOST + b"Content-Length: 1\r\n%b\r\n1"
    async with serving(intake, keepalive_timeout=60, body_timeout=0.3) as source:
        address = "127.0.0.1", int(source.addresses[0].rpartition(":")[2])
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(address)
            await until(lambda: source._server.open)
            (connection,) = source._server.connections
            transport = connection.transport
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            for number in range(1, 1000):
                client.sendall(request % b"")
                await until(lambda number=number: len(intake.items) == number)
                await asyncio.sleep(0)
                if transport.get_write_buffer_size() > 1000:
                    break
            if more:
                client.sendall(request % more)
            else:  # idle from now on, and before for as long as the requests took
                source._server.keepalive_timeout = 0.3
                connection._idle_timer.cancel()
                connection._idle_timer = None
                connection._become_idle()
            await until(transport.is_closing)
            assert transport.get_write_buffer_size()
            await until(lambda: source._server.open == 0)


async def test_connections_of_one_client_are_bounded(intake):
    """429 beyond the bound; others are not concerned, and what is closed makes room."""
    async with serving(intake, connections_per_client_max=2) as source:
        async with connected_from(source, "127.0.1.1") as first:
            first.post(b"1")
            assert (await first.reply()).status == 202
            async with connected_from(source, "127.0.1.1") as second:
                second.post(b"2")
                assert (await second.reply()).status == 202
                async with connected_from(source, "127.0.1.1") as third:
                    third.post(b"3" * 100_000)
                    reply = await third.reply()
                    assert (reply.status, reply.slug) == (429, "client-connections")
                    assert reply.headers["connection"] == "close"
                    assert "retry-after" in reply.headers
                    assert await third.closed()
                async with connected_from(source, "127.0.1.2") as other:
                    other.post(b"4")
                    assert (await other.reply()).status == 202
                await until(lambda: source._server.open == 2)
            await until(lambda: source._server.open == 1)
            async with connected_from(source, "127.0.1.1") as again:
                again.post(b"5")
                assert (await again.reply()).status == 202
        await until(lambda: source._server.open == 0)
        assert not source._server._clients._open
    assert intake.items == [b"1", b"2", b"4", b"5"]


async def test_many_idle_connections(intake):
    """They end by themselves, and nobody else notices them."""
    async with serving(intake, header_timeout=60, connections_per_client_max=100) as source:
        port = int(source.addresses[0].rpartition(":")[2])
        idle = []
        for n in range(IDLE):
            sock = socket.socket()
            sock.bind((f"127.0.2.{1 + n % 10}", 0))
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(("127.0.0.1", port))
            idle.append(sock)
        await until(lambda: source._server.open >= IDLE)
        source._server.header_timeout = 0.5  # from now on: all of them are open at once
        for connection in source._server.connections:
            connection._stop_head_timer()
            connection._start_head_timer()
        source._server.header_timeout = 60
        assert (await ask(source, b"1")).status == 202
        await until(lambda: source._server.open == 0)
        for sock in idle:
            assert sock.recv(1) == b""
            sock.close()


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("a socket", "a socket"),
    ],
)
def test_who_is_a_client(address, client):
    assert client_of(address) == client


def test_clients_are_counted():
    clients = ClientConnections(2)
    assert [clients.enter("a") for _ in range(3)] == [True, True, False]
    assert clients.enter("b")
    clients.leave("a")
    assert clients.enter("a")
    for one in "aab":
        clients.leave(one)
    assert clients._open == {}
    assert all(ClientConnections(0).enter("a") for _ in range(10))
