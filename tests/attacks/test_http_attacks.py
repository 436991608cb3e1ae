"""What is not HTTP/1.1, or may be read in two ways: refused, and nothing behind it is taken."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import pytest
import structlog

from tests.attacks.smuggling import HOST, LINE, REFUSED, REFUSED_OTHERWISE, SMUGGLED, TAKEN_ALONE
from tests.sources.source_tools import MemoryIntake, connected, serving, until

SPLITS = ["whole", "split", "bytes"]


@pytest.fixture
def intake():
    return MemoryIntake()


@pytest.fixture(autouse=True)
def nothing_is_logged_as_an_error(caplog):
    with structlog.testing.capture_logs() as logs:
        yield
    assert not [
        record for record in caplog.get_records("call") if record.levelno >= logging.WARNING
    ]
    assert not [line for line in logs if line["log_level"] in {"warning", "error", "critical"}]


async def send(client, data: bytes, split: str = "whole") -> None:
    """All at once, with the smuggled request in a segment of its own, or byte by byte."""
    pieces = {
        "whole": [data + SMUGGLED],
        "split": [data, SMUGGLED],
        "bytes": [bytes([byte]) for byte in data[:600]] + [data[600:], SMUGGLED],
    }[split]
    for piece in pieces:
        client.send(piece)
        try:
            await client.writer.drain()
        except ConnectionError:
            return  # it has closed already
        if split != "whole":
            await asyncio.sleep(0)


async def answers(client) -> list[int]:
    """The statuses of everything that comes until the server closes."""
    statuses = []
    try:
        while True:
            statuses.append((await client.reply()).status)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # a reset: it closed while something unread was on its way
    return statuses


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", REFUSED)
async def test_smuggling(intake, name, split):
    """A head or a body that could be read in two ways: 400, closed, nothing behind it is taken."""
    async with serving(intake) as source, connected(source) as client:
        await send(client, REFUSED[name], split)
        got = await answers(client)
        assert got == [400] or (split != "whole" and not got)
        await until(lambda: source._server.open == 0)
        assert intake.items == []


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", REFUSED_OTHERWISE)
async def test_heads_that_are_not_wanted(intake, name, split):
    """The same for what has an answer of its own."""
    status, data = REFUSED_OTHERWISE[name]
    async with serving(intake) as source, connected(source) as client:
        await send(client, data, split)
        got = await answers(client)
        # A body that turns out to be wrong while it is read is 400 whatever is wrong.
        assert got == [status] or (
            split != "whole" and (not got or ("trailer" in name and got == [400]))
        )
        await until(lambda: source._server.open == 0)
        assert intake.items == []


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TAKEN_ALONE)
async def test_what_ends_a_connection(intake, name, split):
    """Trailers and upgrades: taken, but nothing that follows on the same connection is."""
    async with serving(intake) as source, connected(source) as client:
        await send(client, TAKEN_ALONE[name], split)
        got = await answers(client)
        assert got == [202] or (split != "whole" and not got)
        await until(lambda: source._server.open == 0)
        assert intake.items == [b"1"]


async def test_a_chunked_body_leaves_its_connection_open(intake):
    """The usual end of a chunked body is followed by the next request, however it is cut."""
    one = LINE + HOST + b"Transfer-Encoding: chunked\r\n\r\n3;a=b\r\n1\n2\r\n0\r\n\r\n"
    async with serving(intake) as source, connected(source) as client:
        for cut in range(1, len(one)):
            client.send(one[:cut])
            await client.writer.drain()
            await asyncio.sleep(0)
            client.send(one[cut:])
            assert (await client.reply()).status == 202
    assert intake.items == [b"1", b"2"] * (len(one) - 1)


async def test_a_head_in_many_small_lines_is_bounded(intake):
    """A head that never ends, in lines that are short enough: 431."""
    async with serving(intake) as source, connected(source) as client:
        client.send(LINE)
        for n in range(100):
            client.send(b"X%d: %b\r\n" % (n, b"x" * 1000))
            try:
                await client.writer.drain()
            except ConnectionError:
                break
            await asyncio.sleep(0)
        assert await answers(client) in ([431], [])
        assert intake.items == []


@pytest.mark.parametrize("endless", [b"X: y\r\n", b"\r\n", b"x", b"\0", b"GET "])
async def test_an_endless_head_is_cut(intake, endless):
    """Whatever it is made of."""
    async with serving(intake) as source, connected(source) as client:
        for _ in range(2000):
            client.send(endless * 1000)
            try:
                await client.writer.drain()
            except ConnectionError:
                break
        await until(lambda: source._server.open == 0)


@pytest.mark.parametrize(
    "endless", [b"1;" + b"x" * 1000, b"0" * 1000, b"1\r\n1\r\n0\r\nX: " + b"x" * 1000]
)
async def test_an_endless_chunk_line_is_cut(intake, endless):
    """An extension, a size or a trailer that never ends is a body that does not come."""
    async with (
        serving(intake, body_timeout=0.3) as source,
        connected(source) as client,
    ):
        client.send(LINE + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + endless)

        async def go_on():
            while source._server.open:
                client.send(endless[-1:] * 1000)
                await client.writer.drain()
                await asyncio.sleep(0.001)

        going = asyncio.create_task(go_on())
        got = await answers(client)
        assert got in ([408], [400], [])
        going.cancel()
        await asyncio.gather(going, return_exceptions=True)
        await until(lambda: source._server.open == 0)
    assert intake.items == []


async def test_a_trailer_that_never_ends_behind_a_large_body_is_cut(intake):
    """The size of a body allows its chunks more framing, and a trailer no more than that of any."""
    async with serving(intake) as source, connected(source) as client:
        client.send(LINE + HOST + b"Transfer-Encoding: chunked\r\n\r\n")
        client.send(b"400000\r\n" + b"1\n" * 0x200000 + b"\r\n0\r\nX: ")
        for _ in range(32):
            client.send(b"x" * 32_768)
            with contextlib.suppress(ConnectionError):
                await client.writer.drain()
        # The answer goes out at once, or the client is reset while it sends.
        assert await asyncio.wait_for(answers(client), 20) in ([400], [])
        await until(lambda: source._server.open == 0)


async def test_chunks_of_one_byte(intake):
    """Some thousand are taken; many thousand are refused before they are all parsed."""
    few, many = (b"1\r\n1\r\n1\r\n\n\r\n" * (number // 2) for number in (8000, 200_000))
    async with serving(intake) as source:
        async with connected(source) as client:
            client.send(LINE + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + few + b"0\r\n\r\n")
            assert (await client.reply()).json["accepted"] == 4000
        async with connected(source) as client:
            client.send(LINE + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + many)
            assert await answers(client) in ([400], [])
        await until(lambda: source._server.open == 0)
        assert source._handler.ingestion.admission.bytes == 0
    assert len(intake.items) == 4000


@pytest.mark.parametrize("bound", ["FRAMING_BYTES_FREE", "CHUNK_BYTES_MIN"])
async def test_each_bound_of_chunks_holds_alone(intake, monkeypatch, bound):
    """On what the framing takes, and on chunks that are parsed but not read yet."""
    off = {"FRAMING_BYTES_FREE": 10**9, "CHUNK_BYTES_MIN": 0}[bound]
    monkeypatch.setattr(f"ingestd.http.protocol.{bound}", off)
    async with serving(intake) as source, connected(source) as client:
        client.send(LINE + HOST + b"Transfer-Encoding: chunked\r\n\r\n")
        client.send(b"1\r\n1\r\n1\r\n\n\r\n" * 200_000 + b"0\r\n\r\n")
        assert await answers(client) in ([400], [])
        await until(lambda: source._server.open == 0)
    assert intake.items == []


async def test_a_body_that_breaks_while_it_is_read(intake):
    """400, and nothing in the log; what was good in it is not taken."""
    for broken in (b"zz\r\n", b"1\r\nxy\r\n", b"0\r\nX\r\n\r\n"):
        async with serving(intake) as source, connected(source) as client:
            client.send(LINE + HOST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n1\n\r\n")
            await until(lambda: source._handler._active)
            client.send(broken)
            reply = await client.reply()
            assert (reply.status, reply.slug) == (400, "bad-request")
            assert await client.closed()
    assert intake.items == []


async def test_pipelining_without_reading_holds_little(intake):
    """Requests behind one that waits are bounded, one by one and all together."""
    intake.gate.clear()
    async with serving(intake, requests_max=4) as source, connected(source) as client:
        client.send((LINE + HOST + b"Content-Length: 1\r\n\r\n1") * 20_000)
        await intake.asked.wait()
        connection = next(iter(source._server.connections))
        await until(lambda: connection.held)
        assert len(connection._messages) <= 4
        assert connection.held <= 1024 * 1024
        intake.gate.set()
        for _ in range(1000):
            assert (await client.reply()).status == 202
    assert source._server._held == 0


async def test_what_waits_is_bounded_for_all_together(intake, monkeypatch):
    """Many connections, each with a part of a head: beyond the bound they are ended."""
    monkeypatch.setattr("ingestd.http.server.HELD_BYTES_MAX", 100_000)
    async with serving(intake) as source:
        clients = [await asyncio.open_connection("127.0.0.1", port(source)) for _ in range(20)]
        for _, writer in clients:
            writer.write(LINE + b"X: %b\r\n" % (b"x" * 8000) + b"Y: %b\r\n" % (b"y" * 8000))
            await writer.drain()
        await until(lambda: 0 < source._server.open < 20)
        assert source._server._held <= 100_000
        for _, writer in clients:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)
        await until(lambda: source._server.open == 0)
        assert source._server._held == 0


def port(source) -> int:
    return int(source.addresses[0].rpartition(":")[2])
